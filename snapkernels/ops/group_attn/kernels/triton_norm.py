"""LayerNorm of the latents in Triton: PyTorch's takes twice as long for so few rows.

Legend: R rows, D their width.
"""

import torch
import triton
import triton.language as tl

from snapkernels.ops.group_attn import config


@triton.jit
def norm_kernel(p_x, p_weight, p_bias, p_y, eps, DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """A program has a whole row, so that the variance is of differences, in registers."""
    row = tl.program_id(0).to(tl.int64) * DIM
    d_D = tl.arange(0, BLOCK_D)
    m_D = d_D < DIM
    x_D = tl.load(p_x + row + d_D, mask=m_D, other=0.0).to(tl.float32)
    weight_D = tl.load(p_weight + d_D, mask=m_D, other=0.0).to(tl.float32)
    bias_D = tl.load(p_bias + d_D, mask=m_D, other=0.0).to(tl.float32)
    centred_D = tl.where(m_D, x_D - tl.sum(x_D, axis=0) / DIM, 0.0)
    rstd = 1.0 / tl.sqrt_rn(tl.sum(centred_D * centred_D, axis=0) / DIM + eps)
    y_D = centred_D * rstd * weight_D + bias_D
    tl.store(p_y + row + d_D, y_D.to(p_y.dtype.element_ty), mask=m_D)


def layer_norm(
    x_RD: torch.Tensor, weight_D: torch.Tensor, bias_D: torch.Tensor, eps: float
) -> torch.Tensor:
    """(x - mean) / sqrt(variance + eps) * weight + bias of each row of `x_RD`, contiguous."""
    y_RD = torch.empty_like(x_RD)
    rows, dim = x_RD.shape
    with torch.cuda.device_of(x_RD):  # Triton launches on the current device
        norm_kernel[(rows,)](
            x_RD,
            weight_D.contiguous(),
            bias_D.contiguous(),
            y_RD,
            eps,
            dim,
            config.power_of_two(dim),
            num_warps=config.TRITON_NORM_WARPS,
        )
    return y_RD
