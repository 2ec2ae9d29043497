"""Linear layers and the feed-forward sublayer, the equation. float64 gives the float64 answer.

Of fp8 it multiplies the weights out and leaves the tokens as they are: what a backend's result is
off is what quantising the tokens costs.
"""

import torch
from torch.nn.functional import dropout, layer_norm

from snapkernels.ops.feed_forward.weights import FeedForwardWeights, Fp8FeedForwardWeights
from snapkernels.philox import kept


def linear(
    tokens: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    norm_weight: torch.Tensor | None,
    norm_bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    eps: float,
) -> torch.Tensor:
    u = tokens
    if norm_weight is not None:
        u = layer_norm(tokens, tokens.shape[-1:], norm_weight, norm_bias, eps)
    y = u @ weight.T + bias
    return y if residual is None else y + residual


def feed_forward(
    tokens: torch.Tensor,
    w: FeedForwardWeights,
    dropout_p: float,
    seed: int | None,
    eps: float,
) -> torch.Tensor:
    u = layer_norm(tokens, tokens.shape[-1:], w.norm_weight, w.norm_bias, eps)
    h = u @ w.fc1_weight.T + w.fc1_bias
    h = h * 0.5 * (1.0 + torch.erf(h * 0.5**0.5))
    if seed is None:
        h = dropout(h, dropout_p)
    else:
        h = h * kept(seed, tuple(h.shape), dropout_p, h.device) / (1 - dropout_p)
    return h @ w.fc2_weight.T + w.fc2_bias + tokens


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
    whole = _multiplied_out(weight, weight_scale, tokens.dtype)
    return linear(tokens, whole, bias, norm_weight, norm_bias, residual, eps)


def feed_forward_fp8(tokens: torch.Tensor, w: Fp8FeedForwardWeights, eps: float) -> torch.Tensor:
    whole = FeedForwardWeights(
        w.norm_weight,
        w.norm_bias,
        _multiplied_out(w.fc1_weight, w.fc1_scale, tokens.dtype),
        w.fc1_bias,
        _multiplied_out(w.fc2_weight, w.fc2_scale, tokens.dtype),
        w.fc2_bias,
    )
    return feed_forward(tokens, whole, 0.0, None, eps)


def _multiplied_out(weight: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return weight.to(dtype) * scale.to(dtype)[:, None]
