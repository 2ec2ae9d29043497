"""The forward process, the equation: x_sigma = x / sigma_in + sigma eps (section 3.2).

A sigma that is not above 0 is none, and gives NaN.
"""

import torch

from snapkernels.philox import normals


def forward_process(
    video: torch.Tensor, sigma: torch.Tensor, sample: torch.Tensor, sigma_in: float, seed: int
) -> torch.Tensor:
    wide = video.to(torch.promote_types(video.dtype, torch.float32))
    drawn = normals(seed, sample, tuple(video.shape[1:])).to(wide.dtype)
    level = torch.where(sigma > 0, sigma, torch.nan).to(wide.dtype)
    return wide / sigma_in + level.view(-1, 1, 1, 1, 1) * drawn
