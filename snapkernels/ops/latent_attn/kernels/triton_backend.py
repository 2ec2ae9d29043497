"""latent_attention_fp8 in Triton: projections as linears, and between them the core in int8."""

import torch

from snapkernels.ops.feed_forward.kernels.triton_backend import linear_fp8
from snapkernels.ops.latent_attn import config
from snapkernels.ops.latent_attn.kernels.triton_core import attended
from snapkernels.ops.latent_attn.kernels.triton_keys import quantised_keys
from snapkernels.ops.latent_attn.weights import Fp8SelfAttentionWeights


def latent_attention_fp8(
    latents_BLD: torch.Tensor, w: Fp8SelfAttentionWeights, num_heads: int, eps: float
) -> torch.Tensor:
    qkv = w.qkv_weight, w.qkv_scale, w.qkv_bias
    qkv_BLJ = linear_fp8(latents_BLD, *qkv, w.norm_weight, w.norm_bias, None, eps)
    blocks = config.core_blocks(qkv_BLJ.shape[1], qkv_BLJ.shape[2] // (3 * num_heads))
    keys = quantised_keys(qkv_BLJ, num_heads, blocks)
    context_BLI = attended(qkv_BLJ, keys, num_heads, blocks)
    return linear_fp8(context_BLI, w.o_weight, w.o_scale, w.o_bias, None, None, latents_BLD, eps)
