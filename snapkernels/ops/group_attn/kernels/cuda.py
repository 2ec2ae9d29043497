"""group_read and group_write absorbed, in CUDA C++: csrc/group_attn.

What meets the patches in the forward is CUDA's. The latents' side, and the backward, are as in
triton_kernels.py.

Legend: as in triton_latents.py.
"""

from typing import Any

import torch

from snapkernels.ops.group_attn.config import CUDA_READ_TOKENS
from snapkernels.ops.group_attn.kernels import absorbed, triton_latents
from snapkernels.ops.group_attn.weights import CrossAttentionWeights


def _average(
    x_GNC: torch.Tensor,
    A_GJC: torch.Tensor,
    sums_GJ: torch.Tensor,
    mask_GN: torch.Tensor | None,
    w: CrossAttentionWeights,
    num_heads: int,
    eps: float,
    *,
    saving: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    assert mask_GN is None
    groups, tokens, width = x_GNC.shape
    columns = sums_GJ.shape[1]
    P_GJN = x_GNC.new_empty(groups, columns, tokens)
    blocks = groups, tokens // CUDA_READ_TOKENS, columns
    most, sums, means = (sums_GJ.new_empty(blocks) for _ in range(3))
    context_HRC = x_GNC.new_empty(num_heads, groups * columns // num_heads, width)
    average_HRC = torch.empty_like(context_HRC) if saving else None
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
        average_HRC,
        eps,
    )
    return context_HRC, average_HRC


def _written(
    x_GND: torch.Tensor,
    A_GJD: torch.Tensor,
    sums_GJ: torch.Tensor,
    bias_GJ: torch.Tensor,
    v_RI: torch.Tensor,
    w: CrossAttentionWeights,
    num_heads: int,
    eps: float,
) -> torch.Tensor:
    values_GJD = triton_latents.values(v_RI, w.o_weight, num_heads, len(x_GND), in_order=True)
    y_GND = torch.empty_like(x_GND)
    torch.ops.snapkernels_cuda.group_write(
        x_GND, A_GJD, sums_GJ, bias_GJ, values_GJD, w.o_bias.contiguous(), y_GND, eps
    )
    return y_GND


def group_read(*call: Any) -> torch.Tensor:
    """The output alone."""
    return absorbed.group_read(_average, *call, saving=False)[0]


def group_write(*call: Any) -> torch.Tensor:
    """The output alone."""
    return group_write_saving(*call)[0]


def group_read_saving(*call: Any) -> tuple[torch.Tensor, ...]:
    """The output, and what absorbed.group_read saves."""
    return absorbed.group_read(_average, *call, saving=True)


def group_write_saving(*call: Any) -> tuple[torch.Tensor, ...]:
    """The output, and what absorbed.group_write saves."""
    return absorbed.group_write(_written, *call)
