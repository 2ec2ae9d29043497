"""The backward of group_read and group_write absorbed, in CUDA C++: csrc/group_attn.

A pass over the patches in CUDA makes dS and, in the write at once, the gradient of the patches,
which in the read is a second; the read's makes P again. The sums over the tokens are products of
cuBLAS. P and dS are (G, N, J) with their columns in order.

Legend: as in triton_latents.py.
"""

from typing import Any

import torch

from snapkernels.ops.group_attn import config
from snapkernels.ops.group_attn.kernels import absorbed_backward, triton_sum_ends
from snapkernels.ops.group_attn.kernels.absorbed_backward import Grads, ReadGrads, WriteGrads
from snapkernels.ops.group_attn.kernels.triton_latents import Absorbed


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
    assert mask_GN is None
    dS_GNJ, sums = _empty(x_GNC, A.sums)
    P_GNJ = torch.empty_like(dS_GNJ)
    lines_GN2 = A.sums.new_empty(*x_GNC.shape[:2], 2)
    dx_GNC = torch.empty_like(x_GNC) if of_patches else None
    torch.ops.snapkernels_cuda.group_read_backward(
        x_GNC, A.rows, A.sums, W.rows, W.sums, log_sum_GJ, W.number, mean_GN, rstd_GN,
        P_GNJ, dS_GNJ, sums, lines_GN2, dx_GNC,
    )  # fmt: skip
    product_GJC = torch.bmm(dS_GNJ.mT, x_GNC, out_dtype=torch.float32)
    dA_HRC, _ = triton_sum_ends.scores_sums(product_GJC, sums, num_heads, average_HRC=average_HRC)
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
    if dy_GND.data_ptr() % config.VECTOR:
        dy_GND = dy_GND.clone()
    dS_GNJ, sums = _empty(x_GND, A.sums)
    tiles = sums.shape[1] * config.CUDA_SUMS_TOKENS // config.CUDA_READ_TOKENS
    dy_sums = A.sums.new_empty(len(x_GND) * tiles, x_GND.shape[2])
    dx_GND = torch.empty_like(x_GND)
    torch.ops.snapkernels_cuda.group_write_backward(
        x_GND, dy_GND, A.rows, A.sums, A.number, W_GJD, P_GNJ, mean_GN, rstd_GN, dS_GNJ, sums,
        dy_sums, dx_GND,
    )  # fmt: skip
    product_GJD = torch.bmm(dS_GNJ.mT, x_GND, out_dtype=torch.float32)
    dA_HRD, d_bias_HR = triton_sum_ends.scores_sums(product_GJD, sums, num_heads)
    dW_HRD = triton_sum_ends.values_sums(torch.bmm(P_GNJ.mT, dy_GND), num_heads)
    return WriteGrads(dA_HRD, d_bias_HR, dW_HRD, dx_GND, dy_sums.sum(0))


def _empty(x_GNC: torch.Tensor, sums_GJ: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """dS, and what kernels leave of its sums: of every few tokens two, (G, K, 2, J)."""
    (groups, tokens, _), columns = x_GNC.shape, sums_GJ.shape[1]
    dS_GNJ = x_GNC.new_empty(groups, tokens, columns)
    tiles = -(-tokens // config.CUDA_READ_TOKENS)
    parts = tiles * config.CUDA_READ_TOKENS // config.CUDA_SUMS_TOKENS
    return dS_GNJ, sums_GJ.new_empty(groups, parts, 2, columns)


def group_read_backward(*call: Any) -> Grads:
    """absorbed_backward.group_read_backward with these passes."""
    return absorbed_backward.group_read_backward(_read, *call)


def group_write_backward(*call: Any) -> Grads:
    """absorbed_backward.group_write_backward with these passes."""
    return absorbed_backward.group_write_backward(_write, *call)
