"""Launch choices of the noise kernels, and what each backend can take."""

import torch

from snapkernels import extension
from snapkernels.dispatch import triton_refuses as no_triton

TRITON_BLOCKS = 512  # blocks of four elements a program; 16 KB of pixels with 4 warps
TRITON_WARPS = 4
MOST_VIDEOS = 65535  # the largest grid.y


def cuda_refuses(
    video: torch.Tensor, sigma: torch.Tensor, sample: torch.Tensor, sigma_in: float, seed: int
) -> str | None:
    """Why the CUDA kernel cannot run this call, or None."""
    if reason := extension.refuses(video):
        return reason
    if video.dtype != torch.float32 or sigma.dtype != torch.float32:
        return f"video and sigma must be float32, they are {video.dtype} and {sigma.dtype}"
    if not (video.is_contiguous() and sigma.is_contiguous() and sample.is_contiguous()):
        return "video, sigma and sample must be contiguous"
    if video[0].numel() % 4 if len(video) else False:
        return f"a video has {video[0].numel()} elements, not in fours"
    if len(video) > MOST_VIDEOS:
        return f"{len(video)} videos are more than {MOST_VIDEOS}"
    if video.data_ptr() % 16:
        return "video does not start at a multiple of 16 bytes"
    return None


def triton_refuses(
    video: torch.Tensor, sigma: torch.Tensor, sample: torch.Tensor, sigma_in: float, seed: int
) -> str | None:
    """Why the Triton kernel cannot run this call, or None."""
    if video.dtype == torch.float64:
        return "video is float64, and its noise would be float32"
    return no_triton(video)
