"""EDM's deterministic second-order sampler, adapted to sigma_in (paper sections 3.2 and 3.6)."""

import math
from collections.abc import Callable
from itertools import pairwise

import torch

from snapvideo_core.capture import CapturedFIT
from snapvideo_core.diffusion import Diffusion, Network
from snapvideo_core.fit import FIT, Conditioning, Mix


def sigma_schedule(
    steps: int,
    *,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    rho: float = 7.0,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """EDM's noise levels: `steps` of them falling from sigma_max to sigma_min, then 0.

    The paper takes 256 steps in the first stage and 40 in the second.

    Returns:
        (steps + 1,) float64.

    Raises:
        ValueError: steps not an int of at least 2, or not 0 < sigma_min < sigma_max < inf, or rho
            below 1.
    """
    if not isinstance(steps, int) or steps < 2:
        raise ValueError(f"steps must be an int of at least 2, got {steps!r}")
    if not 0 < sigma_min < sigma_max < math.inf:
        raise ValueError(f"0 < sigma_min < sigma_max < inf is needed, got {sigma_min}, {sigma_max}")
    if not 1 <= rho < math.inf:
        raise ValueError(f"rho must be at least 1, got {rho}")
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64, device=device)
    high, low = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    sigmas = (high + ramp * (low - high)) ** rho
    return torch.cat([sigmas, sigmas.new_zeros(1)])


def sample(
    network: Network,
    diffusion: Diffusion,
    cond: Conditioning,
    noise: torch.Tensor,
    *,
    sigmas: torch.Tensor,
    second_order: bool = True,
) -> torch.Tensor:
    """Sample videos: noise to data, each evaluation conditioned on the latents of the one before.

    No gradients are recorded; put a `FIT` in evaluation mode first.

    Args:
        network: a `FIT`, captured at this batch size (`FIT.capture`) or not, or any callable of its
            signature.
        diffusion: what the network was trained with.
        cond: what the B videos are conditioned on.
        noise: (B, 3, T, H, W) standard normal; float64 keeps the state in float64, else it is
            float32.
        sigmas: (steps + 1,) falling noise levels that end in 0, as `sigma_schedule` makes them.
        second_order: False for Euler steps, half the evaluations (2 steps - 1 become steps).

    Returns:
        (B, 3, T, H, W) videos, float32 or float64.

    Raises:
        ValueError: sigmas that do not fall strictly to 0, or the network in training mode.
    """
    if getattr(network, "training", False):
        raise ValueError("the network is in training mode, so dropout acts: call eval() on it")
    with torch.no_grad():
        if isinstance(network, FIT | CapturedFIT) and noise.dtype != torch.float64:
            return _sample_in_the_head(network, diffusion, cond, noise, sigmas, second_order)
        return integrate(
            SelfConditionedDenoiser(network, diffusion, cond),
            noise,
            sigmas=sigmas,
            sigma_in=diffusion.sigma_in,
            second_order=second_order,
        )


def _sample_in_the_head(
    network: FIT | CapturedFIT,
    diffusion: Diffusion,
    cond: Conditioning,
    noise: torch.Tensor,
    sigmas: torch.Tensor,
    second_order: bool,
) -> torch.Tensor:
    """`integrate`, with every step's arithmetic done by the head that makes F.

    An Euler step and Heun's correction are sums of F, the state and, in the correction, the state
    before: x ahead holds the first slope.
    """
    levels = _checked_levels(sigmas, diffusion.sigma_in)
    batch = len(noise)
    sigma = torch.tensor(levels, dtype=torch.float64)
    before, after = sigma[:-1], sigma[1:]
    euler = _step_mix(diffusion, before, after - before)
    heun = _step_mix(diffusion, after.clamp(min=1e-300), (after - before) / 2)
    heun[:, 1] -= 0.5  # the correction starts half from x ahead, which Euler's step adds whole
    heun[:, 2] = 0.5
    scales = diffusion.c_in(sigma)

    def to_device(per_step: torch.Tensor) -> torch.Tensor:
        """(steps, ...) as (steps, B, ...), one copy for the whole run."""
        wide = per_step.to(noise.device, torch.float32)
        return wide.unsqueeze(1).expand(-1, batch, *wide.shape[1:]).contiguous()

    sigma_B, scale_B, euler_B3, heun_B3 = map(to_device, (sigma, scales, euler, heun))
    x = noise.float() * levels[0]
    latents = None
    for step in range(len(levels) - 1):
        end = Mix(mix=euler_B3[step], video=x)
        ahead, latents = network(x, sigma_B[step], cond, latents, scale_B=scale_B[step], end=end)
        if second_order and levels[step + 1] > 0:
            end = Mix(mix=heun_B3[step], video=ahead, other=x)
            at = step + 1
            ahead, latents = network(
                ahead, sigma_B[at], cond, latents, scale_B=scale_B[at], end=end
            )
        x = ahead
    return x * diffusion.sigma_in


def _step_mix(diffusion: Diffusion, at: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
    """(steps, 3): x + step (x - D / sigma_in) / at, as a sum of F, x and another video.

    D is c_out F + c_skip x; the slope is that at the noise level `at`.
    """
    rate, sigma_in = step / at, diffusion.sigma_in
    of_F = -rate * diffusion.c_out(at) / sigma_in
    of_x = 1 + rate * (1 - diffusion.c_skip(at) / sigma_in)
    return torch.stack([of_F, of_x, torch.zeros_like(at)], dim=1)


def integrate(
    denoiser: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    noise: torch.Tensor,
    *,
    sigmas: torch.Tensor,
    sigma_in: float,
    second_order: bool = True,
) -> torch.Tensor:
    """Integrate the probability flow from noise to data: Heun's method, or Euler's.

    The signal in x_sigma is scaled by 1 / sigma_in, so D is divided by sigma_in in the slope and
    the result multiplied by it.

    Args:
        denoiser: (x (B, ...), sigma (B,)) -> D(x; sigma), the denoised data in data units.
        noise: (B, ...) standard normal; float64 keeps the state in float64, else it is float32.
        sigmas: (steps + 1,) falling noise levels that end in 0, as `sigma_schedule` makes them.
        sigma_in: of the diffusion the denoiser was trained with.
        second_order: False for Euler steps, half the evaluations (2 steps - 1 become steps).

    Returns:
        (B, ...) samples in data units, float32 or float64.

    Raises:
        ValueError: sigmas that do not fall strictly to 0, or sigma_in not above 0.
    """
    levels = _checked_levels(sigmas, sigma_in)
    x = noise.to(torch.promote_types(noise.dtype, torch.float32)) * levels[0]

    def slope(x: torch.Tensor, sigma: float) -> torch.Tensor:
        sigma_B = torch.full((len(x),), sigma, dtype=x.dtype, device=x.device)
        return (x - denoiser(x, sigma_B).to(x.dtype) / sigma_in) / sigma

    for sigma, following in pairwise(levels):
        d = slope(x, sigma)
        ahead = x + (following - sigma) * d
        if second_order and following > 0:
            ahead = x + (following - sigma) * (d + slope(ahead, following)) / 2
        x = ahead
    return x * sigma_in


def _checked_levels(sigmas: torch.Tensor, sigma_in: float) -> list[float]:
    levels = torch.as_tensor(sigmas).tolist()
    falling = all(math.inf > a > b for a, b in pairwise(levels))
    if len(levels) < 2 or not falling or levels[-1] != 0:
        raise ValueError(f"sigmas must fall strictly and end in 0, got {levels}")
    if not sigma_in > 0:
        raise ValueError(f"sigma_in must be above 0, got {sigma_in!r}")
    return levels


class SelfConditionedDenoiser:
    """A denoiser for `integrate` that hands each evaluation the latents of the one before.

    Every evaluation counts, the second of a Heun step too. An instance serves one call of
    `integrate`: the first evaluation has no latents.
    """

    def __init__(self, network: Network, diffusion: Diffusion, cond: Conditioning):
        self.network, self.diffusion, self.cond = network, diffusion, cond
        self.latents: torch.Tensor | None = None

    def __call__(self, x_sigma: torch.Tensor, sigma_B: torch.Tensor) -> torch.Tensor:
        denoised, self.latents = self.diffusion.denoise(
            self.network, x_sigma, sigma_B, self.cond, self.latents
        )
        return denoised
