"""group_read and group_write: the equation, its exact probes, gradients, bad input."""

import pytest
import torch

from snapkernels import CrossAttentionWeights, group_read, group_write
from snapkernels.ops.group_attn.weights import DIMS
from snapkernels.testing.inputs import random_weights
from snapkernels.testing.numerics import relative_rms

BACKENDS = ["reference", "eager"]
HEADS = 3
SIZES = {"D": 20, "C": 14, "I": 12}
BATCH, GROUPS, LATENTS, PATCHES = 2, 3, 5, 7


def inputs(rng, dtype=torch.float64):
    latents = torch.randn(BATCH, GROUPS, LATENTS, SIZES["D"], generator=rng)
    patches = torch.randn(BATCH, GROUPS, PATCHES, SIZES["C"], generator=rng)
    weights = random_weights(CrossAttentionWeights, DIMS, SIZES, generator=rng)
    return latents.to(dtype), patches.to(dtype), cast(weights, dtype)


def cast(weights, dtype):
    return CrossAttentionWeights(*(w.to(dtype) for w in weights))


def by_hand(latents, patches, w, mask=None):
    """torch.nn.MultiheadAttention's own arithmetic, one group at a time."""
    q_in = torch.nn.functional.layer_norm(
        latents, latents.shape[-1:], w.q_norm_weight, w.q_norm_bias, 1e-6
    )
    kv_in = torch.nn.functional.layer_norm(
        patches, patches.shape[-1:], w.kv_norm_weight, w.kv_norm_bias, 1e-6
    )
    attention = torch.nn.MultiheadAttention(SIZES["I"], HEADS, batch_first=True).double()
    eye, zero = torch.eye(SIZES["I"]).double(), torch.zeros(3 * SIZES["I"]).double()
    with torch.no_grad():
        attention.in_proj_weight.copy_(eye.repeat(3, 1))
        attention.in_proj_bias.copy_(zero)
        attention.out_proj.weight.copy_(eye)
        attention.out_proj.bias.zero_()
    out = latents.clone()
    for g in range(latents.shape[1]):
        context, _ = attention(
            q_in[:, g] @ w.q_weight.T + w.q_bias,
            kv_in[:, g] @ w.k_weight.T + w.k_bias,
            kv_in[:, g] @ w.v_weight.T + w.v_bias,
            key_padding_mask=None if mask is None else ~mask[:, g],
        )
        out[:, g] += context @ w.o_weight.T + w.o_bias
    return out


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("masked", [False, True])
def test_read_is_multihead_attention_inside_each_group(backend, masked, rng):
    latents, patches, weights = inputs(rng)
    mask = torch.rand(BATCH, GROUPS, PATCHES, generator=rng) < 0.6 if masked else None
    if masked:
        mask[..., 2] = True
    out = group_read(latents, patches, weights, num_heads=HEADS, mask=mask, backend=backend)
    expected = by_hand(latents, patches, weights, mask).detach()
    assert relative_rms(out - latents, expected - latents) < 1e-13


@pytest.mark.parametrize("backend", BACKENDS)
def test_write_is_the_same_equation_with_the_roles_changed(backend, rng):
    tokens, others, weights = inputs(rng)
    written = group_write(tokens, others, weights, num_heads=HEADS, backend=backend)
    read = group_read(tokens, others, weights, num_heads=HEADS, backend="reference")
    assert relative_rms(written - tokens, read - tokens) < 1e-13


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", [group_read, group_write])
def test_eps_is_that_of_both_layer_norms(op, backend, rng):
    """With eps = 3, inputs scaled to variance 1 are divided by 2."""
    tokens, others, weights = inputs(rng)
    tokens, others = (t - t.mean(-1, keepdim=True) for t in (tokens, others))
    tokens, others = (t / t.square().mean(-1, keepdim=True).sqrt() for t in (tokens, others))
    out = op(tokens, others, weights, num_heads=HEADS, eps=3.0, backend=backend)
    halved = weights._replace(
        q_norm_weight=weights.q_norm_weight / 2, kv_norm_weight=weights.kv_norm_weight / 2
    )
    expected = op(tokens, others, halved, num_heads=HEADS, eps=0.0, backend="reference")
    assert relative_rms(out - tokens, expected - tokens) < 1e-12


@pytest.mark.parametrize("backend", BACKENDS)
def test_groups_are_isolated(backend, rng):
    latents, patches, weights = inputs(rng)
    out = group_read(latents, patches, weights, num_heads=HEADS, backend=backend)
    moved = patches.clone()
    moved[:, 1] += torch.randn(moved[:, 1].shape, generator=rng)
    changed = group_read(latents, moved, weights, num_heads=HEADS, backend=backend) != out
    assert changed[:, 1].any() and not changed[:, [0, 2]].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_zero_queries_average_the_values(backend, rng):
    latents, patches, weights = inputs(rng)
    weights = weights._replace(
        q_weight=torch.zeros_like(weights.q_weight), q_bias=torch.zeros_like(weights.q_bias)
    )
    out = group_read(latents, patches, weights, num_heads=HEADS, backend=backend)
    kv = torch.nn.functional.layer_norm(
        patches, patches.shape[-1:], weights.kv_norm_weight, weights.kv_norm_bias, 1e-6
    )
    values = (kv @ weights.v_weight.T + weights.v_bias).mean(2, keepdim=True)
    expected = (values @ weights.o_weight.T + weights.o_bias).expand_as(latents)
    assert relative_rms(out - latents, expected) < 1e-13


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_masked_patch_is_as_good_as_absent(backend, rng):
    latents, patches, weights = inputs(rng)
    mask = torch.ones(BATCH, GROUPS, PATCHES, dtype=torch.bool)
    mask[..., -2:] = False
    masked = group_read(latents, patches, weights, num_heads=HEADS, mask=mask, backend=backend)
    absent = group_read(latents, patches[:, :, :-2], weights, num_heads=HEADS, backend=backend)
    assert relative_rms(masked - latents, absent - latents) < 1e-13


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_to_read_gives_zero_attention_and_finite_gradients(backend, rng):
    latents, patches, weights = inputs(rng)
    latents.requires_grad_()
    patches.requires_grad_()
    mask = torch.ones(BATCH, GROUPS, PATCHES, dtype=torch.bool)
    mask[0, 1] = False
    out = group_read(latents, patches, weights, num_heads=HEADS, mask=mask, backend=backend)
    expected = (latents[0, 1] + weights.o_bias).detach()
    torch.testing.assert_close(out[0, 1].detach(), expected, rtol=1e-13, atol=1e-13)
    out.square().sum().backward()
    assert latents.grad.isfinite().all() and patches.grad.isfinite().all()
    assert not patches.grad[0, 1].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients(backend, rng):
    latents, patches, weights = inputs(rng)
    leaves = [t[:1, :2].clone() for t in (latents, patches)] + list(weights)

    def read(latents, patches, *weights):
        weights = CrossAttentionWeights(*weights)
        return group_read(latents, patches, weights, num_heads=HEADS, backend=backend)

    assert torch.autograd.gradcheck(read, [leaf.requires_grad_() for leaf in leaves])


def test_low_precision_stays_near_the_float64_equation(rng):
    latents, patches, weights = inputs(rng, torch.bfloat16)
    exact = group_read(
        latents.double(),
        patches.double(),
        cast(weights, torch.float64),
        num_heads=HEADS,
        backend="reference",
    )
    out = group_read(latents, patches, weights, num_heads=HEADS)
    assert out.dtype == torch.bfloat16
    assert relative_rms(out, exact) < torch.finfo(torch.bfloat16).eps


def test_permuted_inputs_and_empty_batch(rng):
    latents, patches, weights = inputs(rng)
    out = group_read(latents, patches, weights, num_heads=HEADS)
    strided = patches.transpose(1, 3).contiguous().transpose(1, 3)
    assert torch.equal(group_read(latents, strided, weights, num_heads=HEADS), out)
    empty = group_read(latents[:0], patches[:0], weights, num_heads=HEADS)
    assert empty.shape == (0, GROUPS, LATENTS, SIZES["D"])


def test_compiles_without_graph_breaks(rng):
    latents, patches, weights = inputs(rng)
    compiled = torch.compile(group_read, fullgraph=True, backend="aot_eager")
    out = compiled(latents, patches, weights, num_heads=HEADS)
    torch.testing.assert_close(out, group_read(latents, patches, weights, num_heads=HEADS))


MASK = torch.ones(BATCH, GROUPS, PATCHES)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"latents": torch.zeros(2, 5, 20)}, "latents must have 4 dimensions"),
        ({"latents": torch.zeros(2, 3, 5, 20, dtype=torch.long)}, "must be floating point"),
        ({"patches": torch.zeros(2, 4, 7, 14).double()}, "patches has G = 4 .*latents has G = 3"),
        ({"patches": torch.zeros(2, 3, 7, 14)}, "patches must be torch.float64 like latents"),
        ({"patches": torch.zeros(2, 3, 7, 14, device="meta").double()}, "patches is on meta, but"),
        ({"q_weight": torch.zeros(12, 14).double()}, "weights.q_weight has D = 14"),
        ({"o_bias": torch.zeros(1, 20).double()}, "weights.o_bias must have 1 dimensions"),
        ({"k_bias": torch.zeros(13).double()}, "weights.k_bias has I = 13"),
        ({"num_heads": 5}, "I = 12 is not divisible by num_heads = 5"),
        ({"num_heads": 0}, "num_heads must be a positive int"),
        ({"mask": MASK}, "mask must be torch.bool, got torch.float32"),
        ({"mask": MASK[..., :6].bool()}, "mask has N = 6 .*patches has N = 7"),
        ({"weights": (1, 2)}, "weights must have the fields q_norm_weight"),
        ({"backend": "flash"}, "backend='flash' is not one of"),
    ],
)
def test_read_names_what_is_wrong(change, message, rng):
    latents, patches, weights = inputs(rng)
    fields = {name: change.pop(name) for name in DIMS if name in change}
    arguments = {
        "latents": latents,
        "patches": patches,
        "weights": weights._replace(**fields),
        "num_heads": HEADS,
    } | change
    with pytest.raises(ValueError, match=f"^group_read: .*{message}"):
        group_read(
            arguments.pop("latents"),
            arguments.pop("patches"),
            arguments.pop("weights"),
            **arguments,
        )


def test_write_names_its_own_arguments(rng):
    tokens, others, weights = inputs(rng)
    with pytest.raises(ValueError, match=r"^group_write: latents has G = 2 .*patches has G = 3"):
        group_write(tokens, others[:, :2], weights, num_heads=HEADS)
