"""The fp8 forms of the sublayers, for inference: made by `quantise` of trained ones.

They hold buffers, not parameters: nothing in them has a gradient.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from snapkernels.modules import EPS, FeedForward, LatentAttention
from snapkernels.ops.feed_forward.op import feed_forward_fp8, linear_fp8
from snapkernels.ops.feed_forward.quantise import quantise_feed_forward, quantise_rows
from snapkernels.ops.feed_forward.weights import FP8_DTYPES, Fp8FeedForwardWeights

# What these modules compute, in the words that `Recipe` has for it.
E4M3_ROWS = "e4m3, a scale a row: its largest magnitude / 448"
E4M3_BOUND = "e4m3, a scale a token: a bound on its magnitudes / 448"


class Fp8Module(nn.Module):
    """A sublayer with e4m3 matrices.

    Casting it casts LayerNorm and biases, which have the tokens' dtype; the buffers that `fixed`
    names keep theirs.
    """

    fixed: ClassVar[tuple[str, ...]]
    formats: ClassVar[dict[str, str]]
    backend: str | None

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        before = {name: self.get_buffer(name) for name in self.fixed}
        super()._apply(fn, recurse)
        for name, tensor in before.items():
            now = self.get_buffer(name)
            if now.dtype != tensor.dtype:
                setattr(self, name, tensor.to(now.device))
        return self


class Fp8FeedForward(Fp8Module):
    """`feed_forward_fp8` with its weights, those of a `FeedForward` quantised; no dropout."""

    fixed = tuple(FP8_DTYPES)
    formats: ClassVar = {"weights": E4M3_ROWS, "inputs": E4M3_ROWS, "hidden": E4M3_BOUND}

    def __init__(self, layer: FeedForward):
        super().__init__()
        self.backend = layer.backend
        for name, tensor in quantise_feed_forward(layer.weights())._asdict().items():
            self.register_buffer(name, tensor)

    def weights(self) -> Fp8FeedForwardWeights:
        """The buffers as the op takes them."""
        # Not by `get_buffer`, which takes the host twice as long.
        names = Fp8FeedForwardWeights._fields
        return Fp8FeedForwardWeights(*(getattr(self, name) for name in names))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """(..., dim) -> (..., dim)."""
        return feed_forward_fp8(tokens, self.weights(), eps=EPS, backend=self.backend)


class Fp8LatentAttention(Fp8Module):
    """A `LatentAttention` with its projections in fp8, q, k and v as one; the core as it was."""

    fixed = ("qkv_weight", "qkv_scale", "o_weight", "o_scale")
    formats: ClassVar = {"weights": E4M3_ROWS, "inputs": E4M3_ROWS}

    norm_weight: torch.Tensor
    norm_bias: torch.Tensor
    qkv_weight: torch.Tensor
    qkv_scale: torch.Tensor
    qkv_bias: torch.Tensor
    o_weight: torch.Tensor
    o_scale: torch.Tensor
    o_bias: torch.Tensor

    def __init__(self, layer: LatentAttention):
        super().__init__()
        self.num_heads = layer.num_heads
        self.backend = layer.backend
        w = layer.weights()
        stacked = torch.cat([w.q_weight, w.k_weight, w.v_weight]).detach()
        biases = torch.cat([w.q_bias, w.k_bias, w.v_bias]).detach()
        for name, weight, bias in (("qkv", stacked, biases), ("o", w.o_weight, w.o_bias.detach())):
            rows, scale = quantise_rows(weight)
            self.register_buffer(f"{name}_weight", rows)
            self.register_buffer(f"{name}_scale", scale)
            self.register_buffer(f"{name}_bias", bias)
        self.register_buffer("norm_weight", w.norm_weight.detach())
        self.register_buffer("norm_bias", w.norm_bias.detach())

    def forward(self, latents_BLD: torch.Tensor) -> torch.Tensor:
        """(B, L, dim) -> (B, L, dim)."""
        qkv = linear_fp8(
            latents_BLD,
            self.qkv_weight,
            self.qkv_scale,
            self.qkv_bias,
            norm_weight=self.norm_weight,
            norm_bias=self.norm_bias,
            eps=EPS,
            backend=self.backend,
        )
        # (B, H, L, E) views: E dimensions of each of H heads.
        q, k, v = qkv.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        context_BHLE = scaled_dot_product_attention(q, k, v)
        return linear_fp8(
            context_BHLE.transpose(1, 2).flatten(2),
            self.o_weight,
            self.o_scale,
            self.o_bias,
            residual=latents_BLD,
            eps=EPS,
            backend=self.backend,
        )
