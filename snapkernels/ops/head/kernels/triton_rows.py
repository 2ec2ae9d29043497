"""What the backward needs of every token besides the token, in Triton: dF and its row.

dF is the gradient at the token's features, gathered from its pixels. Its row is (mean, rstd, c1,
c2), with which a token's gradient is, column by column of D and without a sum over D,

    dtokens = rstd (norm_weight (dF W) - c1 - xhat c2),    xhat = (x - mean) rstd
    c1 = mean over D of norm_weight (dF W)                  = dF . (W norm_weight) / D
    c2 = mean over D of norm_weight (dF W) xhat             = dF . (F - bias - W norm_bias) / D

since F is linear in LayerNorm's output. So the pass over the tokens may be cut along D.

Legend: as in triton_parts.py; k = (i, j) feature of one channel of a patch, padded to BLOCK_K.
"""

import torch
import triton
import triton.language as tl

from snapkernels.ops.head.config import (
    TRITON_ROW_TOKENS,
    TRITON_ROW_WARPS,
    TRITON_VECTOR_COLUMNS,
    power_of_two,
)
from snapkernels.ops.head.kernels.triton_parts import (
    corners,
    geometry,
    load_pixels,
    load_terms,
    load_vector,
    parameters,
    pixels,
    program_tokens,
    row_sums,
    store_rows,
)
from snapkernels.ops.head.weights import HeadWeights


@triton.jit
def norm_products_kernel(
    p_norm_weight,
    p_norm_bias,
    p_weight,
    p_bias,
    p_gain,
    p_shift,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """W norm_weight and bias + W norm_bias of one feature."""
    p = tl.program_id(0)
    gain_S = tl.zeros((BLOCK,), tl.float32)
    shift_S = tl.zeros((BLOCK,), tl.float32)
    for d in tl.range(0, DIM, BLOCK):
        weight_S = load_vector(p_weight + p * DIM, d, DIM, BLOCK)
        gain_S += weight_S * load_vector(p_norm_weight, d, DIM, BLOCK)
        shift_S += weight_S * load_vector(p_norm_bias, d, DIM, BLOCK)
    tl.store(p_gain + p, tl.sum(gain_S, axis=0))
    tl.store(p_shift + p, tl.load(p_bias + p).to(tl.float32) + tl.sum(shift_S, axis=0))


@triton.jit
def head_rows_kernel(
    p_grad,
    p_mix,
    p_features,
    p_moments,
    p_gain,
    p_shift,
    p_dF,
    p_rows,
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
    MIXED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """dF and rows of BLOCK_M tokens of one video, channel by channel.

    The pixels of a channel of neighbouring patches are whole lines of a cache, and no lane is left
    for the features that three channels lack to a power of two.
    """
    FEATURES: tl.constexpr = CHANNELS * PATCH * PATCH
    width = width // PATCH * PATCH  # changes nothing but that a row of a patch is one vector
    b, n_M = program_tokens(tokens, BLOCK_M)
    t_M, m_M = b * tokens + n_M, n_M < tokens
    corner_M, h_M = corners(
        n_M, height, width, groups_h, groups_w, GROUP_T, GROUP_H, GROUP_W, PATCH
    )
    at_MK, m_MK = pixels(n_M, corner_M, h_M, tokens, frames, height, width, 1, PATCH, BLOCK_K)
    k_K = tl.arange(0, BLOCK_K)
    kept_MK = t_M[:, None] * FEATURES + k_K[None, :]
    m_kept_MK = m_M[:, None] & (k_K < PATCH * PATCH)[None, :]
    channel = tl.cast(frames, tl.int64) * height * width
    p_grad += b * CHANNELS * channel
    c1_M = tl.zeros((BLOCK_M,), tl.float32)
    c2_M = tl.zeros((BLOCK_M,), tl.float32)
    for c in tl.static_range(CHANNELS):
        first = c * PATCH * PATCH
        dF_MK = load_pixels(p_grad + c * channel, at_MK, m_MK)
        if MIXED:
            of_F, _, _ = load_terms(p_mix, b)
            dF_MK *= of_F
        dF_MK = dF_MK.to(p_dF.dtype.element_ty)
        tl.store(p_dF + first + kept_MK, dF_MK, mask=m_kept_MK)
        F_MK = tl.load(p_features + first + kept_MK, mask=m_kept_MK, other=0.0).to(tl.float32)
        of_gain_M, of_F_M = row_sums(dF_MK, F_MK, p_gain + first, p_shift + first, PATCH * PATCH)
        c1_M += of_gain_M
        c2_M += of_F_M
    mean_M = tl.load(p_moments + t_M * 2, mask=m_M, other=0.0)
    rstd_M = tl.load(p_moments + t_M * 2 + 1, mask=m_M, other=0.0)
    store_rows(p_rows, t_M, m_M, mean_M, rstd_M, c1_M / DIM, c2_M / DIM)


def norm_products(w: HeadWeights) -> tuple[torch.Tensor, torch.Tensor]:
    """W norm_weight and bias + W norm_bias, (P,) float32 each."""
    count, width = w.weight.shape
    gain, shift = (w.weight.new_empty(count, dtype=torch.float32) for _ in range(2))
    with torch.cuda.device_of(gain):  # Triton launches on the current device
        norm_products_kernel[(count,)](
            *parameters(w), gain, shift, width, min(power_of_two(width), TRITON_VECTOR_COLUMNS)
        )
    return gain, shift


def rows_of_pixels(
    grad: torch.Tensor,
    mix: torch.Tensor | None,
    features: torch.Tensor,
    moments: torch.Tensor,
    w: HeadWeights,
    size: tuple[int, int, int],
    patch: int,
    group: tuple[int, int, int],
) -> tuple[torch.Tensor, torch.Tensor]:
    """dF in the dtype of `features`, (B, G, N, P), and the rows, (B, G, N, 4) float32.

    Args:
        grad: (B, C, T, H, W), float32, at least one video: the gradient of F or, with `mix`, of a
            mixture with F.
        mix: (B, 3), of which the first is F's factor, or None.
        features, moments: what the forward saved.
        size: (T, H, W) of the video.
    """
    per_video, sizes, shape = geometry(features, w, size, patch, group)
    feature_grad = torch.empty_like(features)
    rows = moments.new_empty((*features.shape[:3], 4))
    programs = len(features) * triton.cdiv(per_video, TRITON_ROW_TOKENS)
    grad = grad.contiguous()
    with torch.cuda.device_of(grad):
        head_rows_kernel[(programs,)](
            grad,
            (grad if mix is None else mix).contiguous(),
            features,
            moments,
            *norm_products(w),
            feature_grad,
            rows,
            per_video,
            *sizes,
            *shape,
            mix is not None,
            TRITON_ROW_TOKENS,
            power_of_two(patch**2),
            num_warps=TRITON_ROW_WARPS,
        )
    return feature_grad, rows
