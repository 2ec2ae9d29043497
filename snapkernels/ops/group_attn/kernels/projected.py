"""Grouped cross-attention by projecting both sides: PyTorch's calls around its fastest core.

Beside the core, what differs from plain calls is memory: nothing outlives its last use, and the
residual is added in place. A product of o's weight that starts from the residual would round once
less, but it starts from one tensor: the residual plus o's bias, rounded at the residual's size,
which is worse than a branch rounded at its own, and moves as much.

Legend: B batch, G groups, X query or key tokens of one group, Q query tokens, K key tokens,
H heads, E channels of a head, I inner width.
"""

import torch
from torch.nn.functional import layer_norm, linear, scaled_dot_product_attention

from snapkernels.ops.group_attn.cores import cudnn_is_best
from snapkernels.ops.group_attn.weights import CrossAttentionWeights


def group_read(
    latents: torch.Tensor,
    patches: torch.Tensor,
    w: CrossAttentionWeights,
    mask: torch.Tensor | None,
    num_heads: int,
    eps: float,
) -> torch.Tensor:
    context_BGQI = _context(latents, patches, w, mask, num_heads, eps)
    return linear(context_BGQI, w.o_weight, w.o_bias).add_(latents)


def group_write(
    patches: torch.Tensor,
    latents: torch.Tensor,
    w: CrossAttentionWeights,
    num_heads: int,
    eps: float,
) -> torch.Tensor:
    return group_read(patches, latents, w, None, num_heads, eps)


def _context(
    q_tokens: torch.Tensor,
    kv_tokens: torch.Tensor,
    w: CrossAttentionWeights,
    mask_BGK: torch.Tensor | None,
    num_heads: int,
    eps: float,
) -> torch.Tensor:
    """(B, G, Q, I), what the queries have read, before o."""

    def by_head(tokens_BGXI: torch.Tensor) -> torch.Tensor:
        """(B, G, X, I) -> (B * G, H, X, E), without a copy."""
        return tokens_BGXI.flatten(0, 1).unflatten(-1, (num_heads, -1)).transpose(1, 2)

    def queries() -> torch.Tensor:
        q_in = layer_norm(q_tokens, q_tokens.shape[-1:], w.q_norm_weight, w.q_norm_bias, eps)
        return by_head(linear(q_in, w.q_weight, w.q_bias))

    def keys_and_values() -> tuple[torch.Tensor, torch.Tensor]:
        kv_in = layer_norm(kv_tokens, kv_tokens.shape[-1:], w.kv_norm_weight, w.kv_norm_bias, eps)
        k, v = linear(kv_in, w.k_weight, w.k_bias), linear(kv_in, w.v_weight, w.v_bias)
        return by_head(k), by_head(v)

    attn_mask = readable = None
    if mask_BGK is not None:
        # SDPA's backends disagree on a row with nothing to read; such a row reads all, times zero.
        readable = mask_BGK.any(-1, keepdim=True)
        attn_mask = (mask_BGK | ~readable).flatten(0, 1)[:, None, None, :]
    context = _attention(queries(), *keys_and_values(), attn_mask)
    context_BGQI = context.transpose(1, 2).flatten(2).unflatten(0, q_tokens.shape[:2])
    return context_BGQI if readable is None else context_BGQI * readable[..., None]


def _attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor:
    """softmax(q k^T / sqrt(E)) v of (B * G, H, X, E) by the core that is best here."""
    tracked = q.requires_grad or k.requires_grad or v.requires_grad
    queries, keys, head_dim = q.shape[2], k.shape[2], q.shape[3]
    if cudnn_is_best(q, queries, keys, head_dim, masked=mask is not None, tracked=tracked):
        return torch.ops.aten._scaled_dot_product_cudnn_attention.default(q, k, v, None, False)[0]
    return scaled_dot_product_attention(q, k, v, attn_mask=mask)
