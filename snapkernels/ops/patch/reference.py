"""The equation of patchify, element by element.

With (t, row, column) the grid position of patch n of group g,
tokens[b, g, n, (c, i, j)] = video[b, c, t, patch * row + i, patch * column + j].
"""

import torch

from snapkernels.ops.patch.layout import PatchLayout


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
    group_t, group_h, group_w = layout.group
    _, groups_h, groups_w = layout.groups

    def digits(count: int, *radices: int) -> list[torch.Tensor]:
        """Split 0..count-1 into mixed-radix digits, most significant first."""
        rest, found = torch.arange(count, device=device), []
        for radix in reversed(radices):
            found.append(rest % radix)
            rest = rest // radix
        return [rest, *reversed(found)]

    gt, gh, gw = digits(layout.num_groups, groups_h, groups_w)
    nt, nh, nw = digits(layout.group_tokens, group_h, group_w)
    c, i, j = digits(channels * layout.patch**2, layout.patch, layout.patch)

    t_GN = gt[:, None] * group_t + nt
    row_GN = gh[:, None] * group_h + nh
    column_GN = gw[:, None] * group_w + nw
    y_GNP = row_GN[:, :, None] * layout.patch + i
    x_GNP = column_GN[:, :, None] * layout.patch + j
    return ((c * frames + t_GN[:, :, None]) * height + y_GNP) * width + x_GNP
