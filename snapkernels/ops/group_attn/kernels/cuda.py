"""group_read and group_write absorbed, in CUDA C++: csrc/group_attn. Without a backward.

Only what meets the patches is CUDA's. The latents' side is PyTorch's projections and Triton's
LayerNorm and small products, as in triton_kernels.py.

Legend: as in triton_latents.py.
"""

import torch
from torch.nn.functional import linear

from snapkernels.ops.group_attn.config import CUDA_READ_TOKENS
from snapkernels.ops.group_attn.kernels import triton_latents
from snapkernels.ops.group_attn.kernels.triton_kernels import score_scale
from snapkernels.ops.group_attn.kernels.triton_norm import layer_norm
from snapkernels.ops.group_attn.weights import CrossAttentionWeights


def group_read(
    latents: torch.Tensor,
    patches: torch.Tensor,
    w: CrossAttentionWeights,
    mask: torch.Tensor | None,
    num_heads: int,
    eps: float,
) -> torch.Tensor:
    assert mask is None
    if not latents.numel():
        return torch.empty_like(latents)
    z_RD, x_GNC = latents.flatten(0, 2).contiguous(), patches.flatten(0, 1)
    normed_RD = layer_norm(z_RD, w.q_norm_weight, w.q_norm_bias, eps)
    q_RI = linear(normed_RD, w.q_weight, w.q_bias)
    A_GJC, sums_GJ = triton_latents.absorbed(
        q_RI, w.k_weight, w.kv_norm_weight, num_heads, len(x_GNC), score_scale(q_RI, num_heads)
    )
    groups, tokens, width = x_GNC.shape
    P_GJN = x_GNC.new_empty(groups, sums_GJ.shape[1], tokens)
    blocks = groups, tokens // CUDA_READ_TOKENS, sums_GJ.shape[1]
    most, sums, means = (sums_GJ.new_empty(blocks) for _ in range(3))
    context_HRC = x_GNC.new_empty(num_heads, len(z_RD), width)
    torch.ops.snapkernels_cuda.group_read(
        x_GNC,
        A_GJC,
        sums_GJ,
        w.kv_norm_weight.contiguous(),
        w.kv_norm_bias.contiguous(),
        P_GJN,
        most,
        sums,
        means,
        context_HRC,
        eps,
    )
    heads_RI = triton_latents.context_heads(context_HRC, w.v_weight, w.v_bias, num_heads)
    return triton_latents.output(heads_RI, w.o_weight, w.o_bias, z_RD).view(latents.shape)


def group_write(
    patches: torch.Tensor,
    latents: torch.Tensor,
    w: CrossAttentionWeights,
    num_heads: int,
    eps: float,
) -> torch.Tensor:
    if not patches.numel():
        return torch.empty_like(patches)
    z_RC, x_GND = latents.flatten(0, 2).contiguous(), patches.flatten(0, 1)
    normed_RC = layer_norm(z_RC, w.kv_norm_weight, w.kv_norm_bias, eps)
    k_RI = linear(normed_RC, w.k_weight, w.k_bias)
    v_RI = linear(normed_RC, w.v_weight, w.v_bias)
    groups, scale = len(x_GND), score_scale(k_RI, num_heads)
    A_GJD, sums_GJ, bias_GJ = triton_latents.absorbed_biased(
        k_RI, w.q_weight, w.q_norm_weight, w.q_norm_bias, w.q_bias, num_heads, groups, scale
    )
    values_GJD = triton_latents.values(v_RI, w.o_weight, num_heads, groups, in_order=True)
    y_GND = torch.empty_like(x_GND)
    torch.ops.snapkernels_cuda.group_write(
        x_GND, A_GJD, sums_GJ, bias_GJ, values_GJD, w.o_bias.contiguous(), y_GND, eps
    )
    return y_GND.view(patches.shape)
