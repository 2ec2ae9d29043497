"""Latent self-attention, the equation.

Legend: B batch, L and M latent tokens, H heads, E channels of a head. Computes in the dtype it is
given: float64 inputs give the float64 answer.
"""

import torch
from torch.nn.functional import layer_norm

from snapkernels.ops.latent_attn.weights import Fp8SelfAttentionWeights, SelfAttentionWeights


def latent_attention(
    latents_BLD: torch.Tensor, w: SelfAttentionWeights, num_heads: int, eps: float
) -> torch.Tensor:
    z_BLD = layer_norm(latents_BLD, latents_BLD.shape[-1:], w.norm_weight, w.norm_bias, eps)
    q_BLHE = (z_BLD @ w.q_weight.T + w.q_bias).unflatten(-1, (num_heads, -1))
    k_BMHE = (z_BLD @ w.k_weight.T + w.k_bias).unflatten(-1, (num_heads, -1))
    v_BMHE = (z_BLD @ w.v_weight.T + w.v_bias).unflatten(-1, (num_heads, -1))
    scores_BHLM = torch.einsum("blhe,bmhe->bhlm", q_BLHE, k_BMHE) * q_BLHE.shape[-1] ** -0.5
    context_BLHE = torch.einsum("bhlm,bmhe->blhe", scores_BHLM.softmax(-1), v_BMHE)
    return latents_BLD + context_BLHE.flatten(-2) @ w.o_weight.T + w.o_bias


def latent_attention_fp8(
    latents_BLD: torch.Tensor, w: Fp8SelfAttentionWeights, num_heads: int, eps: float
) -> torch.Tensor:
    """`latent_attention` with the matrices multiplied out and the tokens as they are."""
    dtype = latents_BLD.dtype
    qkv_JD = w.qkv_weight.to(dtype) * w.qkv_scale.to(dtype)[:, None]
    o_DI = w.o_weight.to(dtype) * w.o_scale.to(dtype)[:, None]
    (q_ID, k_ID, v_ID), (q_I, k_I, v_I) = qkv_JD.chunk(3), w.qkv_bias.chunk(3)
    projections = q_ID, q_I, k_ID, k_I, v_ID, v_I, o_DI, w.o_bias
    weights = SelfAttentionWeights(w.norm_weight, w.norm_bias, *projections)
    return latent_attention(latents_BLD, weights, num_heads, eps)
