"""nn.Module forms of the sublayers: they hold the parameters and call the public functions.

State dicts keep q, k, v and o as separate logical matrices whatever the backend does with them.
"""

import torch
from torch import nn

from snapkernels.ops.feed_forward.op import feed_forward
from snapkernels.ops.feed_forward.weights import FeedForwardWeights
from snapkernels.ops.group_attn.cost import Sizes, absorbs_read, absorbs_write
from snapkernels.ops.group_attn.op import group_read, group_write
from snapkernels.ops.group_attn.weights import CrossAttentionWeights
from snapkernels.ops.latent_attn.op import latent_attention
from snapkernels.ops.latent_attn.weights import SelfAttentionWeights

EPS = 1e-6


class _CrossAttention(nn.Module):
    """Parameters of one cross-attention: queries of width `q_dim`, keys and values of `kv_dim`.

    The inner width is the smaller of the two, as in RIN and FIT.

    Args:
        q_dim, kv_dim: widths of the tokens.
        head_dim: width of a head.
        group: numbers of latent tokens and of patch tokens of a group, if they are known.
        backend: of the op, None for the default.

    Attributes:
        absorbs: whether folding the projections into the attention is the less work in such
            groups, by the operations in `ops/group_attn/cost.py`; False where they are not known.
            It changes no call, each is counted by itself: `quantise` leaves such a layer alone.
    """

    def __init__(
        self,
        q_dim: int,
        kv_dim: int,
        head_dim: int,
        *,
        group: tuple[int, int] | None = None,
        backend: str | None = None,
    ):
        super().__init__()
        inner = min(q_dim, kv_dim)
        self.num_heads = _heads(f"min({q_dim=}, {kv_dim=})", inner, head_dim)
        self.backend = backend
        self.absorbs = False
        if group is not None:
            sizes = {"D": q_dim, "C": kv_dim, "I": inner, "num_heads": self.num_heads}
            sizes["L"], sizes["N"] = group
            self.absorbs = self._absorbs(sizes)
        self.q_norm = nn.LayerNorm(q_dim, eps=EPS)
        self.kv_norm = nn.LayerNorm(kv_dim, eps=EPS)
        self.q = nn.Linear(q_dim, inner)
        self.k = nn.Linear(kv_dim, inner)
        self.v = nn.Linear(kv_dim, inner)
        self.o = nn.Linear(inner, q_dim)

    def _absorbs(self, sizes: Sizes) -> bool:
        raise NotImplementedError

    def weights(self) -> CrossAttentionWeights:
        """The parameters as the ops take them."""
        holders = (self.q_norm, self.kv_norm, self.q, self.k, self.v, self.o)
        return CrossAttentionWeights(*(p for holder in holders for p in _pair(holder)))


class GroupRead(_CrossAttention):
    """`group_read` with its parameters: latents of `q_dim` read tokens of `kv_dim`."""

    def _absorbs(self, sizes: Sizes) -> bool:
        return absorbs_read(sizes)

    def forward(
        self, latents: torch.Tensor, tokens: torch.Tensor, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """(B, G, L, q_dim), (B, G, N, kv_dim) and a (B, G, N) bool mask -> (B, G, L, q_dim)."""
        return group_read(
            latents,
            tokens,
            self.weights(),
            num_heads=self.num_heads,
            mask=mask,
            eps=EPS,
            backend=self.backend,
        )


class GroupWrite(_CrossAttention):
    """`group_write` with its parameters: latents of `kv_dim` update patches of `q_dim`."""

    def _absorbs(self, sizes: Sizes) -> bool:
        return absorbs_write(sizes)

    def forward(self, patches: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        """(B, G, N, q_dim) and (B, G, L, kv_dim) -> (B, G, N, q_dim)."""
        return group_write(
            patches,
            latents,
            self.weights(),
            num_heads=self.num_heads,
            eps=EPS,
            backend=self.backend,
        )


class LatentAttention(nn.Module):
    """`latent_attention` with its parameters."""

    def __init__(self, dim: int, head_dim: int, *, backend: str | None = None):
        super().__init__()
        self.num_heads = _heads("dim", dim, head_dim)
        self.backend = backend
        self.norm = nn.LayerNorm(dim, eps=EPS)
        self.q = nn.Linear(dim, dim)
        self.k = nn.Linear(dim, dim)
        self.v = nn.Linear(dim, dim)
        self.o = nn.Linear(dim, dim)

    def weights(self) -> SelfAttentionWeights:
        """The parameters as the op takes them."""
        holders = (self.norm, self.q, self.k, self.v, self.o)
        return SelfAttentionWeights(*(p for holder in holders for p in _pair(holder)))

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        """(B, L, dim) -> (B, L, dim)."""
        return latent_attention(
            latents, self.weights(), num_heads=self.num_heads, eps=EPS, backend=self.backend
        )


class FeedForward(nn.Module):
    """`feed_forward` with its parameters; dropout acts in training mode only."""

    def __init__(
        self, dim: int, *, ratio: int = 4, dropout: float = 0.0, backend: str | None = None
    ):
        super().__init__()
        self.dropout = dropout
        self.backend = backend
        self.norm = nn.LayerNorm(dim, eps=EPS)
        self.fc1 = nn.Linear(dim, ratio * dim)
        self.fc2 = nn.Linear(ratio * dim, dim)

    def weights(self) -> FeedForwardWeights:
        """The parameters as the op takes them."""
        holders = (self.norm, self.fc1, self.fc2)
        return FeedForwardWeights(*(p for holder in holders for p in _pair(holder)))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """(..., dim) -> (..., dim)."""
        return feed_forward(
            tokens,
            self.weights(),
            dropout=self.dropout if self.training else 0.0,
            eps=EPS,
            backend=self.backend,
        )


def _heads(what: str, width: int, head_dim: int) -> int:
    if head_dim < 1 or width % head_dim:
        raise ValueError(f"{head_dim=} must be above 0 and divide {what} = {width}")
    return width // head_dim


def _pair(holder: nn.LayerNorm | nn.Linear) -> tuple[torch.Tensor, torch.Tensor]:
    return holder.weight, holder.bias
