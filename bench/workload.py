"""What the throughput bench runs: a real clip as a batch, and a model with random weights."""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from snapvideo_core import FIT, Conditioning, FITConfig, SnapDiffusion, read_clip, sample_sigma
from snapvideo_core.training import augment_low_res

LOW_RES_NOISE = 0.2  # augmentation level of an upsampler's input, as at inference
SEED = 0


class Sizes(Protocol):
    """What a batch is made for: a `FITConfig` or a `UNetConfig`."""

    @property
    def name(self) -> str: ...
    @property
    def frames(self) -> int: ...
    @property
    def height(self) -> int: ...
    @property
    def width(self) -> int: ...
    @property
    def low_res(self) -> tuple[int, int] | None: ...
    @property
    def text_dim(self) -> int: ...
    @property
    def text_length(self) -> int: ...
    @property
    def sigma_in(self) -> float: ...


@dataclass(frozen=True)
class Batch:
    """One clip in `batch` copies, each with its own noise, sigma and text embeddings."""

    video: torch.Tensor  # (B, 3, T, H, W) float32 in [-1, 1]
    cond: Conditioning
    sigma: torch.Tensor  # (B,)
    x_sigma: torch.Tensor  # (B, 3, T, H, W)


def load_batch(
    clip: Path, config: Sizes, batch: int, framerate: float, device: torch.device
) -> Batch:
    """Read `clip` at the model's size and noise it. Only the text embeddings are made up.

    Raises:
        VideoError: the file cannot give such a clip.
    """
    generator = torch.Generator(device).manual_seed(SEED)

    def read(size: tuple[int, int]) -> tuple[torch.Tensor, float, tuple[int, int]]:
        found = read_clip(clip, frames=config.frames, size=size, framerate=framerate)
        copies = found.video.to(device).expand(batch, -1, -1, -1, -1)
        return copies, found.framerate, found.source_size

    video, rate, source_size = read((config.height, config.width))
    low_res = augmentation = None
    if config.low_res:
        augmentation = torch.full((batch,), LOW_RES_NOISE, device=device)
        low_res = augment_low_res(read(config.low_res)[0], augmentation, generator=generator)
    lengths = torch.randint(
        1, config.text_length + 1, (batch, 1), device=device, generator=generator
    )
    cond = Conditioning(
        framerate=torch.full((batch,), rate, device=device),
        resolution=torch.tensor(source_size, device=device, dtype=torch.float32).expand(batch, 2),
        text=torch.randn(
            batch, config.text_length, config.text_dim, device=device, generator=generator
        ),
        text_mask=torch.arange(config.text_length, device=device) < lengths,
        low_res=low_res,
        augmentation=augmentation,
    )
    sigma = sample_sigma(batch, device=device, generator=generator)
    eps = torch.randn(video.shape, device=device, generator=generator)
    x_sigma = SnapDiffusion(sigma_in=config.sigma_in).noise(video, eps, sigma)
    return Batch(video, cond, sigma, x_sigma)


def build_model(
    config: FITConfig, device: torch.device, dtype: torch.dtype, backend: str | None
) -> FIT:
    """A FIT with random weights; those that start at zero are drawn too, so that none hides."""
    torch.manual_seed(SEED)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            model = FIT(config, backend=backend)
    finally:
        torch.set_default_dtype(default)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.02)
        features = 3 * config.patch**2
        if config.low_res:
            model.stem.weight[:, features:] = model.stem.weight[:, :features].flip(0)
    return model
