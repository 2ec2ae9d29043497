"""The backward of group_read and group_write absorbed, but for what meets the patches.

That a backend brings. A and what else the forward did not keep is made again. Then, as in the
forward, the latents' side goes first: W is the gradient at the read's average, or the write's
values. Passes over the patches make P again, which the write kept, the gradient of the scores, its
sums over the tokens and the gradient of the patches, and the latents' side makes those of the
latents and the weights.

Nothing is added by atomics: two runs agree in every bit.

Legend: as in triton_latents.py.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.nn.functional import linear

from snapkernels.ops.group_attn.kernels import latents_grads, triton_latents, triton_weight_grads
from snapkernels.ops.group_attn.kernels.absorbed import absorbed_keys, read_mask, score_scale
from snapkernels.ops.group_attn.weights import CrossAttentionWeights

Grads = tuple[torch.Tensor | None, ...]


class ReadGrads(NamedTuple):
    """What a read's passes over the patches make.

    Attributes:
        absorbed: (H, R, C), A's gradient.
        patches: (G, N, C), or None where not wanted.
    """

    absorbed: torch.Tensor
    patches: torch.Tensor | None


class WriteGrads(NamedTuple):
    """What a write's passes over the patches make.

    Attributes:
        absorbed: (H, R, D), A's gradient.
        bias: (H, R) float32, the gradient of the scores' bias, in base 2.
        values: (H, R, D), their gradient.
        patches: (G, N, D).
        grad_sums: (D,) float32, the output's gradient summed over all patches.
    """

    absorbed: torch.Tensor
    bias: torch.Tensor
    values: torch.Tensor
    patches: torch.Tensor
    grad_sums: torch.Tensor


# (x_GNC, A, W, log_sum_GJ, mask_GN, mean_GN, rstd_GN, average_HRC, num_heads, eps, of_patches=): W
# has the number delta.
ReadPasses = Callable[..., ReadGrads]
# (x_GND, dy_GND, A, W_GJD, P_GNJ, mean_GN, rstd_GN, num_heads, eps): A has the scores' bias.
WritePasses = Callable[..., WriteGrads]


def group_read_backward(
    passes: ReadPasses,
    needs: tuple[bool, ...],
    grad: torch.Tensor,
    average: torch.Tensor,
    heads: torch.Tensor,
    rest: torch.Tensor,
    log_sum: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    latents: torch.Tensor,
    patches: torch.Tensor,
    w: CrossAttentionWeights,
    mask_BGN: torch.Tensor | None,
    num_heads: int,
    eps: float,
) -> Grads:
    """The gradients of latents, patches and weights, None where not needed."""
    if not grad.numel() or not any(needs):
        return _zeros(needs, (latents, patches, *w))
    z_RD, x_GNC = latents.flatten(0, 2).contiguous(), patches.flatten(0, 1).contiguous()
    dy_RD, heads_RI, rest_RI = (one.flatten(0, 2) for one in (grad.contiguous(), heads, rest))
    average_HRC, groups = average.flatten(1, 3), len(x_GNC)
    mask_GN, readable_R = read_mask(mask_BGN, latents.shape[2])
    normed = latents_grads.normed(z_RD, w.q_norm_weight, w.q_norm_bias, eps)
    q_RI = linear(normed.rows, w.q_weight, w.q_bias)
    scale = score_scale(q_RI, num_heads)
    A = triton_latents.absorbed(q_RI, w.k_weight, w.kv_norm_weight, num_heads, groups, scale)

    d_o_weight = torch.addmm(dy_RD.T @ rest_RI, dy_RD.T, heads_RI)
    d_heads_RI = dy_RD @ w.o_weight
    if readable_R is not None:
        d_heads_RI *= readable_R[:, None]
    W = triton_latents.absorbed_weighed(
        d_heads_RI, w.v_weight, w.kv_norm_weight, average_HRC, num_heads, groups,
    )  # fmt: skip
    dA_HRC, dx_GNC = passes(
        x_GNC, A, W, log_sum.flatten(0, 1).flatten(1), mask_GN, mean.flatten(0, 1),
        rstd.flatten(0, 1), average_HRC, num_heads, eps, of_patches=needs[1],
    )  # fmt: skip
    dx = None if dx_GNC is None else dx_GNC.view(patches.shape)

    # A = gain a scale, a = q_h W_k,h; the heads are (average gain + shift) W_v,h^T + b_v.
    d_k_bias_I = torch.zeros_like(w.k_bias)  # a number added to all scores of a latent
    d_v_bias_I = latents_grads.sums(d_heads_RI)
    of_keys = triton_weight_grads.of_absorbed(
        w.k_weight, w.kv_norm_weight, w.kv_norm_bias, scale,
        latents_grads.matrix_grads(q_RI, dA_HRC), d_k_bias_I, again=True,
    )  # fmt: skip
    of_values = triton_weight_grads.of_absorbed(
        w.v_weight, w.kv_norm_weight, w.kv_norm_bias, 1.0,
        latents_grads.matrix_grads(d_heads_RI, average_HRC), d_v_bias_I, again=False,
    )  # fmt: skip
    d_q_RI = triton_latents.heads_of(dA_HRC, of_keys.scaled)
    d_q_weight, d_q_bias = d_q_RI.T @ normed.rows, latents_grads.sums(d_q_RI)
    dz_RD, d_q_norm_weight, d_q_norm_bias = latents_grads.normed_grads(
        d_q_RI @ w.q_weight, z_RD, normed, w.q_norm_weight, w.q_norm_bias
    )
    d_weights = CrossAttentionWeights(
        q_norm_weight=d_q_norm_weight,
        q_norm_bias=d_q_norm_bias,
        kv_norm_weight=of_keys.gain + of_values.gain,
        kv_norm_bias=of_values.shift,
        q_weight=d_q_weight,
        q_bias=d_q_bias,
        k_weight=of_keys.weight,
        k_bias=d_k_bias_I,
        v_weight=of_values.weight,
        v_bias=d_v_bias_I,
        o_weight=d_o_weight,
        o_bias=latents_grads.sums(dy_RD),
    )
    return _needed(needs, latents.dtype, ((dz_RD + dy_RD).view(latents.shape), dx, *d_weights))


def group_write_backward(
    passes: WritePasses,
    needs: tuple[bool, ...],
    grad: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    weights: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    patches: torch.Tensor,
    latents: torch.Tensor,
    w: CrossAttentionWeights,
    num_heads: int,
    eps: float,
) -> Grads:
    """The gradients of patches, latents and weights, None where not needed."""
    if not grad.numel() or not any(needs):
        return _zeros(needs, (patches, latents, *w))
    z_RC, x_GND = latents.flatten(0, 2).contiguous(), patches.flatten(0, 1).contiguous()
    dy_GND, groups = grad.flatten(0, 1).contiguous(), len(x_GND)
    k_RI, v_RI = keys.flatten(0, 2), values.flatten(0, 2)
    normed = latents_grads.normed(z_RC, w.kv_norm_weight, w.kv_norm_bias, eps)
    A = absorbed_keys(k_RI, w, num_heads, groups)
    W_GJD = triton_latents.values(v_RI, w.o_weight, num_heads, groups)
    P_GNJ = weights.flatten(0, 1).flatten(2)
    dA_HRD, d_bias_HR, dW_HRD, dx_GND, dy_sums_D = passes(
        x_GND, dy_GND, A, W_GJD, P_GNJ, mean.flatten(0, 1), rstd.flatten(0, 1), num_heads, eps
    )

    # W = v_h W_o,h^T.
    o_weight_HDE = w.o_weight.unflatten(1, (num_heads, -1)).transpose(0, 1)
    d_v_RI = torch.bmm(dW_HRD, o_weight_HDE).transpose(0, 1).flatten(1)
    d_o_weight = latents_grads.matrix_grads(v_RI, dW_HRD).T
    # A = gain a scale, a = k_h W_q,h, and the scores' bias is (shift . a + k_h . b_q) scale.
    scale = score_scale(k_RI, num_heads)
    d_bias_HR = d_bias_HR * scale
    d_q_bias_I = (latents_grads.by_head(k_RI, num_heads) * d_bias_HR[:, :, None]).sum(1).flatten()
    of_queries = triton_weight_grads.of_absorbed(
        w.q_weight, w.q_norm_weight, w.q_norm_bias, scale,
        latents_grads.matrix_grads(k_RI, dA_HRD), d_q_bias_I, again=True,
    )  # fmt: skip
    d_k_RI = triton_latents.heads_of(
        dA_HRD, of_queries.scaled, w.q_bias + of_queries.shifted.sum(0), d_bias_HR
    )

    d_normed_RC = torch.addmm(d_k_RI @ w.k_weight, d_v_RI, w.v_weight)
    dz_RC, d_kv_norm_weight, d_kv_norm_bias = latents_grads.normed_grads(
        d_normed_RC, z_RC, normed, w.kv_norm_weight, w.kv_norm_bias
    )
    d_weights = CrossAttentionWeights(
        q_norm_weight=of_queries.gain,
        q_norm_bias=of_queries.shift,
        kv_norm_weight=d_kv_norm_weight,
        kv_norm_bias=d_kv_norm_bias,
        q_weight=of_queries.weight,
        q_bias=d_q_bias_I,
        k_weight=d_k_RI.T @ normed.rows,
        k_bias=torch.zeros_like(w.k_bias),  # a number added to all scores of a head of a patch
        v_weight=d_v_RI.T @ normed.rows,
        v_bias=latents_grads.sums(d_v_RI),
        o_weight=d_o_weight,
        o_bias=dy_sums_D,
    )
    dx, dz = dx_GND.view(patches.shape), dz_RC.view(latents.shape)
    return _needed(needs, patches.dtype, (dx, dz, *d_weights))


def _needed(needs: tuple[bool, ...], dtype: torch.dtype, grads: Grads) -> Grads:
    """`grads` in `dtype`, contiguous, None where not needed."""
    return tuple(
        grad.to(dtype).contiguous() if need and grad is not None else None
        for need, grad in zip(needs, grads, strict=True)
    )


def _zeros(needs: tuple[bool, ...], inputs: tuple[torch.Tensor, ...]) -> Grads:
    return tuple(
        torch.zeros_like(one, memory_format=torch.contiguous_format) if need else None
        for need, one in zip(needs, inputs, strict=True)
    )
