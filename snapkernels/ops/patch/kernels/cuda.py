"""patchify and unpatchify in CUDA C++: csrc/patch/cell_transpose.cuh."""

import torch

from snapkernels.patches import PatchLayout


def patchify(video: torch.Tensor, patch: int, group: tuple[int, int, int]) -> torch.Tensor:
    batch, channels, t, h, w = video.shape
    layout = PatchLayout((t, h, w), patch, group)
    tokens = video.new_empty((batch, layout.num_groups, layout.group_tokens, channels * patch**2))
    torch.ops.snapkernels_cuda.patchify(video, tokens, patch, group)
    return tokens


def unpatchify(
    tokens: torch.Tensor, size: tuple[int, int, int], patch: int, group: tuple[int, int, int]
) -> torch.Tensor:
    video = tokens.new_empty((len(tokens), tokens.shape[-1] // patch**2, *size))
    torch.ops.snapkernels_cuda.unpatchify(tokens, video, patch, group)
    return video
