"""group_read and group_write absorbed, in CUDA C++: csrc/group_attn.

What meets the patches in the forward is CUDA's; the backward's is in cuda_backward.py. The latents'
side is as in triton_kernels.py.

Legend: as in triton_latents.py.
"""

from typing import Any

import torch

from snapkernels.ops.group_attn.config import CUDA_READ_TOKENS
from snapkernels.ops.group_attn.kernels import absorbed, triton_latents
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
    assert mask_GN is None
    groups, tokens, width = x_GNC.shape
    columns = A.sums.shape[1]
    P_GJN = x_GNC.new_empty(groups, columns, tokens)
    blocks = groups, tokens // CUDA_READ_TOKENS, columns
    most, sums, means = (A.sums.new_empty(blocks) for _ in range(3))
    context_HRC = x_GNC.new_empty(num_heads, groups * columns // num_heads, width)
    saved: tuple[torch.Tensor, ...] = ()
    if saving:
        moments = (A.sums.new_empty(groups, tokens) for _ in range(2))
        saved = (torch.empty_like(context_HRC), torch.empty_like(A.sums), *moments)
    torch.ops.snapkernels_cuda.group_read(
        x_GNC,
        A.rows,
        A.sums,
        w.kv_norm_weight.contiguous(),
        w.kv_norm_bias.contiguous(),
        P_GJN,
        most,
        sums,
        means,
        context_HRC,
        *(saved or (None,) * 4),
        eps,
    )
    return context_HRC, *saved


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
    values_GJD = triton_latents.values(v_RI, w.o_weight, num_heads, len(x_GND), in_order=True)
    y_GND = torch.empty_like(x_GND)
    P_GNJ = mean_GN = rstd_GN = None
    if saving:
        P_GNJ = x_GND.new_empty(*x_GND.shape[:2], A.sums.shape[1])
        mean_GN, rstd_GN = (A.sums.new_empty(x_GND.shape[:2]) for _ in range(2))
    torch.ops.snapkernels_cuda.group_write(
        x_GND, A.rows, A.sums, A.number, values_GJD, w.o_bias.contiguous(), y_GND, P_GNJ, mean_GN,
        rstd_GN, eps,
    )  # fmt: skip
    return y_GND, P_GNJ, mean_GN, rstd_GN


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
