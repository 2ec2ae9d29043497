"""Snap Video's FIT (paper section 3.4, appendix A).

    x = LN(Linear(patchify(c_in x_sigma))) + positions       patch tokens, in groups
    z = Z_init + LN0(prev + FF(LN(prev)))                    latent tokens, self-conditioned
    c = [sigma, framerate, resolution, augmentation, text]   conditioning tokens
    every block:
        z reads c, FF;  z reads x group by group, FF
        global layers:  z = z + SAttn(LN(z)), FF
        x is written from z group by group, FF
    F = unpatchify(Linear(LN(x)))

Legend: B videos, C channels, T frames, H x W pixels, G groups, N patch tokens of one group,
L latent tokens, S conditioning tokens, D the width of whichever token it is.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional

from snapkernels import (
    RECIPES,
    FeedForward,
    GroupRead,
    GroupWrite,
    HeadWeights,
    LatentAttention,
    Recipe,
    StemWeights,
    head,
    head_loss,
    head_mix,
    stem,
)
from snapvideo_core.config import FITConfig

if TYPE_CHECKING:
    from snapvideo_core.capture import CapturedFIT

EPS = 1e-6  # of every LayerNorm, as in RIN and FIT


@dataclass(frozen=True, kw_only=True)
class Conditioning:
    """What a batch of B videos is conditioned on, beside sigma.

    Attributes:
        framerate: (B,) frames per second; inf for an image (section 3.3).
        resolution: (B, 2) height and width of the source in pixels.
        text: (B, S, text_dim) text embeddings.
        text_mask: (B, S) bool, True where `text` holds a token.
        low_res: (B, 3, T, h, w) in [-1, 1], for an upsampler: the noise-augmented low-resolution
            video, not upsampled.
        augmentation: (B,) in [0, 1], for an upsampler: the level of that noise.
    """

    framerate: torch.Tensor
    resolution: torch.Tensor
    text: torch.Tensor
    text_mask: torch.Tensor
    low_res: torch.Tensor | None = None
    augmentation: torch.Tensor | None = None

    def with_text_kept(self, keep: torch.Tensor) -> "Conditioning":
        """Zero the text features of the videos where `keep`, (B,) bool, is False (label dropout).

        The scalars and the mask stay, so one static graph serves both.
        """
        return replace(self, text=torch.where(keep[:, None, None], self.text, 0.0))


@dataclass(frozen=True, kw_only=True)
class Mix:
    """What `FIT.forward` is to end in: mix[:, 0] F + mix[:, 1] video + mix[:, 2] other.

    Attributes:
        mix: (B, 3) coefficients.
        video, other: (B, 3, T, H, W); no other where it is None.
    """

    mix: torch.Tensor
    video: torch.Tensor
    other: torch.Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Loss:
    """What `FIT.forward` is to end in: the mean of terms[:, 0] (F - terms[:, 1] video -
    terms[:, 2] eps)^2, with eps that of `forward_process` for the same seed and samples.

    Attributes:
        terms: (B, 3) coefficients.
        video: (B, 3, T, H, W) data.
        sample: (B,) int64.
        seed: from 0 to 2^63 - 1.
    """

    terms: torch.Tensor
    video: torch.Tensor
    sample: torch.Tensor
    seed: int


class ScalarEmbedding(nn.Module):
    """One number per video as one token: sinusoid, standardised, then a two-layer MLP."""

    def __init__(self, dim: int):
        super().__init__()
        self.features = dim // 4
        self.fc1 = nn.Linear(self.features, dim)
        self.fc2 = nn.Linear(dim, dim)

    def forward(self, scalar_B: torch.Tensor) -> torch.Tensor:
        """(B,) floating point -> (B, dim); the sinusoid is at least float32."""
        scalar_B = at_least_fp32(scalar_B)
        half = self.features // 2
        exponent = torch.arange(half, device=scalar_B.device, dtype=scalar_B.dtype) / half
        angle = scalar_B[:, None] * 10_000.0**-exponent
        wave = torch.cat([angle.sin(), angle.cos()], dim=-1)
        wave = functional.layer_norm(wave, wave.shape[-1:], eps=EPS).to(self.fc1.weight.dtype)
        return self.fc2(functional.silu(self.fc1(wave)))


class ConditioningTokens(nn.Module):
    """Sigma and `Conditioning` as a sequence of tokens with a mask."""

    def __init__(self, config: FITConfig):
        super().__init__()
        self.sigma = ScalarEmbedding(config.cond_dim)
        self.framerate = ScalarEmbedding(config.cond_dim)
        self.height = ScalarEmbedding(config.cond_dim)
        self.width = ScalarEmbedding(config.cond_dim)
        self.augmentation = ScalarEmbedding(config.cond_dim) if config.low_res else None
        self.text = nn.Linear(config.text_dim, config.cond_dim)

    def forward(
        self, sigma_B: torch.Tensor, cond: Conditioning
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(B,) and a batch's conditioning -> (B, S, cond_dim) tokens and their (B, S) mask."""
        scalars = [
            self.sigma(at_least_fp32(sigma_B).log() / 4),  # c_noise of EDM
            # The frame interval in ms, 0 for an image: 24 and 25 fps are far apart in bf16.
            self.framerate(1000 / at_least_fp32(cond.framerate)),
            self.height(at_least_fp32(cond.resolution[:, 0]).log2()),
            self.width(at_least_fp32(cond.resolution[:, 1]).log2()),
        ]
        if self.augmentation is not None:
            assert cond.augmentation is not None  # FIT.forward has checked
            scalars.append(self.augmentation(cond.augmentation))
        scalars_BSD = torch.stack(scalars, dim=1)
        text_BSD = self.text(cond.text.to(self.text.weight.dtype))
        mask_BS = functional.pad(cond.text_mask, (len(scalars), 0), value=True)
        return torch.cat([scalars_BSD, text_BSD], dim=1), mask_BS


class SelfConditioning(nn.Module):
    """Z_init + LN0(prev + FF(LN(prev))), with LN0 zero at first; no previous latents are zeros."""

    def __init__(self, config: FITConfig, backend: str | None):
        super().__init__()
        self.latents = nn.Parameter(torch.empty(config.num_latents, config.latent_dim))
        self.ff = FeedForward(config.latent_dim, ratio=config.ff_ratio, backend=backend)
        self.norm = nn.LayerNorm(config.latent_dim, eps=EPS)

    def forward(self, previous_BLD: torch.Tensor) -> torch.Tensor:
        return self.latents + self.norm(self.ff(previous_BLD))


class FITBlock(nn.Module):
    """One block: read the conditioning, read the patches, think globally, write the patches."""

    def __init__(self, config: FITConfig, backend: str | None):
        super().__init__()
        z_dim, x_dim, c_dim = config.latent_dim, config.patch_dim, config.cond_dim
        head_dim, ratio = config.patch_head_dim, config.ff_ratio
        self.num_groups = config.num_groups
        group = config.num_latents // config.num_groups, config.group_tokens
        self.cond_read = GroupRead(z_dim, c_dim, head_dim, backend=backend)
        self.cond_ff = FeedForward(z_dim, ratio=ratio, backend=backend)
        self.read = GroupRead(z_dim, x_dim, head_dim, group=group, backend=backend)
        self.read_ff = FeedForward(z_dim, ratio=ratio, backend=backend)
        self.global_layers = nn.ModuleList(
            nn.Sequential(
                LatentAttention(z_dim, config.latent_head_dim, backend=backend),
                FeedForward(z_dim, ratio=ratio, dropout=config.dropout, backend=backend),
            )
            for _ in range(config.global_layers)
        )
        self.write = GroupWrite(x_dim, z_dim, head_dim, group=group, backend=backend)
        self.write_ff = FeedForward(x_dim, ratio=ratio, backend=backend)

    def forward(
        self,
        z_BLD: torch.Tensor,
        x_BGND: torch.Tensor,
        c_BSD: torch.Tensor,
        c_mask_BS: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Latents, patches and conditioning tokens -> the new latents and patches."""
        by_group = (self.num_groups, -1)
        z = self.cond_read(z_BLD.unsqueeze(1), c_BSD.unsqueeze(1), c_mask_BS.unsqueeze(1))
        z = self.cond_ff(z.squeeze(1))
        z = self.read(z.unflatten(1, by_group), x_BGND)
        z = self.read_ff(z.flatten(1, 2))
        for layer in self.global_layers:
            z = layer(z)
        x = self.write(x_BGND, z.unflatten(1, by_group))
        x = self.write_ff(x)
        return z, x


class FIT(nn.Module):
    """The network F_theta of section 3, from a scaled noisy video to its raw output.

    Args:
        config: sizes; see `PRESETS`.
        backend: of every op, None for the default.
    """

    def __init__(self, config: FITConfig, *, backend: str | None = None):
        super().__init__()
        self.config = config
        patch_features = config.patch**2
        self.stem = nn.Linear(config.in_channels * patch_features, config.patch_dim)
        self.stem_norm = nn.LayerNorm(config.patch_dim, eps=EPS)
        tables = 1 if config.positions == "group" else config.num_groups
        self.positions = nn.Parameter(torch.empty(tables, config.group_tokens, config.patch_dim))
        self.conditioning = ConditioningTokens(config)
        self.self_conditioning = SelfConditioning(config, backend)
        self.blocks = nn.ModuleList(FITBlock(config, backend) for _ in range(config.blocks))
        self.head_norm = nn.LayerNorm(config.patch_dim, eps=EPS)
        self.head = nn.Linear(config.patch_dim, 3 * patch_features)
        self.backend = backend
        self.recipe: Recipe = RECIPES["bf16"]  # until `snapkernels.quantise` changes it
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the initial weights of RIN and FIT, whose convention the paper's counts fit."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for table in (self.positions, self.self_conditioning.latents):
            drawn = torch.empty_like(table, dtype=torch.float32)
            table.copy_(nn.init.trunc_normal_(drawn, std=0.02, a=-0.04, b=0.04))
        nn.init.zeros_(self.self_conditioning.norm.weight)
        if self.config.low_res:  # an upsampler starts as the first stage it is tuned from
            self.stem.weight[:, 3 * self.config.patch**2 :] = 0

    def forward(
        self,
        x_BCTHW: torch.Tensor,
        sigma_B: torch.Tensor,
        cond: Conditioning,
        previous_BLD: torch.Tensor | None = None,
        *,
        scale_B: torch.Tensor | None = None,
        end: Mix | Loss | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Evaluate the network once.

        Args:
            x_BCTHW: (B, 3, T, H, W), c_in(sigma) x_sigma or, with `scale_B`, x_sigma; any floating
                dtype, and like `previous_BLD` cast to the weights' dtype.
            sigma_B: (B,) noise levels, above 0 (not checked: that would wait for the device).
            cond: conditioning of the same B videos.
            previous_BLD: (B, L, latent_dim), the latents of the previous evaluation; None for none.
            scale_B: (B,), c_in(sigma), which x is then multiplied by.
            end: what to make of F without storing it; None for F itself.

        Returns:
            F or what `end` makes of it, float32 or wider, and the final latents
            (B, L, latent_dim), in the weights' dtype.

        Raises:
            ValueError: sizes that are not the config's, or an upsampler's conditioning missing.
        """
        config, dtype = self.config, self.positions.dtype
        self._check(x_BCTHW, sigma_B, cond, previous_BLD)
        x = stem(
            x_BCTHW,
            torch.ones_like(sigma_B, dtype=torch.float32) if scale_B is None else scale_B,
            cond.low_res,
            StemWeights(
                self.stem.weight,
                self.stem.bias,
                self.stem_norm.weight,
                self.stem_norm.bias,
                self.positions,
            ),
            patch=config.patch,
            group=config.group,
            eps=EPS,
            backend=self.backend,
        )
        if previous_BLD is None:
            previous_BLD = x.new_zeros(len(x), config.num_latents, config.latent_dim)
        z = self.self_conditioning(previous_BLD.to(dtype))
        c, c_mask = self.conditioning(sigma_B, cond)
        c = c.to(dtype)  # under autocast the tokens come narrower than the weights
        for block in self.blocks:
            z, x = block(z, x, c, c_mask)
        return self._ended(x, end), z

    def capture(
        self, x_BCTHW: torch.Tensor, sigma_B: torch.Tensor, cond: Conditioning
    ) -> "CapturedFIT":
        """The network at this batch size as one CUDA graph, to be called in its place.

        Kernels are compiled and chosen now, in a few evaluations of these inputs; calls then copy
        theirs into the graph's memory and replay it.

        Args:
            x_BCTHW, sigma_B, cond: as in `forward`; calls are held to their shapes and dtypes.

        Raises:
            ValueError: the model is in training mode or not on a CUDA device, or an input that
                `forward` would refuse.
        """
        from snapvideo_core.capture import CapturedFIT  # it imports this file

        self._check(x_BCTHW, sigma_B, cond, None)
        return CapturedFIT(self, x_BCTHW, sigma_B, cond)

    def _ended(self, x_BGND: torch.Tensor, end: Mix | Loss | None) -> torch.Tensor:
        config = self.config
        w = HeadWeights(
            self.head_norm.weight, self.head_norm.bias, self.head.weight, self.head.bias
        )
        at: dict[str, Any] = {
            "patch": config.patch,
            "group": config.group,
            "eps": EPS,
            "backend": self.backend,
        }
        if isinstance(end, Mix):
            return head_mix(x_BGND, end.video, end.other, end.mix, w, **at)
        if isinstance(end, Loss):
            return head_loss(x_BGND, end.video, end.sample, end.terms, w, seed=end.seed, **at)
        return head(x_BGND, w, size=(config.frames, config.height, config.width), **at)

    def _check(
        self,
        x: torch.Tensor,
        sigma: torch.Tensor,
        cond: Conditioning,
        previous: torch.Tensor | None,
    ) -> None:
        config, batch = self.config, len(x)
        size = (config.frames, config.height, config.width)
        words = cond.text.shape[1] if getattr(cond.text, "ndim", 0) == 3 else config.text_length
        wanted: dict[str, tuple[torch.Tensor | None, tuple[int, ...]]] = {
            "x": (x, (batch, 3, *size)),
            "sigma": (sigma, (batch,)),
            "cond.framerate": (cond.framerate, (batch,)),
            "cond.resolution": (cond.resolution, (batch, 2)),
            "cond.text": (cond.text, (batch, words, config.text_dim)),
            "cond.text_mask": (cond.text_mask, (batch, words)),
        }
        if previous is not None:
            wanted["previous"] = (previous, (batch, config.num_latents, config.latent_dim))
        if config.low_res:
            wanted["cond.low_res"] = (cond.low_res, (batch, 3, config.frames, *config.low_res))
            wanted["cond.augmentation"] = (cond.augmentation, (batch,))
        elif cond.low_res is not None or cond.augmentation is not None:
            raise ValueError(f"FIT {config.name}: low_res and augmentation are an upsampler's")
        for name, (tensor, shape) in wanted.items():
            kind = "bool" if name == "cond.text_mask" else "floating point"
            must = f"FIT {config.name}: {name} must be a {kind} tensor of shape {shape}"
            if not isinstance(tensor, torch.Tensor):
                raise ValueError(f"{must}, got {tensor!r}")
            fits = tensor.dtype == torch.bool if kind == "bool" else tensor.is_floating_point()
            if tuple(tensor.shape) != shape or not fits:
                raise ValueError(f"{must}, got {tensor.dtype} {tuple(tensor.shape)}")


def at_least_fp32(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` in float32, or in float64 if it is that."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
