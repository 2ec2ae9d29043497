"""The feed-forward family in Triton, interpreted: what the cases of the specs do not show.

`tests/ops/test_proofs.py` holds values and seeded bugs of every case.
"""

from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import gelu
from torch.nn.functional import layer_norm as exact_norm

from snapkernels import (
    FeedForwardWeights,
    env,
    feed_forward,
    feed_forward_fp8,
    interpreter,
    linear,
    linear_fp8,
    quantise_feed_forward,
    quantise_rows,
)
from snapkernels.ops.feed_forward import config
from snapkernels.ops.feed_forward.weights import DIMS
from snapkernels.registry import OPS
from snapkernels.testing.cases import make_values
from snapkernels.testing.inputs import random_weights
from snapkernels.testing.memory import nan_filled
from snapkernels.testing.numerics import relative_rms, widened

pytestmark = pytest.mark.skipif(not env.INTERPRET, reason="interpreted kernels only")

E4M3 = torch.float8_e4m3fn
NAN, INF = float("nan"), float("inf")
LONGER = 1.0645  # a quantised token than the token, at the most


@pytest.fixture(autouse=True)
def kernels():
    """The kernels' module, with the interpreter mended as dispatch mends it."""
    interpreter.install()
    from snapkernels.ops.feed_forward.kernels import triton_norm, triton_product

    return SimpleNamespace(norm=triton_norm, product=triton_product)


def norm_of(rng, width, dtype=torch.float32):
    draw = torch.randn(2, width, generator=rng)
    return (1 + 0.2 * draw[0]).to(dtype), (0.3 * draw[1]).to(dtype)


def quantised(rng, *shape):
    return quantise_rows(torch.randn(*shape, generator=rng))


def bits(q):
    return q.view(torch.uint8)


@pytest.mark.parametrize("dtype", config.TRITON_DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 12, 100, 129, 600])
def test_a_row_of_any_width(width, dtype, kernels, rng):
    """Alone it is quantised to the bit as the recipe says; padding is in no mean and no length."""
    x = (torch.randn(5, width, generator=rng) + 2).to(dtype)
    norm, bound = norm_of(rng, width, dtype), torch.tensor([1.5, 0.25])
    q, scale = kernels.norm.quantised_rows(x, None, 0.0)
    expected, expected_scale = quantise_rows(x.float())
    assert torch.equal(bits(q), bits(expected)) and torch.equal(scale, expected_scale)

    u = exact_norm(x.double(), (width,), *(one.double() for one in norm), 1e-3)
    with nan_filled():
        y = kernels.norm.layer_norm(x, norm, 1e-3)
        q, scale, hidden = kernels.norm.quantised_rows_bounded(x, norm, bound, 1e-3)
    assert relative_rms(y, u) < max(torch.finfo(dtype).eps, 1e-6)
    assert torch.allclose(scale, (u.abs().amax(1) / 448).float(), rtol=1e-5)
    assert ((q.double() * scale[:, None] - u).abs() <= u.abs() / 16 + scale[:, None] / 512).all()
    most = (LONGER * u.norm(dim=1) * 1.5 + 0.25) / 448
    assert torch.allclose(hidden, most.float(), rtol=1e-5)


def test_rows_of_zeros_and_of_what_is_not_finite(kernels):
    x = torch.ones(5, 20)
    x[0] = 0
    x[1, 3], x[2, 4], x[3, 5] = NAN, INF, -INF
    q, scale = kernels.norm.quantised_rows(x, None, 0.0)
    assert scale[0] == 0 and not q[0].float().any()
    assert scale[1].isnan() and scale[2] == scale[3] == INF
    back = q.float() * scale[:, None]
    assert back[1:4].isnan().all() and torch.equal(back[4], x[4])


def test_a_scale_that_is_not_normal_saturates_no_more_than_it_must(kernels):
    """2^-140 has ten bits less than it should, and a row of the least numbers has scale 0."""
    x = torch.tensor([[2.0**-140, 2.0**-141], [2.0**-149, 0.0]])
    q, scale = kernels.norm.quantised_rows(x, None, 0.0)
    assert scale[0] > 0 and relative_rms(q[:1].float() * scale[0], x[:1]) < 0.5
    assert scale[1] == 0 and q[1].float().isfinite().all()


# Below a tile, at its end and past it, in each direction; more rows of tiles than one group has.
RAGGED = [(1, 1, 1), (16, 16, 32), (33, 70, 300), (129, 130, 128), (1100, 20, 24)]


@pytest.mark.parametrize(("rows", "outputs", "depth"), RAGGED)
def test_products_of_any_size(rows, outputs, depth, kernels, rng):
    residual, bias = (torch.randn(*n, outputs, generator=rng) for n in ((rows,), ()))
    for dtype, rounding in ((torch.float32, 1e-6), (torch.bfloat16, 2**-8)):
        a, w = (torch.randn(n, depth, generator=rng).to(dtype) for n in (rows, outputs))
        more = bias.to(dtype), residual.to(dtype)
        wide_a, wide_w, wide_bias, wide_residual = widened((a, w, *more))
        exact = wide_a @ wide_w.T + wide_bias
        with nan_filled():
            plain = kernels.product.product(a, w, more[0])
            whole = kernels.product.product(a, w, *more, gelu=True)
        assert relative_rms(plain, exact) < rounding
        assert relative_rms(whole, gelu(exact) + wide_residual) < rounding


@pytest.mark.parametrize(("rows", "outputs", "depth"), RAGGED)
def test_fp8_products_of_any_size(rows, outputs, depth, kernels, rng):
    """In float32, and quantised again: each number is next to GELU, by half a step of e4m3."""
    (a, a_scale), (w, w_scale) = quantised(rng, rows, depth), quantised(rng, outputs, depth)
    scales = a_scale, w_scale
    bias, residual = torch.randn(outputs, generator=rng), torch.randn(rows, outputs, generator=rng)
    exact = (a.double() * a_scale[:, None]) @ (w.double() * w_scale[:, None]).T + bias
    hidden_scale = (exact.abs().amax(1) / 50).float()
    with nan_filled():
        y = kernels.product.product(a, w, bias, residual, scales=scales)
        h = kernels.product.product(a, w, bias, scales=scales, gelu=True, y_scale_M=hidden_scale)
    assert y.dtype == torch.float32 and relative_rms(y, exact + residual) < 1e-6
    assert h.dtype == E4M3
    expected, step = gelu(exact), hidden_scale[:, None].double()
    off = (h.double() * step - expected).abs()
    assert (off <= expected.abs() / 16 * (1 + 1e-5) + step / 512).all()


def test_nothing_that_is_not_finite_is_quantised_away(kernels, rng):
    """The conversion of a GPU, and of the interpreter, makes 448 of an inf."""
    (a, _), (w, w_scale) = quantised(rng, 3, 8), quantised(rng, 4, 8)
    scales, hidden_scale = (torch.tensor([1.0, NAN, INF]), w_scale), torch.full((3,), 1.0)
    bias = torch.tensor([0.0, INF, 0.0, NAN])
    h = kernels.product.product(a, w, bias, scales=scales, y_scale_M=hidden_scale).float()
    assert torch.equal(h[0].isnan(), torch.tensor([False, True, False, True]))
    assert h[1:].isnan().all()
    zero = torch.zeros(3)
    h = kernels.product.product(a, w, bias * 0, scales=(zero, w_scale), y_scale_M=zero).float()
    assert h[:, ::2].eq(0).all() and h[:, 1::2].isnan().all()


@pytest.mark.parametrize("bad", [NAN, INF])
@pytest.mark.parametrize("op", [feed_forward, feed_forward_fp8, linear, linear_fp8])
def test_what_is_not_finite_stays_in_its_token(op, bad, rng):
    tokens = torch.randn(2, 9, 12, generator=rng)
    w = random_weights(FeedForwardWeights, DIMS, {"D": 12, "F": 40}, generator=rng)
    tokens[1, 4, 3] = bad
    given = {
        feed_forward: (w,),
        feed_forward_fp8: (quantise_feed_forward(w),),
        linear: (w.fc1_weight, w.fc1_bias),
        linear_fp8: (*quantise_rows(w.fc1_weight), w.fc1_bias),
    }[op]
    y = op(tokens, *given, backend="triton")
    assert not y[1, 4].isfinite().any()
    assert y.isfinite().all(-1).sum() == 2 * 9 - 1


def test_a_row_and_a_tile_past_2_31_elements(kernels, monkeypatch, rng):
    """One program of a launch whose others would take hours; memory is there once it is touched."""
    from triton.runtime.interpreter import interpreter_builder

    shifted, run = SimpleNamespace(by=0), interpreter_builder.set_grid_idx
    monkeypatch.setattr(
        interpreter_builder, "set_grid_idx", lambda x, y, z: run(x + shifted.by, y, z)
    )
    monkeypatch.setattr(interpreter_builder, "set_grid_dim", lambda *dims: None)
    interpreter_builder.grid_dim = (2**31 - 1, 1, 1)

    width, rows = config.TRITON_MOST_WIDTH, 2**31 // config.TRITON_MOST_WIDTH + 1
    x = torch.empty(rows, width, dtype=torch.bfloat16)
    q, scale = torch.empty(rows, width, dtype=E4M3), torch.empty(rows)
    x[-1] = torch.randn(width, generator=rng)
    shifted.by = rows - 1
    kernels.norm.rows_kernel[(1,)](x, None, None, None, q, scale, None, 0.0, width, width)
    expected, expected_scale = quantise_rows(x[-1:].float())
    assert torch.equal(bits(q[-1:]), bits(expected)) and scale[-1] == expected_scale[0]

    # The last tile of (2^17 + 16, 32) by (2^14, 32): its rows of y begin past 2^31.
    rows, outputs, depth, tile = 2**17 + 16, 2**14, 32, 16
    a, w = (torch.empty(n, depth, dtype=torch.bfloat16) for n in (rows, outputs))
    a[-tile:], w[-tile:] = (torch.randn(2, tile, depth, generator=rng)).bfloat16()
    bias, y = torch.zeros(outputs), torch.empty(rows, outputs)
    shifted.by = rows // tile * (outputs // tile) - 1
    kernels.product.product_kernel[(1,)](
        a, w, None, None, bias, None, None, y, rows, None, None, None, None,
        outputs, depth, False, tile, tile, 32, config.TRITON_GROUP,
    )  # fmt: skip
    exact = a[-tile:].double() @ w[-tile:].double().T
    assert relative_rms(y[-tile:, -tile:], exact) < 1e-6


@pytest.mark.parametrize("seed", [1, 2**31, 2**62 + 2**32 - 1])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.75])
def test_dropout_zeroes_what_the_reference_does(p, seed, rng):
    """Thresholds and words whose launch is an i32, an i64 or a constant."""
    w = random_weights(FeedForwardWeights, DIMS, {"D": 12, "F": 36}, generator=rng)
    tokens = torch.randn(3, 43, 12, generator=rng)
    how = {"dropout": p, "seed": seed}
    exact = feed_forward(*widened((tokens, w)), **how, backend="reference")
    y = feed_forward(tokens, w, **how, backend="triton")
    assert relative_rms(y.double() - tokens, exact - tokens.double()) < 2e-6


def test_what_it_refuses(rng, monkeypatch):
    sizes = {"D": 12, "F": 37}
    w = random_weights(FeedForwardWeights, DIMS, sizes, generator=rng)
    tokens = torch.randn(3, 12, generator=rng)
    with pytest.raises(ValueError, match="without a seed dropout draws from PyTorch's generator"):
        feed_forward(tokens, w, dropout=0.1, backend="triton")
    with pytest.raises(ValueError, match="the hidden width has to be a multiple of 4"):
        feed_forward(tokens, w, dropout=0.1, seed=1, backend="triton")
    with pytest.raises(ValueError, match="tokens are torch"):
        feed_forward(*widened((tokens, w)), backend="triton")
    wide = torch.zeros(2, config.TRITON_MOST_WIDTH + 1)
    with pytest.raises(ValueError, match="16385 wide, more than 16384"):
        linear(wide, wide, torch.zeros(2), backend="triton")
    with pytest.raises(NotImplementedError, match="no backward yet"):
        feed_forward(tokens.requires_grad_(), w, backend="triton")

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    on_gpu = SimpleNamespace(dtype=torch.bfloat16, shape=(3, 12), is_cuda=True, device="cuda")
    reason = "the GPU has compute capability 8.6, less than 8.9, and no fp8"
    assert config.triton_refuses_fp8(on_gpu) == reason
    assert config.triton_refuses_linear(on_gpu) is None


@pytest.mark.parametrize("name", ["linear", "linear_fp8", "feed_forward", "feed_forward_fp8"])
def test_it_steps_back_for_cublas_in_bf16_alone(name):
    """In fp8 eager's separate passes take longer than these kernels: the family's README."""
    spec = OPS[name].spec
    call = make_values(spec, spec.cases[0], torch.bfloat16, "cpu")
    assert (spec.backend("triton").declines(*call) is None) == name.endswith("_fp8")
