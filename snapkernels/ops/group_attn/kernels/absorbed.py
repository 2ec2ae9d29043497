"""group_read and group_write absorbed, but for what meets the patches, which a backend brings.

The latents' projections are PyTorch's, their LayerNorm and small products Triton's. What is saved
is small: the moments of the patches, of the read the average, the heads and the softmax's sums, of
the write the latents' keys and values and P. The backward (absorbed_backward.py) makes the rest
again.

Legend: as in triton_latents.py.
"""

from collections.abc import Callable
from math import log2

import torch
from torch.nn.functional import linear

from snapkernels.ops.group_attn.kernels import triton_latents
from snapkernels.ops.group_attn.kernels.triton_norm import layer_norm
from snapkernels.ops.group_attn.weights import CrossAttentionWeights

LOG2_E = log2(2.718281828459045)  # scores are exponents of 2

# (x_GNC, A, mask_GN, w, num_heads, eps, saving=) -> (context_HRC, average_HRC, log_sum_GJ,
# mean_GN, rstd_GN): LayerNorm's tokens averaged, and without its weight and bias; of each column
# log2 of the sum of 2^score, 0 if there is nothing to read. Only the first if not saving.
Average = Callable[..., tuple[torch.Tensor, ...]]
# (x_GND, A, v_RI, w, num_heads, eps, saving=) -> (y_GND, P_GNJ, mean_GN, rstd_GN): columns of P in
# whatever order the backend's backward has them. The last three are None if not saving.
Written = Callable[..., tuple[torch.Tensor | None, ...]]


def group_read(
    average: Average,
    latents: torch.Tensor,
    patches: torch.Tensor,
    w: CrossAttentionWeights,
    mask_BGN: torch.Tensor | None,
    num_heads: int,
    eps: float,
    *,
    saving: bool,
) -> tuple[torch.Tensor, ...]:
    """The output and, if `saving`, what the backward wants.

    average (H, B, G, L, C), heads and rest (B, G, L, I), log_sum (B, G, H, L), mean and rstd
    (B, G, N). The rest is what the heads were rounded by: the gradient of o's weight has both.
    """
    grid, width = latents.shape[:3], patches.shape[3]
    if not latents.numel():
        heads = latents.new_empty(*grid, len(w.q_bias))
        average_of_none = latents.new_empty(num_heads, *grid, width)
        log_sum = latents.new_empty(*grid[:2], num_heads, grid[2], dtype=torch.float32)
        moments = (log_sum.new_empty(patches.shape[:3]) for _ in range(2))
        rest = torch.empty_like(heads)
        return torch.empty_like(latents), average_of_none, heads, rest, log_sum, *moments
    z_RD, x_GNC = latents.flatten(0, 2).contiguous(), patches.flatten(0, 1).contiguous()
    q_RI = linear(layer_norm(z_RD, w.q_norm_weight, w.q_norm_bias, eps), w.q_weight, w.q_bias)
    A = triton_latents.absorbed(
        q_RI, w.k_weight, w.kv_norm_weight, num_heads, len(x_GNC), score_scale(q_RI, num_heads)
    )
    mask_GN, readable_R = read_mask(mask_BGN, latents.shape[2])
    context_HRC, *saved = average(x_GNC, A, mask_GN, w, num_heads, eps, saving=saving)
    rest_RI = torch.empty_like(q_RI) if saving else None
    heads_RI = triton_latents.heads_of(
        context_HRC, w.v_weight, w.v_bias, readable_R=readable_R, rest_RI=rest_RI
    )
    y = triton_latents.output(heads_RI, w.o_weight, w.o_bias, z_RD).view(latents.shape)
    if rest_RI is None:
        return (y,)
    average_HRC, log_sum_GJ, mean_GN, rstd_GN = saved
    heads, rest = (one.view(*grid, -1) for one in (heads_RI, rest_RI))
    log_sum = log_sum_GJ.view(*grid[:2], num_heads, grid[2])
    mean, rstd = (one.view(patches.shape[:3]) for one in (mean_GN, rstd_GN))
    return y, average_HRC.view(num_heads, *grid, width), heads, rest, log_sum, mean, rstd


def group_write(
    written: Written,
    patches: torch.Tensor,
    latents: torch.Tensor,
    w: CrossAttentionWeights,
    num_heads: int,
    eps: float,
    *,
    saving: bool,
) -> tuple[torch.Tensor, ...]:
    """The output and, if `saving`, what the backward wants.

    keys and values (B, G, L, I), P (B, G, N, H, L), mean and rstd (B, G, N).
    """
    grid, form = latents.shape[:3], (*patches.shape[:3], num_heads, latents.shape[2])
    if not patches.numel():
        nothing = patches.new_empty(*grid, len(w.k_bias))
        moments = patches.new_empty(form[:3], dtype=torch.float32)
        return (
            torch.empty_like(patches), nothing, torch.empty_like(nothing),
            patches.new_empty(form), moments, torch.empty_like(moments),
        )  # fmt: skip
    z_RC, x_GND = latents.flatten(0, 2).contiguous(), patches.flatten(0, 1)
    normed_RC = layer_norm(z_RC, w.kv_norm_weight, w.kv_norm_bias, eps)
    k_RI = linear(normed_RC, w.k_weight, w.k_bias)
    v_RI = linear(normed_RC, w.v_weight, w.v_bias)
    A = absorbed_keys(k_RI, w, num_heads, len(x_GND))
    y_GND, P_GNJ, mean_GN, rstd_GN = written(x_GND, A, v_RI, w, num_heads, eps, saving=saving)
    assert y_GND is not None
    y = y_GND.view(patches.shape)
    if P_GNJ is None or mean_GN is None or rstd_GN is None:
        return (y,)
    k, v = (one.view(*grid, -1) for one in (k_RI, v_RI))
    return y, k, v, P_GNJ.view(form), mean_GN.view(form[:3]), rstd_GN.view(form[:3])


def absorbed_keys(
    k_RI: torch.Tensor,
    w: CrossAttentionWeights,
    num_heads: int,
    groups: int,
) -> triton_latents.Absorbed:
    """A of the write, with the bias of the scores."""
    return triton_latents.absorbed_biased(
        k_RI, w.q_weight, w.q_norm_weight, w.q_norm_bias, w.q_bias, num_heads, groups,
        score_scale(k_RI, num_heads),
    )  # fmt: skip


def read_mask(
    mask_BGN: torch.Tensor | None, latents: int
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The mask of every group, and of every latent whether its group has something to read."""
    if mask_BGN is None:
        return None, None
    mask_GN = mask_BGN.flatten(0, 1).contiguous()
    return mask_GN, mask_GN.any(1).repeat_interleave(latents)


def score_scale(heads_RI: torch.Tensor, num_heads: int) -> float:
    """What a product of a query and a key is multiplied by."""
    return (heads_RI.shape[1] / num_heads) ** -0.5 * LOG2_E
