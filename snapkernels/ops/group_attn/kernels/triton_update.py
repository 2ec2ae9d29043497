"""The write's second pass in Triton: every patch token with what P and the values add to it.

Legend: as in triton_scores.py; D width of a patch token. In the kernel: M tokens and D channels of
a program, J columns of a step.
"""

import torch
import triton
import triton.language as tl

from snapkernels.ops.group_attn import config


@triton.jit
def update_kernel(
    p_x,
    p_P,
    p_values,
    p_bias,
    p_y,
    tokens,
    COLUMNS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    """y = x + P values + bias of BLOCK_M tokens and BLOCK_D channels, rounded once."""
    parts: tl.constexpr = (DIM + BLOCK_D - 1) // BLOCK_D
    tiles = tl.cdiv(tokens, BLOCK_M)
    tile = tl.program_id(0) // parts
    g, first = (tile // tiles).to(tl.int64), tile % tiles * BLOCK_M
    n = g * tokens + first
    t_M = tl.arange(0, BLOCK_M)
    d_D = tl.program_id(0) % parts * BLOCK_D + tl.arange(0, BLOCK_D)
    m_M, m_D = t_M < tokens - first, d_D < DIM
    p_P += n * COLUMNS
    p_values += g * COLUMNS * DIM
    sum_MD = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for j in range(0, COLUMNS, BLOCK_J):
        j_J = j + tl.arange(0, BLOCK_J)
        m_J = j_J < COLUMNS
        p_MJ = p_P + t_M[:, None] * COLUMNS + j_J[None, :]
        P_MJ = tl.load(p_MJ, mask=m_M[:, None] & m_J[None, :], other=0.0)
        p_JD = p_values + j_J[:, None] * DIM + d_D[None, :]
        values_JD = tl.load(p_JD, mask=m_J[:, None] & m_D[None, :], other=0.0)
        sum_MD = tl.dot(P_MJ, values_JD, sum_MD, input_precision="ieee")
    sum_MD += tl.load(p_bias + d_D, mask=m_D, other=0.0).to(tl.float32)[None, :]
    at_MD = n * DIM + t_M[:, None] * DIM + d_D[None, :]
    m_MD = m_M[:, None] & m_D[None, :]
    sum_MD += tl.load(p_x + at_MD, mask=m_MD, other=0.0).to(tl.float32)
    tl.store(p_y + at_MD, sum_MD.to(p_y.dtype.element_ty), mask=m_MD)


def update(
    x_GND: torch.Tensor, P_GNJ: torch.Tensor, values_GJD: torch.Tensor, bias_D: torch.Tensor
) -> torch.Tensor:
    """y_GND = x + P values + bias."""
    (groups, tokens, width), columns = x_GND.shape, P_GNJ.shape[2]
    item, y_GND = x_GND.element_size(), torch.empty_like(x_GND)
    block_m = config.TRITON_UPDATE_TOKENS[item]
    block_d = config.block(width, config.TRITON_UPDATE_CHANNELS[item])
    grid = (groups * triton.cdiv(tokens, block_m) * triton.cdiv(width, block_d),)
    with torch.cuda.device_of(x_GND):  # Triton launches on the current device
        update_kernel[grid](
            x_GND,
            P_GNJ,
            values_GJD,
            bias_D.contiguous(),
            y_GND,
            tokens,
            columns,
            width,
            block_m,
            block_d,
            config.block(columns, config.TRITON_UPDATE_COLUMNS[item]),
            num_warps=config.TRITON_UPDATE_WARPS,
            num_stages=config.TRITON_UPDATE_STAGES,
        )
    return y_GND
