"""The stem in Triton, for any strides, patch and group.

A program takes a tile of tokens whole, so that the mean and the centred squares of a row are sums
over registers; the features of its patches are gathered a few columns at a time.

Legend: M tokens of a tile, D width of a token, F features of a patch (K some of them), padded to
powers of two; b video, t frame, y and x pixel.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from snapkernels.ops.stem import config
from snapkernels.ops.stem.weights import StemWeights
from snapkernels.patches import PatchLayout


@triton.jit
def stem_fwd_kernel(
    p_video,
    p_scale,
    p_low,
    p_weight,
    p_bias,
    p_norm_weight,
    p_norm_bias,
    p_positions,
    p_tokens,
    p_rstd,
    tokens,
    tables,
    frames,
    height,
    width,
    low_height,
    low_width,
    groups_h,
    groups_w,
    group_t,
    group_h,
    group_w,
    CHANNELS: tl.constexpr,
    LOW_CHANNELS: tl.constexpr,
    PATCH: tl.constexpr,
    DIM: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    FEATURES: tl.constexpr = (CHANNELS + LOW_CHANNELS) * PATCH * PATCH
    size = (frames, height, width, low_height, low_width)
    token_M = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    m_M = token_M < tokens
    at = place_of(token_M, frames, groups_h, groups_w, group_t, group_h, group_w)
    d_D = tl.arange(0, BLOCK_D)
    m_D = d_D < DIM

    y_MD = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for k0 in range(0, FEATURES, BLOCK_K):
        f_K = k0 + tl.arange(0, BLOCK_K)
        m_K = f_K < FEATURES
        x_MK = features_of(
            p_video, p_scale, p_low, at, m_M, f_K, size, CHANNELS, LOW_CHANNELS, PATCH
        )
        p_KD = p_weight + f_K[:, None] + d_D[None, :] * FEATURES
        w_KD = tl.load(p_KD, mask=m_K[:, None] & m_D[None, :], other=0)
        y_MD = tl.dot(x_MK.to(w_KD.dtype), w_KD, y_MD, input_precision="ieee")
    y_MD += tl.load(p_bias + d_D, mask=m_D, other=0).to(tl.float32)[None, :]

    mean_M = tl.sum(y_MD, 1) / DIM
    centred_MD = tl.where(m_D[None, :], y_MD - mean_M[:, None], 0.0)
    rstd_M = 1 / tl.sqrt(tl.sum(centred_MD * centred_MD, 1) / DIM + EPS)
    tl.store(p_rstd + token_M, rstd_M, mask=m_M)

    # Each operand is loaded where it is used: together they would not fit in registers.
    out_MD = centred_MD * rstd_M[:, None]
    out_MD *= tl.load(p_norm_weight + d_D, mask=m_D, other=0).to(tl.float32)[None, :]
    out_MD += tl.load(p_norm_bias + d_D, mask=m_D, other=0).to(tl.float32)[None, :]
    groups, per_group = frames // group_t * groups_h * groups_w, group_t * group_h * group_w
    group_M, n_M = token_M // per_group % groups, token_M % per_group
    row_M = (group_M % tables * per_group + n_M).to(tl.int64)
    m_MD = m_M[:, None] & m_D[None, :]
    p_MD = p_positions + (row_M * DIM)[:, None] + d_D[None, :]
    out_MD += tl.load(p_MD, mask=m_MD, other=0).to(tl.float32)
    p_MD = p_tokens + (token_M.to(tl.int64) * DIM)[:, None] + d_D[None, :]
    tl.store(p_MD, out_MD, mask=m_MD)


@triton.jit
def place_of(token_M, frames, groups_h, groups_w, group_t, group_h, group_w):
    """Video, frame, and row and column of patches of every token."""
    per_group = group_t * group_h * group_w
    group_M, n_M = token_M // per_group, token_M % per_group
    groups = frames // group_t * groups_h * groups_w
    b_M, group_M = group_M // groups, group_M % groups
    t_M = group_M // (groups_h * groups_w) * group_t + n_M // (group_h * group_w)
    row_M = group_M // groups_w % groups_h * group_h + n_M // group_w % group_h
    column_M = group_M % groups_w * group_w + n_M % group_w
    return b_M, t_M, row_M, column_M


@triton.jit
def pixels_of(at, m_M, f_F, size, CHANNELS: tl.constexpr, PATCH: tl.constexpr):
    """Where the video has the pixel of every feature, int64, and which features are its pixels."""
    b_M, t_M, row_M, column_M = at
    frames, height, width, _, _ = size
    y_MF = row_M[:, None] * PATCH + (f_F // PATCH % PATCH)[None, :]
    x_MF = column_M[:, None] * PATCH + (f_F % PATCH)[None, :]
    frame_M = (b_M * CHANNELS * frames + t_M).to(tl.int64)
    frame_F = (f_F // (PATCH * PATCH) * frames).to(tl.int64)
    pixels = height * width
    at_MF = (frame_M * pixels)[:, None] + (frame_F * pixels)[None, :] + y_MF * width + x_MF
    m_MF = m_M[:, None] & (f_F < CHANNELS * PATCH * PATCH)[None, :] & (y_MF < height)
    return at_MF, m_MF


@triton.jit
def features_of(
    p_video,
    p_scale,
    p_low,
    at,
    m_M,
    f_F,
    size,
    CHANNELS: tl.constexpr,
    LOW_CHANNELS: tl.constexpr,
    PATCH: tl.constexpr,
):
    """Features f of the tokens' patches in float32: pixels times their scale, then low_res read.

    They are zero below the last row of pixels, and from the last feature on.
    """
    at_MF, m_MF = pixels_of(at, m_M, f_F, size, CHANNELS, PATCH)
    scale_M = tl.load(p_scale + at[0], mask=m_M, other=0).to(tl.float32)
    pixel_MF = tl.load(p_video + at_MF, mask=m_MF, other=0).to(tl.float32)
    x_MF = tl.where(m_MF, pixel_MF * scale_M[:, None], 0.0)  # a scale may be infinite
    if LOW_CHANNELS > 0:
        low_F = f_F - CHANNELS * PATCH * PATCH
        x_MF += _bilinear(p_low, at, m_M, low_F, size, LOW_CHANNELS, PATCH)
    return x_MF


@triton.jit
def _bilinear(p_low, at, m_M, f_F, size, LOW_CHANNELS: tl.constexpr, PATCH: tl.constexpr):
    """low_res at the pixels of features f of its own, with half-pixel centres; elsewhere zero."""
    b_M, t_M, row_M, column_M = at
    frames, height, width, low_height, low_width = size
    y_MF = row_M[:, None] * PATCH + (f_F // PATCH % PATCH)[None, :]
    x_MF = column_M[:, None] * PATCH + (f_F % PATCH)[None, :]
    m_F = (f_F >= 0) & (f_F < LOW_CHANNELS * PATCH * PATCH)
    m_MF = m_M[:, None] & m_F[None, :] & (y_MF < height)
    y0_MF, y1_MF, down_MF = _corners(y_MF, low_height, height)
    x0_MF, x1_MF, right_MF = _corners(x_MF, low_width, width)

    frame_M = (b_M * LOW_CHANNELS * frames + t_M).to(tl.int64)
    frame_F = (f_F // (PATCH * PATCH) * frames).to(tl.int64)
    pixels = low_height * low_width
    p_MF = p_low + (frame_M * pixels)[:, None] + (frame_F * pixels)[None, :]
    above_MF = _between(p_MF + y0_MF * low_width, x0_MF, x1_MF, right_MF, m_MF)
    below_MF = _between(p_MF + y1_MF * low_width, x0_MF, x1_MF, right_MF, m_MF)
    return tl.where(m_MF, above_MF * (1 - down_MF) + below_MF * down_MF, 0.0)


@triton.jit
def _corners(at_MF, length, full):
    """The two neighbours, among `length`, of places in `full`, and the second's share.

    (at + 1/2) length / full - 1/2 as a fraction over 2 full, so that no place is rounded.
    """
    source_MF = tl.maximum((2 * at_MF + 1) * length - full, 0)
    first_MF = source_MF // (2 * full)
    share_MF = (source_MF - first_MF * (2 * full)).to(tl.float32) / (2 * full).to(tl.float32)
    return first_MF, tl.minimum(first_MF + 1, length - 1), share_MF


@triton.jit
def _between(p_MF, x0_MF, x1_MF, right_MF, m_MF):
    first_MF = tl.load(p_MF + x0_MF, mask=m_MF, other=0).to(tl.float32)
    second_MF = tl.load(p_MF + x1_MF, mask=m_MF, other=0).to(tl.float32)
    return first_MF * (1 - right_MF) + second_MF * right_MF


class VideoCall(NamedTuple):
    """What the kernels are told of the videos: tensors, sizes, and the constants of a patch."""

    tensors: tuple[torch.Tensor, ...]
    geometry: tuple[int, ...]
    channels: tuple[int, int, int]
    groups: tuple[int, int, int]  # videos, groups of one, patches of a group


def stem(
    video: torch.Tensor,
    scale: torch.Tensor,
    low_res: torch.Tensor | None,
    w: StemWeights,
    patch: int,
    group: tuple[int, int, int],
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    told, dim = video_call(video, scale, low_res, patch, group), len(w.weight)
    out = w.weight.new_empty((*told.groups, dim))
    rstd = w.weight.new_empty(told.groups, dtype=torch.float32)
    if not out.numel():
        return out, rstd
    block_d = max(16, triton.next_power_of_2(dim))
    divisor = share(w.weight)
    block_m = min(config.TRITON_MOST_TOKENS, max(16, config.TRITON_TILE // divisor // block_d))
    warps = divisor * block_m * block_d // (32 * config.TRITON_ACCUMULATORS)
    with torch.cuda.device_of(video):  # Triton launches on the current device
        stem_fwd_kernel[(triton.cdiv(rstd.numel(), block_m),)](
            *told.tensors,
            *(one.contiguous() for one in w),
            out,
            rstd,
            rstd.numel(),
            len(w.positions),
            *told.geometry,
            *told.channels,
            dim,
            eps,
            block_m,
            block_d,
            config.TRITON_STEP_FEATURES,
            num_warps=min(config.TRITON_MOST_WARPS, max(4, warps)),
            num_stages=config.TRITON_STAGES,
        )
    return out, rstd


def share(tensor: torch.Tensor) -> int:
    """What tiles are divided by: products of float32 are not the tensor cores'."""
    return config.TRITON_FP32_SHARE if tensor.dtype == torch.float32 else 1


def video_call(
    video: torch.Tensor,
    scale: torch.Tensor,
    low_res: torch.Tensor | None,
    patch: int,
    group: tuple[int, int, int],
) -> VideoCall:
    batch, channels, t, h, w = video.shape
    layout = PatchLayout.padded((t, h, w), patch, group)
    low = video if low_res is None else low_res
    low_channels = 0 if low_res is None else low_res.shape[1]
    return VideoCall(
        tensors=(video.contiguous(), scale.contiguous(), low.contiguous()),
        geometry=(t, h, w, *low.shape[3:], *layout.groups[1:], *group),
        channels=(channels, low_channels, patch),
        groups=(batch, layout.num_groups, layout.group_tokens),
    )
