"""Seeded bugs of the family's kernels, each of which turns a small case red."""

from snapkernels.spec import Mutant


def _triton_bug(name: str, module: str, find: str, replace: str) -> Mutant:
    """A bug of the Triton backend, in kernels/<module>.py."""
    return Mutant(name=name, backend="triton", module=module, find=find, replace=replace)


def _cuda_bug(name: str, file: str, find: str, replace: str) -> Mutant:
    """A bug of the CUDA backend, in csrc/linear/<file>."""
    return Mutant(name=name, backend="cuda", file=f"linear/{file}", find=find, replace=replace)


_SCALED = "fmaf(sum * row_scales[i], scales[j], biases[j])"
_CUDA = (
    _cuda_bug("mean left in", "rows.cuh", "x[i][j] -= mean;", ""),
    _cuda_bug("eps left out", "rows.cuh", "kWidth + given.eps", "kWidth"),
    _cuda_bug(
        "no turn to hand sums over",
        "product.cuh",
        "if (of.share > 0) take_over(of, sums, done.end);",
        "",
    ),
    _cuda_bug(
        "residual left out",
        "product_end.cuh",
        "for (int j = 0; j < 8; ++j) y[j] += added[j];",
        ";",
    ),
)
_CUDA_BF16 = (
    *_CUDA,
    _cuda_bug("bias left out", "product_end.cuh", ": sum + biases[j];", ": sum;"),
)
_CUDA_FP8 = (
    *_CUDA,
    _cuda_bug(
        "bias left out",
        "product_end.cuh",
        _SCALED,
        "sum * row_scales[i] * scales[j]",
    ),
    _cuda_bug(
        "the weights' scale left out",
        "product_end.cuh",
        _SCALED,
        "fmaf(sum, row_scales[i], biases[j])",
    ),
    _cuda_bug(
        "the scale of the token before",
        "product_end.cuh",
        "of.row_scale + row + place, some",
        "of.row_scale + max(row + place - 1, 0), some",
    ),
    _cuda_bug(
        "a resident weight times the next tokens",
        "product_resident.cuh",
        "first_row = tile * kResidentRows;",
        "first_row = (tile + 1) * kResidentRows;",
    ),
    _cuda_bug(
        "columns of a narrower block",
        "product.cuh",
        "column = tile.y + rank * End::kColumns;",
        "column = tile.y + rank * (End::kColumns < kProductSlice ? 64 : kProductSlice);",
    ),
    _cuda_bug(
        "sums not promoted",
        "products.cuh",
        "kPromote = 2;",
        "kPromote = 0;",
    ),
)
_CUDA_ZEROS = _cuda_bug(
    "a row of zeros divided by its largest", "rows.cuh", "kLeast = 1e-30f", "kLeast = 0"
)
_CUDA_HIDDEN = (
    _cuda_bug(
        "GELU of the quantised numbers",
        "product_end.cuh",
        "twice_gelu(y[2 * j], y[2 * j + 1], halves[i])",
        "twice_gelu(2 * halves[i] * y[2 * j], 2 * halves[i] * y[2 * j + 1], 0.5f)",
    ),
    _cuda_bug("tanh of a straight line", "gelu.cuh", "kThird = 0x28742874", "kThird = 0"),
    _cuda_bug(
        "the hidden scale of the token before",
        "product_end.cuh",
        "of.hidden_scale + row + place, some",
        "of.hidden_scale + max(row + place - 1, 0), some",
    ),
    _cuda_bug(
        "a hidden bound that is passed",
        "rows.cuh",
        "kLonger = 1.0645f",
        "kLonger = 0.0645f",
    ),
)
_BIAS = _triton_bug(
    "bias left out", "triton_product", "y_MN = acc_MN + bias_N[None, :]", "y_MN = acc_MN"
)
_PADDING = _triton_bug(
    "padding in the variance",
    "triton_norm",
    "tl.where(m_D, u_D - tl.sum(u_D, axis=0) / DIM, 0.0)",
    "u_D - tl.sum(u_D, axis=0) / DIM",
)
_STALE_SCALE = _triton_bug(
    "the scale of the token before",
    "triton_product",
    "tl.load(p_a_scale + first_m + m_M,",
    "tl.load(p_a_scale + tl.maximum(first_m + m_M - 1, 0),",
)
_MISSING_SCALE = _triton_bug(
    "the weights' scale left out",
    "triton_product",
    "* a_scale_M[:, None] * w_scale_N[None, :]",
    "* a_scale_M[:, None]",
)

LINEAR = (
    *_CUDA_BF16,
    _BIAS,
    _PADDING,
    _triton_bug(
        "last step of the sum left out",
        "triton_product",
        "in range(0, K, BLOCK_K):",
        "in range(0, K - BLOCK_K, BLOCK_K):",
    ),
    _triton_bug(
        "residual of the first tile",
        "triton_product",
        "tl.load(p_residual + at_MN,",
        "tl.load(p_residual + at_MN - first_m * N,",
    ),
    _triton_bug(
        "columns of tiles counted as rows are",
        "triton_product",
        "program % of_group // height",
        "program % of_group % tiles_n",
    ),
)
FEED_FORWARD = (
    *_CUDA_BF16,
    _cuda_bug("GELU left out", "product_end.cuh", "y[j] = gelu(y[j]);", ";"),
    _BIAS,
    _triton_bug(
        "GELU by sigmoid",
        "triton_product",
        "0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))",
        "x * tl.sigmoid(1.702 * x)",
    ),
    _triton_bug(
        "every tile's dropout that of the first of its row",
        "triton_product",
        "first_m * (N // 4) + first_n // 4",
        "first_m * (N // 4)",
    ),
    _triton_bug(
        "kept values not scaled up",
        "triton_product",
        "least), factor, 0.0)",
        "least), 1.0, 0.0)",
    ),
)
LINEAR_FP8 = (
    *_CUDA_FP8,
    _CUDA_ZEROS,
    _BIAS,
    _STALE_SCALE,
    _MISSING_SCALE,
    _triton_bug(
        "largest value with its sign",
        "triton_norm",
        "u_D.to(tl.int32, bitcast=True) & 0x7FFFFFFF",
        "tl.maximum(u_D, 0.0).to(tl.int32, bitcast=True)",
    ),
)
FEED_FORWARD_FP8 = (
    *_CUDA_FP8,
    *_CUDA_HIDDEN,
    _BIAS,
    _STALE_SCALE,
    _MISSING_SCALE,
    _PADDING,
    _triton_bug(
        "GELU of the quantised numbers",
        "triton_product",
        "to_e4m3(y_MN, y_scale_M[:, None])",
        "to_e4m3(exact_gelu(acc_MN / y_scale_M[:, None]), 1.0)",
    ),
    _triton_bug(
        "the hidden bound without the token's length",
        "triton_norm",
        "length = LENGTHENED * tl.sqrt_rn(tl.sum(u_D * u_D, axis=0))",
        "length = LENGTHENED",
    ),
    _triton_bug(
        "the hidden scale of the token before",
        "triton_product",
        "tl.load(p_y_scale + first_m + m_M,",
        "tl.load(p_y_scale + tl.maximum(first_m + m_M - 1, 0),",
    ),
)
