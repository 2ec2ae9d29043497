"""group_read and group_write absorbed, in Triton: for any shape.

Keys, queries and values of the patches are never made; what meets them is two passes.

Legend: as in triton_latents.py and triton_scores.py.
"""

from typing import Any

import torch

from snapkernels.ops.group_attn.kernels import absorbed, triton_latents
from snapkernels.ops.group_attn.kernels.triton_scores import log_sums, read_scores, write_scores
from snapkernels.ops.group_attn.kernels.triton_token_sums import average
from snapkernels.ops.group_attn.kernels.triton_update import update
from snapkernels.ops.group_attn.weights import CrossAttentionWeights


def _average(
    x_GNC: torch.Tensor,
    A: triton_latents.Absorbed,
    mask_GN: torch.Tensor | None,
    w: CrossAttentionWeights,
    num_heads: int,
    eps: float,
    *,
    saving: bool,
) -> tuple[torch.Tensor, ...]:
    scores = read_scores(x_GNC, A.rows, A.sums, mask_GN, num_heads, eps)
    context_HRC, average_HRC = average(
        x_GNC, scores, w.kv_norm_weight, w.kv_norm_bias, num_heads, saving=saving
    )
    if average_HRC is None:
        return (context_HRC,)
    return context_HRC, average_HRC, log_sums(scores), scores.mean, scores.rstd


def _written(
    x_GND: torch.Tensor,
    A: triton_latents.Absorbed,
    v_RI: torch.Tensor,
    w: CrossAttentionWeights,
    num_heads: int,
    eps: float,
    *,
    saving: bool,
) -> tuple[torch.Tensor | None, ...]:
    x_GND = x_GND.contiguous()
    values_GJD = triton_latents.values(v_RI, w.o_weight, num_heads, len(x_GND))
    scores = write_scores(x_GND, A.rows, A.sums, A.number, num_heads, eps)
    y_GND = update(x_GND, scores.P, values_GJD, w.o_bias)
    return (y_GND, *scores) if saving else (y_GND, None, None, None)


def group_read(*call: Any) -> torch.Tensor:
    """The output alone."""
    return absorbed.group_read(_average, *call, saving=False)[0]


def group_write(*call: Any) -> torch.Tensor:
    """The output alone."""
    return absorbed.group_write(_written, *call, saving=False)[0]


def group_read_saving(*call: Any) -> tuple[torch.Tensor, ...]:
    """The output, and what absorbed.group_read saves."""
    return absorbed.group_read(_average, *call, saving=True)


def group_write_saving(*call: Any) -> tuple[torch.Tensor, ...]:
    """The output, and what absorbed.group_write saves."""
    return absorbed.group_write(_written, *call, saving=True)
