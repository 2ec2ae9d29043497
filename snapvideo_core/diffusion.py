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

from snapvideo_core.fit import Conditioning, at_least_fp32

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
    def target(self, x: torch.Tensor, eps: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        """Training target F_tgt."""

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
            network: a `FIT`, or any callable of its signature.
            x_sigma: (B, 3, T, H, W) noisy videos.
            sigma_B: (B,) their noise levels.
            cond, previous: as in `FIT.forward`.
        """
        sigma = _broadcast(sigma_B, x_sigma)
        F, latents = network(self.network_input(x_sigma, sigma_B), sigma_B, cond, previous)
        return self.c_skip(sigma) * x_sigma + self.c_out(sigma) * at_least_fp32(F), latents

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

    def target(self, x: torch.Tensor, eps: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        return self.sigma_data**2 * eps - sigma * x

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

    def target(self, x: torch.Tensor, eps: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        spurious = self.sigma_data**2 * (self.sigma_in - 1) / (self.sigma_in * sigma)
        return sigma * x - self.sigma_data**2 * eps + spurious * x

    def weight(self, sigma: torch.Tensor) -> torch.Tensor:
        return torch.ones_like(sigma)


def _broadcast(sigma_B: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """(B,) -> (B, 1, ..., 1) of `like`'s rank, float32 or wider.

    Raises:
        ValueError: sigma is not (B,).
    """
    if sigma_B.shape != like.shape[:1]:
        raise ValueError(f"sigma must be {tuple(like.shape[:1])}, got {tuple(sigma_B.shape)}")
    return at_least_fp32(sigma_B).view(-1, *[1] * (like.dim() - 1))
