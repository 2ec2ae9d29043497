"""video_mix and its gradients in Triton: a program takes BLOCK pixels of one video."""

import torch
import triton
import triton.language as tl

from snapkernels.ops.head.config import TRITON_MIX_BLOCK, TRITON_MIX_WARPS
from snapkernels.ops.head.kernels.triton_parts import load_pixels, load_terms

Grads = tuple[torch.Tensor | None, ...]


@triton.jit
def video_mix_kernel(
    p_F,
    p_video,
    p_other,
    p_mix,
    p_mixed,
    elements,
    HAS_OTHER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    tiles = tl.cdiv(elements, BLOCK)
    b = (tl.program_id(0) // tiles).to(tl.int64)
    e_E = (tl.program_id(0) % tiles).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_E = e_E < elements
    at_E = b * elements + e_E
    of_F, of_video, of_other = load_terms(p_mix, b)
    mixed_E = of_F * load_pixels(p_F, at_E, m_E) + of_video * load_pixels(p_video, at_E, m_E)
    if HAS_OTHER:
        mixed_E += of_other * load_pixels(p_other, at_E, m_E)
    tl.store(p_mixed + at_E, mixed_E, mask=m_E)


@triton.jit
def video_mix_backward_kernel(
    p_grad,
    p_mix,
    p_dF,
    p_dvideo,
    p_dother,
    elements,
    NEED_F: tl.constexpr,
    NEED_VIDEO: tl.constexpr,
    NEED_OTHER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    tiles = tl.cdiv(elements, BLOCK)
    b = (tl.program_id(0) // tiles).to(tl.int64)
    e_E = (tl.program_id(0) % tiles).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_E = e_E < elements
    at_E = b * elements + e_E
    grad_E = load_pixels(p_grad, at_E, m_E)
    of_F, of_video, of_other = load_terms(p_mix, b)
    if NEED_F:
        tl.store(p_dF + at_E, (of_F * grad_E).to(p_dF.dtype.element_ty), mask=m_E)
    if NEED_VIDEO:
        tl.store(p_dvideo + at_E, (of_video * grad_E).to(p_dvideo.dtype.element_ty), mask=m_E)
    if NEED_OTHER:
        tl.store(p_dother + at_E, (of_other * grad_E).to(p_dother.dtype.element_ty), mask=m_E)


def video_mix(
    F: torch.Tensor, video: torch.Tensor, other: torch.Tensor | None, mix: torch.Tensor
) -> torch.Tensor:
    mixed = torch.empty(F.shape, dtype=torch.float32, device=F.device)
    if not mixed.numel():
        return mixed
    elements = F.numel() // len(F)
    with torch.cuda.device_of(F):
        video_mix_kernel[(len(F) * triton.cdiv(elements, TRITON_MIX_BLOCK),)](
            F.contiguous(),
            video.contiguous(),
            (F if other is None else other).contiguous(),
            mix.contiguous(),
            mixed,
            elements,
            other is not None,
            TRITON_MIX_BLOCK,
            num_warps=TRITON_MIX_WARPS,
        )
    return mixed


def video_mix_backward(
    needs: tuple[bool, ...],
    grad: torch.Tensor,
    F: torch.Tensor,
    video: torch.Tensor,
    other: torch.Tensor | None,
    mix: torch.Tensor,
) -> Grads:
    grads = tuple(
        torch.empty(one.shape, dtype=one.dtype, device=one.device)
        if need and one is not None
        else None
        for one, need in zip((F, video, other), needs, strict=True)
    )
    if not any(needs) or not grad.numel():
        return grads
    elements = grad.numel() // len(grad)
    grad = grad.contiguous()
    with torch.cuda.device_of(grad):
        video_mix_backward_kernel[(len(grad) * triton.cdiv(elements, TRITON_MIX_BLOCK),)](
            grad,
            mix.contiguous(),
            *(grad if one is None else one for one in grads),
            elements,
            *(one is not None for one in grads),
            TRITON_MIX_BLOCK,
            num_warps=TRITON_MIX_WARPS,
        )
    return grads
