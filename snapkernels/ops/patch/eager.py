"""patchify as a careful user writes it: one view, one permuted copy."""

import torch

from snapkernels.patches import PatchLayout, cut, join


def patchify(video: torch.Tensor, patch: int, group: tuple[int, int, int]) -> torch.Tensor:
    _, _, t, h, w = video.shape
    return cut(video, PatchLayout((t, h, w), patch, group)).contiguous()


def unpatchify(
    tokens: torch.Tensor, size: tuple[int, int, int], patch: int, group: tuple[int, int, int]
) -> torch.Tensor:
    return join(tokens, PatchLayout(size, patch, group))
