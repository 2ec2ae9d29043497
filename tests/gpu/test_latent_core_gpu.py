"""csrc's attention core of 8-bit integers, and the heads that its products leave, alone."""

import pytest
import torch

from snapkernels import extension, quantise_rows
from snapkernels.testing.numerics import relative_rms

pytestmark = pytest.mark.gpu
NAN = float("nan")
TILE = 128  # tokens of a scale
DITHER = (-7, 1, -3, 5, -5, 3, -1, 7)  # sixteenths
SHAPES = [(2, 256, 2, 128), (3, 129, 4, 64), (1, 1, 4, 64), (5, 100, 2, 128), (2, 768, 4, 128)]
shapes = pytest.mark.parametrize(("batch", "length", "heads", "head"), SHAPES)


@pytest.fixture(autouse=True)
def library(gpu):
    assert extension.load() is None


def rows_of(batch, length):
    """Rows from one video to the next, and of all."""
    stride = -(-length // TILE) * TILE
    return stride, -(-batch * stride // 256) * 256


def is_token(batch, length):
    """Of every row."""
    stride, padded = rows_of(batch, length)
    row = torch.arange(padded, device="cuda")
    return (row % stride < length) & (row < batch * stride)


def tokens_of(one, batch, length):
    """(batch, length, ...) of rows that are (padded, ...)."""
    stride, _ = rows_of(batch, length)
    return one[: batch * stride].unflatten(0, (batch, stride))[:, :length]


def drawn(batch, length, heads, head, spread=1.0):
    """Heads in 8 bits as `latent_core` takes them, and in float64."""
    torch.manual_seed(0)
    (_, padded), inner = rows_of(batch, length), heads * head
    qk = torch.randint(-127, 128, (padded, 2 * inner), device="cuda", dtype=torch.int8)
    v = torch.randint(-127, 128, (inner, padded), device="cuda", dtype=torch.int8)
    v *= is_token(batch, length)  # others have no value
    # Scores of about `spread`, in scales that differ.
    unit = (spread * head**0.5) ** 0.5 / 73 / head**0.25
    q_scale = unit * (0.5 + torch.rand(heads, padded, device="cuda"))
    k_scale, v_scale = (
        unit * (0.5 + torch.rand(heads, padded // TILE, device="cuda")) for _ in range(2)
    )
    return qk, v, q_scale, k_scale, v_scale


def equation(qk, v, q_scale, k_scale, v_scale, batch, length):
    """(batch length, inner), float64."""
    scales = [q_scale, *(scale.repeat_interleave(TILE, 1) for scale in (k_scale, v_scale))]
    q, k, v = (
        tokens_of(one.double().unflatten(1, (len(q_scale), -1)), batch, length).transpose(1, 2)
        * tokens_of(scale.double().T, batch, length).transpose(1, 2)[..., None]
        for one, scale in zip((*qk.split(len(v), 1), v.T), scales, strict=True)
    )
    weights = (q @ k.transpose(2, 3) / q.shape[-1] ** 0.5).softmax(-1)
    return (weights @ v).transpose(1, 2).flatten(2).flatten(0, 1)


def by_hand(qk, v, q_scale, k_scale, v_scale, batch, length, head):
    """The kernel's way, tile by tile."""
    heads, inner = len(q_scale), len(v)
    # A lane's scores in turn: keys 4 lane to 4 lane + 3 of every 16.
    more = v.new_tensor(DITHER, dtype=torch.float32).view(2, 1, 4).expand(2, 4, 4) / 16
    more = more.flatten().repeat(TILE // 32)
    out = v.new_empty(batch * length, inner, dtype=torch.float8_e4m3fn)
    out_scale = v_scale.new_empty(batch * length)
    stride, _ = rows_of(batch, length)
    for video in range(batch):
        rows = slice(video * length, (video + 1) * length)
        begin, end = video * stride, video * stride + length
        tiles = range(begin // TILE, (begin + stride) // TILE)
        out_scale[rows] = v_scale[:, tiles.start : tiles.stop].max() * 127 / 448
        for at in range(heads):
            columns = slice(at * head, (at + 1) * head)
            q = qk[begin:end, columns].float()  # whole numbers, so sums are exact
            unit = q_scale[at, begin:end] / head**0.5 * 1.4426950408889634
            most, total, mean = torch.full_like(unit, -float("inf")), 0, 0
            for tile in tiles:
                token = torch.arange(tile * TILE, (tile + 1) * TILE, device=v.device)
                k = qk[token, inner:][:, columns].float()
                scores = (q @ k.T).masked_fill(token >= end, -float("inf"))
                of_tile = (unit * k_scale[at, tile]).clamp(min=1e-30)  # else NaN outside
                highest = scores.amax(1) * of_tile
                now = torch.maximum(most, highest)
                kept, share, most = torch.exp2(most - now), torch.exp2(highest - now), now
                weights = 240 * torch.exp2(scores * of_tile[:, None] - highest[:, None])
                weights = (weights + more).round().clamp(0, 255)
                total = total * kept + weights.sum(1) * share
                added = weights @ v[columns][:, token].float().T
                added *= (v_scale[at, tile] * share)[:, None]
                mean = added if tile == tiles.start else mean * kept[:, None] + added
            out[rows, columns] = (mean / (total * out_scale[rows])[:, None]).to(out.dtype)
    return out, out_scale


def run(values, batch, length, head):
    qk, v, *scales = values
    out = torch.empty(batch * length, len(v), device="cuda", dtype=torch.float8_e4m3fn)
    out_scale = torch.empty(len(out), device="cuda")
    torch.ops.snapkernels_cuda.latent_core(qk, v, *scales, out, out_scale, length, head)
    return out, out_scale


@shapes
@pytest.mark.parametrize("spread", [0.3, 3.0])
def test_it_is_the_equation_but_for_the_rounding_of_its_result(batch, length, heads, head, spread):
    values = drawn(batch, length, heads, head, spread)
    out, scale = run(values, batch, length, head)
    found = out.double() * scale.double()[:, None]
    expected = equation(*values, batch, length)
    assert relative_rms(found, expected) < 0.035  # e4m3 is 2.6 %
    # By hand a number is the next one where a sum lies between two.
    hand, hand_scale = by_hand(*values, batch, length, head)
    assert torch.allclose(scale, hand_scale, rtol=1e-6)
    assert relative_rms(found, hand.double() * hand_scale.double()[:, None]) < 0.004


@shapes
def test_one_key_that_takes_all_leaves_its_value(batch, length, heads, head):
    values = drawn(batch, length, heads, head, 400.0)
    out, scale = run(values, batch, length, head)
    expected = equation(*values, batch, length)
    assert relative_rms(out.double() * scale.double()[:, None], expected) < 0.04


def test_keys_beside_one_that_outweighs_them_are_counted():
    """A key as heavy as a thousand others, without a value: by its weight these would be 0."""
    length, head = 768, 128
    qk, v, q_scale, k_scale, v_scale = drawn(1, length, 2, head)
    qk.zero_()
    qk[:, ::head] = 100  # a channel of every query and key
    qk[:, 2 * head :: head] = 0
    qk[5, 2 * head :: head] = 127
    v.fill_(100)
    v[:, 5] = 0
    q_scale.fill_(1)
    k_scale.fill_(6.9 * head**0.5 / 12700)
    values = qk, v, q_scale, k_scale, v_scale
    out, scale = run(values, 1, length, head)
    expected = equation(*values, 1, length)
    # Without dither those in its own tile are lost, an eighth of the mean.
    assert relative_rms(out.double() * scale.double()[:, None], expected) < 0.04


def test_a_scale_that_is_not_finite_spoils_those_it_reaches():
    batch, length, heads, head = 3, 200, 2, 128  # a video has 256 rows
    clean = run(drawn(batch, length, heads, head), batch, length, head)[0].float()
    for which, tokens in ((2, [244]), (3, range(200, 400)), (4, range(200, 400))):
        values = drawn(batch, length, heads, head)
        values[which][1, 300 if which == 2 else 300 // TILE] = NAN
        out, scale = run(values, batch, length, head)
        found = out.float() * scale[:, None]
        spoiled = torch.zeros(len(out), dtype=torch.bool)
        spoiled[list(tokens)] = True
        assert found[spoiled].isnan().any(1).all(), which
        assert torch.equal(out[~spoiled].float(), clean[~spoiled]), which


def test_zeros_are_a_mean_of_all_values():
    values = drawn(1, 200, 2, 128)
    values[0].zero_()
    values[2].fill_(1e-30 / 127)
    values[3].fill_(1e-30 / 127)
    out, scale = run(values, 1, 200, 128)
    expected = equation(*values, 1, 200)
    assert relative_rms(out.double() * scale.double()[:, None], expected) < 0.035


def test_repeats_are_equal_in_every_bit():
    values = drawn(4, 500, 8, 64)
    first = run(values, 4, 500, 64)
    for _ in range(100):
        again = run(values, 4, 500, 64)
        assert torch.equal(again[0].float(), first[0].float()) and torch.equal(again[1], first[1])


@shapes
def test_heads_are_the_projections_in_8_bits(batch, length, heads, head):
    torch.manual_seed(0)
    dim, inner, tokens = 256, heads * head, batch * length
    _, padded = rows_of(batch, length)
    latents = torch.randn(tokens, dim, device="cuda").bfloat16()
    norm = [torch.randn(dim, device="cuda").bfloat16() for _ in range(2)]
    weight, weight_scale = quantise_rows(torch.randn(3 * inner, dim, device="cuda") / dim**0.5)
    bias = torch.randn(3 * inner, device="cuda").bfloat16()
    o_weight, o_scale = quantise_rows(torch.randn(dim, inner, device="cuda") / inner**0.5)
    o_bias = torch.randn(dim, device="cuda").bfloat16()
    empty = latents.new_empty
    quantised = empty(padded, dim, dtype=torch.float8_e4m3fn)
    scale, q_scale = (empty(*shape, dtype=torch.float32) for shape in ((padded,), (heads, padded)))
    k_scale, v_scale = (empty(heads, padded // TILE, dtype=torch.float32) for _ in range(2))
    qk, v = (empty(*shape, dtype=torch.int8) for shape in ((padded, 2 * inner), (inner, padded)))
    context = empty(tokens, inner, dtype=torch.float8_e4m3fn)
    context_scale, out = empty(tokens, dtype=torch.float32), torch.empty_like(latents)
    blocks = torch.cuda.get_device_properties(0).multi_processor_count // 2 * 2
    parts = empty(blocks, 256 * 128, dtype=torch.float32)
    flags = empty(blocks, 2, dtype=torch.int32)
    torch.ops.snapkernels_cuda.latent_attention_fp8(
        latents, *norm, weight, weight_scale, bias, o_weight, o_scale, o_bias, quantised, scale,
        qk, v, q_scale, k_scale, v_scale, context, context_scale, out, parts, flags, length, head,
        1e-6,
    )  # fmt: skip
    some = is_token(batch, length)
    assert not quantised[~some].float().any() and torch.equal(scale > 0, some)
    u = quantised.double() * scale.double()[:, None]
    y = u @ (weight.double() * weight_scale.double()[:, None]).T + bias.double()
    y *= some[:, None]
    exact = [one.unflatten(1, (heads, head)) for one in y.split(inner, 1)]
    # A row's largest, and a tile's.
    largest = (
        exact[0].abs().amax(2).T,
        *(one.unflatten(0, (-1, TILE)).abs().amax((1, 3)).T for one in exact[1:]),
    )
    for found, most in zip((q_scale, k_scale, v_scale), largest, strict=True):
        torch.testing.assert_close(found.double(), most / 127, rtol=3e-3, atol=1e-30)
    scales = q_scale, *(one.repeat_interleave(TILE, 1) for one in (k_scale, v_scale))
    for found, by, expected in zip((*qk.split(inner, 1), v.T), scales, exact, strict=True):
        found = found.double().unflatten(1, (heads, head)) * by.double().T[..., None]
        assert relative_rms(found, expected) < 0.02
    core = equation(qk, v, q_scale, k_scale, v_scale, batch, length)
    read = context.double() * context_scale.double()[:, None]
    assert relative_rms(read, core) < 0.035
    branch = read @ (o_weight.double() * o_scale.double()[:, None]).T + o_bias.double()
    assert relative_rms(out.double() - latents.double(), branch) < 0.02
    assert not flags.any()
