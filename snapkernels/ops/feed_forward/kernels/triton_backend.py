"""The family's ops as Triton kernels: tokens normed, or normed and quantised, then products."""

import torch

from snapkernels.ops.feed_forward.kernels.triton_norm import (
    layer_norm,
    quantised_rows,
    quantised_rows_bounded,
)
from snapkernels.ops.feed_forward.kernels.triton_product import product
from snapkernels.ops.feed_forward.weights import FeedForwardWeights, Fp8FeedForwardWeights


def linear(
    tokens: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    norm_weight: torch.Tensor | None,
    norm_bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    eps: float,
) -> torch.Tensor:
    u_MK = _rows(tokens)
    if norm_weight is not None and norm_bias is not None:
        u_MK = layer_norm(u_MK, (norm_weight, norm_bias), eps)
    y_MN = product(u_MK, weight, bias, None if residual is None else _rows(residual))
    return y_MN.view(*tokens.shape[:-1], weight.shape[0])


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
    norm = None
    if norm_weight is not None and norm_bias is not None:
        norm = norm_weight, norm_bias
    q_MK, scale_M = quantised_rows(_rows(tokens), norm, eps)
    y_MN = product(
        q_MK,
        weight,
        bias,
        None if residual is None else _rows(residual),
        scales=(scale_M, weight_scale),
    )
    return y_MN.view(*tokens.shape[:-1], weight.shape[0])


def feed_forward(
    tokens: torch.Tensor,
    w: FeedForwardWeights,
    dropout: float,
    seed: int | None,
    eps: float,
) -> torch.Tensor:
    x_MD = _rows(tokens)
    u_MD = layer_norm(x_MD, (w.norm_weight, w.norm_bias), eps)
    drop = (dropout, seed) if dropout and seed is not None else None
    h_MF = product(u_MD, w.fc1_weight, w.fc1_bias, gelu=True, dropout=drop)
    return product(h_MF, w.fc2_weight, w.fc2_bias, x_MD).view(tokens.shape)


def feed_forward_fp8(tokens: torch.Tensor, w: Fp8FeedForwardWeights, eps: float) -> torch.Tensor:
    x_MD = _rows(tokens)
    norm = w.norm_weight, w.norm_bias
    q_MD, scale_M, hidden_scale_M = quantised_rows_bounded(x_MD, norm, w.hidden_bound, eps)
    h_MF = product(
        q_MD,
        w.fc1_weight,
        w.fc1_bias,
        scales=(scale_M, w.fc1_scale),
        gelu=True,
        y_scale_M=hidden_scale_M,
    )
    y_MD = product(h_MF, w.fc2_weight, w.fc2_bias, x_MD, scales=(hidden_scale_M, w.fc2_scale))
    return y_MD.view(tokens.shape)


def _rows(tokens: torch.Tensor) -> torch.Tensor:
    """(..., D) as (M, D), contiguous."""
    return tokens.reshape(-1, tokens.shape[-1]).contiguous()
