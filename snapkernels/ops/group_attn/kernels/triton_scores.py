"""The scores of an absorbed cross-attention in Triton: from patch tokens and A to P.

A program takes a block of tokens of one group and some heads. It reads the tokens twice, for mean
and variance and then, out of L2, for the product x A^T. In one loop it would be a race: of a tile
that registers read beside wgmma, Triton 3.6 has a buffer too few, as its TTGIR shows.

16-bit tokens are multiplied as they are, and what the mean adds to the product is taken off in
float32: mean times the sum of A's row, of A as it is rounded, so nothing is lost to a rounding
however large the mean. Tokens in float32, whose product rounds as they do, are centred before it.

The write's P is the softmax over the latents of each head. The read's softmax is over tokens, of
which a program has a part: its P is exp2(score - m) / standard deviation of the token, with m the
largest score of the block, rounded up to an integer so that 2^(m - m of another block) is exact.
What the second pass multiplies by P are the tokens again as they are.

Legend: G groups of all videos, N tokens of a group, C their width, J = H L columns of scores,
j = h L + l. In kernels: M tokens, H heads of a program, L latents of a piece of each head,
S = H L; c some of C.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from snapkernels.ops.group_attn import config

STATS_STAGES = tl.constexpr(config.TRITON_STATS_STAGES)


class Scores(NamedTuple):
    """P of the write, and the moments of the tokens.

    Attributes:
        P: (G, N, J) in the tokens' dtype.
        mean, rstd: (G, N), float32.
    """

    P: torch.Tensor
    mean: torch.Tensor
    rstd: torch.Tensor


class ReadScores(NamedTuple):
    """What the read's second pass needs, float32 but for P.

    Attributes:
        P: (G, N, J) in the tokens' dtype.
        mean, rstd: (G, N), of the tokens.
        most: (G, blocks, J), of every block of `block` tokens and column the largest score.
        total: likewise the sum of exp2(score - most).
        moment: likewise the sum of P, as it is rounded, times the tokens' means.
    """

    P: torch.Tensor
    mean: torch.Tensor
    rstd: torch.Tensor
    most: torch.Tensor
    total: torch.Tensor
    moment: torch.Tensor
    block: int


@triton.jit
def statistics(
    p_x,
    m_M,
    DIM: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Mean and 1 / standard deviation of every token.

    Slice by slice: its mean, then its centred squares, then both joined with what came before.
    """
    mean_M = tl.zeros((BLOCK_M,), tl.float32)
    squares_M = tl.zeros((BLOCK_M,), tl.float32)
    for c in tl.range(0, DIM, BLOCK_C, num_stages=STATS_STAGES):
        x_MC = load_tokens(p_x, m_M, c, DIM, BLOCK_M, BLOCK_C).to(tl.float32)
        count = tl.minimum(DIM - c, BLOCK_C)
        mean_of_slice_M = tl.sum(x_MC, axis=1) / count
        m_C = c + tl.arange(0, BLOCK_C) < DIM
        centred_MC = tl.where(m_C[None, :], x_MC - mean_of_slice_M[:, None], 0.0)
        apart_M = mean_of_slice_M - mean_M
        share = count / (c + count).to(tl.float32)
        mean_M += apart_M * share
        squares_M += tl.sum(centred_MC * centred_MC, axis=1) + apart_M * apart_M * (c * share)
    return mean_M, 1.0 / tl.sqrt(squares_M / DIM + EPS)


@triton.jit
def load_tokens(p_x, m_M, c, DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr):
    """Channels c to c + BLOCK_C of the tokens from `p_x` on, zeros beyond them."""
    c_C = c + tl.arange(0, BLOCK_C)
    p_MC = p_x + tl.arange(0, BLOCK_M)[:, None] * DIM + c_C[None, :]
    return tl.load(p_MC, mask=m_M[:, None] & (c_C < DIM)[None, :], other=0.0)


@triton.jit
def store_moments(p_mean, p_rstd, mean_M, rstd_M, m_M, BLOCK_M: tl.constexpr):
    """Mean and 1 / standard deviation of the tokens of `m_M`."""
    tl.store(p_mean + tl.arange(0, BLOCK_M), mean_M, mask=m_M)
    tl.store(p_rstd + tl.arange(0, BLOCK_M), rstd_M, mask=m_M)


@triton.jit
def columns(
    h,
    first,
    HEADS: tl.constexpr,
    LATENTS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    PIECE: tl.constexpr,
):
    """j of latents `first` to first + PIECE of the heads from h on, and whether it is one."""
    s_S = tl.arange(0, BLOCK_H * PIECE)
    h_S, l_S = h + s_S // PIECE, first + s_S % PIECE
    return h_S * LATENTS + l_S, (h_S < HEADS) & (l_S < LATENTS)


@triton.jit
def multiplied(p_A, x_MC, j_S, m_S, c, out_MS, DIM: tl.constexpr, BLOCK_C: tl.constexpr):
    """out + x A^T over channels c to c + BLOCK_C."""
    c_C = c + tl.arange(0, BLOCK_C)
    p_CS = p_A + c_C[:, None] + j_S[None, :] * DIM
    A_CS = tl.load(p_CS, mask=(c_C < DIM)[:, None] & m_S[None, :], other=0.0)
    return tl.dot(x_MC, A_CS, out_MS, input_precision="ieee")


@triton.jit
def products(
    p_x,
    p_A,
    m_M,
    mean_M,
    h,
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
    """x A^T for both pieces of the heads from h on; without a second piece, 16 columns of zeros."""
    j_F, m_F = columns(h, 0, HEADS, LATENTS, BLOCK_H, FIRST)
    first_MF = tl.zeros((BLOCK_M, BLOCK_H * FIRST), tl.float32)
    rest_MR = tl.zeros((BLOCK_M, BLOCK_H * REST if REST else 16), tl.float32)
    for c in range(0, DIM, BLOCK_C):
        x_MC = load_tokens(p_x, m_M, c, DIM, BLOCK_M, BLOCK_C)
        if CENTRE_FIRST:
            x_MC -= mean_M[:, None]
        first_MF = multiplied(p_A, x_MC, j_F, m_F, c, first_MF, DIM, BLOCK_C)
        if REST:
            j_R, m_R = columns(h, FIRST, HEADS, LATENTS, BLOCK_H, REST)
            rest_MR = multiplied(p_A, x_MC, j_R, m_R, c, rest_MR, DIM, BLOCK_C)
    return first_MF, rest_MR


@triton.jit
def scaled(product_MS, p_sums, j_S, m_S, mean_M, rstd_M, CENTRE_FIRST: tl.constexpr):
    """The scores that a product with x gives."""
    if not CENTRE_FIRST:
        sums_S = tl.load(p_sums + j_S, mask=m_S, other=0.0)
        product_MS -= mean_M[:, None] * sums_S[None, :]
    return product_MS * rstd_M[:, None]


@triton.jit
def place(tokens, HEADS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr):
    """A program's group, int64, block of tokens and first head; heads first: they share tokens."""
    parts: tl.constexpr = (HEADS + BLOCK_H - 1) // BLOCK_H
    tile = tl.program_id(0) // parts
    tiles = tl.cdiv(tokens, BLOCK_M)
    return (tile // tiles).to(tl.int64), tile % tiles, tl.program_id(0) % parts * BLOCK_H


@triton.jit
def write_scores_kernel(
    p_x,
    p_A,
    p_sums,
    p_bias,
    p_P,
    p_mean,
    p_rstd,
    tokens,
    EPS: tl.constexpr,
    HEADS: tl.constexpr,
    LATENTS: tl.constexpr,
    DIM: tl.constexpr,
    CENTRE_FIRST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_H: tl.constexpr,
    FIRST: tl.constexpr,
    REST: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_STATS: tl.constexpr,
):
    """P of a block of tokens: the softmax of the scores over the latents of each head."""
    J: tl.constexpr = HEADS * LATENTS
    g, tile, h = place(tokens, HEADS, BLOCK_M, BLOCK_H)
    n = g * tokens + tile * BLOCK_M
    p_x += n * DIM
    m_M = tl.arange(0, BLOCK_M) < tokens - tile * BLOCK_M
    mean_M, rstd_M = statistics(p_x, m_M, DIM, EPS, BLOCK_M, BLOCK_STATS)
    store_moments(p_mean + n, p_rstd + n, mean_M, rstd_M, m_M & (h == 0), BLOCK_M)
    first_MF, rest_MR = products(
        p_x, p_A + g * J * DIM, m_M, mean_M, h, HEADS, LATENTS, DIM, CENTRE_FIRST, BLOCK_M,
        BLOCK_H, FIRST, REST, BLOCK_C,
    )  # fmt: skip

    p_sums += g * J
    p_bias += g * J
    j_F, m_F = columns(h, 0, HEADS, LATENTS, BLOCK_H, FIRST)
    first_MF = scaled(first_MF, p_sums, j_F, m_F, mean_M, rstd_M, CENTRE_FIRST)
    first_MHL = by_head(first_MF, p_bias, j_F, m_F, BLOCK_M, BLOCK_H, FIRST)
    most_MH = tl.max(first_MHL, axis=2)
    if REST:
        j_R, m_R = columns(h, FIRST, HEADS, LATENTS, BLOCK_H, REST)
        rest_MR = scaled(rest_MR, p_sums, j_R, m_R, mean_M, rstd_M, CENTRE_FIRST)
        rest_MHL = by_head(rest_MR, p_bias, j_R, m_R, BLOCK_M, BLOCK_H, REST)
        most_MH = tl.maximum(most_MH, tl.max(rest_MHL, axis=2))
        rest_MHL = tl.exp2(rest_MHL - most_MH[:, :, None])
    first_MHL = tl.exp2(first_MHL - most_MH[:, :, None])
    total_MH = tl.sum(first_MHL, axis=2)
    if REST:
        total_MH += tl.sum(rest_MHL, axis=2)
    share_MH = 1.0 / total_MH

    p_M = p_P + n * J + tl.arange(0, BLOCK_M) * J
    P_MF = tl.reshape(first_MHL * share_MH[:, :, None], (BLOCK_M, BLOCK_H * FIRST))
    p_MF = p_M[:, None] + j_F[None, :]
    tl.store(p_MF, P_MF.to(p_P.dtype.element_ty), mask=m_M[:, None] & m_F[None, :])
    if REST:
        P_MR = tl.reshape(rest_MHL * share_MH[:, :, None], (BLOCK_M, BLOCK_H * REST))
        p_MR = p_M[:, None] + j_R[None, :]
        tl.store(p_MR, P_MR.to(p_P.dtype.element_ty), mask=m_M[:, None] & m_R[None, :])


@triton.jit
def by_head(
    scores_MS,
    p_bias,
    j_S,
    m_S,
    BLOCK_M: tl.constexpr,
    BLOCK_H: tl.constexpr,
    PIECE: tl.constexpr,
):
    """Scores with their bias as (M, H, L); where there is no such latent, what exp2 makes 0."""
    bias_S = tl.load(p_bias + j_S, mask=m_S, other=-1e30)  # -inf - -inf would be NaN
    return tl.reshape(scores_MS + bias_S[None, :], (BLOCK_M, BLOCK_H, PIECE))


@triton.jit
def read_scores_kernel(
    p_x,
    p_A,
    p_sums,
    p_mask,
    p_P,
    p_mean,
    p_rstd,
    p_most,
    p_total,
    p_moment,
    tokens,
    EPS: tl.constexpr,
    HEADS: tl.constexpr,
    LATENTS: tl.constexpr,
    DIM: tl.constexpr,
    CENTRE_FIRST: tl.constexpr,
    HAS_MASK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_H: tl.constexpr,
    FIRST: tl.constexpr,
    REST: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_STATS: tl.constexpr,
):
    """P of a block of tokens, and what joins it with the other blocks of its group."""
    J: tl.constexpr = HEADS * LATENTS
    g, tile, h = place(tokens, HEADS, BLOCK_M, BLOCK_H)
    n = g * tokens + tile * BLOCK_M
    p_x += n * DIM
    m_M = tl.arange(0, BLOCK_M) < tokens - tile * BLOCK_M
    mean_M, rstd_M = statistics(p_x, m_M, DIM, EPS, BLOCK_M, BLOCK_STATS)
    store_moments(p_mean + n, p_rstd + n, mean_M, rstd_M, m_M & (h == 0), BLOCK_M)
    first_MF, rest_MR = products(
        p_x, p_A + g * J * DIM, m_M, mean_M, h, HEADS, LATENTS, DIM, CENTRE_FIRST, BLOCK_M,
        BLOCK_H, FIRST, REST, BLOCK_C,
    )  # fmt: skip
    if HAS_MASK:
        m_read_M = tl.load(p_mask + n + tl.arange(0, BLOCK_M), mask=m_M, other=0) != 0
    else:
        m_read_M = m_M

    k = (g * tl.cdiv(tokens, BLOCK_M) + tile) * J
    p_sums += g * J
    p_P += n * J
    if REST:  # before the first piece, which has more registers
        j_R, m_R = columns(h, FIRST, HEADS, LATENTS, BLOCK_H, REST)
        rest_MR = scaled(rest_MR, p_sums, j_R, m_R, mean_M, rstd_M, CENTRE_FIRST)
        store_read(
            rest_MR, j_R, m_R, m_M, m_read_M, mean_M, rstd_M, p_P, p_most + k, p_total + k,
            p_moment + k, J, BLOCK_M,
        )  # fmt: skip
    j_F, m_F = columns(h, 0, HEADS, LATENTS, BLOCK_H, FIRST)
    first_MF = scaled(first_MF, p_sums, j_F, m_F, mean_M, rstd_M, CENTRE_FIRST)
    store_read(
        first_MF, j_F, m_F, m_M, m_read_M, mean_M, rstd_M, p_P, p_most + k, p_total + k,
        p_moment + k, J, BLOCK_M,
    )  # fmt: skip


@triton.jit
def store_read(
    scores_MS,
    j_S,
    m_S,
    m_M,
    m_read_M,
    mean_M,
    rstd_M,
    p_P,
    p_most,
    p_total,
    p_moment,
    J: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """P, most, total and moment of some columns; most is -inf where there is nothing to read."""
    scores_MS = tl.where(m_read_M[:, None], scores_MS, float("-inf"))
    most_S = tl.ceil(tl.max(scores_MS, axis=0))
    # -inf - -inf would be NaN; NaN itself goes through exp2 to P.
    weight_MS = tl.exp2(scores_MS - tl.where(most_S == float("-inf"), 0.0, most_S)[None, :])
    tl.store(p_most + j_S, most_S, mask=m_S)
    tl.store(p_total + j_S, tl.sum(weight_MS, axis=0), mask=m_S)
    P_MS = tl.where(m_read_M[:, None], weight_MS * rstd_M[:, None], 0.0).to(p_P.dtype.element_ty)
    tl.store(p_moment + j_S, tl.sum(P_MS.to(tl.float32) * mean_M[:, None], axis=0), mask=m_S)
    p_MS = p_P + tl.arange(0, BLOCK_M)[:, None] * J + j_S[None, :]
    tl.store(p_MS, P_MS, mask=m_M[:, None] & m_S[None, :])


def read_scores(
    x_GNC: torch.Tensor,
    A_GJC: torch.Tensor,
    sums_GJ: torch.Tensor,
    mask_GN: torch.Tensor | None,
    num_heads: int,
    eps: float,
) -> ReadScores:
    """The read's first pass over the tokens x."""
    (groups, tokens, width), columns = x_GNC.shape, A_GJC.shape[1]
    blocks = config.score_blocks(x_GNC.element_size(), num_heads, columns // num_heads)
    tiles = triton.cdiv(tokens, blocks.tokens)
    P_GNJ = x_GNC.new_empty(groups, tokens, columns)
    mean_GN, rstd_GN = (sums_GJ.new_empty(groups, tokens) for _ in range(2))
    most, total, moment = (sums_GJ.new_empty(groups, tiles, columns) for _ in range(3))
    with torch.cuda.device_of(x_GNC):  # Triton launches on the current device
        read_scores_kernel[(groups * tiles * triton.cdiv(num_heads, blocks.heads),)](
            x_GNC,
            A_GJC,
            sums_GJ,
            x_GNC if mask_GN is None else mask_GN,
            P_GNJ,
            mean_GN,
            rstd_GN,
            most,
            total,
            moment,
            tokens,
            eps,
            num_heads,
            columns // num_heads,
            width,
            x_GNC.dtype == torch.float32,
            mask_GN is not None,
            *blocks,
            *channels_at_once(x_GNC),
            num_warps=config.TRITON_SCORES_WARPS,
            num_stages=config.TRITON_SCORES_STAGES,
        )
    return ReadScores(P_GNJ, mean_GN, rstd_GN, most, total, moment, blocks.tokens)


def of_all_blocks(scores: ReadScores) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(power (G, blocks, J), total (G, J), most (G, J)) of all tokens' softmax.

    most is the largest score and total the sum of 2^(score - most), 0 and 1 where none can be read;
    power is 2^(most of the block - most).
    """
    most_GJ = scores.most.amax(1)
    # -inf - -inf would be NaN: where nothing can be read the power is 0.
    most_GJ = torch.where(most_GJ == -torch.inf, 0.0, most_GJ)
    power = torch.exp2(scores.most - most_GJ[:, None])
    total_GJ = (scores.total * power).sum(1)
    return power, torch.where(total_GJ == 0, 1.0, total_GJ), most_GJ


def log_sums(scores: ReadScores) -> torch.Tensor:
    """(G, J) log2 of the sum over all tokens of 2^score, 0 where none can be read."""
    _, total_GJ, most_GJ = of_all_blocks(scores)
    return most_GJ + total_GJ.log2()


def write_scores(
    x_GNC: torch.Tensor,
    A_GJC: torch.Tensor,
    sums_GJ: torch.Tensor,
    bias_GJ: torch.Tensor | None,
    num_heads: int,
    eps: float,
) -> Scores:
    """P of the write."""
    (groups, tokens, width), columns = x_GNC.shape, A_GJC.shape[1]
    blocks = config.score_blocks(x_GNC.element_size(), num_heads, columns // num_heads)
    tiles = triton.cdiv(tokens, blocks.tokens)
    P_GNJ = x_GNC.new_empty(groups, tokens, columns)
    mean_GN, rstd_GN = (sums_GJ.new_empty(groups, tokens) for _ in range(2))
    with torch.cuda.device_of(x_GNC):  # Triton launches on the current device
        write_scores_kernel[(groups * tiles * triton.cdiv(num_heads, blocks.heads),)](
            x_GNC,
            A_GJC,
            sums_GJ,
            bias_GJ,
            P_GNJ,
            mean_GN,
            rstd_GN,
            tokens,
            eps,
            num_heads,
            columns // num_heads,
            width,
            x_GNC.dtype == torch.float32,
            *blocks,
            *channels_at_once(x_GNC),
            num_warps=config.TRITON_SCORES_WARPS,
            num_stages=config.TRITON_SCORES_STAGES,
        )
    return Scores(P_GNJ, mean_GN, rstd_GN)


def channels_at_once(x_GNC: torch.Tensor) -> tuple[int, int]:
    """Channels at once: of the product, and of mean and variance."""
    width, item = x_GNC.shape[2], x_GNC.element_size()
    return (
        config.block(width, config.TRITON_SCORES_CHANNELS[item]),
        config.block(width, config.TRITON_STATS_CHANNELS[item]),
    )
