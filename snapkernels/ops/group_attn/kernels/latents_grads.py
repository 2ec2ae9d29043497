"""The latents' side of an absorbed cross-attention's backward: PyTorch's products of few rows.

Legend: as in triton_latents.py.
"""

from typing import NamedTuple

import torch


class Normed(NamedTuple):
    """LayerNorm of the latents, with what its backward needs: rows (R, D), mean and rstd (R, 1)."""

    rows: torch.Tensor
    mean: torch.Tensor
    rstd: torch.Tensor


def normed(z_RD: torch.Tensor, weight_D: torch.Tensor, bias_D: torch.Tensor, eps: float) -> Normed:
    """PyTorch's LayerNorm."""
    return Normed(*torch.native_layer_norm(z_RD, z_RD.shape[1:], weight_D, bias_D, eps))


def normed_grads(
    grad_RD: torch.Tensor,
    z_RD: torch.Tensor,
    of: Normed,
    weight_D: torch.Tensor,
    bias_D: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of z, the weight and the bias."""
    return torch.ops.aten.native_layer_norm_backward(
        grad_RD, z_RD, z_RD.shape[1:], of.mean, of.rstd, weight_D, bias_D, [True] * 3
    )


def sums(rows_RI: torch.Tensor) -> torch.Tensor:
    """Over the rows, in float32."""
    if rows_RI.is_cuda and rows_RI.element_size() == 2:  # 5 us of 768 rows, a sum takes 12 to 20
        return torch.mm(rows_RI.new_ones(1, len(rows_RI)), rows_RI, out_dtype=torch.float32)[0]
    return rows_RI.sum(0, dtype=torch.float32)


def by_head(rows_RI: torch.Tensor, num_heads: int) -> torch.Tensor:
    """(R, I) -> (H, R, E), a view."""
    return rows_RI.unflatten(1, (num_heads, -1)).transpose(0, 1)


def matrix_grads(rows_RI: torch.Tensor, grads_HRC: torch.Tensor) -> torch.Tensor:
    """rows_h^T grads_h of every head, (I, C) in float32."""
    rows_HER = by_head(rows_RI, len(grads_HRC)).mT
    if rows_RI.is_cuda and rows_RI.element_size() == 2:
        return torch.bmm(rows_HER, grads_HRC, out_dtype=torch.float32).flatten(0, 1)
    return torch.bmm(rows_HER.float(), grads_HRC.float()).flatten(0, 1)
