"""latent_attention_fp8 by the products of csrc/linear, with SDPA in the tokens' dtype between."""

import torch
from torch.nn.functional import scaled_dot_product_attention

from snapkernels.ops.feed_forward.kernels.cuda import linear_fp8
from snapkernels.ops.latent_attn.weights import Fp8SelfAttentionWeights


def latent_attention_fp8(
    latents_BLD: torch.Tensor, w: Fp8SelfAttentionWeights, num_heads: int, eps: float
) -> torch.Tensor:
    qkv = w.qkv_weight, w.qkv_scale, w.qkv_bias
    qkv_BLJ = linear_fp8(latents_BLD, *qkv, w.norm_weight, w.norm_bias, None, eps)
    # (B, H, L, E) views: E channels of each of H heads.
    q, k, v = qkv_BLJ.unflatten(-1, (3, num_heads, -1)).permute(2, 0, 3, 1, 4)
    # To the latents' dtype, which autocast would have SDPA change.
    context_BHLE = scaled_dot_product_attention(q, k, v).to(latents_BLD.dtype)
    context_BLI = context_BHLE.transpose(1, 2).flatten(2)
    return linear_fp8(context_BLI, w.o_weight, w.o_scale, w.o_bias, None, None, latents_BLD, eps)
