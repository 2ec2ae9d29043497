"""The fp8 recipe as a careful user writes it: rows quantised by their maxima, `_scaled_mm`."""

import torch
import torch.nn.functional as F  # noqa: N812

from snapkernels.ops.feed_forward.quantise import quantise_rows
from snapkernels.ops.feed_forward.weights import Fp8FeedForwardWeights


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
    u = tokens
    if norm_weight is not None:
        u = F.layer_norm(tokens, tokens.shape[-1:], norm_weight, norm_bias, eps)
    y = product(u, weight, weight_scale, bias)
    return y if residual is None else y + residual


def feed_forward_fp8(tokens: torch.Tensor, w: Fp8FeedForwardWeights, eps: float) -> torch.Tensor:
    u = F.layer_norm(tokens, tokens.shape[-1:], w.norm_weight, w.norm_bias, eps)
    h = F.gelu(product(u, w.fc1_weight, w.fc1_scale, w.fc1_bias))
    return product(h, w.fc2_weight, w.fc2_scale, w.fc2_bias) + tokens


def product(
    tokens: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor, bias: torch.Tensor
) -> torch.Tensor:
    """(..., K) tokens, quantised, by (N, K) quantised rows: (..., N), summed in float32 or more."""
    rows, scale = quantise_rows(tokens.reshape(-1, tokens.shape[-1]))
    if _multiplies_fp8(tokens, weight):
        summed = torch._scaled_mm(
            rows,
            weight.contiguous().T,
            scale_a=scale[:, None],
            scale_b=weight_scale.contiguous()[None],
            bias=bias,
            out_dtype=tokens.dtype,
            use_fast_accum=False,
        )
    else:
        wide = torch.promote_types(tokens.dtype, torch.float32)
        rows_MK = rows.to(wide) * scale[:, None]
        weight_NK = weight.to(wide) * weight_scale[:, None]
        summed = (rows_MK @ weight_NK.T + bias).to(tokens.dtype)
    return summed.reshape(*tokens.shape[:-1], weight.shape[0])


def _multiplies_fp8(tokens: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether PyTorch has the product of e4m3 rows: to bfloat16, of whole 16-byte pieces."""
    return (
        tokens.is_cuda
        and tokens.dtype == torch.bfloat16
        and not any(size % 16 for size in weight.shape)
        and torch.cuda.get_device_capability(tokens.device) >= (8, 9)
    )
