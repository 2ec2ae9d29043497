"""head, head_mix and head_loss in Triton.

A program takes BLOCK_M tokens of one video, and reads them twice: for mean and variance, and, then
out of L2, for the product. To hold them in between takes the registers of all other programs, or
fewer tokens and with that more of W for each. What the product makes is never written as tokens:
every feature goes to its pixel, through the mixture or into the sum of the loss.

Legend: b video, m token of a program, s column of a slice, p = (c, i, j) feature of a patch, by
channel, pixel row and pixel column, padded to BLOCK_P; k = (c, i). t frame, h row of patches, w
column of patches, y row of pixels. D width of a token. F the network's output.
"""

import torch
import triton
import triton.language as tl

from snapkernels.ops.head.config import (
    TRITON_STAGES,
    TRITON_STATS_COLUMNS,
    TRITON_WARPS,
    triton_blocks,
)
from snapkernels.ops.head.weights import HeadWeights
from snapkernels.patches import PatchLayout
from snapkernels.philox_triton import philox_normals

STATS = tl.constexpr(TRITON_STATS_COLUMNS)


@triton.jit
def head_kernel(
    p_tokens,
    p_norm_weight,
    p_norm_bias,
    p_weight,
    p_bias,
    p_F,
    tokens,
    frames,
    height,
    width,
    groups_h,
    groups_w,
    GROUP_T: tl.constexpr,
    GROUP_H: tl.constexpr,
    GROUP_W: tl.constexpr,
    CHANNELS: tl.constexpr,
    PATCH: tl.constexpr,
    DIM: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_P: tl.constexpr,
    SLICE: tl.constexpr,
):
    FEATURES: tl.constexpr = CHANNELS * PATCH * PATCH
    b, n_M = program_tokens(tokens, BLOCK_M)
    p_tokens += b * tokens * DIM
    mean_M, rstd_M = statistics(p_tokens, n_M, tokens, DIM, EPS, BLOCK_M)
    F_MP = product(
        p_tokens, n_M, tokens, mean_M, rstd_M, p_norm_weight, p_norm_bias, p_weight, FEATURES,
        DIM, BLOCK_M, BLOCK_P, SLICE,
    )  # fmt: skip
    F_MP += load_vector(p_bias, 0, FEATURES, BLOCK_P)[None, :]

    corner_M, h_M = corners(
        n_M, height, width, groups_h, groups_w, GROUP_T, GROUP_H, GROUP_W, PATCH
    )
    at_MP, m_MP = pixels(
        n_M, corner_M, h_M, tokens, frames, height, width, CHANNELS, PATCH, BLOCK_P
    )
    elements = tl.cast(frames, tl.int64) * height * width * CHANNELS
    tl.store(p_F + b * elements + at_MP, F_MP, mask=m_MP)


@triton.jit
def head_mix_kernel(
    p_tokens,
    p_norm_weight,
    p_norm_bias,
    p_weight,
    p_bias,
    p_video,
    p_other,
    p_mix,
    p_mixed,
    tokens,
    frames,
    height,
    width,
    groups_h,
    groups_w,
    GROUP_T: tl.constexpr,
    GROUP_H: tl.constexpr,
    GROUP_W: tl.constexpr,
    CHANNELS: tl.constexpr,
    PATCH: tl.constexpr,
    DIM: tl.constexpr,
    EPS: tl.constexpr,
    HAS_OTHER: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_P: tl.constexpr,
    SLICE: tl.constexpr,
):
    FEATURES: tl.constexpr = CHANNELS * PATCH * PATCH
    b, n_M = program_tokens(tokens, BLOCK_M)
    p_tokens += b * tokens * DIM
    mean_M, rstd_M = statistics(p_tokens, n_M, tokens, DIM, EPS, BLOCK_M)
    F_MP = product(
        p_tokens, n_M, tokens, mean_M, rstd_M, p_norm_weight, p_norm_bias, p_weight, FEATURES,
        DIM, BLOCK_M, BLOCK_P, SLICE,
    )  # fmt: skip
    F_MP += load_vector(p_bias, 0, FEATURES, BLOCK_P)[None, :]

    corner_M, h_M = corners(
        n_M, height, width, groups_h, groups_w, GROUP_T, GROUP_H, GROUP_W, PATCH
    )
    at_MP, m_MP = pixels(
        n_M, corner_M, h_M, tokens, frames, height, width, CHANNELS, PATCH, BLOCK_P
    )
    at_MP += b * (tl.cast(frames, tl.int64) * height * width * CHANNELS)
    of_F, of_video, of_other = load_terms(p_mix, b)
    mixed_MP = of_F * F_MP + of_video * load_pixels(p_video, at_MP, m_MP)
    if HAS_OTHER:
        mixed_MP += of_other * load_pixels(p_other, at_MP, m_MP)
    tl.store(p_mixed + at_MP, mixed_MP, mask=m_MP)


@triton.jit
def head_loss_kernel(
    p_tokens,
    p_norm_weight,
    p_norm_bias,
    p_weight,
    p_bias,
    p_video,
    p_sample,
    p_terms,
    p_partials,
    seed_lo,
    seed_hi,
    tokens,
    frames,
    height,
    width,
    groups_h,
    groups_w,
    GROUP_T: tl.constexpr,
    GROUP_H: tl.constexpr,
    GROUP_W: tl.constexpr,
    CHANNELS: tl.constexpr,
    PATCH: tl.constexpr,
    DIM: tl.constexpr,
    EPS: tl.constexpr,
    IN_FOURS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_P: tl.constexpr,
    SLICE: tl.constexpr,
):
    FEATURES: tl.constexpr = CHANNELS * PATCH * PATCH
    b, n_M = program_tokens(tokens, BLOCK_M)
    p_tokens += b * tokens * DIM
    mean_M, rstd_M = statistics(p_tokens, n_M, tokens, DIM, EPS, BLOCK_M)
    F_MP = product(
        p_tokens, n_M, tokens, mean_M, rstd_M, p_norm_weight, p_norm_bias, p_weight, FEATURES,
        DIM, BLOCK_M, BLOCK_P, SLICE,
    )  # fmt: skip
    F_MP += load_vector(p_bias, 0, FEATURES, BLOCK_P)[None, :]

    corner_M, h_M = corners(
        n_M, height, width, groups_h, groups_w, GROUP_T, GROUP_H, GROUP_W, PATCH
    )
    at_MP, m_MP = pixels(
        n_M, corner_M, h_M, tokens, frames, height, width, CHANNELS, PATCH, BLOCK_P
    )
    elements = tl.cast(frames, tl.int64) * height * width * CHANNELS
    eps_MP = noise(
        seed_lo, seed_hi, tl.load(p_sample + b), corner_M, at_MP, frames, height, width, PATCH,
        IN_FOURS, BLOCK_P,
    )  # fmt: skip
    weight, of_video, of_eps = load_terms(p_terms, b)
    video_MP = load_pixels(p_video + b * elements, at_MP, m_MP)
    error_MP = F_MP - (of_video * video_MP + of_eps * eps_MP)
    loss_MP = tl.where(m_MP, weight * error_MP * error_MP, 0.0)
    tl.store(p_partials + tl.program_id(0), tl.sum(tl.sum(loss_MP, axis=1), axis=0))


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
def noise(
    seed_lo,
    seed_hi,
    sample,
    corner_M,
    at_MP,
    frames,
    height,
    width,
    PATCH: tl.constexpr,
    IN_FOURS: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """The normals of the pixels at `at_MP`, four of which share a counter.

    Where a patch's row of pixels is such a four, one counter serves a row; elsewhere each pixel
    draws its four and takes one.
    """
    # A word's width depends on its value otherwise, and a 1 would be a constant.
    seed_lo, seed_hi = tl.cast(seed_lo, tl.uint32), tl.cast(seed_hi, tl.uint32)
    if IN_FOURS:
        k_K = tl.arange(0, BLOCK_P // 4)
        at_K = (k_K // PATCH).to(tl.int64) * frames * height * width + k_K % PATCH * width
        row_MK = (corner_M[:, None] + at_K[None, :]) // 4
        z0, z1, z2, z3 = philox_normals(seed_lo, seed_hi, row_MK, sample)
        # (M, K, 2, 2) of [[z0, z1], [z2, z3]], so that the last two axes are j.
        eps_MK22 = tl.join(tl.join(z0, z2), tl.join(z1, z3))
        eps_MP = tl.reshape(eps_MK22, (z0.shape[0], BLOCK_P))
    else:
        z0, z1, z2, z3 = philox_normals(seed_lo, seed_hi, at_MP // 4, sample)
        nth_MP = at_MP % 4
        eps_MP = tl.where(nth_MP < 2, tl.where(nth_MP == 0, z0, z1), tl.where(nth_MP == 2, z2, z3))
    return eps_MP


def head(
    tokens: torch.Tensor,
    w: HeadWeights,
    size: tuple[int, int, int],
    patch: int,
    group: tuple[int, int, int],
    eps: float,
) -> torch.Tensor:
    batch, channels = len(tokens), w.weight.shape[0] // patch**2
    F = tokens.new_empty((batch, channels, *size), dtype=torch.float32)
    if not F.numel():
        return F
    per_video, sizes, shape = geometry(tokens, w, size, patch, group, eps)
    blocks = triton_blocks(tokens, w.weight)
    with torch.cuda.device_of(tokens):  # Triton launches on the current device
        head_kernel[(batch * triton.cdiv(per_video, blocks.m),)](
            tokens.contiguous(),
            *parameters(w),
            F,
            per_video,
            *sizes,
            *shape,
            *blocks,
            num_warps=TRITON_WARPS,
            num_stages=TRITON_STAGES,
        )
    return F


def head_mix(
    tokens: torch.Tensor,
    video: torch.Tensor,
    other: torch.Tensor | None,
    mix: torch.Tensor,
    w: HeadWeights,
    patch: int,
    group: tuple[int, int, int],
    eps: float,
) -> torch.Tensor:
    mixed = torch.empty(video.shape, dtype=torch.float32, device=video.device)
    if not mixed.numel():
        return mixed
    per_video, sizes, shape = geometry(tokens, w, size_of(video), patch, group, eps)
    blocks = triton_blocks(tokens, w.weight)
    with torch.cuda.device_of(tokens):
        head_mix_kernel[(len(tokens) * triton.cdiv(per_video, blocks.m),)](
            tokens.contiguous(),
            *parameters(w),
            video.contiguous(),
            (video if other is None else other).contiguous(),
            mix.contiguous(),
            mixed,
            per_video,
            *sizes,
            *shape,
            other is not None,
            *blocks,
            num_warps=TRITON_WARPS,
            num_stages=TRITON_STAGES,
        )
    return mixed


def head_loss(
    tokens: torch.Tensor,
    video: torch.Tensor,
    sample: torch.Tensor,
    terms: torch.Tensor,
    w: HeadWeights,
    seed: int,
    patch: int,
    group: tuple[int, int, int],
    eps: float,
) -> torch.Tensor:
    if not video.numel():
        return tokens.new_full((), torch.nan, dtype=torch.float32)
    per_video, sizes, shape = geometry(tokens, w, size_of(video), patch, group, eps)
    blocks = triton_blocks(tokens, w.weight)
    programs = len(tokens) * triton.cdiv(per_video, blocks.m)
    partials = tokens.new_empty(programs, dtype=torch.float32)
    with torch.cuda.device_of(tokens):
        head_loss_kernel[(programs,)](
            tokens.contiguous(),
            *parameters(w),
            video.contiguous(),
            sample.contiguous(),
            terms.contiguous(),
            partials,
            seed & 0xFFFFFFFF,
            seed >> 32,
            per_video,
            *sizes,
            *shape,
            patch == 4 and video.shape[4] % 4 == 0,  # a patch's row of pixels is one block of noise
            *blocks,
            num_warps=TRITON_WARPS,
            num_stages=TRITON_STAGES,
        )
    return partials.sum() / video.numel()


def geometry(
    tokens: torch.Tensor,
    w: HeadWeights,
    size: tuple[int, int, int],
    patch: int,
    group: tuple[int, int, int],
    eps: float,
) -> tuple[int, tuple[int, ...], tuple[int | float, ...]]:
    """Tokens of a video, and what every kernel is told of sizes: at its call, and as constants."""
    _, groups_h, groups_w = PatchLayout.padded(size, patch, group).groups
    channels = w.weight.shape[0] // patch**2
    per_video = tokens.shape[1] * tokens.shape[2]
    shape = (*group, channels, patch, tokens.shape[-1], eps)
    return per_video, (*size, groups_h, groups_w), shape


def parameters(w: HeadWeights) -> tuple[torch.Tensor, ...]:
    return tuple(one.contiguous() for one in w)


def size_of(video: torch.Tensor) -> tuple[int, int, int]:
    return video.shape[2], video.shape[3], video.shape[4]
