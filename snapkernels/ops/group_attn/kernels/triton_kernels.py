"""group_read and group_write absorbed, in Triton: for any shape, without a backward.

Keys, queries and values of the patches are never made. The latents' projections are PyTorch's;
what follows is two passes over the patches and small products around them.

Legend: as in triton_latents.py and triton_scores.py.
"""

from math import log2

import torch
from torch.nn.functional import linear

from snapkernels.ops.group_attn.kernels import triton_latents
from snapkernels.ops.group_attn.kernels.triton_context import context
from snapkernels.ops.group_attn.kernels.triton_norm import layer_norm
from snapkernels.ops.group_attn.kernels.triton_scores import read_scores, write_scores
from snapkernels.ops.group_attn.kernels.triton_update import update
from snapkernels.ops.group_attn.weights import CrossAttentionWeights

LOG2_E = log2(2.718281828459045)  # scores are exponents of 2


def group_read(
    latents: torch.Tensor,
    patches: torch.Tensor,
    w: CrossAttentionWeights,
    mask_BGN: torch.Tensor | None,
    num_heads: int,
    eps: float,
) -> torch.Tensor:
    if not latents.numel():
        return torch.empty_like(latents)
    z_RD, x_GNC = latents.flatten(0, 2).contiguous(), patches.flatten(0, 1).contiguous()
    normed_RD = layer_norm(z_RD, w.q_norm_weight, w.q_norm_bias, eps)
    q_RI = linear(normed_RD, w.q_weight, w.q_bias)
    A_GJC, sums_GJ = triton_latents.absorbed(
        q_RI, w.k_weight, w.kv_norm_weight, num_heads, len(x_GNC), score_scale(q_RI, num_heads)
    )
    mask_GN = readable_R = None
    if mask_BGN is not None:
        mask_GN = mask_BGN.flatten(0, 1).contiguous()
        readable_R = mask_GN.any(1).repeat_interleave(latents.shape[2])
    scores = read_scores(x_GNC, A_GJC, sums_GJ, mask_GN, num_heads, eps)
    context_HRC = context(x_GNC, scores, w.kv_norm_weight, w.kv_norm_bias, num_heads)
    heads_RI = triton_latents.context_heads(
        context_HRC, w.v_weight, w.v_bias, num_heads, readable_R
    )
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
    z_RC, x_GND = latents.flatten(0, 2).contiguous(), patches.flatten(0, 1).contiguous()
    normed_RC = layer_norm(z_RC, w.kv_norm_weight, w.kv_norm_bias, eps)
    k_RI = linear(normed_RC, w.k_weight, w.k_bias)
    v_RI = linear(normed_RC, w.v_weight, w.v_bias)
    groups, scale = len(x_GND), score_scale(k_RI, num_heads)
    A_GJD, sums_GJ, bias_GJ = triton_latents.absorbed_biased(
        k_RI, w.q_weight, w.q_norm_weight, w.q_norm_bias, w.q_bias, num_heads, groups, scale
    )
    values_GJD = triton_latents.values(v_RI, w.o_weight, num_heads, groups)
    P_GNJ = write_scores(x_GND, A_GJD, sums_GJ, bias_GJ, num_heads, eps)
    return update(x_GND, P_GNJ, values_GJD, w.o_bias).view(patches.shape)


def score_scale(heads_RI: torch.Tensor, num_heads: int) -> float:
    """What a product of a query and a key is multiplied by."""
    return (heads_RI.shape[1] / num_heads) ** -0.5 * LOG2_E
