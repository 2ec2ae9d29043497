"""Latent self-attention as a careful user writes it: linear layers around SDPA.

PyTorch chooses the SDPA backend. This is the baseline of every later ratio.
"""

import torch
from torch.nn.functional import layer_norm, linear, scaled_dot_product_attention

from snapkernels.ops.latent_attn.weights import SelfAttentionWeights


def latent_attention(
    latents_BLD: torch.Tensor, w: SelfAttentionWeights, num_heads: int, eps: float
) -> torch.Tensor:
    z_BLD = layer_norm(latents_BLD, latents_BLD.shape[-1:], w.norm_weight, w.norm_bias, eps)

    def heads(weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        """The projected tokens as (B, H, L, E), without a copy."""
        return linear(z_BLD, weight, bias).unflatten(-1, (num_heads, -1)).transpose(1, 2)

    context_BHLE = scaled_dot_product_attention(
        heads(w.q_weight, w.q_bias), heads(w.k_weight, w.k_bias), heads(w.v_weight, w.v_bias)
    )
    return latents_BLD + linear(context_BHLE.transpose(1, 2).flatten(2), w.o_weight, w.o_bias)
