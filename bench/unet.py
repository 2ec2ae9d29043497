"""The U-Nets that the paper holds its FITs against (tables 2 and 7), in plain PyTorch.

ADM's U-Net runs on every frame; attention over time joins the frames of a video and cross
attention reads its text. Table 7 leaves the places of both open; those chosen here give the
paper's parameter counts, 85M and 284M.

Legend: B videos, T frames, N = B T frames of all videos, C channels, H x W pixels, S text tokens,
L tokens of one sequence, K heads, D channels of a text token or a head.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

GROUPS = 32  # of every GroupNorm, as in ADM


@dataclass(frozen=True, kw_only=True)
class UNetConfig:
    """Sizes of one U-Net. Lengths are in frames, pixels (height, width) and tokens.

    Raises:
        ValueError: sizes that do not fit together; the message names them.
    """

    name: str
    base: int  # channels of the stem
    mult: tuple[int, ...]  # channels of each level, in units of base
    res_blocks: int = 2  # of a level on the way down; one more on the way up
    attention_levels: tuple[int, ...] = (1, 2, 3)  # the middle attends too
    head_dim: int = 64
    cond_dim: int = 768  # of the embedding of sigma, and of the text tokens
    text_dim: int = 1024  # T5-11B
    text_length: int = 128
    frames: int = 16
    height: int = 36
    width: int = 64
    dropout: float = 0.1
    sigma_in: float = 4.0  # s * sqrt(T), section 3.5

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type is int and not (isinstance(value, int) and value > 0):
                self._refuse(field.name, "an int of at least 1")
        if not self.mult or not all(isinstance(m, int) and m > 0 for m in self.mult):
            self._refuse("mult", "positive ints")
        if self.base % GROUPS:
            self._refuse("base", f"divisible by the {GROUPS} groups of a norm")
        if not set(self.attention_levels) <= set(range(len(self.mult))):
            self._refuse("attention_levels", f"among the levels, 0 to {len(self.mult) - 1}")
        for level in (*self.attention_levels, -1):
            if self.dims[level] % self.head_dim:
                self._refuse("head_dim", f"a divisor of the channels {self.dims[level]}")
        if self.width % self.shrinking:
            self._refuse("width", f"divisible by {self.shrinking}, to be halved at every level")
        if not 0 <= self.dropout <= 1:
            self._refuse("dropout", "a probability")
        if not self.sigma_in > 0:
            self._refuse("sigma_in", "above 0")

    def _refuse(self, name: str, allowed: str) -> None:
        raise ValueError(f"{self.name}: {name} must be {allowed}, got {getattr(self, name)!r}")

    @property
    def low_res(self) -> None:
        """It is no upsampler."""
        return None

    @property
    def dims(self) -> tuple[int, ...]:
        """Channels of each level."""
        return tuple(self.base * m for m in self.mult)

    @property
    def shrinking(self) -> int:
        """How many pixels along an axis are one at the last level."""
        return 2 ** (len(self.mult) - 1)

    @property
    def padded_height(self) -> int:
        """Height with the zero rows that let it be halved at every level (36 -> 40, table 7)."""
        return -(-self.height // self.shrinking) * self.shrinking


UNETS = {
    config.name: config
    for config in (
        UNetConfig(name="unet-85m", base=128, mult=(1, 2, 2, 3)),
        UNetConfig(name="unet-284m", base=192, mult=(1, 2, 3, 4)),
        # For tests and CPUs: every mechanism at small sizes that tell its dimensions apart.
        UNetConfig(
            name="unet-tiny",
            base=32,
            mult=(1, 1, 2),
            attention_levels=(1, 2),
            head_dim=16,
            cond_dim=24,
            text_dim=20,
            text_length=6,
            frames=4,
            height=18,
            width=32,
        ),
    )
}


class Context(NamedTuple):
    """What every layer is conditioned on.

    Attributes:
        embedding: (B, cond_dim), SiLU of the embedding of sigma.
        text: (B, S, cond_dim) text tokens.
        mask: (B, 1, 1, S), what is added to the text's scores: 0 for a token, else -inf.
    """

    embedding: torch.Tensor
    text: torch.Tensor
    mask: torch.Tensor


class ResidualBlock(nn.Module):
    """Two convolutions beside a skip; sigma scales and shifts what is between them.

    Args:
        in_dim, out_dim: channels.
        config: the U-Net's.
        resample: halves or doubles the frames, on both branches (as in BigGAN).
    """

    def __init__(
        self, in_dim: int, out_dim: int, config: UNetConfig, resample: nn.Module | None = None
    ):
        super().__init__()
        self.norm1 = nn.GroupNorm(GROUPS, in_dim)
        self.resample = resample or nn.Identity()
        self.conv1 = nn.Conv2d(in_dim, out_dim, 3, padding=1)
        self.modulation = nn.Linear(config.cond_dim, 2 * out_dim)
        self.norm2 = nn.GroupNorm(GROUPS, out_dim)
        self.dropout = nn.Dropout(config.dropout)
        self.conv2 = nn.Conv2d(out_dim, out_dim, 3, padding=1)
        self.skip = nn.Conv2d(in_dim, out_dim, 1) if in_dim != out_dim else nn.Identity()

    def forward(self, x_NCHW: torch.Tensor, context: Context) -> torch.Tensor:
        h = self.conv1(self.resample(functional.silu(self.norm1(x_NCHW))))
        modulation = self.modulation(context.embedding)[:, None, :, None, None]
        scale, shift = modulation.chunk(2, dim=2)  # (B, 1, C, 1, 1): the frames of a video share it
        h = self.norm2(h).unflatten(0, (len(scale), -1))
        h = functional.silu(torch.addcmul(shift, h, 1 + scale)).flatten(0, 1)
        return self.skip(self.resample(x_NCHW)) + self.conv2(self.dropout(h))


class SelfAttention(nn.Module):
    """x + attention among the pixels of a frame or, if `temporal`, the frames of a pixel."""

    def __init__(self, dim: int, config: UNetConfig, *, temporal: bool):
        super().__init__()
        self.frames = config.frames if temporal else None
        self.head_dim = config.head_dim
        self.norm = nn.GroupNorm(GROUPS, dim)
        self.qkv = nn.Linear(dim, 3 * dim)  # q, k, v of the first head, of the second, ...
        self.out = nn.Linear(dim, dim)

    def forward(self, x_NCHW: torch.Tensor, context: Context) -> torch.Tensor:
        tokens_NLC = tokens_of(self.norm(x_NCHW))
        sequences, length, _ = tokens_NLC.shape
        if self.frames:  # every pixel has heads of its own: q, k and v are views here too
            sequences, length = sequences // self.frames, self.frames
        qkv = self.qkv(tokens_NLC).reshape(sequences, length, -1, 3, self.head_dim)
        q, k, v = qkv.unbind(-2)
        found = attention(q, k, v).reshape(tokens_NLC.shape)
        return x_NCHW + frames_of(self.out(found), x_NCHW)


class TextAttention(nn.Module):
    """x + attention of every pixel to the text, whose keys are made once for all frames."""

    def __init__(self, dim: int, config: UNetConfig):
        super().__init__()
        self.head_dim = config.head_dim
        self.norm = nn.GroupNorm(GROUPS, dim)
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(config.cond_dim, 2 * dim)  # k, v of the first head, ...
        self.out = nn.Linear(dim, dim)

    def forward(self, x_NCHW: torch.Tensor, context: Context) -> torch.Tensor:
        tokens_NLC = tokens_of(self.norm(x_NCHW))
        videos, tokens, _ = context.text.shape
        heads = tokens_NLC.shape[-1] // self.head_dim
        q = self.q(tokens_NLC).reshape(videos, -1, heads, self.head_dim)
        kv = self.kv(context.text).reshape(videos, tokens, heads, 2, self.head_dim)
        k, v = kv.unbind(-2)
        found = attention(q, k, v, context.mask).reshape(tokens_NLC.shape)
        return x_NCHW + frames_of(self.out(found), x_NCHW)


class Stage(nn.ModuleList):
    """Layers in turn, between two skip connections."""

    def forward(self, x_NCHW: torch.Tensor, context: Context) -> torch.Tensor:
        for layer in self:
            x_NCHW = layer(x_NCHW, context)
        return x_NCHW


class UNet(nn.Module):
    """The network F_theta as a U-Net, without self-conditioning.

    Weights are drawn as PyTorch draws them. ADM starts the last layer of every branch at zero;
    here that would make F zero, and hide every error from the gate.

    After `model.to(memory_format=torch.channels_last)` the frames are channels-last too, whatever
    the layout of x, and the tokens of attention are views of them. (CUDA's group norm answers in
    NCHW, as of PyTorch 2.13, so eager calls change the layout around every norm.)

    Args:
        config: sizes; see `UNETS`.
    """

    def __init__(self, config: UNetConfig):
        super().__init__()
        self.config = config
        last = len(config.mult) - 1
        self.fc1 = nn.Linear(config.base, config.cond_dim)
        self.fc2 = nn.Linear(config.cond_dim, config.cond_dim)
        self.text = nn.Linear(config.text_dim, config.cond_dim)
        dim = config.base
        skips = [dim]
        self.stem = nn.Conv2d(3, dim, 3, padding=1)
        self.down = nn.ModuleList()
        for level, out_dim in enumerate(config.dims):
            for _ in range(config.res_blocks):
                self.down.append(Stage(layers(dim, out_dim, config, level)))
                dim = out_dim
                skips.append(dim)
            if level < last:
                self.down.append(Stage([ResidualBlock(dim, dim, config, nn.AvgPool2d(2))]))
                skips.append(dim)
        # The second attention of the middle is what lands both of the paper's counts.
        self.middle = Stage(
            [
                ResidualBlock(dim, dim, config),
                *attentions(dim, config),
                ResidualBlock(dim, dim, config),
                SelfAttention(dim, config, temporal=False),
                SelfAttention(dim, config, temporal=True),
            ]
        )
        self.up = nn.ModuleList()
        for level in range(last, -1, -1):
            for block in range(config.res_blocks + 1):
                stage = Stage(layers(dim + skips.pop(), config.dims[level], config, level))
                dim = config.dims[level]
                if level and block == config.res_blocks:
                    stage.append(ResidualBlock(dim, dim, config, nn.Upsample(scale_factor=2)))
                self.up.append(stage)
        self.head_norm = nn.GroupNorm(GROUPS, dim)
        self.head = nn.Conv2d(dim, 3, 3, padding=1)

    def forward(
        self,
        x_BCTHW: torch.Tensor,
        sigma_B: torch.Tensor,
        text_BSD: torch.Tensor,
        text_mask_BS: torch.Tensor,
    ) -> torch.Tensor:
        """Evaluate the network once.

        Args:
            x_BCTHW: (B, 3, T, H, W), c_in(sigma) x_sigma, any floating dtype; cast, like the text,
                to the weights' dtype.
            sigma_B: (B,) noise levels, above 0 (not checked: that would wait for the device).
            text_BSD: (B, S, text_dim) text embeddings, of any length S.
            text_mask_BS: (B, S) bool, True where `text_BSD` holds a token; every video has one
                at least (not checked either: without one F is NaN).

        Returns:
            F (B, 3, T, H, W), float32 or wider.

        Raises:
            ValueError: a tensor of the wrong shape, dtype or device; the message names it.
        """
        self._check(x_BCTHW, sigma_B, text_BSD, text_mask_BS)
        weight = self.stem.weight
        padding = self.config.padded_height - self.config.height
        frames = x_BCTHW.to(weight.dtype).transpose(1, 2).flatten(0, 1)
        frames = functional.pad(frames, (0, 0, 0, padding))
        if weight.is_contiguous(memory_format=torch.channels_last):
            frames = frames.contiguous(memory_format=torch.channels_last)
        context = self._context(sigma_B, text_BSD, text_mask_BS)
        h = self.stem(frames)
        skips = [h]
        for stage in self.down:
            h = stage(h, context)
            skips.append(h)
        h = self.middle(h, context)
        for stage in self.up:
            h = stage(torch.cat([h, skips.pop()], dim=1), context)
        F_NCHW = self.head(functional.silu(self.head_norm(h)))[:, :, : self.config.height]
        F_BCTHW = F_NCHW.unflatten(0, (len(x_BCTHW), -1)).transpose(1, 2)
        return F_BCTHW.to(torch.promote_types(weight.dtype, torch.float32))

    def _context(
        self, sigma_B: torch.Tensor, text_BSD: torch.Tensor, text_mask_BS: torch.Tensor
    ) -> Context:
        dtype = self.fc1.weight.dtype
        wave = sinusoid(sigma_B.to(torch.promote_types(dtype, torch.float32)), self.config.base)
        embedding = self.fc2(functional.silu(self.fc1(wave.to(dtype))))
        allowed = text_mask_BS[:, None, None, :]
        mask = torch.zeros_like(allowed, dtype=dtype).masked_fill(~allowed, -torch.inf)
        return Context(functional.silu(embedding), self.text(text_BSD.to(dtype)), mask)

    def _check(
        self, x: torch.Tensor, sigma: torch.Tensor, text: torch.Tensor, text_mask: torch.Tensor
    ) -> None:
        config = self.config
        sizes = (3, config.frames, config.height, config.width)
        videos, tokens = x.shape[:1], text_mask.shape[1:]
        for name, tensor, shape in (
            ("x_BCTHW", x, (*videos, *sizes)),
            ("sigma_B", sigma, (*videos,)),
            ("text_mask_BS", text_mask, (*videos, *tokens[:1])),
            ("text_BSD", text, (*videos, *tokens, config.text_dim)),
        ):
            if tensor.shape != shape:
                self._refuse(name, "shape", shape, tuple(tensor.shape))
            if name != "text_mask_BS" and not tensor.is_floating_point():
                self._refuse(name, "dtype", "a floating one", tensor.dtype)
            if tensor.device != self.stem.weight.device:
                self._refuse(name, "device", self.stem.weight.device, tensor.device)
        if text_mask.dtype != torch.bool:
            self._refuse("text_mask_BS", "dtype", torch.bool, text_mask.dtype)

    def _refuse(self, name: str, what: str, allowed: object, got: object) -> None:
        raise ValueError(f"{self.config.name}: {what} of {name} must be {allowed}, got {got}")


def layers(in_dim: int, out_dim: int, config: UNetConfig, level: int) -> Iterator[nn.Module]:
    """A residual block and, where the level attends, `attentions`."""
    yield ResidualBlock(in_dim, out_dim, config)
    if level in config.attention_levels:
        yield from attentions(out_dim, config)


def attentions(dim: int, config: UNetConfig) -> Iterator[nn.Module]:
    """Attention in space, to the text and in time."""
    yield SelfAttention(dim, config, temporal=False)
    yield TextAttention(dim, config)
    yield SelfAttention(dim, config, temporal=True)


def tokens_of(x_NCHW: torch.Tensor) -> torch.Tensor:
    """Frames as contiguous (N, H W, C) tokens: of channels-last frames a view.

    Of others a copy, which costs less than the product and the bias pass of strided tokens.
    """
    return x_NCHW.flatten(2).transpose(1, 2).contiguous()


def frames_of(tokens_NLC: torch.Tensor, like_NCHW: torch.Tensor) -> torch.Tensor:
    """(N, H W, C) tokens as frames of the shape of `like_NCHW`, a view."""
    return tokens_NLC.transpose(1, 2).unflatten(2, like_NCHW.shape[2:])


def attention(
    q_BLKD: torch.Tensor,
    k_BLKD: torch.Tensor,
    v_BLKD: torch.Tensor,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """softmax(q k / sqrt(D) + mask) v, (B, L, K, D), by PyTorch's fused kernels."""
    q, k, v = (heads.transpose(1, 2) for heads in (q_BLKD, k_BLKD, v_BLKD))
    return functional.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


def sinusoid(sigma_B: torch.Tensor, dim: int) -> torch.Tensor:
    """cos and sin of c_noise = ln(sigma) / 4 at dim / 2 frequencies from 1 to 1e-4: (B, dim)."""
    half = dim // 2
    exponent = torch.arange(half, device=sigma_B.device, dtype=sigma_B.dtype) / half
    angle = (sigma_B.log() / 4)[:, None] * 10_000.0**-exponent
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


def unet_reference(model: UNet) -> UNet:
    """A float64 copy of `model` in eval mode, which the gate compares it with."""
    return copy.deepcopy(model).double().eval()


@lru_cache
def unet_tflop(config: UNetConfig) -> float:
    """TFLOP of one evaluation of one video: convolutions and products, a multiply-add as two.

    `config.text_length` text tokens are counted.
    """
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        UNet(config)(
            torch.ones(1, 3, config.frames, config.height, config.width),
            torch.ones(1),
            torch.ones(1, config.text_length, config.text_dim),
            torch.ones(1, config.text_length, dtype=torch.bool),
        )
    return counter.get_total_flops() / 1e12
