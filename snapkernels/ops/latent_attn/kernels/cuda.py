"""latent_attention_fp8 in CUDA C++: csrc/latent_attn, or the products of csrc/linear around SDPA.

Legend: B videos of L latents, D their width, I that of all heads, H heads of E channels; M latents
of all videos, P the same with every video's padded to `CUDA_TILE`.
"""

import torch
from torch.nn.functional import scaled_dot_product_attention

from snapkernels.ops.feed_forward.kernels.cuda import E4M3, as_rows, linear_fp8, split_parts
from snapkernels.ops.latent_attn.config import CUDA_TILE, cuda_has_integers, cuda_padded
from snapkernels.ops.latent_attn.weights import Fp8SelfAttentionWeights


def latent_attention_fp8(
    latents_BLD: torch.Tensor, w: Fp8SelfAttentionWeights, num_heads: int, eps: float
) -> torch.Tensor:
    inner = w.o_weight.shape[1]
    run = _of_integers if cuda_has_integers(latents_BLD, inner, num_heads) else _around_sdpa
    return run(latents_BLD, w, num_heads, eps)


def _of_integers(
    latents_BLD: torch.Tensor, w: Fp8SelfAttentionWeights, num_heads: int, eps: float
) -> torch.Tensor:
    x_MD = as_rows(latents_BLD)
    (tokens, dim), inner = x_MD.shape, w.o_weight.shape[1]
    padded = cuda_padded(latents_BLD)
    y_MD = torch.empty_like(x_MD)
    torch.ops.snapkernels_cuda.latent_attention_fp8(
        x_MD,
        *(one.contiguous() for one in w),
        x_MD.new_empty(padded, dim, dtype=E4M3),
        x_MD.new_empty(padded, dtype=torch.float32),
        x_MD.new_empty(padded, 2 * inner, dtype=torch.int8),
        x_MD.new_empty(inner, padded, dtype=torch.int8),
        x_MD.new_empty(num_heads, padded, dtype=torch.float32),
        *x_MD.new_empty(2, num_heads, padded // CUDA_TILE, dtype=torch.float32),
        x_MD.new_empty(tokens, inner, dtype=E4M3),
        x_MD.new_empty(tokens, dtype=torch.float32),
        y_MD,
        *split_parts(x_MD),
        latents_BLD.shape[1],
        inner // num_heads,
        eps,
    )
    return y_MD.view(latents_BLD.shape)


def _around_sdpa(
    latents_BLD: torch.Tensor, w: Fp8SelfAttentionWeights, num_heads: int, eps: float
) -> torch.Tensor:
    qkv = w.qkv_weight, w.qkv_scale, w.qkv_bias
    qkv_BLJ = linear_fp8(latents_BLD, *qkv, w.norm_weight, w.norm_bias, None, eps)
    q, k, v = qkv_BLJ.unflatten(-1, (3, num_heads, -1)).permute(2, 0, 3, 1, 4)  # (B, H, L, E)
    # To the latents' dtype, which autocast would have SDPA change.
    context_BHLE = scaled_dot_product_attention(q, k, v).to(latents_BLD.dtype)
    context_BLI = context_BHLE.transpose(1, 2).flatten(2)
    return linear_fp8(context_BLI, w.o_weight, w.o_scale, w.o_bias, None, None, latents_BLD, eps)
