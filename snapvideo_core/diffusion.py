"""The diffusion framework: both columns of the paper's table 1 (appendices D and E).

x_sigma = x / sigma_in + sigma eps is denoised by D = c_skip x_sigma + c_out F(c_in x_sigma). The
training loss is w |F - c_nrm F_tgt|^2, which equals lambda |D - x|^2. The paper's table prints
EDM's c_out with sigma_data^2 for sigma_data, and eqs. 41 and 42 a plus before c_nrm F_tgt; neither
satisfies that equality, so both are corrected here (the tests check it).

Everything is computed in float32 or wider: as sigma goes to 0, w goes to sigma_in^2, 1024 in the
second stage.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch

from snapkernels import video_mix
from snapvideo_core.capture import CapturedFIT
from snapvideo_core.fit import FIT, Conditioning, Loss, Mix, at_least_fp32

Network = Callable[
    [torch.Tensor, torch.Tensor, Conditioning, torch.Tensor | None],
    tuple[torch.Tensor, torch.Tensor],
]


@dataclass(frozen=True, kw_only=True)
class Diffusion(ABC):
    """What both columns share.

    Attributes:
        sigma_in: the input is divided by it, s * sqrt(T): 4 in the first stage, 32 in the second.
        sigma_data: standard deviation of the data.

    Raises:
        ValueError: one of them is not above 0.
    """

    sigma_in: float
    sigma_data: float = 1.0

    def __post_init__(self) -> None:
        for name in ("sigma_in", "sigma_data"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)!r}")

    @abstractmethod
    def c_in(self, sigma: torch.Tensor) -> torch.Tensor:
        """Input scaling."""

    @abstractmethod
    def c_skip(self, sigma: torch.Tensor) -> torch.Tensor:
        """Skip scaling."""

    @abstractmethod
    def c_out(self, sigma: torch.Tensor) -> torch.Tensor:
        """Output scaling."""

    @abstractmethod
    def target_terms(self, sigma: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What data and noise are multiplied by in the training target F_tgt."""

    def target(self, x: torch.Tensor, eps: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        """Training target F_tgt."""
        of_x, of_eps = self.target_terms(sigma)
        return of_x * x + of_eps * eps

    @abstractmethod
    def weight(self, sigma: torch.Tensor) -> torch.Tensor:
        """Effective loss weight w, of |F - c_nrm F_tgt|^2."""

    def c_nrm(self, sigma: torch.Tensor) -> torch.Tensor:
        """Target scaling."""
        return 1 / (self.sigma_data * (sigma**2 + self.sigma_data**2).sqrt())

    def loss_weight(self, sigma: torch.Tensor) -> torch.Tensor:
        """Loss weight lambda, of |D - x|^2."""
        return 1 / self.sigma_data**2 + 1 / sigma**2

    def noise(self, x: torch.Tensor, eps: torch.Tensor, sigma_B: torch.Tensor) -> torch.Tensor:
        """The forward process: x_sigma = x / sigma_in + sigma eps (section 3.2).

        Args:
            x, eps: (B, ...) data and standard normal noise.
            sigma_B: (B,) noise levels, above 0 (not checked: that would wait for the device).

        Returns:
            x_sigma, of x's shape, float32 or wider.

        Raises:
            ValueError: shapes that disagree.
        """
        if eps.shape != x.shape:
            raise ValueError(f"eps must be {tuple(x.shape)} like x, got {tuple(eps.shape)}")
        return at_least_fp32(x) / self.sigma_in + _broadcast(sigma_B, x) * eps

    def network_input(self, x_sigma: torch.Tensor, sigma_B: torch.Tensor) -> torch.Tensor:
        """c_in x_sigma, what the network sees: (B, ...), float32 or wider."""
        return self.c_in(_broadcast(sigma_B, x_sigma)) * x_sigma

    def denoise(
        self,
        network: Network,
        x_sigma: torch.Tensor,
        sigma_B: torch.Tensor,
        cond: Conditioning,
        previous: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One denoiser evaluation (eq. 2): D(x_sigma), float32 or wider, and the final latents.

        Args:
            network: a `FIT`, captured or not, or any callable (x, sigma, cond, previous) ->
                (F, latents) of what `network_input` makes; a FIT scales and ends in D itself.
            x_sigma: (B, 3, T, H, W) noisy videos.
            sigma_B: (B,) their noise levels.
            cond, previous: as in `FIT.forward`.
        """
        if isinstance(network, FIT | CapturedFIT):
            level = checked(sigma_B, x_sigma)
            mix = torch.stack([self.c_out(level), self.c_skip(level), 0 * level], dim=1)
            end = Mix(mix=mix, video=x_sigma)
            return network(x_sigma, sigma_B, cond, previous, scale_B=self.c_in(level), end=end)
        sigma = _broadcast(sigma_B, x_sigma)
        F, latents = network(self.network_input(x_sigma, sigma_B), sigma_B, cond, previous)
        return self.c_skip(sigma) * x_sigma + self.c_out(sigma) * at_least_fp32(F), latents

    def guided(
        self,
        F: torch.Tensor,
        null_F: torch.Tensor,
        x_sigma: torch.Tensor,
        sigma_B: torch.Tensor,
        weight: float,
    ) -> torch.Tensor:
        """Classifier-free guidance: D = (1 + weight) D(cond) - weight D(null), float32 or wider.

        Args:
            F, null_F: (B, 3, T, H, W) outputs of the network with and without the condition.
            x_sigma: (B, 3, T, H, W) noisy videos.
            sigma_B: (B,) their noise levels.
            weight: 0 is D(cond) alone.
        """
        sigma = checked(sigma_B, x_sigma)
        c_out = self.c_out(sigma)
        mix = torch.stack([(1 + weight) * c_out, self.c_skip(sigma), -weight * c_out], dim=1)
        return video_mix(F, x_sigma, null_F, mix)

    def loss_end(
        self, x: torch.Tensor, sample_B: torch.Tensor, sigma_B: torch.Tensor, *, seed: int
    ) -> Loss:
        """The training loss (eq. 3) as the end of a `FIT`, for noise that is counted.

        Args:
            x: (B, 3, T, H, W) data.
            sample_B: (B,) int64, as in `snapkernels.forward_process`.
            sigma_B: (B,) noise levels.
            seed: as in `snapkernels.forward_process`.
        """
        sigma = checked(sigma_B, x)
        of_x, of_eps = self.target_terms(sigma)
        scale = self.c_nrm(sigma)
        terms = torch.stack([self.weight(sigma), scale * of_x, scale * of_eps], dim=1)
        return Loss(terms=terms, video=x, sample=sample_B, seed=seed)

    def loss(
        self, F: torch.Tensor, x: torch.Tensor, eps: torch.Tensor, sigma_B: torch.Tensor
    ) -> torch.Tensor:
        """The training loss (eq. 3): mean of w |F - c_nrm F_tgt|^2 over all elements, a scalar.

        F comes cropped, so padding rows have no part in it.

        Args:
            F: (B, 3, T, H, W) output of the network on c_in x_sigma.
            x, eps: the data and noise that x_sigma was made of.
            sigma_B: (B,) noise levels.
        """
        sigma = _broadcast(sigma_B, x)
        error = at_least_fp32(F) - self.c_nrm(sigma) * self.target(at_least_fp32(x), eps, sigma)
        return (self.weight(sigma) * error**2).mean()


class SnapDiffusion(Diffusion):
    """The paper's framework: table 1, column "Our" (appendix E)."""

    def c_in(self, sigma: torch.Tensor) -> torch.Tensor:
        return 1 / (self.sigma_data**2 / self.sigma_in**2 + sigma**2).sqrt()

    def c_skip(self, sigma: torch.Tensor) -> torch.Tensor:
        data = self.sigma_data**2
        return self.sigma_in * data / (self.sigma_in * sigma**2 + data)

    def c_out(self, sigma: torch.Tensor) -> torch.Tensor:
        data = self.sigma_data**2
        scale = self.sigma_in * self.sigma_data
        return -scale * sigma * (sigma**2 + data).sqrt() / (data + self.sigma_in * sigma**2)

    def target_terms(self, sigma: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return -sigma, torch.full_like(sigma, self.sigma_data**2)

    def weight(self, sigma: torch.Tensor) -> torch.Tensor:
        data = self.sigma_data**2
        return (sigma**2 + data) ** 2 / (sigma**2 + data / self.sigma_in) ** 2


class EDMDiffusion(Diffusion):
    """EDM with the scaled input: table 1, column "EDM" (appendix D)."""

    def c_in(self, sigma: torch.Tensor) -> torch.Tensor:
        return 1 / (self.sigma_data**2 + sigma**2).sqrt()

    def c_skip(self, sigma: torch.Tensor) -> torch.Tensor:
        return self.sigma_data**2 / (sigma**2 + self.sigma_data**2)

    def c_out(self, sigma: torch.Tensor) -> torch.Tensor:
        return sigma * self.sigma_data / (sigma**2 + self.sigma_data**2).sqrt()

    def target_terms(self, sigma: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        spurious = self.sigma_data**2 * (self.sigma_in - 1) / (self.sigma_in * sigma)
        return sigma + spurious, torch.full_like(sigma, -(self.sigma_data**2))

    def weight(self, sigma: torch.Tensor) -> torch.Tensor:
        return torch.ones_like(sigma)


def checked(sigma_B: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """`sigma_B`, (B,) noise levels of `like` (B, ...), float32 or wider; NaN where not above 0.

    Raises:
        ValueError: sigma is not (B,), or on the CPU and not above 0 (elsewhere to look at it would
            wait for the device).
    """
    if sigma_B.shape != like.shape[:1]:
        raise ValueError(f"sigma must be {tuple(like.shape[:1])}, got {tuple(sigma_B.shape)}")
    positive = sigma_B > 0
    if sigma_B.device.type == "cpu" and not torch.compiler.is_compiling() and not positive.all():
        raise ValueError(f"sigma must be above 0, got {sigma_B.tolist()}")
    return torch.where(positive, at_least_fp32(sigma_B), torch.nan)


def _broadcast(sigma_B: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """`checked`, as (B, 1, ..., 1) of `like`'s rank."""
    return checked(sigma_B, like).view(-1, *[1] * (like.dim() - 1))
