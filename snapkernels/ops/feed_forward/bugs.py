"""Seeded bugs of the family's kernels, each of which turns a small case red."""

from snapkernels.spec import Mutant


def _triton_bug(name: str, module: str, find: str, replace: str) -> Mutant:
    """A bug of the Triton backend, in kernels/<module>.py."""
    return Mutant(name=name, backend="triton", module=module, find=find, replace=replace)


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
