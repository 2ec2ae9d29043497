"""The feed-forward family's CUDA kernels: tensors not finite, empty, strided or misplaced."""

from functools import partial

import pytest
import torch
from torch.nn.functional import gelu, layer_norm

from snapkernels import (
    FeedForwardWeights,
    extension,
    feed_forward,
    feed_forward_fp8,
    linear,
    linear_fp8,
    quantise_feed_forward,
    quantise_rows,
)
from snapkernels.ops.feed_forward.kernels.cuda import split_parts
from snapkernels.ops.feed_forward.weights import DIMS
from snapkernels.testing.inputs import random_weights
from snapkernels.testing.numerics import relative_rms

pytestmark = pytest.mark.gpu
NAN, INF = float("nan"), float("inf")
DIM, HIDDEN = 512, 1024
FP8 = ["linear_fp8", "normed_linear_fp8", "feed_forward_fp8"]
BF16 = ["linear", "normed_linear", "feed_forward"]
HIDDEN_VALUES = ["feed_forward", "feed_forward_fp8"]


def strided(tensor):
    """The same numbers, with others between them."""
    wider = tensor.new_zeros(*tensor.shape[:-1], 2 * tensor.shape[-1])
    wider[..., ::2] = tensor
    return wider[..., ::2]


def call(name, change=lambda tensor: tensor, backend="cuda"):
    """The sublayer `name` as a function of tokens, `change` made to every other tensor."""
    torch.manual_seed(0)
    sizes = {"D": DIM, "F": HIDDEN}
    w = random_weights(FeedForwardWeights, DIMS, sizes, dtype=torch.bfloat16, device="cuda")
    norm = {"norm_weight": change(w.norm_weight), "norm_bias": change(w.norm_bias)}
    if "normed" not in name:
        norm = {}
    if name in HIDDEN_VALUES:
        weights = quantise_feed_forward(w) if name in FP8 else w
        op = feed_forward_fp8 if name in FP8 else feed_forward
        return partial(op, weights=type(weights)(*map(change, weights)), backend=backend)
    bias = change(w.fc1_bias)
    if name in FP8:
        matrix, scale = map(change, quantise_rows(w.fc1_weight))
        given = {"weight": matrix, "weight_scale": scale, "bias": bias}
        return partial(linear_fp8, **given, **norm, backend=backend)
    return partial(linear, weight=change(w.fc1_weight), bias=bias, **norm, backend=backend)


def tokens(*shape):
    torch.manual_seed(1)
    return torch.randn(*shape, DIM, device="cuda").bfloat16()


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("name", BF16 + FP8)
def test_a_token_that_is_not_finite_spoils_itself_alone(name, bad, gpu):
    x, run = tokens(2, 300), call(name)
    spoiled = x.clone()
    spoiled[1, 200, 9] = bad
    others = torch.ones(2, 300, dtype=torch.bool)
    others[1, 200] = False
    result = run(spoiled)
    assert not result[1, 200].isfinite().any()
    assert torch.equal(result[others], run(x)[others])


@pytest.mark.parametrize("name", FP8)
def test_one_huge_value_leaves_what_eager_leaves(name, gpu):
    """It sets its token's scale: nothing is saturated, and the other tokens are as before."""
    x = tokens(300)
    calm = call(name)(x)
    x[7, 5] = 2.0**40
    found, expected = (call(name, backend=backend)(x) for backend in ("cuda", "eager"))
    assert found.isfinite().all()
    others = torch.arange(300) != 7
    assert torch.equal(found[others], calm[others])
    besides = torch.arange(found.shape[-1]) != 5  # where the value itself is, in a residual
    found, expected = (y[7].double()[besides] for y in (found, expected))
    assert (found - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize("backend", ["cuda", "triton", "eager"])
@pytest.mark.parametrize("name", BF16 + FP8)
def test_of_no_tokens_there_is_no_result(name, backend, gpu):
    run = call(name, backend=backend)
    for shape in ((0,), (3, 0), (0, 5)):
        result = run(tokens(*shape))
        assert result.shape[:-1] == shape and result.dtype == torch.bfloat16


@pytest.mark.parametrize("name", BF16 + FP8)
def test_strided_tensors_are_as_good(name, gpu):
    x = tokens(3, 100)
    result = call(name)(x)
    assert torch.equal(result, call(name, strided)(strided(x)))
    assert torch.equal(result.transpose(0, 1), call(name)(x.transpose(0, 1)))
    assert result.is_contiguous()


@pytest.mark.parametrize("name", BF16 + FP8)
def test_what_starts_at_an_odd_place_is_refused_or_left_to_others(name, gpu):
    x = torch.cat([tokens(1).new_zeros(1), tokens(9).flatten()])[1:].view(9, DIM)
    with pytest.raises(ValueError, match="tokens does not start at a multiple of 16 bytes"):
        call(name)(x)
    expected = call(name, backend="eager")(x.clone())
    assert (call(name, backend=None)(x) - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize("name", BF16 + FP8)
def test_repeats_are_equal_in_every_bit(name, gpu):
    """Also where clusters hand sums to each other, as of 300 tokens."""
    x, run = tokens(300), call(name)
    first = run(x)
    for _ in range(100):
        assert torch.equal(run(x), first)


@pytest.mark.parametrize("depth", [1024, 3072, 4096])
def test_sums_of_layernorms_rows_lose_less_than_bf16_rounds(depth, gpu):
    """They are not promoted; what is left is bf16's 1.7e-3, and LN rounded another way."""
    torch.manual_seed(0)
    x = torch.randn(512, depth, device=gpu).bfloat16()
    norm = [(one + 0.1 * torch.randn(depth, device=gpu)).bfloat16() for one in (1, 0)]
    matrix, scale = quantise_rows(torch.randn(512, depth, device=gpu) / depth**0.5)
    bias = torch.zeros(512, device=gpu).bfloat16()
    given = {"norm_weight": norm[0], "norm_bias": norm[1], "backend": "cuda"}
    found = linear_fp8(x, matrix, scale, bias, **given)
    widened = (one.double() for one in norm)
    rows, by = quantise_rows(layer_norm(x.double(), (depth,), *widened, 1e-6).float())
    expected = (rows.double() * by[:, None]) @ (matrix.double() * scale[:, None]).T
    assert relative_rms(found, expected) < 3e-3


@pytest.mark.parametrize("width", [512, 2048])
def test_hidden_values_are_gelus_but_for_roundings_near_a_tie(width, gpu):
    """Of the same operands in float64; what 16 bits round is a hundredth of e4m3's step."""
    assert extension.load() is None
    torch.manual_seed(0)
    sizes = {"D": width, "F": HIDDEN}
    w = random_weights(FeedForwardWeights, DIMS, sizes, dtype=torch.bfloat16, device="cuda")
    w, x = quantise_feed_forward(w), torch.randn(1000, width, device=gpu).bfloat16()
    rows = torch.empty_like(x, dtype=torch.float8_e4m3fn)
    scales = torch.empty(2, len(x), device=gpu)
    hidden = x.new_empty(len(x), HIDDEN, dtype=rows.dtype)
    out, parts = torch.empty_like(x), split_parts(x)
    torch.ops.snapkernels_cuda.feed_forward_fp8(x, *w, rows, scales, hidden, out, *parts, 1e-6)
    fc1 = w.fc1_weight.double() * w.fc1_scale[:, None].double()
    y = (rows.double() * scales[0, :, None].double()) @ fc1.T + w.fc1_bias.double()
    expected = (gelu(y) / scales[1, :, None]).float().to(rows.dtype)
    assert relative_rms(hidden.double(), expected.double()) < 0.011
