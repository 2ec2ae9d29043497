"""What the head's Triton kernels share: tokens to features, features to pixels.

Legend: b video, m token of a program, t token of the batch, s column of a slice, p = (c, i, j)
feature of a patch, by channel, pixel row and pixel column, padded to BLOCK_P; k = (c, i). t frame,
h row of patches, w column of patches, y row of pixels. D width of a token. F the network's output.
"""

import torch
import triton
import triton.language as tl

from snapkernels.ops.head.config import TRITON_STATS_COLUMNS
from snapkernels.ops.head.weights import HeadWeights
from snapkernels.patches import PatchLayout

STATS = tl.constexpr(TRITON_STATS_COLUMNS)


@triton.jit
def program_tokens(tokens, BLOCK_M: tl.constexpr):
    """This program's video (int64) and its tokens in that video, of which the last may be none."""
    tiles = tl.cdiv(tokens, BLOCK_M)
    b = (tl.program_id(0) // tiles).to(tl.int64)
    return b, tl.program_id(0) % tiles * BLOCK_M + tl.arange(0, BLOCK_M)


@triton.jit
def load_tokens(p_tokens, n_M, tokens, d, DIM: tl.constexpr, SLICE: tl.constexpr):
    """Columns d to d + SLICE of the tokens `n_M`, float32, zeros beyond them."""
    d_S = d + tl.arange(0, SLICE)
    mask = (n_M < tokens)[:, None] & (d_S < DIM)[None, :]
    p_MS = p_tokens + n_M.to(tl.int64)[:, None] * DIM + d_S[None, :]
    return tl.load(p_MS, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def features(
    p_tokens,
    n_M,
    tokens,
    p_norm_weight,
    p_norm_bias,
    p_weight,
    p_bias,
    FEATURES: tl.constexpr,
    DIM: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_P: tl.constexpr,
    SLICE: tl.constexpr,
):
    """Mean and 1 / standard deviation of every token, and F of it, float32."""
    mean_M, rstd_M = statistics(p_tokens, n_M, tokens, DIM, EPS, BLOCK_M)
    F_MP = product(
        p_tokens, n_M, tokens, mean_M, rstd_M, p_norm_weight, p_norm_bias, p_weight, FEATURES,
        DIM, BLOCK_M, BLOCK_P, SLICE,
    )  # fmt: skip
    return mean_M, rstd_M, F_MP + load_vector(p_bias, 0, FEATURES, BLOCK_P)[None, :]


@triton.jit
def statistics(p_tokens, n_M, tokens, DIM: tl.constexpr, EPS: tl.constexpr, BLOCK_M: tl.constexpr):
    """Mean and 1 / standard deviation of every token.

    Slice by slice: its mean, then its centred squares, then both joined with what came before.
    """
    mean_M = tl.zeros((BLOCK_M,), tl.float32)
    squares_M = tl.zeros((BLOCK_M,), tl.float32)
    for d in tl.range(0, DIM, STATS):
        x_MS = load_tokens(p_tokens, n_M, tokens, d, DIM, STATS)
        count = tl.minimum(DIM - d, STATS)
        mean_of_slice_M = tl.sum(x_MS, axis=1) / count
        m_S = d + tl.arange(0, STATS) < DIM
        centred_MS = tl.where(m_S[None, :], x_MS - mean_of_slice_M[:, None], 0.0)
        apart_M = mean_of_slice_M - mean_M
        share = count / (d + count).to(tl.float32)
        mean_M += apart_M * share
        squares_M += tl.sum(centred_MS * centred_MS, axis=1) + apart_M * apart_M * (d * share)
    return mean_M, 1.0 / tl.sqrt(squares_M / DIM + EPS)


@triton.jit
def product(
    p_tokens,
    n_M,
    tokens,
    mean_M,
    rstd_M,
    p_norm_weight,
    p_norm_bias,
    p_weight,
    FEATURES: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_P: tl.constexpr,
    SLICE: tl.constexpr,
):
    """W LN(x), float32 and without bias; LN is rounded to the dtype of W, as a layer before it."""
    out_MP = tl.zeros((BLOCK_M, BLOCK_P), tl.float32)
    for d in tl.range(0, DIM, SLICE):
        x_MS = load_tokens(p_tokens, n_M, tokens, d, DIM, SLICE)
        gain_S = load_vector(p_norm_weight, d, DIM, SLICE)
        shift_S = load_vector(p_norm_bias, d, DIM, SLICE)
        xhat_MS = (x_MS - mean_M[:, None]) * rstd_M[:, None]
        normed_MS = (xhat_MS * gain_S[None, :] + shift_S[None, :]).to(p_weight.dtype.element_ty)
        weight_PS = load_weight(p_weight, d, FEATURES, DIM, BLOCK_P, SLICE)
        out_MP = tl.dot(normed_MS, tl.trans(weight_PS), out_MP, input_precision="ieee")
    return out_MP


@triton.jit
def load_weight(
    p_weight,
    d,
    FEATURES: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_P: tl.constexpr,
    SLICE: tl.constexpr,
):
    """Columns d to d + SLICE of W, zeros beyond it."""
    d_S = d + tl.arange(0, SLICE)
    p_P = tl.arange(0, BLOCK_P)
    m_PS = (p_P < FEATURES)[:, None] & (d_S < DIM)[None, :]
    return tl.load(p_weight + p_P[:, None] * DIM + d_S[None, :], mask=m_PS, other=0.0)


@triton.jit
def load_vector(p_vector, first, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """Elements `first` to first + BLOCK of a vector of COUNT, float32, zeros beyond it."""
    at = first + tl.arange(0, BLOCK)
    return tl.load(p_vector + at, mask=at < COUNT, other=0.0).to(tl.float32)


@triton.jit
def load_terms(p_terms, b):
    """The three factors of a video, float32."""
    p_b = p_terms + b * 3
    return (
        tl.load(p_b).to(tl.float32),
        tl.load(p_b + 1).to(tl.float32),
        tl.load(p_b + 2).to(tl.float32),
    )


@triton.jit
def load_pixels(p_video, at, mask):
    """Pixels as float32: whatever the dtype, arithmetic on them is float32's."""
    return tl.load(p_video + at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def corners(
    n_M,
    height,
    width,
    groups_h,
    groups_w,
    GROUP_T: tl.constexpr,
    GROUP_H: tl.constexpr,
    GROUP_W: tl.constexpr,
    PATCH: tl.constexpr,
):
    """Offset of a patch's first pixel in its frame's channel 0 (int64), and its row of patches."""
    group_M = n_M // (GROUP_T * GROUP_H * GROUP_W)
    place_M = n_M % (GROUP_T * GROUP_H * GROUP_W)
    t_M = group_M // (groups_h * groups_w) * GROUP_T + place_M // (GROUP_H * GROUP_W)
    h_M = group_M // groups_w % groups_h * GROUP_H + place_M // GROUP_W % GROUP_H
    w_M = group_M % groups_w * GROUP_W + place_M % GROUP_W
    return (t_M.to(tl.int64) * height + h_M * PATCH) * width + w_M * PATCH, h_M


@triton.jit
def pixels(
    n_M,
    corner_M,
    h_M,
    tokens,
    frames,
    height,
    width,
    CHANNELS: tl.constexpr,
    PATCH: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Offset in its video of every feature's pixel, int64, and whether there is such a pixel."""
    p_P = tl.arange(0, BLOCK_P)
    c_P, i_P, j_P = p_P // (PATCH * PATCH), p_P // PATCH % PATCH, p_P % PATCH
    at_P = (c_P.to(tl.int64) * frames * height + i_P) * width + j_P
    m_MP = (n_M < tokens)[:, None] & (p_P < CHANNELS * PATCH * PATCH)[None, :]
    # Rows that only fill the last row of groups are below the video, and may begin in a patch.
    m_MP &= h_M[:, None] * PATCH + i_P[None, :] < height
    return corner_M[:, None] + at_P[None, :], m_MP


@triton.jit
def store_features(p_features, features_MP, t_M, m_M, FEATURES: tl.constexpr):
    """The features of the tokens `t_M` of the batch, in the dtype they are kept in."""
    p_P = tl.arange(0, features_MP.shape[1])
    m_MP = m_M[:, None] & (p_P < FEATURES)[None, :]
    kept_MP = features_MP.to(p_features.dtype.element_ty)
    tl.store(p_features + t_M[:, None] * FEATURES + p_P[None, :], kept_MP, mask=m_MP)


@triton.jit
def store_rows(p_rows, t_M, m_M, mean_M, rstd_M, c1_M, c2_M):
    """(mean, rstd, c1, c2) of the tokens `t_M`, a 16-byte vector each."""
    # (M, 2, 2) of [[mean, rstd], [c1, c2]].
    rows_M22 = tl.join(tl.join(mean_M, c1_M), tl.join(rstd_M, c2_M))
    p_M4 = p_rows + t_M[:, None] * 4 + tl.arange(0, 4)[None, :]
    tl.store(p_M4, tl.reshape(rows_M22, (t_M.shape[0], 4)), mask=m_M[:, None])


@triton.jit
def row_sums(dF_MP, F_MP, p_gain, p_shift, FEATURES: tl.constexpr):
    """dF . gain and dF . (F - shift) over FEATURES features: c1 D and c2 D, if those are all.

    `dF_MP` is rounded as it is kept: they have to be the sums of the very dF W that is multiplied
    out later, or what is left of its mean over D, which LayerNorm does not let through, is error.
    """
    dF_MP = dF_MP.to(tl.float32)
    gain_P = load_vector(p_gain, 0, FEATURES, dF_MP.shape[1])
    shift_P = load_vector(p_shift, 0, FEATURES, dF_MP.shape[1])
    of_gain_M = tl.sum(dF_MP * gain_P[None, :], axis=1)
    return of_gain_M, tl.sum(dF_MP * (F_MP - shift_P[None, :]), axis=1)


def geometry(
    tokens: torch.Tensor,
    w: HeadWeights,
    size: tuple[int, int, int],
    patch: int,
    group: tuple[int, int, int],
) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
    """Tokens of a video, and what every kernel is told of sizes: at its call, and as constants."""
    _, groups_h, groups_w = PatchLayout.padded(size, patch, group).groups
    channels = w.weight.shape[0] // patch**2
    per_video = tokens.shape[1] * tokens.shape[2]
    shape = (*group, channels, patch, w.weight.shape[1])
    return per_video, (*size, groups_h, groups_w), shape


def parameters(w: HeadWeights) -> tuple[torch.Tensor, ...]:
    return tuple(one.contiguous() for one in w)


def size_of(video: torch.Tensor) -> tuple[int, int, int]:
    return video.shape[2], video.shape[3], video.shape[4]
