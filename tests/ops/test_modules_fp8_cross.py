"""The fp8 reads and writes: as near the truth as plain fp8, masks, views, and what is refused."""

import pytest
import torch
from torch.nn.functional import layer_norm, scaled_dot_product_attention

from snapkernels import (
    CrossAttentionWeights,
    Fp8GroupRead,
    Fp8GroupWrite,
    GroupRead,
    GroupWrite,
    group_read,
    group_write,
    linear_fp8,
    modules_fp8,
    quantise_rows,
)
from snapkernels.testing.numerics import relative_rms, widened

BF16 = torch.bfloat16
B, G, LATENTS, PATCHES, Z, X, HEADS = 2, 3, 8, 20, 64, 48, 3
FORMS = {"read": (GroupRead, Fp8GroupRead), "write": (GroupWrite, Fp8GroupWrite)}
MASKS = ("whole", "partly", "a group of nothing")
LIMIT = 6e-2  # of the branch: three roundings of 2.6 %, and what the softmax makes of two


def layer_and_tokens(way, rng, dtype=BF16):
    """A layer whose norms, biases and scores all matter, and what it is called with."""
    latents = torch.randn(B, G, LATENTS, Z, generator=rng).to(dtype)
    patches = torch.randn(B, G, PATCHES, X, generator=rng).to(dtype)
    tokens = (latents, patches) if way == "read" else (patches, latents)
    layer = FORMS[way][0](*(one.shape[-1] for one in tokens), X // HEADS).eval()
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            noise = torch.randn(parameter.shape, generator=rng)
            if "norm" in name:
                parameter.add_(0.5 * noise)
            else:
                parameter.copy_(noise / parameter.shape[-1] ** (0.5 if parameter.dim() > 1 else 0))
    return layer.to(dtype), tokens


def mask_of(kind, rng):
    if kind == "whole":
        return None
    mask = torch.rand(B, G, PATCHES, generator=rng) < 0.5
    if kind == "a group of nothing":
        mask[1, 0] = False
    return mask


def called(way, tokens, weights, mask=None, **options):
    if way == "read":
        return group_read(*tokens, weights, num_heads=HEADS, mask=mask, **options)
    return group_write(*tokens, weights, num_heads=HEADS, **options)


def plain(tokens, w, mask):
    """The layer as a careful user writes it of linear layers in fp8, a matrix at a time."""

    def projected(name, u):
        weight, bias = getattr(w, f"{name}_weight"), getattr(w, f"{name}_bias")
        return linear_fp8(u, *quantise_rows(weight), bias, backend="eager")

    def heads(name, u):
        return projected(name, u).flatten(0, 1).unflatten(-1, (HEADS, -1)).transpose(1, 2)

    q_tokens, kv_tokens = tokens
    q_in = layer_norm(q_tokens, q_tokens.shape[-1:], w.q_norm_weight, w.q_norm_bias, 1e-6)
    kv_in = layer_norm(kv_tokens, kv_tokens.shape[-1:], w.kv_norm_weight, w.kv_norm_bias, 1e-6)
    bias = None
    if mask is not None:
        bias = torch.zeros(mask.shape, dtype=q_tokens.dtype).masked_fill(~mask, -1e9)
        bias = bias.flatten(0, 1)[:, None, None]
    context = scaled_dot_product_attention(
        heads("q", q_in), heads("k", kv_in), heads("v", kv_in), attn_mask=bias
    )
    context = context.transpose(1, 2).flatten(2).view(*q_tokens.shape[:3], -1)
    if mask is not None:
        context = context * mask.any(-1)[..., None, None]
    return projected("o", context) + q_tokens


def forward(quantised, tokens, mask):
    return quantised(*tokens) if mask is None else quantised(*tokens, mask)


@torch.no_grad()
def errors(way, mask_kind, rng):
    """Of the fp8 layer and of plain fp8: of the branch, against float64 with the bf16 weights."""
    layer, tokens = layer_and_tokens(way, rng)
    mask = mask_of(mask_kind, rng)
    *wide, weights = widened((*tokens, layer.weights()))
    branch = called(way, wide, weights, mask, backend="reference") - wide[0]
    ours = forward(FORMS[way][1](layer), tokens, mask)
    return tuple(
        relative_rms(result.double() - wide[0], branch)
        for result in (ours, plain(tokens, layer.weights(), mask))
    )


def holds(ours, plainly):
    return ours <= 1.1 * plainly and ours <= LIMIT


CASES = [("write", "whole"), *(("read", mask) for mask in MASKS)]


@pytest.mark.parametrize(("way", "mask"), CASES)
def test_it_is_as_near_the_truth_as_plain_fp8(way, mask, rng):
    ours, plainly = errors(way, mask, rng)
    assert holds(ours, plainly), (ours, plainly)
    assert ours > 5e-3  # it is fp8


@torch.no_grad()
def test_what_all_values_of_a_write_have_in_common_is_not_rounded(rng):
    layer, tokens = layer_and_tokens("write", rng, torch.float32)
    layer.v.bias.mul_(20)
    plainly = plain(tokens, layer.weights(), None) - tokens[0]
    *wide, weights = widened((*tokens, layer.weights()))
    branch = group_write(*wide, weights, num_heads=HEADS, backend="reference") - wide[0]
    quantised = Fp8GroupWrite(layer)
    ours = quantised(*tokens) - tokens[0]
    assert relative_rms(ours, branch) < 0.3 * relative_rms(plainly, branch)
    values = layer_norm(tokens[1], (Z,), layer.kv_norm.weight, layer.kv_norm.bias, 1e-6)
    v_weight = (quantised.kv_weight.float() * quantised.kv_scale[:, None])[X:]
    v = (values @ v_weight.T + quantised.kv_bias[X:]).flatten(0, 2)
    assert (v.mean(0).abs() < 0.6 * v.std(0)).all()


def without(part):
    """`_project` that leaves out one of its parts."""
    real = modules_fp8._Fp8CrossAttention._project

    def project(self, name, tokens, *, norm=None, residual=None):
        if part == norm:
            norm = None
        if part == "residual":
            residual = None
        return real(self, name, tokens, norm=norm, residual=residual)

    return {"_Fp8CrossAttention._project": project}


def attended_as(change):
    """`attended` of changed arguments."""
    real = modules_fp8.attended
    return {"attended": lambda *values: real(*change(*values))}


BUGS = {
    "k and v swapped": lambda: attended_as(lambda q, k, v, *rest: (q, v, k, *rest)),
    "values of the group before": lambda: attended_as(
        lambda q, k, v, *rest: (q, k, v.roll(1, 1), *rest)
    ),
    "one head": lambda: attended_as(lambda q, k, v, mask, _: (q, k, v, mask, 1)),
    "residual left out": lambda: without("residual"),
    "q's LayerNorm left out": lambda: without("q_norm"),
    "LayerNorm of k and v left out": lambda: without("kv_norm"),
}


@pytest.mark.parametrize("way", FORMS)
@pytest.mark.parametrize("bug", BUGS)
def test_a_seeded_bug_is_seen(bug, way, rng, monkeypatch):
    for name, broken in BUGS[bug]().items():
        monkeypatch.setattr(f"snapkernels.modules_fp8.{name}", broken)
    assert not holds(*errors(way, "whole", rng))


@pytest.mark.parametrize("mask", MASKS[1:])
def test_an_ignored_mask_is_seen(mask, rng, monkeypatch):
    broken = attended_as(lambda q, k, v, _, heads: (q, k, v, None, heads))["attended"]
    monkeypatch.setattr(modules_fp8, "attended", broken)
    assert not holds(*errors("read", mask, rng))


@torch.no_grad()
@pytest.mark.parametrize(("way", "mask"), CASES)
def test_it_is_the_op_of_the_multiplied_out_weights(way, mask, rng):
    """Where activations are not quantised, to the last bits of float64."""
    layer, tokens = layer_and_tokens(way, rng, torch.float64)
    layer.backend = "reference"
    mask = mask_of(mask, rng)
    whole = {}
    for name, tensor in layer.weights()._asdict().items():
        if tensor.dim() == 2:
            rows, scale = quantise_rows(tensor)
            tensor = rows.double() * scale.double()[:, None]
        whole[name] = tensor
    weights = CrossAttentionWeights(**whole)
    expected = called(way, tokens, weights, mask, backend="reference")
    if way == "write":  # what values have in common goes past the rounding of o's matrix
        common = weights.v_weight @ weights.kv_norm_bias + weights.v_bias
        expected = expected + (layer.o.weight - weights.o_weight) @ common
    torch.testing.assert_close(forward(FORMS[way][1](layer), tokens, mask), expected)


@torch.no_grad()
def test_a_group_with_nothing_to_read_gets_the_bias_of_o(rng):
    layer, (latents, patches) = layer_and_tokens("read", rng, torch.float32)
    got = Fp8GroupRead(layer)(latents, patches, mask_of("a group of nothing", rng))
    assert torch.equal(got[1, 0], latents[1, 0] + layer.o.bias)


@torch.no_grad()
@pytest.mark.parametrize("way", FORMS)
@pytest.mark.parametrize("side", [0, 1])
def test_a_nan_goes_where_it_goes_in_the_op(side, way, rng):
    layer, tokens = layer_and_tokens(way, rng)
    tokens[side][1, 2, 4, 5] = float("nan")
    expected = called(way, tokens, layer.weights(), backend="eager").isfinite()
    assert not expected.all() and expected[1, :2].all()
    assert torch.equal(FORMS[way][1](layer)(*tokens).isfinite(), expected)


@torch.no_grad()
@pytest.mark.parametrize("way", FORMS)
def test_k_and_v_are_views_of_one_product(way, rng, monkeypatch):
    seen = []

    def attended(q, k, v, mask, heads):
        seen.extend((k, v))
        return q

    monkeypatch.setattr(modules_fp8, "attended", attended)
    layer, tokens = layer_and_tokens(way, rng)
    FORMS[way][1](layer)(*tokens)
    assert len({one.untyped_storage().data_ptr() for one in seen}) == 1
    assert {(*one.shape,) for one in seen} == {(*tokens[1].shape[:3], X)}


@torch.no_grad()
@pytest.mark.parametrize("way", FORMS)
def test_a_cast_leaves_e4m3_and_scales_as_they_are(way, rng):
    layer, tokens = layer_and_tokens(way, rng, torch.float32)
    quantised = FORMS[way][1](layer)
    assert not list(quantised.parameters())
    before = {name: tensor.clone() for name, tensor in quantised.state_dict().items()}
    quantised.to(BF16)
    for name, tensor in quantised.state_dict().items():
        if name in quantised.fixed:
            assert tensor.dtype == (torch.float32 if "scale" in name else torch.float8_e4m3fn)
            assert torch.equal(tensor.float(), before[name].float())
        else:
            assert tensor.dtype == BF16
    assert quantised(*(one.to(BF16) for one in tokens)).dtype == BF16
    assert quantised.double()(*(one.double() for one in tokens)).dtype == torch.float64
    assert FORMS[way][1](layer.to("meta")).state_dict().keys() == before.keys()


@torch.no_grad()
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda z, x, m: (z[:1], x, m), r"tokens must be \(B, G, ..., dim\) of the same B, G, got"),
        (lambda z, x, m: (z, x[:, :1], m), r"tokens must be .* got \(2, 3, 8, 64\) and \(2, 1, 20"),
        (lambda z, x, m: (z[0], x[0], m), r"tokens must be .* got \(3, 8, 64\) and"),
        (lambda z, x, m: (z, x, m[:1]), r"mask must be torch.bool \(2, 3, 20\), got torch.bool"),
        (lambda z, x, m: (z, x, m.float()), r"mask must be .*, got torch.float32 \(2, 3, 20\)"),
    ],
)
def test_what_does_not_fit_is_named(change, message, rng):
    layer, tokens = layer_and_tokens("read", rng)
    values = change(*tokens, mask_of("partly", rng))
    with pytest.raises(ValueError, match=f"^Fp8GroupRead: {message}"):
        Fp8GroupRead(layer)(*values)
