"""The geometry of a patchified video."""

from math import prod
from typing import NamedTuple


class PatchLayout(NamedTuple):
    """A video of `size` (T, H, W) cut in `patch`-sided patches, grouped by `group` (T, H, W)."""

    size: tuple[int, int, int]
    patch: int
    group: tuple[int, int, int]

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
