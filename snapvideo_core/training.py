"""The training loss of one batch, self-conditioning and label dropout included (appendix B)."""

import torch

from snapkernels import forward_process
from snapvideo_core.diffusion import Diffusion, checked
from snapvideo_core.fit import FIT, Conditioning


def sample_sigma(
    batch: int,
    *,
    mean: float = -1.2,
    std: float = 1.2,
    device: torch.device | str = "cpu",
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Draw (batch,) float32 noise levels with ln sigma ~ N(mean, std^2), EDM's p_train."""
    return (mean + std * torch.randn(batch, device=device, generator=generator)).exp()


def training_loss(
    model: FIT,
    diffusion: Diffusion,
    video: torch.Tensor,
    cond: Conditioning,
    *,
    sigma: torch.Tensor | None = None,
    sample: torch.Tensor | None = None,
    seed: int = 0,
    eps: torch.Tensor | None = None,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """The loss of one batch; call backward() on it.

    The network runs twice on the same x_sigma, sigma and text: first without gradients and
    without previous latents, on the whole batch; then on the latents of that pass, zeroed for a
    video with probability 1 - `config.self_conditioning`. The text of a video is dropped with
    probability `config.label_dropout`. Hidden dropout draws from PyTorch's default generator.

    Args:
        model: in training mode for dropout to act.
        diffusion: its sigma_in is the config's.
        video: (B, 3, T, H, W) in [-1, 1].
        cond: conditioning of the same videos.
        sigma: (B,), on the video's device; drawn when None.
        sample: (B,) int64 numbers of the videos, of which and of `seed` their noise is a function
            (see `snapkernels.forward_process`); drawn when None. Numbers that count the videos of
            a training run make its noise independent of how they are split into batches.
        seed: from 0 to 2^63 - 1.
        eps: standard normal noise like the video, to be stored instead of counted.
        generator: for everything drawn here, on the video's device.

    Returns:
        A float32 scalar.

    Raises:
        ValueError: shapes that disagree, both a sample and eps, or another sigma_in than the
            config's.
    """
    config, batch, device = model.config, len(video), video.device
    if diffusion.sigma_in != config.sigma_in:
        raise ValueError(
            f"diffusion has sigma_in = {diffusion.sigma_in}, but the model {config.name} has "
            f"sigma_in = {config.sigma_in}"
        )
    if sigma is None:
        sigma = sample_sigma(batch, device=device, generator=generator)
    if sample is not None and eps is not None:
        raise ValueError("the noise is either that of sample or eps, not both")
    if sample is None:
        sample = torch.randint(2**63 - 1, (batch,), device=device, generator=generator)

    def happens(probability: float) -> torch.Tensor:
        return torch.rand(batch, device=device, generator=generator) < probability

    cond = cond.with_text_kept(~happens(config.label_dropout))
    if eps is None:
        x_sigma = forward_process(
            video, sigma, sample, sigma_in=diffusion.sigma_in, seed=seed, backend=model.backend
        )
        end = diffusion.loss_end(video, sample, sigma, seed=seed)
    else:
        x_sigma, end = diffusion.noise(video, eps, sigma), None
    scale = diffusion.c_in(checked(sigma, video))
    with torch.no_grad():
        _, previous = model(x_sigma, sigma, cond, scale_B=scale)
    previous = previous * happens(config.self_conditioning)[:, None, None]
    result, _ = model(x_sigma, sigma, cond, previous, scale_B=scale, end=end)
    return result if eps is None else diffusion.loss(result, video, eps, sigma)


def augment_low_res(
    low_res: torch.Tensor, level: torch.Tensor, *, generator: torch.Generator | None = None
) -> torch.Tensor:
    """Noise an upsampler's low-resolution input (section 3.4, "variable level of noise").

    sqrt(g) low_res + sqrt(1 - g) eps with g = cos^2(pi level / 2), before it is upsampled.

    Args:
        low_res: (B, 3, T, h, w) in [-1, 1].
        level: (B,) in [0, 1]; uniform in training, a fixed small one at inference.
        generator: for eps, on the video's device.

    Raises:
        ValueError: level is not (B,).
    """
    if level.shape != low_res.shape[:1]:
        raise ValueError(f"level must be {tuple(low_res.shape[:1])}, got {tuple(level.shape)}")
    angle = (level * torch.pi / 2)[:, None, None, None, None]
    eps = torch.randn(low_res.shape, device=low_res.device, generator=generator)
    return angle.cos() * low_res + angle.sin() * eps
