"""Grouped cross-attention, the equation.

Legend: B batch, G groups, Q query tokens and K key tokens of one group, H heads, E channels of a
head. Computes in the dtype it is given: float64 inputs give the float64 answer.
"""

import torch
from torch.nn.functional import layer_norm

from snapkernels.ops.group_attn.weights import CrossAttentionWeights


def cross_attention(
    q_tokens: torch.Tensor,
    kv_tokens: torch.Tensor,
    w: CrossAttentionWeights,
    mask_BGK: torch.Tensor | None,
    num_heads: int,
    eps: float,
) -> torch.Tensor:
    q_in = layer_norm(q_tokens, q_tokens.shape[-1:], w.q_norm_weight, w.q_norm_bias, eps)
    kv_in = layer_norm(kv_tokens, kv_tokens.shape[-1:], w.kv_norm_weight, w.kv_norm_bias, eps)
    q_BGQHE = (q_in @ w.q_weight.T + w.q_bias).unflatten(-1, (num_heads, -1))
    k_BGKHE = (kv_in @ w.k_weight.T + w.k_bias).unflatten(-1, (num_heads, -1))
    v_BGKHE = (kv_in @ w.v_weight.T + w.v_bias).unflatten(-1, (num_heads, -1))

    scores = torch.einsum("bgqhe,bgkhe->bghqk", q_BGQHE, k_BGKHE) * q_BGQHE.shape[-1] ** -0.5
    if mask_BGK is None:
        p_BGHQK = scores.softmax(-1)
    else:
        # A finite fill keeps rows with nothing to read free of NaN; they become zeros.
        m_BG11K = mask_BGK[:, :, None, None, :]
        p_BGHQK = scores.masked_fill(~m_BG11K, torch.finfo(scores.dtype).min).softmax(-1) * m_BG11K
    context_BGQHE = torch.einsum("bghqk,bgkhe->bgqhe", p_BGHQK, v_BGKHE)
    return context_BGQHE.flatten(-2) @ w.o_weight.T + w.o_bias + q_tokens


def group_write(
    patches: torch.Tensor,
    latents: torch.Tensor,
    w: CrossAttentionWeights,
    num_heads: int,
    eps: float,
) -> torch.Tensor:
    return cross_attention(patches, latents, w, None, num_heads, eps)
