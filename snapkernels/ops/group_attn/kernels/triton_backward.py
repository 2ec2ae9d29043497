"""The backward of group_read and group_write absorbed, in Triton: for any shape.

Legend: as in triton_latents.py and triton_scores.py.
"""

from typing import Any

import torch

from snapkernels.ops.group_attn.kernels import absorbed_backward
from snapkernels.ops.group_attn.kernels.absorbed_backward import Grads, ReadGrads, WriteGrads
from snapkernels.ops.group_attn.kernels.triton_latents import Absorbed
from snapkernels.ops.group_attn.kernels.triton_patch_grads import (
    read_patch_grads,
    write_patch_grads,
)
from snapkernels.ops.group_attn.kernels.triton_score_grads import (
    read_score_grads,
    write_score_grads,
)
from snapkernels.ops.group_attn.kernels.triton_scores import Scores, read_scores
from snapkernels.ops.group_attn.kernels.triton_token_sums import scores_sums, values_sums


def _read(
    x_GNC: torch.Tensor,
    A: Absorbed,
    W: Absorbed,
    log_sum_GJ: torch.Tensor,
    mask_GN: torch.Tensor | None,
    mean_GN: torch.Tensor,
    rstd_GN: torch.Tensor,
    average_HRC: torch.Tensor,
    num_heads: int,
    eps: float,
    *,
    of_patches: bool,
) -> ReadGrads:
    scores = read_scores(x_GNC, A.rows, A.sums, mask_GN, num_heads, eps)
    grads = read_score_grads(x_GNC, W, A.sums, log_sum_GJ, scores, num_heads)
    dA_HRC = scores_sums(x_GNC, grads, mean_GN, num_heads, average_HRC=average_HRC)
    dx_GNC = None
    if of_patches:
        dx_GNC = read_patch_grads(x_GNC, mean_GN, rstd_GN, grads, A.rows, scores.P, W.rows)
    return ReadGrads(dA_HRC, dx_GNC)


def _write(
    x_GND: torch.Tensor,
    dy_GND: torch.Tensor,
    A: Absorbed,
    W_GJD: torch.Tensor,
    P_GNJ: torch.Tensor,
    mean_GN: torch.Tensor,
    rstd_GN: torch.Tensor,
    num_heads: int,
    eps: float,
) -> WriteGrads:
    scores = Scores(P_GNJ, mean_GN, rstd_GN)
    grads = write_score_grads(dy_GND, W_GJD, A, scores, num_heads)
    d_bias_HR = grads.total.sum(1).unflatten(1, (num_heads, -1)).transpose(0, 1).flatten(1)
    dA_HRD = scores_sums(x_GND, grads, scores.mean, num_heads)
    dW_HRD = values_sums(dy_GND, scores.P, num_heads, grads.block)
    dx_GND, dy_sums_D = write_patch_grads(x_GND, scores.mean, scores.rstd, grads, A.rows, dy_GND)
    return WriteGrads(dA_HRD, d_bias_HR, dW_HRD, dx_GND, dy_sums_D)


def group_read_backward(*call: Any) -> Grads:
    """absorbed_backward.group_read_backward with these passes."""
    return absorbed_backward.group_read_backward(_read, *call)


def group_write_backward(*call: Any) -> Grads:
    """absorbed_backward.group_write_backward with these passes."""
    return absorbed_backward.group_write_backward(_write, *call)
