"""latent_attention_fp8: its weights, what frees k's bias, NaN, backends, bad input."""

import pytest
import torch
from torch.nn.functional import layer_norm, scaled_dot_product_attention

from snapkernels import (
    SelfAttentionWeights,
    extension,
    latent_attention,
    latent_attention_fp8,
    linear_fp8,
    quantise_latent_attention,
    quantise_rows,
)
from snapkernels.ops.latent_attn import config, reference
from snapkernels.ops.latent_attn.weights import DIMS
from snapkernels.registry import OPS
from snapkernels.testing.inputs import random_weights
from snapkernels.testing.numerics import relative_rms, same_bits, widened

EPS = 1e-6
HEADS = 3
NAN, INF = float("nan"), float("inf")


def weights_of(rng, dim=40, inner=48, dtype=torch.float32):
    sizes = {"D": dim, "I": inner}
    return random_weights(SelfAttentionWeights, DIMS, sizes, dtype=dtype, generator=rng)


def multiplied_out(numbers, scale):
    return numbers.double() * scale.double()[:, None]


def plain(w, quantised):
    """q, k and v's matrix of `w` as it is quantised, and by what each channel was multiplied."""
    numbers, scale = quantise_rows(torch.cat([w.q_weight, w.k_weight, w.v_weight]))
    assert same_bits(quantised.qkv_weight, numbers)
    return multiplied_out(numbers, scale), quantised.qkv_scale.double() / scale.double()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_weights_are_quantised_by_output_row_q_k_and_v_as_one(dtype, rng):
    w = weights_of(rng, dtype=dtype)
    quantised = quantise_latent_attention(w)
    _, factor = plain(w, quantised)
    numbers, scale = quantise_rows(w.o_weight.float() / factor[96:].float())
    torch.testing.assert_close(quantised.o_scale, scale)
    assert relative_rms(quantised.o_weight.float(), numbers.float()) < 1e-3  # u is 1 / (1 / u)
    assert quantised.qkv_bias.dtype == quantised.o_bias.dtype == dtype
    assert not any(one.requires_grad for one in quantised)
    shapes = [one.shape for one in quantised]
    on_meta = quantise_latent_attention(SelfAttentionWeights(*(one.to("meta") for one in w)))
    assert [one.shape for one in on_meta] == shapes


def constants_and_outliers(rng):
    """Weights whose biases are large, and whose channels differ by far."""
    w = weights_of(rng)
    many = {name: 3 * torch.randn(40, generator=rng) for name in ("norm_bias", "o_bias")}
    many |= {name: 3 * torch.randn(48, generator=rng) for name in ("q_bias", "k_bias", "v_bias")}
    factor = 10 ** torch.randn(2, 48, generator=rng)[..., None]
    many |= {"k_weight": w.k_weight * factor[0], "q_weight": w.q_weight / factor[0]}
    return w._replace(**many, v_weight=w.v_weight * factor[1], o_weight=w.o_weight / factor[1].T)


def test_what_is_moved_leaves_the_sublayer_as_it_was(rng):
    """Biases of k and v, and channels' factors: in float64 they change nothing."""
    w = constants_and_outliers(rng)
    latents = torch.randn(2, 50, 40, generator=rng).double()
    quantised = quantise_latent_attention(w)
    qkv_JD, factor = plain(w, quantised)
    o_DI = multiplied_out(quantised.o_weight, quantised.o_scale) * factor[96:]
    q_ID, k_ID, v_ID = qkv_JD.chunk(3)
    exact, wide = widened((w, quantised))
    exact = exact._replace(q_weight=q_ID, k_weight=k_ID, v_weight=v_ID, o_weight=o_DI)
    expected = reference.latent_attention(latents, exact, HEADS, EPS)
    # What is the same in every value goes past the rounding of o's matrix.
    expected += (w.o_weight - o_DI) @ (v_ID @ exact.norm_bias + exact.v_bias)
    found = reference.latent_attention_fp8(latents, wide, HEADS, EPS)
    assert relative_rms(found - latents, expected - latents) < 1e-5  # biases are float32


def test_keys_and_values_vary_around_zero_and_channels_alike(rng):
    w = constants_and_outliers(rng)
    latents = torch.randn(2, 2000, 40, generator=rng).double()
    quantised = quantise_latent_attention(w)
    u = layer_norm(latents, (40,), w.norm_weight.double(), w.norm_bias.double(), EPS)
    scaled = multiplied_out(quantised.qkv_weight, quantised.qkv_scale)
    q, k, v = (u @ scaled.T + quantised.qkv_bias.double()).flatten(0, 1).chunk(3, 1)
    for one in (k, v):
        assert (one.mean(0).abs() < 0.15 * one.std(0)).all()
    torch.testing.assert_close(q.std(0), k.std(0), rtol=0.25, atol=0)
    torch.testing.assert_close(v.std(0), torch.ones(48).double(), rtol=0.25, atol=0)


def test_a_channel_that_does_not_vary_is_left_alone(rng):
    w = weights_of(rng)
    for name in ("q_weight", "k_weight", "v_weight"):
        getattr(w, name)[5] = 0
    w.k_weight[7] = 0
    quantised = quantise_latent_attention(w)
    assert all(one.float().isfinite().all() for one in quantised)
    _, factor = plain(w, quantised)
    zero = [5, 48 + 5, 96 + 5, 48 + 7]
    assert not quantised.qkv_scale[zero].any()
    assert factor[7] == 1


def test_eager_is_two_linears_around_sdpa(rng):
    latents, w = torch.randn(2, 9, 40, generator=rng), quantise_latent_attention(weights_of(rng))
    norm = {"norm_weight": w.norm_weight, "norm_bias": w.norm_bias}
    qkv = linear_fp8(latents, w.qkv_weight, w.qkv_scale, w.qkv_bias, **norm, backend="eager")
    heads = (one.unflatten(-1, (HEADS, -1)).transpose(1, 2) for one in qkv.chunk(3, -1))
    context = scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
    o = w.o_weight, w.o_scale, w.o_bias
    expected = linear_fp8(context, *o, residual=latents, backend="eager")
    found = latent_attention_fp8(latents, w, num_heads=HEADS, backend="eager")
    torch.testing.assert_close(found, expected)


def test_heads_of_one_are_left_to_eager(rng):
    """Triton refuses them."""
    sizes = {"D": 10, "I": 6}
    w = random_weights(SelfAttentionWeights, DIMS, sizes, generator=rng)
    call = torch.randn(2, 6, 10, generator=rng), quantise_latent_attention(w), 6, EPS
    latents, weights, heads, _ = widened(call)
    exact = reference.latent_attention_fp8(latents, weights, heads, EPS) - latents
    found = latent_attention_fp8(*call[:2], num_heads=6) - call[0]
    assert relative_rms(found, exact) < 6e-2
    assert "an odd number of channels, 1" in str(config.triton_refuses(*call))


def test_it_is_near_the_sublayer_that_it_was_made_of(rng):
    latents, w = torch.randn(2, 30, 40, generator=rng), weights_of(rng)
    found = latent_attention_fp8(latents, quantise_latent_attention(w), num_heads=HEADS)
    plain = latent_attention(latents, w, num_heads=HEADS)
    assert 0.01 < relative_rms(found - latents, plain - latents) < 0.08


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("bad", [NAN, INF])
def test_a_latent_that_is_not_finite_spoils_its_video_alone(backend, bad, rng):
    """Not by eager: PyTorch's SDPA on a CPU loses some of it."""
    latents = torch.randn(3, 9, 40, generator=rng)
    w = quantise_latent_attention(weights_of(rng))
    clean = latent_attention_fp8(latents, w, num_heads=HEADS, backend=backend)
    latents[1, 4, 7] = bad
    found = latent_attention_fp8(latents, w, num_heads=HEADS, backend=backend)
    assert not found[1].isfinite().any()
    assert same_bits(found[::2], clean[::2])


def test_it_has_no_gradient_and_says_so(rng):
    w = quantise_latent_attention(weights_of(rng))
    latents = torch.randn(1, 3, 40, generator=rng, requires_grad=True)
    with pytest.raises(ValueError, match=r"^latent_attention_fp8: latents has no gradient here"):
        latent_attention_fp8(latents, w, num_heads=HEADS)
    with torch.no_grad():
        assert not latent_attention_fp8(latents, w, num_heads=HEADS).requires_grad


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"latents": torch.zeros(7, 40)}, "latents must have 3 dimensions"),
        ({"latents": torch.zeros(2, 7, 41)}, "weights.norm_weight has D = 40"),
        ({"latents": torch.zeros(2, 7, 40).bfloat16()}, "norm_weight must be torch.bfloat16"),
        ({"num_heads": 7}, "I = 48 is not divisible by num_heads = 7"),
        ({"qkv_weight": torch.zeros(144, 40)}, "qkv_weight must be torch.float8_e4m3fn"),
        ({"o_scale": torch.zeros(40).double()}, "o_scale must be torch.float32"),
        ({"o_weight": torch.zeros(40, 64).to(torch.float8_e4m3fn)}, "J = 144, but J = 3 . I = 192"),
    ],
)
def test_it_names_what_is_wrong(change, message, rng):
    w = quantise_latent_attention(weights_of(rng))
    fields = {name: change.pop(name) for name in w._fields if name in change}
    given = {"latents": torch.zeros(2, 7, 40), "num_heads": HEADS} | change
    with pytest.raises(ValueError, match=f"^latent_attention_fp8: .*{message}"):
        latent_attention_fp8(weights=w._replace(**fields), **given)


def call_of(rng, dim, inner, heads, dtype=torch.bfloat16):
    w = quantise_latent_attention(weights_of(rng, dim, inner, dtype))
    return torch.zeros(1, 2, dim, dtype=dtype), w, heads, EPS


def test_cuda_takes_what_its_products_take(rng, monkeypatch):
    assert "CUDA tensor" in config.cuda_refuses(*call_of(rng, 256, 256, 2))
    monkeypatch.setattr(extension, "refuses", lambda tensor: None)
    assert config.cuda_refuses(*call_of(rng, 256, 512, 2)) is None
    refused = {
        "float32, not torch.bfloat16": call_of(rng, 256, 256, 2, torch.float32),
        "a token is 128 wide": call_of(rng, 128, 256, 2),
        "a matrix is (384, 256)": call_of(rng, 256, 128, 2),
        "the inner width is 4352, more than 4096": call_of(rng, 256, 4352, 34),
    }
    for reason, call in refused.items():
        assert reason in config.cuda_refuses(*call)
    latents, *rest = call_of(rng, 256, 256, 2)
    moved = latents.new_zeros(latents.numel() + 1)[1:].view(latents.shape)
    assert "does not start at a multiple of 16 bytes" in config.cuda_refuses(moved, *rest)


def test_cuda_has_integers_where_they_were_measured_to_be_faster():
    def chosen(videos, length, inner, heads):
        latents = torch.empty(videos, length, 64, device="meta")
        return config.cuda_has_integers(latents, inner, heads)

    assert chosen(16, 768, 3072, 24) and chosen(1, 768, 3072, 24)
    assert not chosen(64, 512, 1024, 16)  # heads of 64
    assert not chosen(16, 768, 1536, 48)  # of 32
    assert not chosen(16, 768, 384, 3)  # an inner width that tiles do not fit
    # Videos of 100 are padded to 128; of 40, too. One of 100 is 256 rows, as a product wants them.
    assert chosen(2, 100, 256, 2) and not chosen(2, 40, 256, 2) and not chosen(1, 100, 256, 2)
    assert config.cuda_padded(torch.empty(3, 129, 1)) == 768
    too_many = config.CUDA_MOST_COLUMNS // config.CUDA_TILE + 1
    assert not chosen(too_many, config.CUDA_TILE, 256, 2)


def test_the_order_is_cuda_triton_eager():
    spec = OPS["latent_attention_fp8"].spec
    assert [one.name for one in spec.backends] == ["cuda", "triton", "eager", "reference"]
