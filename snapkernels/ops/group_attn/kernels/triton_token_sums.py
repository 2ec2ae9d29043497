"""Sums over the tokens of a group, weighted by P or a gradient of its scores, in Triton.

What is made is the sums or, of the read, LayerNorm's tokens averaged: with its weight and bias, or
as they are, or both.

The read's average of LayerNorm's tokens is (sum P (x - mean)) / total, where P has 1 / standard
deviation in it. A block's part is multiplied by 2^(most - most of all blocks), which is exact, and
added to the sum in the order of the blocks: no atomics, two runs agree in every bit. Tokens of 16
bits are multiplied as they are, and `moment`, which is what the means add, is taken off at the end.
The sums of the backward have no total, and those over the gradient of the write's output no mean.
Of the read's, what dS sums to over a column instead of 0 comes off: that much of P's average.

Legend: as in triton_scores.py; R = G L rows, r = g L + l. In the kernel: J columns of P and D
channels of a program, M tokens of a step, K blocks.
"""

import torch
import triton
import triton.language as tl

from snapkernels.ops.group_attn import config
from snapkernels.ops.group_attn.kernels.triton_score_grads import ScoreGrads
from snapkernels.ops.group_attn.kernels.triton_scores import ReadScores


@triton.jit
def token_sums_kernel(
    p_x,
    p_P,
    p_mean,
    p_most,
    p_total,
    p_moment,
    p_excess,
    p_average,
    p_gain,
    p_shift,
    p_sums,
    p_gained,
    tokens,
    blocks,
    groups,
    HEADS: tl.constexpr,
    LATENTS: tl.constexpr,
    DIM: tl.constexpr,
    AVERAGE: tl.constexpr,
    HAS_MEAN: tl.constexpr,
    HAS_EXCESS: tl.constexpr,
    HAS_SUMS: tl.constexpr,
    HAS_GAINED: tl.constexpr,
    CENTRE_FIRST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Sums of BLOCK_J columns of P and BLOCK_D channels, over all tokens of their group."""
    COLUMNS: tl.constexpr = HEADS * LATENTS
    parts_j: tl.constexpr = (COLUMNS + BLOCK_J - 1) // BLOCK_J
    parts_d: tl.constexpr = (DIM + BLOCK_D - 1) // BLOCK_D
    g = (tl.program_id(0) // (parts_j * parts_d)).to(tl.int64)
    j_J = tl.program_id(0) // parts_d % parts_j * BLOCK_J + tl.arange(0, BLOCK_J)
    d_D = tl.program_id(0) % parts_d * BLOCK_D + tl.arange(0, BLOCK_D)
    m_J, m_D = j_J < COLUMNS, d_D < DIM
    at_J = g * blocks * COLUMNS + j_J
    most_J = tl.zeros((BLOCK_J,), tl.float32)
    if AVERAGE:
        most_J = largest(p_most + at_J, m_J, blocks, COLUMNS, BLOCK_J, BLOCK_K)

    t_M = tl.arange(0, BLOCK_M)
    sum_JD = tl.zeros((BLOCK_J, BLOCK_D), tl.float32)
    for k in range(blocks):
        n = g * tokens + k * BLOCK_M
        m_M = t_M < tokens - k * BLOCK_M
        p_MJ = p_P + n * COLUMNS + t_M[:, None] * COLUMNS + j_J[None, :]
        P_MJ = tl.load(p_MJ, mask=m_M[:, None] & m_J[None, :], other=0.0)
        p_MD = p_x + n * DIM + t_M[:, None] * DIM + d_D[None, :]
        x_MD = tl.load(p_MD, mask=m_M[:, None] & m_D[None, :], other=0.0)
        if HAS_MEAN and CENTRE_FIRST:
            x_MD -= tl.load(p_mean + n + t_M, mask=m_M, other=0.0)[:, None]
        if AVERAGE:
            of_block_J = tl.load(p_most + at_J + k * COLUMNS, mask=m_J, other=0.0)
            part_JD = tl.dot(tl.trans(P_MJ), x_MD, input_precision="ieee")
            sum_JD += part_JD * tl.exp2(of_block_J - most_J)[:, None]
        else:
            sum_JD = tl.dot(tl.trans(P_MJ), x_MD, sum_JD, input_precision="ieee")
    if HAS_MEAN and not CENTRE_FIRST:
        moment_J = joined(
            p_most + at_J, p_moment + at_J, most_J, m_J, blocks, COLUMNS, AVERAGE, BLOCK_J, BLOCK_K
        )
        sum_JD -= moment_J[:, None]
    if AVERAGE:
        total_J = joined(
            p_most + at_J, p_total + at_J, most_J, m_J, blocks, COLUMNS, True, BLOCK_J, BLOCK_K
        )
        # Nothing to read: P is zero, and so is what is divided.
        sum_JD /= tl.where(total_J == 0.0, 1.0, total_J)[:, None]
    row_J = (j_J // LATENTS * groups + g) * LATENTS + j_J % LATENTS
    at_JD, m_JD = row_J[:, None] * DIM + d_D[None, :], m_J[:, None] & m_D[None, :]
    if HAS_EXCESS:
        excess_J = joined(
            p_most, p_excess + at_J, most_J, m_J, blocks, COLUMNS, False, BLOCK_J, BLOCK_K
        )
        average_JD = tl.load(p_average + at_JD, mask=m_JD, other=0.0).to(tl.float32)
        sum_JD -= excess_J[:, None] * average_JD
    if HAS_SUMS:
        tl.store(p_sums + at_JD, sum_JD.to(p_sums.dtype.element_ty), mask=m_JD)
    if HAS_GAINED:
        gain_D = tl.load(p_gain + d_D, mask=m_D, other=0.0).to(tl.float32)
        shift_D = tl.load(p_shift + d_D, mask=m_D, other=0.0).to(tl.float32)
        gained_JD = sum_JD * gain_D[None, :] + shift_D[None, :]
        tl.store(p_gained + at_JD, gained_JD.to(p_gained.dtype.element_ty), mask=m_JD)


@triton.jit
def largest(
    p_most_J,
    m_J,
    blocks,
    COLUMNS: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The largest score of every column over all blocks, 0 if none can be read."""
    most_J = tl.full((BLOCK_J,), float("-inf"), tl.float32)
    for k in range(0, blocks, BLOCK_K):
        k_K = k + tl.arange(0, BLOCK_K)
        m_KJ = (k_K < blocks)[:, None] & m_J[None, :]
        p_KJ = p_most_J[None, :] + (k_K * COLUMNS)[:, None]
        most_KJ = tl.load(p_KJ, mask=m_KJ, other=float("-inf"))
        most_J = tl.maximum(most_J, tl.max(most_KJ, axis=0))
    return tl.where(most_J == float("-inf"), 0.0, most_J)  # -inf - -inf would be NaN


@triton.jit
def joined(
    p_most_J,
    p_parts_J,
    most_J,
    m_J,
    blocks,
    COLUMNS: tl.constexpr,
    AVERAGE: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The parts of all blocks added, of an average each times 2^(its most - the largest)."""
    sum_J = tl.zeros((BLOCK_J,), tl.float32)
    for k in range(0, blocks, BLOCK_K):
        k_K = k + tl.arange(0, BLOCK_K)
        m_KJ = (k_K < blocks)[:, None] & m_J[None, :]
        at_K1 = (k_K * COLUMNS)[:, None]
        part_KJ = tl.load(p_parts_J[None, :] + at_K1, mask=m_KJ, other=0.0)
        if AVERAGE:
            most_KJ = tl.load(p_most_J[None, :] + at_K1, mask=m_KJ, other=float("-inf"))
            part_KJ *= tl.exp2(most_KJ - most_J[None, :])
        sum_J += tl.sum(part_KJ, axis=0)
    return sum_J


def average(
    x_GNC: torch.Tensor,
    scores: ReadScores,
    norm_weight_C: torch.Tensor,
    norm_bias_C: torch.Tensor,
    num_heads: int,
    *,
    saving: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(context_HRC, average_HRC): LayerNorm's tokens averaged, and without its weight and bias.

    Where a group has nothing to read they are the bias and 0. The average is None if not `saving`.
    """
    sums_HRC, context_HRC = _launch(
        x_GNC,
        scores.P,
        num_heads,
        scores.block,
        sums=saving,
        most=scores.most,
        total=scores.total,
        mean_GN=scores.mean,
        moment=scores.moment,
        gain_C=norm_weight_C,
        shift_C=norm_bias_C,
    )
    assert context_HRC is not None
    return context_HRC, sums_HRC


def scores_sums(
    x_GNC: torch.Tensor,
    grads: ScoreGrads,
    mean_GN: torch.Tensor,
    num_heads: int,
    *,
    average_HRC: torch.Tensor | None = None,
) -> torch.Tensor:
    """dA_HRC = sum dS (x - mean).

    The read gives the average, of which what dS sums to is taken off.
    """
    dA_HRC, _ = _launch(
        x_GNC,
        grads.scores,
        num_heads,
        grads.block,
        sums=True,
        mean_GN=mean_GN,
        moment=grads.moment,
        excess=None if average_HRC is None else grads.total,
        average_HRC=average_HRC,
    )
    assert dA_HRC is not None
    return dA_HRC


def values_sums(
    dy_GND: torch.Tensor, P_GNJ: torch.Tensor, num_heads: int, block: int
) -> torch.Tensor:
    """sums_HRD = sum of P dy, the gradient at the write's values."""
    sums_HRD, _ = _launch(dy_GND, P_GNJ, num_heads, block, sums=True)
    assert sums_HRD is not None
    return sums_HRD


def _launch(
    x_GNC: torch.Tensor,
    P_GNJ: torch.Tensor,
    num_heads: int,
    block: int,
    *,
    sums: bool,
    most: torch.Tensor | None = None,
    total: torch.Tensor | None = None,
    mean_GN: torch.Tensor | None = None,
    moment: torch.Tensor | None = None,
    excess: torch.Tensor | None = None,
    average_HRC: torch.Tensor | None = None,
    gain_C: torch.Tensor | None = None,
    shift_C: torch.Tensor | None = None,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    (groups, tokens, width), columns = x_GNC.shape, P_GNJ.shape[2]
    item, latents = x_GNC.element_size(), columns // num_heads
    shape = num_heads, groups * latents, width
    sums_HRC = x_GNC.new_empty(shape) if sums else None
    gained_HRC = None if gain_C is None else x_GNC.new_empty(shape)
    block_j = config.block(columns, config.TRITON_CONTEXT_ROWS[item])
    block_d = config.block(width, config.TRITON_CONTEXT_CHANNELS[item])
    grid = (groups * triton.cdiv(columns, block_j) * triton.cdiv(width, block_d),)
    optional = (
        mean_GN, most, total, moment, excess, average_HRC,
        None if gain_C is None else gain_C.contiguous(),
        None if shift_C is None else shift_C.contiguous(),
        sums_HRC, gained_HRC,
    )  # fmt: skip
    with torch.cuda.device_of(x_GNC):  # Triton launches on the current device
        token_sums_kernel[grid](
            x_GNC,
            P_GNJ,
            *(x_GNC if one is None else one for one in optional),
            tokens,
            triton.cdiv(tokens, block),
            groups,
            num_heads,
            latents,
            width,
            most is not None,
            mean_GN is not None,
            excess is not None,
            sums_HRC is not None,
            gained_HRC is not None,
            x_GNC.dtype == torch.float32,
            block,
            block_j,
            block_d,
            config.TRITON_CONTEXT_BLOCKS,
            num_warps=config.TRITON_CONTEXT_WARPS,
            num_stages=config.TRITON_CONTEXT_STAGES,
        )
    return sums_HRC, gained_HRC
