"""The geometry of a patchified video."""

from math import prod
from typing import NamedTuple

import torch

from snapkernels.validate import Arguments


class PatchLayout(NamedTuple):
    """A video of `size` (T, H, W) cut in `patch`-sided patches, grouped by `group` (T, H, W)."""

    size: tuple[int, int, int]
    patch: int
    group: tuple[int, int, int]

    @classmethod
    def checked(
        cls,
        args: Arguments,
        size: tuple[int, int, int],
        patch: int,
        group: tuple[int, int, int],
    ) -> "PatchLayout":
        """The layout, or a ValueError that names what does not divide."""
        for name, value in (("size", size), ("group", group)):
            three = isinstance(value, tuple | list | torch.Size) and len(value) == 3
            if not three or not all(isinstance(v, int) and v > 0 for v in value):
                args.fail(f"{name} must be three positive ints (T, H, W), got {value!r}")
        args.divides("patch", patch, "H", size[1])
        args.divides("patch", patch, "W", size[2])
        args.divides("group[0]", group[0], "T", size[0])
        args.divides("group[1]", group[1], f"H / patch (H = {size[1]})", size[1] // patch)
        args.divides("group[2]", group[2], f"W / patch (W = {size[2]})", size[2] // patch)
        return cls(size, patch, group)

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
