"""The sizes of a FIT model, and the paper's three as presets (appendix A, table 8)."""

from dataclasses import dataclass, fields, replace
from math import prod
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class FITConfig:
    """Sizes of one FIT. Lengths are in frames, pixels (height, width) and tokens.

    Raises:
        ValueError: sizes that do not fit together; the message names them.
    """

    name: str
    frames: int = 16
    height: int = 36
    width: int = 64
    patch: int = 4
    group: tuple[int, int, int] = (16, 5, 4)  # patch tokens of one group along (T, H, W)
    patch_dim: int
    patch_head_dim: int
    num_latents: int  # of the whole video; every group owns num_latents / num_groups
    latent_dim: int
    latent_head_dim: int
    cond_dim: int
    blocks: int = 6
    global_layers: int = 4  # of one block
    ff_ratio: int = 4
    positions: Literal["group", "token"] = "group"  # one table shared by the groups, or one each
    low_res: tuple[int, int] | None = None  # (height, width) of an upsampler's conditioning video
    text_dim: int = 1024  # T5-11B
    text_length: int = 128
    dropout: float = 0.1
    label_dropout: float = 0.1
    self_conditioning: float = 0.9
    sigma_in: float = 4.0  # s * sqrt(T), section 3.5

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            least = 0 if field.name in ("blocks", "global_layers") else 1
            if field.type is int and not (isinstance(value, int) and value >= least):
                self._refuse(field.name, f"an int of at least {least}")
        for name in ("group", "low_res"):
            value, axes = getattr(self, name), {"group": 3, "low_res": 2}[name]
            if value is not None and not (
                len(value) == axes and all(isinstance(v, int) and v > 0 for v in value)
            ):
                self._refuse(name, f"{axes} positive ints")
        for name in ("dropout", "label_dropout", "self_conditioning"):
            if not 0 <= getattr(self, name) <= 1:
                self._refuse(name, "a probability")
        if not self.sigma_in > 0:
            self._refuse("sigma_in", "above 0")
        if self.positions not in ("group", "token"):
            self._refuse("positions", '"group" or "token"')
        if self.cond_dim % 8:
            self._refuse("cond_dim", "divisible by 8")
        if self.width % self.patch:
            self._refuse("width", f"divisible by patch = {self.patch}")
        grid, group = self.grid, self.group
        if grid[0] % group[0] or grid[2] % group[2]:
            self._refuse("group", f"a divisor of the token grid {grid} (T, H, W)")
        if self.num_latents % self.num_groups:
            self._refuse("num_latents", f"divisible by the {self.num_groups} groups")
        if self.low_res and (self.height % self.low_res[0] or self.width % self.low_res[1]):
            self._refuse("low_res", f"a divisor of {(self.height, self.width)} (height, width)")
        for dim in (min(self.patch_dim, self.latent_dim), min(self.cond_dim, self.latent_dim)):
            if dim % self.patch_head_dim:
                self._refuse("patch_head_dim", f"a divisor of the inner width {dim}")
        if self.latent_dim % self.latent_head_dim:
            self._refuse("latent_head_dim", f"a divisor of latent_dim = {self.latent_dim}")

    def _refuse(self, name: str, allowed: str) -> None:
        raise ValueError(f"{self.name}: {name} must be {allowed}, got {getattr(self, name)!r}")

    @property
    def padded_height(self) -> int:
        """Height with the zero rows that fill the last group (36 -> 40, appendix A)."""
        rows = self.patch * self.group[1]
        return -(-self.height // rows) * rows

    @property
    def grid(self) -> tuple[int, int, int]:
        """Patch tokens along (T, H, W), padding included."""
        return self.frames, self.padded_height // self.patch, self.width // self.patch

    @property
    def num_groups(self) -> int:
        return prod(self.grid) // prod(self.group)

    @property
    def group_tokens(self) -> int:
        return prod(self.group)

    @property
    def in_channels(self) -> int:
        """Noisy video, and the upsampled low-resolution video beside it."""
        return 6 if self.low_res else 3


FIT_500M = FITConfig(
    name="500m",
    patch_dim=768,
    patch_head_dim=48,
    num_latents=512,
    latent_dim=1024,
    latent_head_dim=64,
    cond_dim=768,
)
FIT_3_9B = FITConfig(
    name="3.9b",
    patch_dim=1024,
    patch_head_dim=64,
    num_latents=768,
    latent_dim=3072,
    latent_head_dim=128,
    cond_dim=1024,
)
FIT_3_9B_UP = replace(
    FIT_3_9B,
    name="3.9b-up",
    height=288,
    width=512,
    group=(16, 18, 16),
    low_res=(36, 64),
    sigma_in=32.0,
)

# For machines without a GPU: the first stage's token grid, narrow and shallow; and an upsampler
# of a quarter of the pixels' side, with the padding the full one does not need.
MINI = FITConfig(
    name="mini",
    patch_dim=192,
    patch_head_dim=48,
    num_latents=128,
    latent_dim=384,
    latent_head_dim=64,
    cond_dim=192,
    blocks=3,
    global_layers=2,
)
MINI_UP = replace(
    MINI, name="mini-up", height=72, width=128, group=(16, 5, 8), low_res=(36, 64), sigma_in=8.0
)
# For tests: every mechanism at the smallest sizes that tell its dimensions apart.
TINY = FITConfig(
    name="tiny",
    frames=4,
    height=18,
    width=32,
    group=(4, 5, 4),
    patch_dim=24,
    patch_head_dim=12,
    num_latents=8,
    latent_dim=32,
    latent_head_dim=8,
    cond_dim=24,
    blocks=2,
    global_layers=1,
    text_dim=20,
    text_length=6,
)
TINY_UP = replace(
    TINY, name="tiny-up", height=36, width=64, group=(4, 5, 8), low_res=(18, 32), sigma_in=4.0
)

PRESETS = {
    config.name: config
    for config in (FIT_500M, FIT_3_9B, FIT_3_9B_UP, MINI, MINI_UP, TINY, TINY_UP)
}
