"""The gradient of an absorbed cross-attention's scores in Triton, from P and a second product.

P is in memory; what a column's P multiplies is W: the gradient at the read's average, or the
write's values. Its gradient dP is a product of tokens with W, the read's of LayerNorm's tokens x,
as the scores are, the write's of the output's gradient dy. Then dS = P (dP - delta), delta being
the sum of P dP over what the softmax is over: of the read over tokens, which the latents' side
knows (`absorbed_weighed`), of the write over the latents of a head, which a program has.

Scores are exponents of 2, so with dS comes log 2. Rounded, and with 1 / standard deviation of the
token in it as the read's P has, dS multiplies tokens as they are in `token_sums` and A in
`patch_grads`, which needs for LayerNorm's backward of each token, over all columns, two sums more:

    ones = sum P (sum of W's row) + sum dS (sum of A's row), the sum over channels of u
    norms = sum P dP + sum dS S, likewise of u times the normalised token

with u = P W + dS A, and S the scores without their bias. The write's u has no term with P, and its
S is log2 P less the bias: what a head's total adds is the same for all of a dS that adds up to 0.

Legend: as in triton_scores.py; K parts of the heads, a program's each.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from snapkernels.ops.group_attn import config
from snapkernels.ops.group_attn.kernels.triton_latents import Absorbed
from snapkernels.ops.group_attn.kernels.triton_scores import (
    ReadScores,
    Scores,
    channels_at_once,
    columns,
    of_all_blocks,
    place,
    products,
    scaled,
)

LN_2 = tl.constexpr(0.6931471805599453)


class ScoreGrads(NamedTuple):
    """What the rest of the backward needs of the scores, float32 but for dS.

    Attributes:
        scores: dS, (G, N, J) in the tokens' dtype, with 1 / standard deviation of the token in it.
        ones, norms: (G, N, K), the parts of the two sums of every token.
        moment: (G, blocks, J), of every `block` tokens the sum of dS, as rounded, times the mean.
        total: likewise the sum of dS as it is without standard deviation: the gradient of the
            write's score bias, and of the read what is left of a sum that is 0.
    """

    scores: torch.Tensor
    ones: torch.Tensor
    norms: torch.Tensor
    moment: torch.Tensor
    total: torch.Tensor
    block: int


@triton.jit
def read_score_grads_kernel(
    p_x,
    p_W,
    p_W_sums,
    p_A_sums,
    p_delta,
    p_mean,
    p_rstd,
    p_log_sum,
    p_share,
    p_P,
    p_dS,
    p_ones,
    p_norms,
    p_moment,
    p_total,
    tokens,
    HEADS: tl.constexpr,
    LATENTS: tl.constexpr,
    DIM: tl.constexpr,
    CENTRE_FIRST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_H: tl.constexpr,
    FIRST: tl.constexpr,
    REST: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """dS of a block of tokens and some heads; P becomes what it is over all blocks."""
    J: tl.constexpr = HEADS * LATENTS
    g, tile, h = place(tokens, HEADS, BLOCK_M, BLOCK_H)
    n = g * tokens + tile * BLOCK_M
    t_M = tl.arange(0, BLOCK_M)
    m_M = t_M < tokens - tile * BLOCK_M
    mean_M = tl.load(p_mean + n + t_M, mask=m_M, other=0.0)
    rstd_M = tl.load(p_rstd + n + t_M, mask=m_M, other=1.0)
    first_MF, rest_MR = products(
        p_x + n * DIM, p_W + g * J * DIM, m_M, mean_M, h, HEADS, LATENTS, DIM, CENTRE_FIRST,
        BLOCK_M, BLOCK_H, FIRST, REST, BLOCK_C,
    )  # fmt: skip

    k = (g * tl.cdiv(tokens, BLOCK_M) + tile) * J
    ones_M = tl.zeros((BLOCK_M,), tl.float32)
    norms_M = tl.zeros((BLOCK_M,), tl.float32)
    if REST:  # before the first piece, which has more registers
        j_R, m_R = columns(h, FIRST, HEADS, LATENTS, BLOCK_H, REST)
        ones_M, norms_M = of_read(
            rest_MR, j_R, m_R, m_M, mean_M, rstd_M, p_W_sums + g * J, p_A_sums + g * J,
            p_delta + g * J, p_log_sum + g * J, p_share + k, p_moment + k, p_total + k, p_P + n * J,
            p_dS + n * J, J, CENTRE_FIRST, BLOCK_M,
        )  # fmt: skip
    j_F, m_F = columns(h, 0, HEADS, LATENTS, BLOCK_H, FIRST)
    more_ones_M, more_norms_M = of_read(
        first_MF, j_F, m_F, m_M, mean_M, rstd_M, p_W_sums + g * J, p_A_sums + g * J,
        p_delta + g * J, p_log_sum + g * J, p_share + k, p_moment + k, p_total + k, p_P + n * J,
        p_dS + n * J, J, CENTRE_FIRST, BLOCK_M,
    )  # fmt: skip
    ones_M += more_ones_M
    norms_M += more_norms_M
    parts: tl.constexpr = (HEADS + BLOCK_H - 1) // BLOCK_H
    at_M = (n + t_M) * parts + h // BLOCK_H
    tl.store(p_ones + at_M, ones_M, mask=m_M)
    tl.store(p_norms + at_M, norms_M, mask=m_M)


@triton.jit
def of_read(
    product_MS,
    j_S,
    m_S,
    m_M,
    mean_M,
    rstd_M,
    p_W_sums,
    p_A_sums,
    p_delta,
    p_log_sum,
    p_share,
    p_moment,
    p_total,
    p_P,
    p_dS,
    J: tl.constexpr,
    CENTRE_FIRST: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """P and dS of some columns are stored; the tokens' sums over these are returned."""
    dP_MS = scaled(product_MS, p_W_sums, j_S, m_S, mean_M, rstd_M, CENTRE_FIRST)
    at_MS = tl.arange(0, BLOCK_M)[:, None] * J + j_S[None, :]
    m_MS = m_M[:, None] & m_S[None, :]
    share_S = tl.load(p_share + j_S, mask=m_S, other=0.0)
    delta_S = tl.load(p_delta + j_S, mask=m_S, other=0.0)
    P_MS = tl.load(p_P + at_MS, mask=m_MS, other=0.0).to(tl.float32) * share_S[None, :]
    dS_MS = P_MS * (dP_MS - delta_S[None, :]) * LN_2
    norms_M = tl.sum(P_MS * dP_MS, axis=1)
    tl.store(p_total + j_S, tl.sum(dS_MS * (1.0 / rstd_M)[:, None], axis=0), mask=m_S)
    # Where P is 0 so is dS, whatever the score.
    log_sum_S = tl.load(p_log_sum + j_S, mask=m_S, other=0.0)
    score_MS = tl.log2(tl.where(P_MS > 0, P_MS, 1.0)) + log_sum_S[None, :]
    norms_M += tl.sum(dS_MS * score_MS, axis=1) - tl.log2(rstd_M) * tl.sum(dS_MS, axis=1)
    P_MS = P_MS.to(p_P.dtype.element_ty)
    tl.store(p_P + at_MS, P_MS, mask=m_MS)
    W_sums_S = tl.load(p_W_sums + j_S, mask=m_S, other=0.0)
    ones_M = tl.sum(P_MS.to(tl.float32) * W_sums_S[None, :], axis=1)
    dS_MS = dS_MS.to(p_dS.dtype.element_ty)
    tl.store(p_dS + at_MS, dS_MS, mask=m_MS)
    dS_MS = dS_MS.to(tl.float32)
    A_sums_S = tl.load(p_A_sums + j_S, mask=m_S, other=0.0)
    ones_M += tl.sum(dS_MS * A_sums_S[None, :], axis=1)
    tl.store(p_moment + j_S, tl.sum(dS_MS * mean_M[:, None], axis=0), mask=m_S)
    return ones_M, norms_M


@triton.jit
def write_score_grads_kernel(
    p_dy,
    p_W,
    p_A_sums,
    p_bias,
    p_mean,
    p_rstd,
    p_P,
    p_dS,
    p_ones,
    p_norms,
    p_moment,
    p_total,
    tokens,
    HEADS: tl.constexpr,
    LATENTS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_H: tl.constexpr,
    FIRST: tl.constexpr,
    REST: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """dS of a block of tokens and some heads."""
    J: tl.constexpr = HEADS * LATENTS
    g, tile, h = place(tokens, HEADS, BLOCK_M, BLOCK_H)
    n = g * tokens + tile * BLOCK_M
    t_M = tl.arange(0, BLOCK_M)
    m_M = t_M < tokens - tile * BLOCK_M
    mean_M = tl.load(p_mean + n + t_M, mask=m_M, other=0.0)
    rstd_M = tl.load(p_rstd + n + t_M, mask=m_M, other=0.0)
    first_MF, rest_MR = products(
        p_dy + n * DIM, p_W + g * J * DIM, m_M, mean_M, h, HEADS, LATENTS, DIM, False, BLOCK_M,
        BLOCK_H, FIRST, REST, BLOCK_C,
    )  # fmt: skip

    p_P += n * J
    p_dS += n * J
    p_bias += g * J
    p_A_sums += g * J
    k = (g * tl.cdiv(tokens, BLOCK_M) + tile) * J
    j_F, m_F = columns(h, 0, HEADS, LATENTS, BLOCK_H, FIRST)
    P_MF = load_columns(p_P, j_F, m_F, m_M, J, BLOCK_M)
    delta_MH, total_MH = weighted(P_MF, first_MF, BLOCK_M, BLOCK_H, FIRST)
    if REST:
        j_R, m_R = columns(h, FIRST, HEADS, LATENTS, BLOCK_H, REST)
        P_MR = load_columns(p_P, j_R, m_R, m_M, J, BLOCK_M)
        more_MH, more_total_MH = weighted(P_MR, rest_MR, BLOCK_M, BLOCK_H, REST)
        delta_MH += more_MH
        total_MH += more_total_MH
    # Divided by the total of P as it is rounded: so dS adds up to 0. Beyond the tokens it is 0.
    delta_MH /= tl.where(total_MH == 0.0, 1.0, total_MH)
    ones_M, norms_M = of_write(
        first_MF, P_MF, delta_MH, j_F, m_F, m_M, mean_M, rstd_M, p_A_sums, p_bias, p_moment + k,
        p_total + k, p_dS, J, BLOCK_M, BLOCK_H, FIRST,
    )  # fmt: skip
    if REST:  # P is read again: registers are short
        more_ones_M, more_norms_M = of_write(
            rest_MR, load_columns(p_P, j_R, m_R, m_M, J, BLOCK_M), delta_MH, j_R, m_R, m_M,
            mean_M, rstd_M, p_A_sums, p_bias, p_moment + k, p_total + k, p_dS, J, BLOCK_M,
            BLOCK_H, REST,
        )  # fmt: skip
        ones_M += more_ones_M
        norms_M += more_norms_M
    parts: tl.constexpr = (HEADS + BLOCK_H - 1) // BLOCK_H
    at_M = (n + t_M) * parts + h // BLOCK_H
    tl.store(p_ones + at_M, ones_M, mask=m_M)
    tl.store(p_norms + at_M, norms_M, mask=m_M)


@triton.jit
def load_columns(p_P, j_S, m_S, m_M, J: tl.constexpr, BLOCK_M: tl.constexpr):
    """Some columns of P of the tokens from `p_P` on, float32."""
    p_MS = p_P + tl.arange(0, BLOCK_M)[:, None] * J + j_S[None, :]
    return tl.load(p_MS, mask=m_M[:, None] & m_S[None, :], other=0.0).to(tl.float32)


@triton.jit
def weighted(P_MS, dP_MS, BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr, PIECE: tl.constexpr):
    """The sums over the latents of each head of P dP and of P."""
    product_MHL = tl.reshape(P_MS * dP_MS, (BLOCK_M, BLOCK_H, PIECE))
    P_MHL = tl.reshape(P_MS, (BLOCK_M, BLOCK_H, PIECE))
    return tl.sum(product_MHL, axis=2), tl.sum(P_MHL, axis=2)


@triton.jit
def of_write(
    dP_MS,
    P_MS,
    delta_MH,
    j_S,
    m_S,
    m_M,
    mean_M,
    rstd_M,
    p_A_sums,
    p_bias,
    p_moment,
    p_total,
    p_dS,
    J: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_H: tl.constexpr,
    PIECE: tl.constexpr,
):
    """dS of some columns is stored; the tokens' sums over these are returned."""
    dP_MHL = tl.reshape(dP_MS, (BLOCK_M, BLOCK_H, PIECE)) - delta_MH[:, :, None]
    dS_MS = P_MS * tl.reshape(dP_MHL, (BLOCK_M, BLOCK_H * PIECE)) * LN_2
    tl.store(p_total + j_S, tl.sum(dS_MS, axis=0), mask=m_S)
    dS_MS *= rstd_M[:, None]
    bias_S = tl.load(p_bias + j_S, mask=m_S, other=0.0)
    score_MS = tl.log2(tl.where(P_MS > 0, P_MS, 1.0)) - bias_S[None, :]
    norms_M = tl.sum(dS_MS * score_MS, axis=1)  # as it is rounded dS would not add up to 0
    dS_MS = dS_MS.to(p_dS.dtype.element_ty)
    p_MS = p_dS + tl.arange(0, BLOCK_M)[:, None] * J + j_S[None, :]
    tl.store(p_MS, dS_MS, mask=m_M[:, None] & m_S[None, :])
    dS_MS = dS_MS.to(tl.float32)
    tl.store(p_moment + j_S, tl.sum(dS_MS * mean_M[:, None], axis=0), mask=m_S)
    A_sums_S = tl.load(p_A_sums + j_S, mask=m_S, other=0.0)
    return tl.sum(dS_MS * A_sums_S[None, :], axis=1), norms_M


def read_score_grads(
    x_GNC: torch.Tensor,
    W: Absorbed,
    A_sums_GJ: torch.Tensor,
    log_sum_GJ: torch.Tensor,
    scores: ReadScores,
    num_heads: int,
) -> ScoreGrads:
    """From W, the gradient at the average, and delta; P of `scores` becomes that of all blocks."""
    (groups, tokens, width), columns_ = x_GNC.shape, W.rows.shape[1]
    blocks = _blocks(x_GNC, columns_, num_heads)
    tiles, parts = scores.most.shape[1], triton.cdiv(num_heads, blocks.heads)
    power, total_GJ, _ = of_all_blocks(scores)
    share = power / total_GJ[:, None]  # 2^(most - log_sum), but for what the logarithm rounds
    grads = _empty(x_GNC, W.sums, scores.P, parts, tiles, blocks.tokens)
    with torch.cuda.device_of(x_GNC):  # Triton launches on the current device
        read_score_grads_kernel[(groups * tiles * parts,)](
            x_GNC,
            W.rows,
            W.sums,
            A_sums_GJ,
            W.number,
            scores.mean,
            scores.rstd,
            log_sum_GJ,
            share,
            scores.P,
            grads.scores,
            grads.ones,
            grads.norms,
            grads.moment,
            grads.total,
            tokens,
            num_heads,
            columns_ // num_heads,
            width,
            x_GNC.dtype == torch.float32,
            *blocks,
            channels_at_once(x_GNC)[0],
            num_warps=config.TRITON_SCORES_WARPS,
            num_stages=config.TRITON_SCORES_STAGES,
        )
    return grads


def write_score_grads(
    dy_GND: torch.Tensor,
    W_GJD: torch.Tensor,
    A: Absorbed,
    scores: Scores,
    num_heads: int,
) -> ScoreGrads:
    """From W, the values in the patches' width, and the gradient of the output."""
    (groups, tokens, width), columns_ = dy_GND.shape, W_GJD.shape[1]
    blocks = _blocks(dy_GND, columns_, num_heads)
    tiles, parts = triton.cdiv(tokens, blocks.tokens), triton.cdiv(num_heads, blocks.heads)
    grads = _empty(dy_GND, A.sums, scores.P, parts, tiles, blocks.tokens)
    with torch.cuda.device_of(dy_GND):  # Triton launches on the current device
        write_score_grads_kernel[(groups * tiles * parts,)](
            dy_GND,
            W_GJD,
            A.sums,
            A.number,
            scores.mean,
            scores.rstd,
            scores.P,
            grads.scores,
            grads.ones,
            grads.norms,
            grads.moment,
            grads.total,
            tokens,
            num_heads,
            columns_ // num_heads,
            width,
            *blocks,
            channels_at_once(dy_GND)[0],
            num_warps=config.TRITON_SCORES_WARPS,
            num_stages=config.TRITON_SCORES_STAGES,
        )
    return grads


def _blocks(tokens_GNC: torch.Tensor, columns_: int, num_heads: int) -> config.ScoreBlocks:
    return config.score_blocks(
        tokens_GNC.element_size(), num_heads, columns_ // num_heads, config.TRITON_GRAD_COLUMNS
    )


def _empty(
    tokens_GNC: torch.Tensor,
    like: torch.Tensor,
    P_GNJ: torch.Tensor,
    parts: int,
    tiles: int,
    block: int,
) -> ScoreGrads:
    """Uninitialised, the float32 ones on the device of `like`."""
    groups, tokens, columns_ = P_GNJ.shape
    ones, norms = (like.new_empty(groups, tokens, parts) for _ in range(2))
    moment, total = (like.new_empty(groups, tiles, columns_) for _ in range(2))
    return ScoreGrads(torch.empty_like(P_GNJ), ones, norms, moment, total, block)
