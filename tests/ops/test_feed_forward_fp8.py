"""The fp8 recipe: quantised rows, the bound on hidden values, NaN, weights."""

import pytest
import torch
from torch.nn.functional import gelu, layer_norm

from snapkernels import (
    FeedForwardWeights,
    feed_forward,
    feed_forward_fp8,
    linear_fp8,
    quantise_feed_forward,
    quantise_rows,
)
from snapkernels.ops.feed_forward import reference
from snapkernels.ops.feed_forward.weights import DIMS, LENGTHENED
from snapkernels.testing.inputs import random_weights
from snapkernels.testing.numerics import relative_rms, widened

BACKENDS = ["reference", "eager"]
E4M3 = torch.float8_e4m3fn
EPS = 1e-6


def weights_of(rng, dim=64, hidden=256, dtype=torch.float32):
    sizes = {"D": dim, "F": hidden}
    return random_weights(FeedForwardWeights, DIMS, sizes, dtype=dtype, generator=rng)


def multiplied_out(numbers, scale):
    return numbers.double() * scale.double()[:, None]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_a_row_comes_back_within_the_spacing_of_e4m3(dtype, rng):
    loudness = torch.logspace(-4, 4, 50)[:, None]
    matrix = (torch.randn(50, 333, generator=rng) * loudness).to(dtype)
    numbers, scale = quantise_rows(matrix)
    assert (numbers.dtype, scale.dtype, scale.shape) == (E4M3, torch.float32, (50,))
    largest = matrix.double().abs().amax(1)
    torch.testing.assert_close(scale.double(), largest / 448, rtol=1e-6, atol=0)
    assert numbers.float().abs().amax(1).eq(448).all()
    error = (multiplied_out(numbers, scale) - matrix.double()).abs()
    allowed = torch.maximum(matrix.double().abs() / 16, scale.double()[:, None] * 2**-10)
    assert (error <= allowed * (1 + 1e-5)).all()
    assert relative_rms(multiplied_out(numbers, scale), matrix) < 0.03


def test_numbers_are_rounded_to_nearest_ties_to_even():
    ties = torch.tensor([[448.0, 17.0, 19.0, 21.0, -17.0, 2**-10, 3 * 2**-10, 16.99]])
    numbers, scale = quantise_rows(ties)
    assert scale.item() == 1
    assert numbers.float().tolist() == [[448, 16, 20, 20, -16, 0, 2**-8, 16]]


def test_a_row_of_zeros_has_scale_zero_and_no_nan(rng):
    matrix = torch.randn(3, 20, generator=rng)
    matrix[1] = 0
    numbers, scale = quantise_rows(matrix)
    assert scale[1] == 0 and numbers[1].float().eq(0).all()
    assert multiplied_out(numbers, scale).isfinite().all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_never_saturated(bad, rng):
    matrix = torch.randn(3, 20, generator=rng).bfloat16()
    clean = quantise_rows(matrix)
    matrix[1, 7] = bad
    numbers, scale = quantise_rows(matrix)
    assert not scale[1].isfinite()
    assert not multiplied_out(numbers, scale)[1].isfinite().any()
    for one, other in zip((numbers, scale), clean, strict=True):
        assert one[[0, 2]].float().equal(other[[0, 2]].float())


def test_one_huge_value_is_exact_and_the_rest_within_its_spacing(rng):
    matrix = torch.randn(2, 64, generator=rng)
    matrix[0, 5] = 3e38
    numbers, scale = quantise_rows(matrix)
    back = multiplied_out(numbers, scale)
    torch.testing.assert_close(back[0, 5].item(), 3e38, rtol=1e-6, atol=0)
    assert (back[0] - matrix[0].double()).abs()[torch.arange(64) != 5].max() <= scale[0] * 2**-10
    assert relative_rms(back[1], matrix[1]) < 0.04


@pytest.mark.parametrize("largest", [1e-38, 1e-40, 600 * 2.0**-149, 2.0**-149])
def test_a_row_below_the_normal_numbers_stays_finite(largest):
    numbers, scale = quantise_rows(torch.tensor([[largest, -largest / 2, 0.0]]))
    back = multiplied_out(numbers, scale)
    assert back.isfinite().all() and back.abs().max() <= 2 * largest


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        (torch.zeros(3), r"must be \(M, K\), floating point, got shape \(3,\)"),
        (torch.zeros(3, 4, dtype=torch.int32), "got shape .*int32"),
        ([[1.0]], "got list"),
        (torch.zeros(3, 0), "at least one column"),
    ],
)
def test_it_names_what_it_cannot_quantise(matrix, message):
    with pytest.raises(ValueError, match=f"^quantise_rows: .*{message}"):
        quantise_rows(matrix)


def test_weights_are_quantised_by_output_row_and_bounded(rng):
    weights = weights_of(rng, dtype=torch.bfloat16)
    quantised = quantise_feed_forward(weights)
    for name in ("fc1", "fc2"):
        whole = getattr(weights, f"{name}_weight")
        numbers, scale = (getattr(quantised, f"{name}_{part}") for part in ("weight", "scale"))
        assert scale.shape == whole.shape[:1]
        assert relative_rms(multiplied_out(numbers, scale), whole) < 0.03
    for name in ("norm_weight", "norm_bias", "fc1_bias", "fc2_bias"):
        assert getattr(quantised, name).equal(getattr(weights, name))
    fc1 = multiplied_out(quantised.fc1_weight, quantised.fc1_scale)
    expected = torch.stack([fc1.norm(dim=1).amax(), weights.fc1_bias.double().abs().amax()])
    torch.testing.assert_close(quantised.hidden_bound.double(), expected, rtol=1e-6, atol=0)
    assert not any(one.requires_grad for one in quantised)


def hidden_bound(u, quantised):
    """What no hidden value of the normed tokens u (M, D) can pass, (M,)."""
    length, bias = quantised.hidden_bound.double()
    return LENGTHENED * u.double().norm(dim=1) * length + bias


def hidden(u, quantised):
    """The values before GELU, which does not lengthen them, of quantised tokens: (M, F)."""
    fc1 = multiplied_out(quantised.fc1_weight, quantised.fc1_scale)
    return multiplied_out(*quantise_rows(u)) @ fc1.T + quantised.fc1_bias.double()


def random(u, fc1):
    return u


def outliers(u, fc1):
    u[:, ::17] *= 50
    return u


def aligned(u, fc1):
    """Every token along the longest row of fc1."""
    return fc1[fc1.norm(dim=1).argmax()] * u[:, :1]


def rounded_up(u, fc1):
    """One number sets the scale, and all others are lengthened by nearly 1/16."""
    signs = fc1[fc1.norm(dim=1).argmax()].sign()
    u[:] = signs * 1.0626
    u[:, 0] = signs[0] * 448 / 256
    return u


@pytest.mark.parametrize("make", [random, outliers, aligned, rounded_up])
def test_no_hidden_value_passes_its_bound(make, rng):
    dim = 64
    weights = weights_of(rng, dim)
    if make is rounded_up:
        weights.fc1_weight[3] = 4 * weights.fc1_weight[3].sign()
        weights.fc1_bias.zero_()
    quantised = quantise_feed_forward(weights)
    u = make(torch.randn(40, dim, generator=rng), weights.fc1_weight.clone())
    largest = hidden(u, quantised).abs().amax(1)
    bound = hidden_bound(u, quantised)
    assert (largest <= bound).all()
    assert (bound <= dim**0.5 * largest).all()
    if make is aligned:
        assert (bound <= 1.2 * largest + 2 * quantised.hidden_bound[1]).all()
    if make is rounded_up:
        assert (largest > bound / LENGTHENED).all()


def test_a_bound_for_a_scale_costs_no_precision(rng):
    """e4m3 floats: with the largest of a row 4 to 30 times below 448 its numbers round the same."""
    weights, tokens = weights_of(rng, 256, 1024), torch.randn(200, 256, generator=rng)
    quantised = quantise_feed_forward(weights)
    exact = reference.feed_forward_fp8(*widened((tokens, quantised)), EPS)
    u = layer_norm(tokens, (256,), weights.norm_weight, weights.norm_bias, EPS)
    scale = hidden_bound(u, quantised) / 448
    h = gelu(hidden(u, quantised))
    assert (scale * 448 / h.abs().amax(1)).min() > 4
    rounded = multiplied_out((h / scale[:, None]).to(E4M3), scale)
    fc2 = multiplied_out(quantised.fc2_weight, quantised.fc2_scale)
    branch = rounded @ fc2.T + weights.fc2_bias
    by_bound = relative_rms(branch, exact - tokens)
    by_largest = relative_rms(feed_forward_fp8(tokens, quantised) - tokens, exact - tokens)
    assert by_bound < 1.02 * by_largest


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_token_that_is_not_finite_spoils_itself_alone(backend, bad, rng):
    tokens = torch.randn(2, 5, 32, generator=rng).bfloat16()
    weights = quantise_feed_forward(weights_of(rng, 32, 48, torch.bfloat16))
    numbers, scale = quantise_rows(torch.randn(24, 32, generator=rng).bfloat16())
    bias = torch.randn(24, generator=rng).bfloat16()
    norm = {"norm_weight": weights.norm_weight, "norm_bias": weights.norm_bias}
    spoiled = tokens.clone()
    spoiled[1, 2, 9] = bad
    others = torch.ones(2, 5, dtype=torch.bool)
    others[1, 2] = False
    for run in (
        lambda x: feed_forward_fp8(x, weights, backend=backend),
        lambda x: linear_fp8(x, numbers, scale, bias, backend=backend),
        lambda x: linear_fp8(x, numbers, scale, bias, **norm, backend=backend),
    ):
        result = run(spoiled)
        assert not result[1, 2].isfinite().any()
        assert result[others].equal(run(tokens)[others])


def test_fp8_is_near_the_sublayer_that_it_was_made_of(rng):
    weights, tokens = weights_of(rng), torch.randn(30, 64, generator=rng)
    found = feed_forward_fp8(tokens, quantise_feed_forward(weights)) - tokens
    assert 0.02 < relative_rms(found, feed_forward(tokens, weights) - tokens) < 0.08


def test_it_has_no_gradient_and_says_so(rng):
    weights = quantise_feed_forward(weights_of(rng))
    tokens = torch.randn(3, 64, generator=rng, requires_grad=True)
    with pytest.raises(ValueError, match=r"^feed_forward_fp8: tokens has no gradient here"):
        feed_forward_fp8(tokens, weights)
    asked = weights._replace(fc1_bias=weights.fc1_bias.clone().requires_grad_())
    with pytest.raises(ValueError, match=r"weights\.fc1_bias has no gradient here"):
        feed_forward_fp8(tokens.detach(), asked)
    compiled = torch.compile(feed_forward_fp8, fullgraph=True, backend="aot_eager")
    for without in (torch.no_grad, torch.inference_mode):
        with without():
            expected = feed_forward_fp8(tokens, asked)
            assert not expected.requires_grad and compiled(tokens, asked).equal(expected)
    with pytest.raises(Exception, match="has no gradient here"):
        compiled(tokens, weights)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("fc1_weight", torch.zeros(256, 64), "must be torch.float8_e4m3fn, got torch.float32"),
        ("fc2_scale", torch.zeros(64).double(), "must be torch.float32, got torch.float64"),
        ("fc1_scale", torch.zeros(64), "has F = 64"),
        ("hidden_bound", torch.zeros(3), "has E = 3, but E = 2"),
        ("fc1_bias", torch.zeros(256).bfloat16(), "must be torch.float32 like tokens"),
    ],
)
def test_it_names_what_is_wrong(field, value, message, rng):
    weights = quantise_feed_forward(weights_of(rng))._replace(**{field: value})
    with pytest.raises(ValueError, match=f"^feed_forward_fp8: weights.{field} {message}"):
        feed_forward_fp8(torch.zeros(5, 64), weights)
