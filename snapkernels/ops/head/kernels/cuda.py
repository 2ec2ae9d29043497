"""head and its ends in CUDA C++: csrc/head/head_forward.cuh."""

import torch

from snapkernels.ops.head.config import CUDA_PARTIALS
from snapkernels.ops.head.weights import HeadWeights


def head(
    tokens: torch.Tensor,
    w: HeadWeights,
    size: tuple[int, int, int],
    patch: int,
    group: tuple[int, int, int],
    eps: float,
) -> torch.Tensor:
    shape = (len(tokens), len(w.bias) // patch**2, *size)
    F = tokens.new_empty(shape, dtype=torch.float32)
    torch.ops.snapkernels_cuda.head(tokens, *w, F, group, eps)
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
    mixed = torch.empty_like(video)
    torch.ops.snapkernels_cuda.head_mix(tokens, video, other, mix, *w, mixed, group, eps)
    return mixed


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
    partial, loss = video.new_empty(CUDA_PARTIALS), video.new_empty(())
    torch.ops.snapkernels_cuda.head_loss(
        tokens, video, sample, terms, *w, partial, loss, seed, group, eps
    )
    return loss
