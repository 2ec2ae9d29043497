"""forward_process in CUDA C++: csrc/noise/forward_process.cu."""

import torch


def forward_process(
    video: torch.Tensor, sigma: torch.Tensor, sample: torch.Tensor, sigma_in: float, seed: int
) -> torch.Tensor:
    x_sigma = torch.empty_like(video)
    torch.ops.snapkernels_cuda.forward_process(video, sigma, sample, x_sigma, sigma_in, seed)
    return x_sigma
