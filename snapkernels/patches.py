"""A video as grouped patch tokens: the geometry, as numbers and as views.

Groups, and patches inside a group, are counted frame first, then row, then column; the features of
a patch are ordered (channel, pixel row, pixel column) (paper section 3.4, table 8).
"""

from math import prod
from typing import NamedTuple

import torch

# (B, C, groups T, group T, groups H, group H, patch, groups W, group W, patch)
# -> (B, groups T, H, W, group T, H, W, C, patch, patch), and back.
_TO_TOKENS = (0, 2, 4, 7, 3, 5, 8, 1, 6, 9)
_TO_VIDEO = (0, 7, 1, 4, 2, 5, 8, 3, 6, 9)


class PatchLayout(NamedTuple):
    """A video of `size` (T, H, W) cut in `patch`-sided patches, grouped by `group` (T, H, W)."""

    size: tuple[int, int, int]
    patch: int
    group: tuple[int, int, int]

    @classmethod
    def padded(
        cls, size: tuple[int, int, int], patch: int, group: tuple[int, int, int]
    ) -> "PatchLayout":
        """The layout with the rows added that fill the last row of groups (appendix A)."""
        t, h, w = size
        rows = patch * group[1]
        return cls((t, -(-h // rows) * rows, w), patch, group)

    @property
    def groups(self) -> tuple[int, int, int]:
        """How many groups along (T, H, W)."""
        t, h, w = self.size
        gt, gh, gw = self.group
        return t // gt, h // (self.patch * gh), w // (self.patch * gw)

    @property
    def num_groups(self) -> int:
        return prod(self.groups)

    @property
    def group_tokens(self) -> int:
        return prod(self.group)


def cut(video: torch.Tensor, layout: PatchLayout) -> torch.Tensor:
    """(B, C, T, H, W) -> (B, G, N, C * patch * patch), by one permuted copy."""
    patch = layout.patch
    (groups_t, groups_h, groups_w), (gt, gh, gw) = layout.groups, layout.group
    pieces = (
        video.unflatten(4, (groups_w, gw, patch))
        .unflatten(3, (groups_h, gh, patch))
        .unflatten(2, (groups_t, gt))
    )
    shape = (len(video), layout.num_groups, layout.group_tokens, video.shape[1] * patch**2)
    return pieces.permute(_TO_TOKENS).reshape(shape)


def join(tokens: torch.Tensor, layout: PatchLayout) -> torch.Tensor:
    """(B, G, N, C * patch * patch) -> (B, C, T, H, W), by one permuted copy."""
    patch = layout.patch
    channels = tokens.shape[-1] // patch**2
    pieces = (
        tokens.unflatten(3, (channels, patch, patch))
        .unflatten(2, layout.group)
        .unflatten(1, layout.groups)
    )
    return pieces.permute(_TO_VIDEO).reshape(len(tokens), channels, *layout.size)


def places(layout: PatchLayout, device: torch.device) -> tuple[torch.Tensor, ...]:
    """Frame, row of patches and column of patches of every patch: three (G, N), int64."""
    group_t, group_h, group_w = layout.group
    _, groups_h, groups_w = layout.groups
    gt, gh, gw = digits(layout.num_groups, groups_h, groups_w, device=device)
    nt, nh, nw = digits(layout.group_tokens, group_h, group_w, device=device)
    return (
        gt[:, None] * group_t + nt,
        gh[:, None] * group_h + nh,
        gw[:, None] * group_w + nw,
    )


def digits(count: int, *radices: int, device: torch.device) -> list[torch.Tensor]:
    """0..count-1 split into mixed-radix digits, most significant first, each (count,) int64."""
    rest, found = torch.arange(count, device=device), []
    for radix in reversed(radices):
        found.append(rest % radix)
        rest = rest // radix
    return [rest, *reversed(found)]
