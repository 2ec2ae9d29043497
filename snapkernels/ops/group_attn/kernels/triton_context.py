"""The read's second pass in Triton: from P and the patch tokens to the context of every latent.

ctx = norm_weight * (sum over tokens of P (x - mean)) / total + norm_bias, where P has 1 / standard
deviation in it. A block's part is multiplied by 2^(most - most of all blocks), which is exact, and
added to the sum in the order of the blocks: no atomics, two runs agree in every bit. Tokens of 16
bits are multiplied as they are, and `moment`, which is what the means add, is taken off at the end.

Legend: as in triton_scores.py; R = G L rows, r = g L + l. In the kernel: J columns of P and D
channels of a program, M tokens of a step, K blocks.
"""

import torch
import triton
import triton.language as tl

from snapkernels.ops.group_attn import config
from snapkernels.ops.group_attn.kernels.triton_scores import ReadScores


@triton.jit
def context_kernel(
    p_x,
    p_P,
    p_mean,
    p_most,
    p_total,
    p_moment,
    p_gain,
    p_shift,
    p_context,
    tokens,
    blocks,
    groups,
    HEADS: tl.constexpr,
    LATENTS: tl.constexpr,
    DIM: tl.constexpr,
    CENTRE_FIRST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Context of BLOCK_J columns of P and BLOCK_D channels, over all tokens of their group."""
    COLUMNS: tl.constexpr = HEADS * LATENTS
    parts_j: tl.constexpr = (COLUMNS + BLOCK_J - 1) // BLOCK_J
    parts_d: tl.constexpr = (DIM + BLOCK_D - 1) // BLOCK_D
    g = (tl.program_id(0) // (parts_j * parts_d)).to(tl.int64)
    j_J = tl.program_id(0) // parts_d % parts_j * BLOCK_J + tl.arange(0, BLOCK_J)
    d_D = tl.program_id(0) % parts_d * BLOCK_D + tl.arange(0, BLOCK_D)
    m_J, m_D = j_J < COLUMNS, d_D < DIM
    at_J = g * blocks * COLUMNS + j_J
    most_J, total_J, moment_J = joined(
        p_most + at_J, p_total + at_J, p_moment + at_J, m_J, blocks, COLUMNS, BLOCK_J, BLOCK_K
    )

    t_M = tl.arange(0, BLOCK_M)
    sum_JD = tl.zeros((BLOCK_J, BLOCK_D), tl.float32)
    for k in range(blocks):
        n = g * tokens + k * BLOCK_M
        m_M = t_M < tokens - k * BLOCK_M
        p_MJ = p_P + n * COLUMNS + t_M[:, None] * COLUMNS + j_J[None, :]
        P_MJ = tl.load(p_MJ, mask=m_M[:, None] & m_J[None, :], other=0.0)
        p_MD = p_x + n * DIM + t_M[:, None] * DIM + d_D[None, :]
        x_MD = tl.load(p_MD, mask=m_M[:, None] & m_D[None, :], other=0.0)
        if CENTRE_FIRST:
            x_MD -= tl.load(p_mean + n + t_M, mask=m_M, other=0.0)[:, None]
        of_block_J = tl.load(p_most + at_J + k * COLUMNS, mask=m_J, other=0.0)
        part_JD = tl.dot(tl.trans(P_MJ), x_MD, input_precision="ieee")
        sum_JD += part_JD * tl.exp2(of_block_J - most_J)[:, None]
    if not CENTRE_FIRST:
        sum_JD -= moment_J[:, None]
    # Nothing to read: P is zero, and so is what is divided.
    sum_JD /= tl.where(total_J == 0.0, 1.0, total_J)[:, None]
    gain_D = tl.load(p_gain + d_D, mask=m_D, other=0.0).to(tl.float32)
    shift_D = tl.load(p_shift + d_D, mask=m_D, other=0.0).to(tl.float32)
    context_JD = sum_JD * gain_D[None, :] + shift_D[None, :]
    row_J = (j_J // LATENTS * groups + g) * LATENTS + j_J % LATENTS
    p_JD = p_context + row_J[:, None] * DIM + d_D[None, :]
    tl.store(p_JD, context_JD.to(p_context.dtype.element_ty), mask=m_J[:, None] & m_D[None, :])


@triton.jit
def joined(
    p_most_J,
    p_total_J,
    p_moment_J,
    m_J,
    blocks,
    COLUMNS: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The largest score of every column over all blocks, 0 if none can be read; total; moment."""
    most_J = tl.full((BLOCK_J,), float("-inf"), tl.float32)
    for k in range(0, blocks, BLOCK_K):
        k_K = k + tl.arange(0, BLOCK_K)
        m_KJ = (k_K < blocks)[:, None] & m_J[None, :]
        at_K1 = (k_K * COLUMNS)[:, None]
        most_KJ = tl.load(p_most_J[None, :] + at_K1, mask=m_KJ, other=float("-inf"))
        most_J = tl.maximum(most_J, tl.max(most_KJ, axis=0))
    most_J = tl.where(most_J == float("-inf"), 0.0, most_J)  # -inf - -inf would be NaN
    total_J = tl.zeros((BLOCK_J,), tl.float32)
    moment_J = tl.zeros((BLOCK_J,), tl.float32)
    for k in range(0, blocks, BLOCK_K):
        k_K = k + tl.arange(0, BLOCK_K)
        m_KJ = (k_K < blocks)[:, None] & m_J[None, :]
        at_K1 = (k_K * COLUMNS)[:, None]
        most_KJ = tl.load(p_most_J[None, :] + at_K1, mask=m_KJ, other=float("-inf"))
        share_KJ = tl.exp2(most_KJ - most_J[None, :])
        total_KJ = tl.load(p_total_J[None, :] + at_K1, mask=m_KJ, other=0.0)
        moment_KJ = tl.load(p_moment_J[None, :] + at_K1, mask=m_KJ, other=0.0)
        total_J += tl.sum(total_KJ * share_KJ, axis=0)
        moment_J += tl.sum(moment_KJ * share_KJ, axis=0)
    return most_J, total_J, moment_J


def context(
    x_GNC: torch.Tensor,
    scores: ReadScores,
    norm_weight_C: torch.Tensor,
    norm_bias_C: torch.Tensor,
    num_heads: int,
) -> torch.Tensor:
    """context_HRC in the dtype of the tokens x; norm_bias where a group has nothing to read."""
    (groups, tokens, width), columns = x_GNC.shape, scores.P.shape[2]
    item, latents = x_GNC.element_size(), columns // num_heads
    context_HRC = x_GNC.new_empty(num_heads, groups * latents, width)
    block_j = config.block(columns, config.TRITON_CONTEXT_ROWS[item])
    block_d = config.block(width, config.TRITON_CONTEXT_CHANNELS[item])
    grid = (groups * triton.cdiv(columns, block_j) * triton.cdiv(width, block_d),)
    with torch.cuda.device_of(x_GNC):  # Triton launches on the current device
        context_kernel[grid](
            x_GNC,
            scores.P,
            scores.mean,
            scores.most,
            scores.total,
            scores.moment,
            norm_weight_C.contiguous(),
            norm_bias_C.contiguous(),
            context_HRC,
            tokens,
            scores.most.shape[1],
            groups,
            num_heads,
            latents,
            width,
            x_GNC.dtype == torch.float32,
            scores.block,
            block_j,
            block_d,
            config.TRITON_CONTEXT_BLOCKS,
            num_warps=config.TRITON_CONTEXT_WARPS,
            num_stages=config.TRITON_CONTEXT_STAGES,
        )
    return context_HRC
