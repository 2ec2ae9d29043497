"""What a product is handed, in Triton: tokens normed and quantised, or normed alone, in one pass.

Legend: M tokens, D their width.
"""

import torch
import triton
import triton.language as tl

from snapkernels.ops.feed_forward import config
from snapkernels.ops.feed_forward.kernels.triton_e4m3 import E4M3_MOST, to_e4m3

# Quantising lengthens a token by a 16th at most, half a step of e4m3; the rest is for rounding.
LENGTHENED = tl.constexpr(1.0645)

Quantised = tuple[torch.Tensor, torch.Tensor]
Norm = tuple[torch.Tensor, torch.Tensor]  # weight and bias, (D) each


@triton.jit
def rows_kernel(
    p_x,
    p_weight,
    p_bias,
    p_bound,
    p_y,
    p_scale,
    p_hidden_scale,
    eps,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A program has a whole token, so that the variance is of differences, in registers."""
    m = tl.program_id(0).to(tl.int64)
    d_D = tl.arange(0, BLOCK_D)
    m_D = d_D < DIM
    u_D = tl.load(p_x + m * DIM + d_D, mask=m_D, other=0.0).to(tl.float32)
    if p_weight is not None:
        weight_D = tl.load(p_weight + d_D, mask=m_D, other=0.0).to(tl.float32)
        bias_D = tl.load(p_bias + d_D, mask=m_D, other=0.0).to(tl.float32)
        centred_D = tl.where(m_D, u_D - tl.sum(u_D, axis=0) / DIM, 0.0)
        rstd = 1.0 / tl.sqrt_rn(tl.sum(centred_D * centred_D, axis=0) / DIM + eps)
        u_D = centred_D * rstd * weight_D + bias_D
    if p_scale is None:
        y_D = u_D.to(p_y.dtype.element_ty)
    else:
        # Magnitudes are in the order of their bits, with NaN above inf; tl.max alone drops a NaN.
        bits_D = u_D.to(tl.int32, bitcast=True) & 0x7FFFFFFF
        largest = tl.max(bits_D, axis=0).to(tl.float32, bitcast=True)
        scale = tl.div_rn(largest, E4M3_MOST)
        y_D = to_e4m3(u_D, scale)
        tl.store(p_scale + m, scale)
    if p_bound is not None:
        # |w . q_u s_u| <= |w| |q_u s_u|: known before the product, so that it can be written in
        # 8 bits by programs that each see a part of a row.
        length = LENGTHENED * tl.sqrt_rn(tl.sum(u_D * u_D, axis=0))
        most = length * tl.load(p_bound) + tl.load(p_bound + 1)
        tl.store(p_hidden_scale + m, tl.div_rn(most, E4M3_MOST))
    tl.store(p_y + m * DIM + d_D, y_D, mask=m_D)


def layer_norm(x_MD: torch.Tensor, norm: Norm, eps: float) -> torch.Tensor:
    """(x - mean) / sqrt(variance + eps) * weight + bias of each row, in the dtype of `x_MD`."""
    y_MD = torch.empty_like(x_MD)
    _launch(x_MD, norm, None, y_MD, None, None, eps)
    return y_MD


def quantised_rows(x_MD: torch.Tensor, norm: Norm | None, eps: float) -> Quantised:
    """e4m3 and its scale, (M) float32, of each row of `x_MD`, after LayerNorm if there is one."""
    q_MD, scale_M = _quantised(x_MD)
    _launch(x_MD, norm, None, q_MD, scale_M, None, eps)
    return q_MD, scale_M


def quantised_rows_bounded(
    x_MD: torch.Tensor, norm: Norm, bound: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`quantised_rows`, and the scale of the hidden values that a row can have at the most.

    Args:
        bound: (2,) float32: the greatest length of a row of the first matrix, and the greatest
            magnitude of its bias.
    """
    q_MD, scale_M = _quantised(x_MD)
    hidden_scale_M = torch.empty_like(scale_M)
    _launch(x_MD, norm, bound, q_MD, scale_M, hidden_scale_M, eps)
    return q_MD, scale_M, hidden_scale_M


def _quantised(x_MD: torch.Tensor) -> Quantised:
    q_MD = torch.empty_like(x_MD, dtype=torch.float8_e4m3fn)
    return q_MD, x_MD.new_empty(len(x_MD), dtype=torch.float32)


def _launch(
    x_MD: torch.Tensor,
    norm: Norm | None,
    bound: torch.Tensor | None,
    y_MD: torch.Tensor,
    scale_M: torch.Tensor | None,
    hidden_scale_M: torch.Tensor | None,
    eps: float,
) -> None:
    rows, dim = x_MD.shape
    block = config.power_of_two(dim)
    weight, bias = (one.contiguous() for one in norm) if norm else (None, None)
    with torch.cuda.device_of(x_MD):  # Triton launches on the current device
        rows_kernel[(rows,)](
            x_MD,
            weight,
            bias,
            None if bound is None else bound.contiguous(),
            y_MD,
            scale_M,
            hidden_scale_M,
            eps,
            dim,
            block,
            num_warps=config.triton_row_warps(block),
        )
