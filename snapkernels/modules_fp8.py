"""The fp8 forms of the sublayers, for inference: made by `quantise` of trained ones.

They hold buffers, not parameters: nothing in them has a gradient.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import nn

from snapkernels.modules import EPS, FeedForward, GroupRead, GroupWrite, LatentAttention
from snapkernels.ops.feed_forward.op import feed_forward_fp8, linear_fp8
from snapkernels.ops.feed_forward.quantise import quantise_feed_forward, quantise_rows
from snapkernels.ops.feed_forward.weights import FP8_DTYPES, Fp8FeedForwardWeights
from snapkernels.ops.group_attn.eager import attended
from snapkernels.ops.group_attn.weights import CrossAttentionWeights
from snapkernels.ops.latent_attn.op import latent_attention_fp8
from snapkernels.ops.latent_attn.quantise import quantise_latent_attention
from snapkernels.ops.latent_attn.weights import FP8_DTYPES as ATTENTION_FP8_DTYPES
from snapkernels.ops.latent_attn.weights import Fp8SelfAttentionWeights

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
    """`latent_attention_fp8` with its weights, those of a `LatentAttention` quantised."""

    fixed = tuple(ATTENTION_FP8_DTYPES)
    formats: ClassVar = {"weights": E4M3_ROWS, "inputs": E4M3_ROWS}

    def __init__(self, layer: LatentAttention):
        super().__init__()
        self.num_heads = layer.num_heads
        self.backend = layer.backend
        for name, tensor in quantise_latent_attention(layer.weights())._asdict().items():
            self.register_buffer(name, tensor)

    def weights(self) -> Fp8SelfAttentionWeights:
        """The buffers as the op takes them."""
        names = Fp8SelfAttentionWeights._fields
        return Fp8SelfAttentionWeights(*(getattr(self, name) for name in names))

    def forward(self, latents_BLD: torch.Tensor) -> torch.Tensor:
        """(B, L, dim) -> (B, L, dim).

        Raises:
            ValueError: the latents are not of three dimensions, or not those of the weights.
        """
        if latents_BLD.dim() != 3:
            got = tuple(latents_BLD.shape)
            raise ValueError(f"Fp8LatentAttention: latents must be (B, L, dim), got {got}")
        return latent_attention_fp8(
            latents_BLD, self.weights(), num_heads=self.num_heads, eps=EPS, backend=self.backend
        )


class _Fp8CrossAttention(Fp8Module):
    """A cross-attention with its projections in fp8, k and v as one; its core stays as it was.

    A projection called q has its numbers in q_weight, q_scale and q_bias.
    """

    fixed = ("q_weight", "q_scale", "kv_weight", "kv_scale", "o_weight", "o_scale")
    formats: ClassVar = {"weights": E4M3_ROWS, "inputs": E4M3_ROWS}

    def __init__(self, layer: GroupRead | GroupWrite):
        super().__init__()
        self.num_heads = layer.num_heads
        self.backend = layer.backend
        w = layer.weights()
        self._keep_norm("q_norm", w.q_norm_weight, w.q_norm_bias)
        self._keep_norm("kv_norm", w.kv_norm_weight, w.kv_norm_bias)
        v_bias, o_bias = self._biases(w)
        self._keep_projection("q", w.q_weight, w.q_bias)
        self._keep_projection(
            "kv", torch.cat([w.k_weight, w.v_weight]), torch.cat([w.k_bias, v_bias])
        )
        self._keep_projection("o", w.o_weight, o_bias)

    @staticmethod
    def _biases(w: CrossAttentionWeights) -> tuple[torch.Tensor, torch.Tensor]:
        """Those of v and of o."""
        return w.v_bias, w.o_bias

    def _keep_projection(self, name: str, weight: torch.Tensor, bias: torch.Tensor) -> None:
        rows, scale = quantise_rows(weight)
        self.register_buffer(f"{name}_weight", rows)
        self.register_buffer(f"{name}_scale", scale)
        self.register_buffer(f"{name}_bias", bias.detach().clone())

    def _keep_norm(self, name: str, weight: torch.Tensor, bias: torch.Tensor) -> None:
        self.register_buffer(f"{name}_weight", weight.detach().clone())
        self.register_buffer(f"{name}_bias", bias.detach().clone())

    def _project(
        self,
        name: str,
        tokens: torch.Tensor,
        *,
        norm: str | None = None,
        residual: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The projection `name` of the tokens, after the LayerNorm `norm` and to the residual."""
        return linear_fp8(
            tokens,
            getattr(self, f"{name}_weight"),
            getattr(self, f"{name}_scale"),
            getattr(self, f"{name}_bias"),
            norm_weight=getattr(self, f"{norm}_weight") if norm else None,
            norm_bias=getattr(self, f"{norm}_bias") if norm else None,
            residual=residual,
            eps=EPS,
            backend=self.backend,
        )

    def _updated(
        self, q_tokens: torch.Tensor, kv_tokens: torch.Tensor, mask_BGK: torch.Tensor | None
    ) -> torch.Tensor:
        """(B, G, Q, q_dim) and (B, G, K, kv_dim) -> (B, G, Q, q_dim)."""
        self._check(q_tokens, kv_tokens, mask_BGK)
        q_BGQI = self._project("q", q_tokens, norm="q_norm")
        k_BGKI, v_BGKI = self._project("kv", kv_tokens, norm="kv_norm").chunk(2, -1)
        context_BGQI = attended(q_BGQI, k_BGKI, v_BGKI, mask_BGK, self.num_heads)
        return self._project("o", context_BGQI.to(q_tokens.dtype), residual=q_tokens)

    def _check(
        self, q_tokens: torch.Tensor, kv_tokens: torch.Tensor, mask: torch.Tensor | None
    ) -> None:
        """What the projections do not see: that the groups are the same, and the mask is theirs."""
        groups, what = q_tokens.shape[:2], type(self).__name__
        if q_tokens.dim() != 4 or kv_tokens.dim() != 4 or kv_tokens.shape[:2] != groups:
            got = f"{tuple(q_tokens.shape)} and {tuple(kv_tokens.shape)}"
            raise ValueError(f"{what}: tokens must be (B, G, ..., dim) of the same B, G, got {got}")
        if mask is not None and (mask.dtype != torch.bool or mask.shape != kv_tokens.shape[:3]):
            wanted, got = tuple(kv_tokens.shape[:3]), f"{mask.dtype} {tuple(mask.shape)}"
            raise ValueError(f"{what}: mask must be torch.bool {wanted}, got {got}")
        for side, tokens in (("q", q_tokens), ("kv", kv_tokens)):
            norm = self.get_buffer(f"{side}_norm_weight")
            if tokens.dtype != norm.dtype or tokens.shape[-1:] != norm.shape:
                raise ValueError(
                    f"{what}: the {side} side's tokens must be {norm.dtype} (B, G, ..., "
                    f"{len(norm)}), got {tokens.dtype} {tuple(tokens.shape)}"
                )


class Fp8GroupRead(_Fp8CrossAttention):
    """A `GroupRead` with its projections in fp8, k and v as one; attention by SDPA."""

    def forward(
        self, latents: torch.Tensor, tokens: torch.Tensor, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """(B, G, L, q_dim), (B, G, N, kv_dim) and a (B, G, N) bool mask -> (B, G, L, q_dim).

        Raises:
            ValueError: as `group_read` does.
        """
        return self._updated(latents, tokens, mask)


class Fp8GroupWrite(_Fp8CrossAttention):
    """A `GroupWrite` with its projections in fp8, k and v as one; attention by SDPA.

    The weights of a query add up to 1: what is the same in every value is so in every context. It
    goes past the core, into o's bias, where it is not rounded. (A read may have nothing to read.)
    """

    @staticmethod
    @torch.no_grad()
    def _biases(w: CrossAttentionWeights) -> tuple[torch.Tensor, torch.Tensor]:
        dtype = w.v_bias.dtype
        wide = torch.promote_types(dtype, torch.float32)
        rows, scale = quantise_rows(w.v_weight)
        of_norm = rows.to(wide) @ w.kv_norm_bias.to(wide) * scale
        o_bias = w.o_bias.to(wide) + w.o_weight.to(wide) @ (of_norm + w.v_bias.to(wide))
        return -of_norm.to(dtype), o_bias.to(dtype)

    def forward(self, patches: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        """(B, G, N, q_dim) and (B, G, L, kv_dim) -> (B, G, N, q_dim).

        Raises:
            ValueError: as `group_write` does.
        """
        return self._updated(patches, latents, None)
