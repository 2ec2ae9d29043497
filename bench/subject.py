"""What the throughput bench times: one model in one variant, and what all of a run share."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import nn
from workload import Sizes

from snapkernels import RECIPES, Recipe
from snapkernels.roofline import short_name
from snapkernels.testing.load import Load

CAPTURED = ", by a replay of one CUDA graph"
# {peer: its one recipe}
PEERS = {"torchao": "fp8", "flash-attn": "bf16", "xformers": "bf16", "te": "fp8"}


@dataclass(frozen=True)
class Options:
    """What every case of a run has in common."""

    device: torch.device
    dtype: torch.dtype
    capture: bool
    clip: Path
    framerate: float
    repeats: int
    ceilings: dict[str, float]
    load: Load

    @property
    def tflop_s(self) -> float:
        """The rate of products in the run's dtype."""
        return self.ceilings[f"{short_name(self.dtype)}_tflop_s"]


@dataclass(frozen=True)
class Variant:
    """How a model is run: by whose kernels, in which number formats."""

    backend: str
    recipe: Recipe = RECIPES["bf16"]

    @property
    def quantised(self) -> bool:
        return bool(self.recipe.layers)

    @property
    def compiled(self) -> bool:
        """Whether every batch is a compilation."""
        return self.backend not in ("ours", "eager", "reference")

    @property
    def peer(self) -> bool:
        """Whether it is other software, whose red gate is not ours to mend."""
        return self.backend in PEERS

    @property
    def trains(self) -> bool:
        """Whether it has gradients: what is quantised has none, but by torchao."""
        return not self.quantised or self.peer

    def name(self, dtype: torch.dtype) -> str:
        """As records have it, of a model whose weights are `dtype`."""
        return f"{self.backend}-{self.recipe.name if self.quantised else short_name(dtype)}"


class Subject(Protocol):
    """A model with random weights in one variant, built when it is made.

    Attributes:
        config: its sizes.
        variant: how it is run.
        module: what holds its parameters.
        modes: what it can be timed in, of "infer" and "train".
    """

    @property
    def config(self) -> Sizes: ...
    @property
    def variant(self) -> Variant: ...
    @property
    def module(self) -> nn.Module: ...
    @property
    def modes(self) -> tuple[str, ...]: ...

    def gated(self) -> tuple[str, dict[str, float]]:
        """Hold its output against float64: "ok" or the reason, and the errors seen."""

    def inference(self, batch: int) -> Callable[[], object]:
        """What evaluates the denoiser once."""

    def training_step(self, batch: int) -> Callable[[], object]:
        """What computes every gradient once, made anew as after an optimiser step."""

    def release(self) -> None:
        """Let go of what is kept from one call of these to the next, but for what is compiled."""

    def includes(self, mode: str) -> str:
        """What is in the time of `mode`."""

    def tflop(self, mode: str) -> float:
        """Of one video, as the paper's graph has it."""

    def floor_ms(self, mode: str) -> float:
        """Of one video, at the ceilings of this process."""
