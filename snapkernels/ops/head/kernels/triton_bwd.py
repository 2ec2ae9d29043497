"""The backward of head, head_mix, head_loss and video_mix in Triton.

Two kernels. The first takes rows: BLOCK_M tokens of one video, as the forward. It makes F again, of
that dF, the gradient at a token's features, and finishes the tokens' gradient with two sums over D
that are products over P instead (F is linear in LN's output):

    mean over D of g        = dF . W gamma / D              with g = gamma (dF W)
    mean over D of g xhat   = dF . (F - bias - W beta) / D
    dtokens = rstd (g - the first - xhat times the second)

The second takes columns: R = sum of dF xhat^T and q = sum of dF over a part of the tokens. PyTorch
adds the parts, in their order, and makes the four gradients of the parameters from R and q. No
atomics: two runs agree in every bit.

dF is rounded once, to the product's dtype, for dF W; R gets it as that and a remainder, two
products, since a sum over all tokens would show the rounding.

Legend: as in triton_fwd.py; t a token of the batch, R (P, D), q (P).
"""

import torch
import triton
import triton.language as tl

from snapkernels.ops.head.config import (
    TRITON_STAGES,
    TRITON_WARPS,
    triton_blocks,
)
from snapkernels.ops.head.kernels.triton_fwd import (
    corners,
    geometry,
    load_pixels,
    load_terms,
    load_tokens,
    load_vector,
    load_weight,
    noise,
    parameters,
    pixels,
    product,
    program_tokens,
    size_of,
    statistics,
)
from snapkernels.ops.head.kernels.triton_mix import Grads, video_mix_backward
from snapkernels.ops.head.kernels.triton_sums import weight_gradients
from snapkernels.ops.head.weights import HeadWeights


@triton.jit
def head_backward_kernel(
    p_grad,
    p_mix,
    p_tokens,
    p_norm_weight,
    p_norm_bias,
    p_weight,
    p_weight_gain,
    p_weight_shift,
    p_dtokens,
    p_dF,
    p_mean,
    p_rstd,
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
    MIXED: tl.constexpr,
    NEED_TOKENS: tl.constexpr,
    NEED_SUMS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_P: tl.constexpr,
    SLICE: tl.constexpr,
):
    FEATURES: tl.constexpr = CHANNELS * PATCH * PATCH
    b, n_M = program_tokens(tokens, BLOCK_M)
    corner_M, h_M = corners(
        n_M, height, width, groups_h, groups_w, GROUP_T, GROUP_H, GROUP_W, PATCH
    )
    at_MP, m_MP = pixels(
        n_M, corner_M, h_M, tokens, frames, height, width, CHANNELS, PATCH, BLOCK_P
    )
    elements = tl.cast(frames, tl.int64) * height * width * CHANNELS
    dF_MP = load_pixels(p_grad + b * elements, at_MP, m_MP)
    if MIXED:
        of_F, _, _ = load_terms(p_mix, b)
        dF_MP *= of_F

    p_tokens += b * tokens * DIM
    mean_M, rstd_M = statistics(p_tokens, n_M, tokens, DIM, EPS, BLOCK_M)
    if NEED_SUMS:
        _store_for_sums(
            dF_MP, mean_M, rstd_M, p_dF, p_mean, p_rstd, b, n_M, tokens, FEATURES, BLOCK_P
        )
    if NEED_TOKENS:
        F_MP = product(
            p_tokens, n_M, tokens, mean_M, rstd_M, p_norm_weight, p_norm_bias, p_weight, FEATURES,
            DIM, BLOCK_M, BLOCK_P, SLICE,
        )  # fmt: skip
        _store_dtokens(
            p_tokens, n_M, tokens, mean_M, rstd_M, F_MP, dF_MP, 1.0, p_norm_weight, p_weight,
            p_weight_gain, p_weight_shift, p_dtokens + b * tokens * DIM, FEATURES, DIM, BLOCK_P,
            SLICE,
        )  # fmt: skip


@triton.jit
def head_loss_backward_kernel(
    p_scale,
    p_tokens,
    p_norm_weight,
    p_norm_bias,
    p_weight,
    p_bias,
    p_video,
    p_sample,
    p_terms,
    p_weight_gain,
    p_weight_shift,
    p_dtokens,
    p_dF,
    p_mean,
    p_rstd,
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
    NEED_TOKENS: tl.constexpr,
    NEED_SUMS: tl.constexpr,
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

    corner_M, h_M = corners(
        n_M, height, width, groups_h, groups_w, GROUP_T, GROUP_H, GROUP_W, PATCH
    )
    at_MP, m_MP = pixels(
        n_M, corner_M, h_M, tokens, frames, height, width, CHANNELS, PATCH, BLOCK_P
    )
    eps_MP = noise(
        seed_lo, seed_hi, tl.load(p_sample + b), corner_M, at_MP, frames, height, width, PATCH,
        IN_FOURS, BLOCK_P,
    )  # fmt: skip
    weight, of_video, of_eps = load_terms(p_terms, b)
    elements = tl.cast(frames, tl.int64) * height * width * CHANNELS
    target_MP = of_video * load_pixels(p_video + b * elements, at_MP, m_MP) + of_eps * eps_MP
    error_MP = F_MP + load_vector(p_bias, 0, FEATURES, BLOCK_P)[None, :] - target_MP
    # Without the mean's 1 / elements, which would be among the smallest numbers of float16.
    dF_MP = tl.where(m_MP, weight * error_MP, 0.0)
    if NEED_SUMS:
        _store_for_sums(
            dF_MP, mean_M, rstd_M, p_dF, p_mean, p_rstd, b, n_M, tokens, FEATURES, BLOCK_P
        )
    if NEED_TOKENS:
        _store_dtokens(
            p_tokens, n_M, tokens, mean_M, rstd_M, F_MP, dF_MP, tl.load(p_scale), p_norm_weight,
            p_weight, p_weight_gain, p_weight_shift, p_dtokens + b * tokens * DIM, FEATURES, DIM,
            BLOCK_P, SLICE,
        )  # fmt: skip


@triton.jit
def _store_for_sums(
    dF_MP,
    mean_M,
    rstd_M,
    p_dF,
    p_mean,
    p_rstd,
    b,
    n_M,
    tokens,
    FEATURES: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    t_M = b * tokens + n_M
    m_M = n_M < tokens
    p_P = tl.arange(0, BLOCK_P)
    m_MP = m_M[:, None] & (p_P < FEATURES)[None, :]
    tl.store(p_dF + t_M[:, None] * FEATURES + p_P[None, :], dF_MP, mask=m_MP)
    tl.store(p_mean + t_M, mean_M, mask=m_M)
    tl.store(p_rstd + t_M, rstd_M, mask=m_M)


@triton.jit
def _store_dtokens(
    p_tokens,
    n_M,
    tokens,
    mean_M,
    rstd_M,
    F_MP,
    dF_MP,
    scale,
    p_norm_weight,
    p_weight,
    p_weight_gain,
    p_weight_shift,
    p_dtokens,
    FEATURES: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_P: tl.constexpr,
    SLICE: tl.constexpr,
):
    """The gradient of the tokens; `F_MP` is without bias, `scale` multiplies `dF_MP`."""
    # The sums have to be those of the very g that is multiplied out below, rounding included.
    rounded_MP = dF_MP.to(p_weight.dtype.element_ty)
    dF_MP = rounded_MP.to(tl.float32)
    gain_P = load_vector(p_weight_gain, 0, FEATURES, BLOCK_P)
    shift_P = load_vector(p_weight_shift, 0, FEATURES, BLOCK_P)
    mean_g_M = tl.sum(dF_MP * gain_P[None, :], axis=1) / DIM
    mean_gx_M = tl.sum(dF_MP * (F_MP - shift_P[None, :]), axis=1) / DIM

    for d in tl.range(0, DIM, SLICE):
        weight_PS = load_weight(p_weight, d, FEATURES, DIM, BLOCK_P, SLICE)
        x_MS = load_tokens(p_tokens, n_M, tokens, d, DIM, SLICE)
        g_MS = tl.dot(rounded_MP, weight_PS, input_precision="ieee")
        g_MS *= load_vector(p_norm_weight, d, DIM, SLICE)[None, :]
        xhat_MS = (x_MS - mean_M[:, None]) * rstd_M[:, None]
        g_MS -= mean_g_M[:, None] + xhat_MS * mean_gx_M[:, None]
        d_S = d + tl.arange(0, SLICE)
        p_MS = p_dtokens + n_M.to(tl.int64)[:, None] * DIM + d_S[None, :]
        dtokens_MS = (g_MS * (rstd_M * scale)[:, None]).to(p_dtokens.dtype.element_ty)
        tl.store(p_MS, dtokens_MS, mask=(n_M < tokens)[:, None] & (d_S < DIM)[None, :])


def head_backward(
    needs: tuple[bool, ...],
    grad: torch.Tensor,
    tokens: torch.Tensor,
    w: HeadWeights,
    size: tuple[int, int, int],
    patch: int,
    group: tuple[int, int, int],
    eps: float,
) -> Grads:
    return _of_pixels(needs, grad, tokens, None, w, size, patch, group, eps)


def head_mix_backward(
    needs: tuple[bool, ...],
    grad: torch.Tensor,
    tokens: torch.Tensor,
    video: torch.Tensor,
    other: torch.Tensor | None,
    mix: torch.Tensor,
    w: HeadWeights,
    patch: int,
    group: tuple[int, int, int],
    eps: float,
) -> Grads:
    need_tokens, need_video, need_other, *need_weights = needs
    need_videos = (False, need_video, need_other)
    # F stands for itself alone: its gradient is not asked for.
    _, dvideo, dother = video_mix_backward(need_videos, grad, grad, video, other, mix)
    dtokens, *dweights = _of_pixels(
        (need_tokens, *need_weights), grad, tokens, mix, w, size_of(video), patch, group, eps
    )
    return dtokens, dvideo, dother, *dweights


def head_loss_backward(
    needs: tuple[bool, ...],
    grad: torch.Tensor,
    tokens: torch.Tensor,
    video: torch.Tensor,
    sample: torch.Tensor,
    terms: torch.Tensor,
    w: HeadWeights,
    seed: int,
    patch: int,
    group: tuple[int, int, int],
    eps: float,
) -> Grads:
    # The video has no gradient: None, where `needs` has a place for it.
    need_tokens, *of_video = needs[:-4]
    need_weights = needs[-4:]
    nothing = (None,) * len(of_video)
    if not video.numel() or not any((need_tokens, *need_weights)):
        zeros = _nothing((need_tokens, *need_weights), tokens, w)
        return *zeros[:1], *nothing, *zeros[1:]
    scale = grad.float() * (2 / video.numel())
    per_video, sizes, shape = geometry(tokens, w, size_of(video), patch, group, eps)
    blocks = triton_blocks(tokens, w.weight)
    tokens, w = tokens.contiguous(), HeadWeights(*parameters(w))
    results = _row_results(tokens, w, need_tokens, any(need_weights))
    with torch.cuda.device_of(tokens):  # Triton launches on the current device
        head_loss_backward_kernel[(len(tokens) * triton.cdiv(per_video, blocks.m),)](
            scale,
            tokens,
            *w,
            video.contiguous(),
            sample.contiguous(),
            terms.contiguous(),
            *_weight_of_norm(w),
            *results,
            seed & 0xFFFFFFFF,
            seed >> 32,
            per_video,
            *sizes,
            *shape,
            patch == 4 and video.shape[4] % 4 == 0,
            need_tokens,
            any(need_weights),
            *blocks,
            num_warps=TRITON_WARPS,
            num_stages=TRITON_STAGES,
        )
    dtokens, dF, mean, rstd = results
    dweights = weight_gradients(need_weights, tokens, w, dF, mean, rstd, scale)
    return dtokens if need_tokens else None, *nothing, *dweights


def _of_pixels(
    needs: tuple[bool, ...],
    grad: torch.Tensor,
    tokens: torch.Tensor,
    mix: torch.Tensor | None,
    w: HeadWeights,
    size: tuple[int, int, int],
    patch: int,
    group: tuple[int, int, int],
    eps: float,
) -> Grads:
    """The gradients of (tokens, *w), of that of F's pixels or of their mixture's."""
    need_tokens, *need_weights = needs
    if not grad.numel() or not any(needs):
        return _nothing(needs, tokens, w)
    per_video, sizes, shape = geometry(tokens, w, size, patch, group, eps)
    blocks = triton_blocks(tokens, w.weight)
    grad, tokens, w = grad.contiguous(), tokens.contiguous(), HeadWeights(*parameters(w))
    results = _row_results(tokens, w, need_tokens, any(need_weights))
    with torch.cuda.device_of(tokens):
        head_backward_kernel[(len(tokens) * triton.cdiv(per_video, blocks.m),)](
            grad,
            (grad if mix is None else mix).contiguous(),
            tokens,
            w.norm_weight,
            w.norm_bias,
            w.weight,
            *_weight_of_norm(w),
            *results,
            per_video,
            *sizes,
            *shape,
            mix is not None,
            need_tokens,
            any(need_weights),
            *blocks,
            num_warps=TRITON_WARPS,
            num_stages=TRITON_STAGES,
        )
    dtokens, dF, mean, rstd = results
    dweights = weight_gradients(need_weights, tokens, w, dF, mean, rstd, None)
    return dtokens if need_tokens else None, *dweights


def _nothing(needs: tuple[bool, ...], tokens: torch.Tensor, w: HeadWeights) -> Grads:
    """Gradients of no videos."""
    pairs = zip((tokens, *w), needs, strict=True)
    return tuple(torch.zeros_like(one) if need else None for one, need in pairs)


def _row_results(
    tokens: torch.Tensor, w: HeadWeights, need_tokens: bool, need_sums: bool
) -> tuple[torch.Tensor, ...]:
    """What the kernel of rows fills: dtokens, and dF, mean and 1 / deviation for that of columns.

    What is not needed is not written, and `tokens` takes its place.
    """
    total = tokens.numel() // tokens.shape[-1]
    shapes = ((total, len(w.bias)), (total,), (total,))
    dtokens = torch.empty_like(tokens) if need_tokens else tokens
    if not need_sums:
        return dtokens, tokens, tokens, tokens
    return dtokens, *(tokens.new_empty(shape, dtype=torch.float32) for shape in shapes)


def _weight_of_norm(w: HeadWeights) -> tuple[torch.Tensor, torch.Tensor]:
    """W gamma and W beta, (P,) each. Not as a matrix product, which TF32 may be allowed for."""
    weight = w.weight.float()
    return (weight * w.norm_weight.float()).sum(1), (weight * w.norm_bias.float()).sum(1)
