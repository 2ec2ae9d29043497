"""The family's ops in CUDA C++, csrc/linear: rows normed or quantised, then products.

Legend: M tokens, D their width, N that of a linear's result, F hidden width.
"""

from functools import cache

import torch

from snapkernels.ops.feed_forward.config import CUDA_PART
from snapkernels.ops.feed_forward.weights import FeedForwardWeights, Fp8FeedForwardWeights

E4M3 = torch.float8_e4m3fn


def linear(
    tokens: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    norm_weight: torch.Tensor | None,
    norm_bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    eps: float,
) -> torch.Tensor:
    x_MD = as_rows(tokens)
    y_MN = x_MD.new_empty(len(x_MD), len(bias))
    torch.ops.snapkernels_cuda.linear(
        x_MD,
        weight.contiguous(),
        bias.contiguous(),
        _contiguous(norm_weight),
        _contiguous(norm_bias),
        None if residual is None else as_rows(residual),
        None if norm_weight is None else torch.empty_like(x_MD),
        y_MN,
        *((None, None) if norm_weight is None else split_parts(x_MD)),
        eps,
    )
    return y_MN.view(*tokens.shape[:-1], len(bias))


def linear_fp8(
    tokens: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor,
    norm_weight: torch.Tensor | None,
    norm_bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    eps: float,
) -> torch.Tensor:
    x_MD = as_rows(tokens)
    y_MN = x_MD.new_empty(len(x_MD), len(bias))
    torch.ops.snapkernels_cuda.linear_fp8(
        x_MD,
        weight.contiguous(),
        weight_scale.contiguous(),
        bias.contiguous(),
        _contiguous(norm_weight),
        _contiguous(norm_bias),
        None if residual is None else as_rows(residual),
        torch.empty_like(x_MD, dtype=E4M3),
        x_MD.new_empty(len(x_MD), dtype=torch.float32),
        y_MN,
        *split_parts(x_MD),
        eps,
    )
    return y_MN.view(*tokens.shape[:-1], len(bias))


def feed_forward(
    tokens: torch.Tensor,
    w: FeedForwardWeights,
    dropout: float,
    seed: int | None,
    eps: float,
) -> torch.Tensor:
    assert not dropout
    x_MD = as_rows(tokens)
    y_MD = torch.empty_like(x_MD)
    torch.ops.snapkernels_cuda.feed_forward(
        x_MD,
        *(one.contiguous() for one in w),
        torch.empty_like(x_MD),
        x_MD.new_empty(len(x_MD), len(w.fc1_bias)),
        y_MD,
        *split_parts(x_MD),
        eps,
    )
    return y_MD.view(tokens.shape)


def feed_forward_fp8(tokens: torch.Tensor, w: Fp8FeedForwardWeights, eps: float) -> torch.Tensor:
    x_MD = as_rows(tokens)
    y_MD = torch.empty_like(x_MD)
    torch.ops.snapkernels_cuda.feed_forward_fp8(
        x_MD,
        *(one.contiguous() for one in w),
        torch.empty_like(x_MD, dtype=E4M3),
        x_MD.new_empty(2, len(x_MD), dtype=torch.float32),
        x_MD.new_empty(len(x_MD), len(w.fc1_bias), dtype=E4M3),
        y_MD,
        *split_parts(x_MD),
        eps,
    )
    return y_MD.view(tokens.shape)


def as_rows(tokens: torch.Tensor) -> torch.Tensor:
    """(..., D) as (M, D), contiguous."""
    return tokens.reshape(-1, tokens.shape[-1]).contiguous()


def split_parts(x_MD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Where tiles split by their depth are put together: sums, and flags that they are there."""
    blocks = _multiprocessors(x_MD.get_device()) // 2 * 2
    parts = x_MD.new_empty(blocks, CUDA_PART, dtype=torch.float32)
    return parts, x_MD.new_empty(blocks, 2, dtype=torch.int32)


@cache
def _multiprocessors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _contiguous(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.contiguous()
