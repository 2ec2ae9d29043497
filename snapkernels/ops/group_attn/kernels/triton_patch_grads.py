"""The gradient of the patch tokens in Triton, through the products and LayerNorm.

With u = P W + dS A of a token, where W is the read's gradient at the average and the write has no
such term, LayerNorm's backward is dx = u - mean(u) - xn mean(u xn), xn the normalised token, both
means over channels: `ones` and `norms` of the scores' gradient over the width. P and dS have
1 / standard deviation of the token in them. The write adds the gradient of its output.

Legend: as in triton_score_grads.py; D width of a patch token. In the kernel: M tokens and D
channels of a program, J columns of a step.
"""

import torch
import triton
import triton.language as tl

from snapkernels.ops.group_attn import config
from snapkernels.ops.group_attn.kernels.triton_score_grads import ScoreGrads


@triton.jit
def patch_grads_kernel(
    p_x,
    p_dS,
    p_A,
    p_P,
    p_W,
    p_mean,
    p_rstd,
    p_ones,
    p_norms,
    p_dy,
    p_dx,
    p_dy_sums,
    tokens,
    PARTS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DIM: tl.constexpr,
    READ: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    """dx of BLOCK_M tokens and BLOCK_D channels; of the write their sums of dy, for its bias."""
    parts: tl.constexpr = (DIM + BLOCK_D - 1) // BLOCK_D
    tiles = tl.cdiv(tokens, BLOCK_M)
    tile = tl.program_id(0) // parts
    g, first = (tile // tiles).to(tl.int64), tile % tiles * BLOCK_M
    n = g * tokens + first
    t_M = tl.arange(0, BLOCK_M)
    d_D = tl.program_id(0) % parts * BLOCK_D + tl.arange(0, BLOCK_D)
    m_M, m_D = t_M < tokens - first, d_D < DIM
    sum_MD = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    sum_MD = multiplied(p_dS + n * COLUMNS, p_A + g * COLUMNS * DIM, m_M, d_D, m_D, sum_MD,
                        COLUMNS, DIM, BLOCK_M, BLOCK_J)  # fmt: skip
    if READ:
        sum_MD = multiplied(p_P + n * COLUMNS, p_W + g * COLUMNS * DIM, m_M, d_D, m_D, sum_MD,
                            COLUMNS, DIM, BLOCK_M, BLOCK_J)  # fmt: skip
    ones_M = tl.zeros((BLOCK_M,), tl.float32)
    norms_M = tl.zeros((BLOCK_M,), tl.float32)
    for part in range(PARTS):
        at_M = (n + t_M) * PARTS + part
        ones_M += tl.load(p_ones + at_M, mask=m_M, other=0.0)
        norms_M += tl.load(p_norms + at_M, mask=m_M, other=0.0)
    mean_M = tl.load(p_mean + n + t_M, mask=m_M, other=0.0)
    rstd_M = tl.load(p_rstd + n + t_M, mask=m_M, other=0.0)
    at_MD = n * DIM + t_M[:, None] * DIM + d_D[None, :]
    m_MD = m_M[:, None] & m_D[None, :]
    x_MD = tl.load(p_x + at_MD, mask=m_MD, other=0.0).to(tl.float32)
    sum_MD -= (ones_M / DIM)[:, None]
    sum_MD -= (x_MD - mean_M[:, None]) * (rstd_M * norms_M / DIM)[:, None]
    if not READ:
        dy_MD = tl.load(p_dy + at_MD, mask=m_MD, other=0.0).to(tl.float32)
        sum_MD += dy_MD
        tl.store(p_dy_sums + tile.to(tl.int64) * DIM + d_D, tl.sum(dy_MD, axis=0), mask=m_D)
    tl.store(p_dx + at_MD, sum_MD.to(p_dx.dtype.element_ty), mask=m_MD)


@triton.jit
def multiplied(
    p_weights,
    p_rows,
    m_M,
    d_D,
    m_D,
    sum_MD,
    COLUMNS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    """sum + weights rows, over all columns."""
    for j in range(0, COLUMNS, BLOCK_J):
        j_J = j + tl.arange(0, BLOCK_J)
        m_J = j_J < COLUMNS
        p_MJ = p_weights + tl.arange(0, BLOCK_M)[:, None] * COLUMNS + j_J[None, :]
        weights_MJ = tl.load(p_MJ, mask=m_M[:, None] & m_J[None, :], other=0.0)
        p_JD = p_rows + j_J[:, None] * DIM + d_D[None, :]
        rows_JD = tl.load(p_JD, mask=m_J[:, None] & m_D[None, :], other=0.0)
        sum_MD = tl.dot(weights_MJ, rows_JD, sum_MD, input_precision="ieee")
    return sum_MD


def read_patch_grads(
    x_GNC: torch.Tensor,
    mean_GN: torch.Tensor,
    rstd_GN: torch.Tensor,
    grads: ScoreGrads,
    A_GJC: torch.Tensor,
    P_GNJ: torch.Tensor,
    W_GJC: torch.Tensor,
) -> torch.Tensor:
    """dx_GNC of the read."""
    dx_GNC, _ = _launch(x_GNC, mean_GN, rstd_GN, grads, A_GJC, P_GNJ, W_GJC, None)
    return dx_GNC


def write_patch_grads(
    x_GND: torch.Tensor,
    mean_GN: torch.Tensor,
    rstd_GN: torch.Tensor,
    grads: ScoreGrads,
    A_GJD: torch.Tensor,
    dy_GND: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(dx_GND, sums_D) of the write, the float32 sums of dy over all tokens."""
    return _launch(x_GND, mean_GN, rstd_GN, grads, A_GJD, None, None, dy_GND)


def _launch(
    x_GND: torch.Tensor,
    mean_GN: torch.Tensor,
    rstd_GN: torch.Tensor,
    grads: ScoreGrads,
    A_GJD: torch.Tensor,
    P_GNJ: torch.Tensor | None,
    W_GJD: torch.Tensor | None,
    dy_GND: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    (groups, tokens, width), columns = x_GND.shape, A_GJD.shape[1]
    item, dx_GND = x_GND.element_size(), torch.empty_like(x_GND)
    block_m = config.TRITON_UPDATE_TOKENS[item]
    block_d = config.block(width, config.TRITON_UPDATE_CHANNELS[item])
    tiles = groups * triton.cdiv(tokens, block_m)
    dy_sums = mean_GN.new_empty(0 if dy_GND is None else tiles, width)
    with torch.cuda.device_of(x_GND):  # Triton launches on the current device
        patch_grads_kernel[(tiles * triton.cdiv(width, block_d),)](
            x_GND,
            grads.scores,
            A_GJD,
            x_GND if P_GNJ is None else P_GNJ,
            x_GND if W_GJD is None else W_GJD,
            mean_GN,
            rstd_GN,
            grads.ones,
            grads.norms,
            x_GND if dy_GND is None else dy_GND,
            dx_GND,
            dy_sums,
            tokens,
            grads.ones.shape[2],
            columns,
            width,
            dy_GND is None,
            block_m,
            block_d,
            config.block(columns, config.TRITON_UPDATE_COLUMNS[item]),
            num_warps=config.TRITON_UPDATE_WARPS,
            num_stages=config.TRITON_UPDATE_STAGES,
        )
    return dx_GND, dy_sums.sum(0)
