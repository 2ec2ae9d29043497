"""head_loss in Triton: as triton_fwd.py, with the sum of the loss where that has pixels.

Neither F nor the target is stored. Where a gradient is wanted, its features are: the loss knows
them up to a factor, which the backward has.

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
    row_sums,
    size_of,
    store_features,
    store_rows,
)
from snapkernels.ops.head.kernels.triton_rows import norm_products
from snapkernels.ops.head.weights import HeadWeights
from snapkernels.philox_triton import philox_normals


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
    p_gain,
    p_shift,
    p_feature_grad,
    p_rows,
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
    SAVE: tl.constexpr,
    IN_FOURS: tl.constexpr,
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

    if SAVE:
        # Without the mean's 2 / elements, which would be among the smallest numbers of float16.
        dF_MP = tl.where(m_MP, weight * error_MP, 0.0).to(p_feature_grad.dtype.element_ty)
        c1_M, c2_M = row_sums(dF_MP, F_MP, p_gain, p_shift, FEATURES)
        t_M, m_M = b * tokens + n_M, n_M < tokens
        store_features(p_feature_grad, dF_MP, t_M, m_M, FEATURES)
        store_rows(p_rows, t_M, m_M, mean_M, rstd_M, c1_M / DIM, c2_M / DIM)


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
    return _head_loss(tokens, video, sample, terms, w, seed, patch, group, eps, None)


def head_loss_saving(
    tokens: torch.Tensor,
    video: torch.Tensor,
    sample: torch.Tensor,
    terms: torch.Tensor,
    w: HeadWeights,
    seed: int,
    patch: int,
    group: tuple[int, int, int],
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The loss, and the gradient at the features and the rows of the tokens."""
    places = tokens.shape[:3]
    feature_grad = tokens.new_empty((*places, len(w.bias)))
    saved = feature_grad, tokens.new_empty((*places, 4), dtype=torch.float32)
    return _head_loss(tokens, video, sample, terms, w, seed, patch, group, eps, saved), *saved


def _head_loss(
    tokens: torch.Tensor,
    video: torch.Tensor,
    sample: torch.Tensor,
    terms: torch.Tensor,
    w: HeadWeights,
    seed: int,
    patch: int,
    group: tuple[int, int, int],
    eps: float,
    saved: tuple[torch.Tensor, torch.Tensor] | None,
) -> torch.Tensor:
    if not video.numel():
        return tokens.new_full((), torch.nan, dtype=torch.float32)
    per_video, sizes, shape = geometry(tokens, w, size_of(video), patch, group)
    blocks = triton_blocks(tokens, w.weight)
    programs = len(tokens) * triton.cdiv(per_video, blocks.m)
    partials = tokens.new_empty(programs, dtype=torch.float32)
    of_saved = (*norm_products(w), *saved) if saved else (partials,) * 4
    with torch.cuda.device_of(tokens):
        head_loss_kernel[(programs,)](
            tokens.contiguous(),
            *parameters(w),
            video.contiguous(),
            sample.contiguous(),
            terms.contiguous(),
            partials,
            *of_saved,
            seed & 0xFFFFFFFF,
            seed >> 32,
            per_video,
            *sizes,
            *shape,
            eps,
            saved is not None,
            patch == 4 and video.shape[4] % 4 == 0,  # a patch's row of pixels is one block of noise
            *blocks,
            num_warps=TRITON_WARPS,
            num_stages=TRITON_STAGES,
        )
    return partials.sum() / video.numel()
