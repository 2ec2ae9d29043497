"""The equation of patchify, element by element.

With (t, row, column) the grid position of patch n of group g,
tokens[b, g, n, (c, i, j)] = video[b, c, t, patch * row + i, patch * column + j].
"""

import torch

from snapkernels.patches import PatchLayout, digits, places


def patchify(video: torch.Tensor, patch: int, group: tuple[int, int, int]) -> torch.Tensor:
    _, channels, t, h, w = video.shape
    layout = PatchLayout((t, h, w), patch, group)
    return video.flatten(1)[:, _element_index(layout, channels, video.device)]


def unpatchify(
    tokens: torch.Tensor, size: tuple[int, int, int], patch: int, group: tuple[int, int, int]
) -> torch.Tensor:
    channels = tokens.shape[-1] // patch**2
    index = _element_index(PatchLayout(size, patch, group), channels, tokens.device)
    video = tokens.new_zeros(len(tokens), channels, *size)
    return video.flatten(1).index_copy(1, index.flatten(), tokens.flatten(1)).view_as(video)


def _element_index(layout: PatchLayout, channels: int, device: torch.device) -> torch.Tensor:
    """(G, N, P): where in a flattened (C, T, H, W) video each element of each token lies."""
    frames, height, width = layout.size
    t_GN, row_GN, column_GN = places(layout, device)
    c, i, j = digits(channels * layout.patch**2, layout.patch, layout.patch, device=device)
    y_GNP = row_GN[:, :, None] * layout.patch + i
    x_GNP = column_GN[:, :, None] * layout.patch + j
    return ((c * frames + t_GN[:, :, None]) * height + y_GNP) * width + x_GNP
