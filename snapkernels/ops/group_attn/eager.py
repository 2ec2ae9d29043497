"""Grouped cross-attention as a careful user writes it: linear layers around SDPA.

PyTorch chooses the SDPA backend. This is the baseline of every later ratio. `peers.py` hands it
other attentions, (B * G, H, X, E) queries, keys and values in and the queries' shape out.
"""

from collections.abc import Callable

import torch
from torch.nn.functional import layer_norm, linear, scaled_dot_product_attention

from snapkernels.ops.group_attn.weights import CrossAttentionWeights


def cross_attention(
    q_tokens: torch.Tensor,
    kv_tokens: torch.Tensor,
    w: CrossAttentionWeights,
    mask_BGK: torch.Tensor | None,
    num_heads: int,
    eps: float,
    *,
    attention: Callable[..., torch.Tensor] = scaled_dot_product_attention,
) -> torch.Tensor:
    q_in = layer_norm(q_tokens, q_tokens.shape[-1:], w.q_norm_weight, w.q_norm_bias, eps)
    kv_in = layer_norm(kv_tokens, kv_tokens.shape[-1:], w.kv_norm_weight, w.kv_norm_bias, eps)
    context_BGQI = attended(
        linear(q_in, w.q_weight, w.q_bias),
        linear(kv_in, w.k_weight, w.k_bias),
        linear(kv_in, w.v_weight, w.v_bias),
        mask_BGK,
        num_heads,
        attention=attention,
    )
    # In this order the sum is contiguous whatever the strides of q_tokens.
    return linear(context_BGQI, w.o_weight, w.o_bias) + q_tokens


def attended(
    q_BGQI: torch.Tensor,
    k_BGKI: torch.Tensor,
    v_BGKI: torch.Tensor,
    mask_BGK: torch.Tensor | None,
    num_heads: int,
    *,
    attention: Callable[..., torch.Tensor] = scaled_dot_product_attention,
) -> torch.Tensor:
    """What every query reads of its group's values: (B, G, Q, I), zeros where it may read none."""

    def by_head(tokens_BGXI: torch.Tensor) -> torch.Tensor:
        """(B, G, X, I) -> (B * G, H, X, E), without a copy."""
        return tokens_BGXI.flatten(0, 1).unflatten(-1, (num_heads, -1)).transpose(1, 2)

    attn_mask = readable = None
    if mask_BGK is not None:
        # SDPA's backends disagree on a row with nothing to read; such a row reads all, times zero.
        readable = mask_BGK.any(-1, keepdim=True)
        attn_mask = (mask_BGK | ~readable).flatten(0, 1)[:, None, None, :]
    context = attention(
        by_head(q_BGQI),
        by_head(k_BGKI),
        by_head(v_BGKI),
        attn_mask=attn_mask,
    )
    context_BGQI = context.transpose(1, 2).flatten(2).unflatten(0, q_BGQI.shape[:2])
    return context_BGQI if readable is None else context_BGQI * readable[..., None]


def group_write(
    patches: torch.Tensor,
    latents: torch.Tensor,
    w: CrossAttentionWeights,
    num_heads: int,
    eps: float,
    *,
    attention: Callable[..., torch.Tensor] = scaled_dot_product_attention,
) -> torch.Tensor:
    return cross_attention(patches, latents, w, None, num_heads, eps, attention=attention)
