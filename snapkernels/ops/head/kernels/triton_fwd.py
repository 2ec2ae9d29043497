"""head and head_mix in Triton.

A program takes BLOCK_M tokens of one video, and reads them twice: for mean and variance, and, then
out of L2, for the product. To hold them in between takes the registers of all other programs, or
fewer tokens and with that more of W for each. What the product makes goes to its pixels, through
the mixture; where a gradient is wanted, it is kept as the tokens' features too, for the backward to
read instead of making it again.

Legend: as in triton_parts.py.
"""

import torch
import triton
import triton.language as tl

from snapkernels.ops.head.config import TRITON_STAGES, TRITON_WARPS, triton_blocks
from snapkernels.ops.head.kernels.triton_parts import (
    corners,
    features,
    geometry,
    load_pixels,
    load_terms,
    parameters,
    pixels,
    program_tokens,
    size_of,
    store_features,
)
from snapkernels.ops.head.weights import HeadWeights

Saving = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@triton.jit
def head_kernel(
    p_tokens,
    p_norm_weight,
    p_norm_bias,
    p_weight,
    p_bias,
    p_F,
    p_features,
    p_moments,
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
    SAVE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_P: tl.constexpr,
    SLICE: tl.constexpr,
):
    FEATURES: tl.constexpr = CHANNELS * PATCH * PATCH
    b, n_M = program_tokens(tokens, BLOCK_M)
    mean_M, rstd_M, F_MP = features(
        p_tokens + b * tokens * DIM, n_M, tokens, p_norm_weight, p_norm_bias, p_weight, p_bias,
        FEATURES, DIM, EPS, BLOCK_M, BLOCK_P, SLICE,
    )  # fmt: skip
    if SAVE:
        save(F_MP, mean_M, rstd_M, p_features, p_moments, b, n_M, tokens, FEATURES)

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
    p_features,
    p_moments,
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
    SAVE: tl.constexpr,
    HAS_OTHER: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_P: tl.constexpr,
    SLICE: tl.constexpr,
):
    FEATURES: tl.constexpr = CHANNELS * PATCH * PATCH
    b, n_M = program_tokens(tokens, BLOCK_M)
    mean_M, rstd_M, F_MP = features(
        p_tokens + b * tokens * DIM, n_M, tokens, p_norm_weight, p_norm_bias, p_weight, p_bias,
        FEATURES, DIM, EPS, BLOCK_M, BLOCK_P, SLICE,
    )  # fmt: skip
    if SAVE:
        save(F_MP, mean_M, rstd_M, p_features, p_moments, b, n_M, tokens, FEATURES)

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
def save(F_MP, mean_M, rstd_M, p_features, p_moments, b, n_M, tokens, FEATURES: tl.constexpr):
    """F of every token, and (mean, rstd) of it; of those too whose pixels are cropped."""
    t_M, m_M = b * tokens + n_M, n_M < tokens
    store_features(p_features, F_MP, t_M, m_M, FEATURES)
    p_M2 = p_moments + t_M[:, None] * 2 + tl.arange(0, 2)[None, :]
    tl.store(p_M2, tl.join(mean_M, rstd_M), mask=m_M[:, None])


def head(
    tokens: torch.Tensor,
    w: HeadWeights,
    size: tuple[int, int, int],
    patch: int,
    group: tuple[int, int, int],
    eps: float,
) -> torch.Tensor:
    return _head(tokens, w, size, patch, group, eps, None)


def head_saving(
    tokens: torch.Tensor,
    w: HeadWeights,
    size: tuple[int, int, int],
    patch: int,
    group: tuple[int, int, int],
    eps: float,
) -> Saving:
    """F, and the features and moments of the tokens."""
    saved = _to_save(tokens, w)
    return _head(tokens, w, size, patch, group, eps, saved), *saved


def _head(
    tokens: torch.Tensor,
    w: HeadWeights,
    size: tuple[int, int, int],
    patch: int,
    group: tuple[int, int, int],
    eps: float,
    saved: tuple[torch.Tensor, torch.Tensor] | None,
) -> torch.Tensor:
    batch, channels = len(tokens), w.weight.shape[0] // patch**2
    F = tokens.new_empty((batch, channels, *size), dtype=torch.float32)
    if not F.numel():
        return F
    per_video, sizes, shape = geometry(tokens, w, size, patch, group)
    blocks = triton_blocks(tokens, w.weight)
    with torch.cuda.device_of(tokens):  # Triton launches on the current device
        head_kernel[(batch * triton.cdiv(per_video, blocks.m),)](
            tokens.contiguous(),
            *parameters(w),
            F,
            *(saved or (F, F)),
            per_video,
            *sizes,
            *shape,
            eps,
            saved is not None,
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
    return _head_mix(tokens, video, other, mix, w, patch, group, eps, None)


def head_mix_saving(
    tokens: torch.Tensor,
    video: torch.Tensor,
    other: torch.Tensor | None,
    mix: torch.Tensor,
    w: HeadWeights,
    patch: int,
    group: tuple[int, int, int],
    eps: float,
) -> Saving:
    """The mixture, and the features and moments of the tokens."""
    saved = _to_save(tokens, w)
    return _head_mix(tokens, video, other, mix, w, patch, group, eps, saved), *saved


def _head_mix(
    tokens: torch.Tensor,
    video: torch.Tensor,
    other: torch.Tensor | None,
    mix: torch.Tensor,
    w: HeadWeights,
    patch: int,
    group: tuple[int, int, int],
    eps: float,
    saved: tuple[torch.Tensor, torch.Tensor] | None,
) -> torch.Tensor:
    mixed = torch.empty(video.shape, dtype=torch.float32, device=video.device)
    if not mixed.numel():
        return mixed
    per_video, sizes, shape = geometry(tokens, w, size_of(video), patch, group)
    blocks = triton_blocks(tokens, w.weight)
    with torch.cuda.device_of(tokens):
        head_mix_kernel[(len(tokens) * triton.cdiv(per_video, blocks.m),)](
            tokens.contiguous(),
            *parameters(w),
            video.contiguous(),
            (video if other is None else other).contiguous(),
            mix.contiguous(),
            mixed,
            *(saved or (mixed, mixed)),
            per_video,
            *sizes,
            *shape,
            eps,
            saved is not None,
            other is not None,
            *blocks,
            num_warps=TRITON_WARPS,
            num_stages=TRITON_STAGES,
        )
    return mixed


def _to_save(tokens: torch.Tensor, w: HeadWeights) -> tuple[torch.Tensor, torch.Tensor]:
    """Room for the features and moments of `tokens`."""
    places = tokens.shape[:3]
    features = tokens.new_empty((*places, len(w.bias)))
    return features, tokens.new_empty((*places, 2), dtype=torch.float32)
