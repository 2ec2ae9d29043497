"""Linear layers and the feed-forward sublayer as a careful user writes them: the baseline."""

import torch
import torch.nn.functional as F  # noqa: N812

from snapkernels.ops.feed_forward.weights import FeedForwardWeights
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
        u = F.layer_norm(tokens, tokens.shape[-1:], norm_weight, norm_bias, eps)
    y = F.linear(u, weight, bias)
    return y if residual is None else y + residual


def feed_forward(
    tokens: torch.Tensor,
    w: FeedForwardWeights,
    dropout_p: float,
    seed: int | None,
    eps: float,
) -> torch.Tensor:
    u = F.layer_norm(tokens, tokens.shape[-1:], w.norm_weight, w.norm_bias, eps)
    h = F.gelu(F.linear(u, w.fc1_weight, w.fc1_bias))
    if dropout_p:
        h = dropout(h, dropout_p, seed)
    # In this order the sum is contiguous whatever the strides of the tokens.
    return F.linear(h, w.fc2_weight, w.fc2_bias) + tokens


def dropout(h: torch.Tensor, probability: float, seed: int | None) -> torch.Tensor:
    if seed is None:
        return F.dropout(h, probability)
    return h * kept(seed, tuple(h.shape), probability, h.device) / (1 - probability)
