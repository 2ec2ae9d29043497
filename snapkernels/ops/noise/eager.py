"""The forward process in PyTorch calls, its noise from the counter."""

import torch

from snapkernels.philox import normals


def forward_process(
    video: torch.Tensor, sigma: torch.Tensor, sample: torch.Tensor, sigma_in: float, seed: int
) -> torch.Tensor:
    wide = video.to(torch.promote_types(video.dtype, torch.float32)).contiguous()
    eps = normals(seed, sample, tuple(video.shape[1:])).to(wide.dtype)
    level = torch.where(sigma > 0, sigma, torch.nan).to(wide.dtype)
    return torch.addcmul(wide / sigma_in, level.view(-1, 1, 1, 1, 1), eps)
