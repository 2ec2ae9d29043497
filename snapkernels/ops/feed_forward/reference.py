"""The feed-forward sublayer, the equation. float64 inputs give the float64 answer."""

import torch
from torch.nn.functional import dropout, layer_norm

from snapkernels.ops.feed_forward.weights import FeedForwardWeights


def feed_forward(
    tokens: torch.Tensor, w: FeedForwardWeights, dropout_p: float, eps: float
) -> torch.Tensor:
    u = layer_norm(tokens, tokens.shape[-1:], w.norm_weight, w.norm_bias, eps)
    h = u @ w.fc1_weight.T + w.fc1_bias
    h = h * 0.5 * (1.0 + torch.erf(h * 0.5**0.5))
    return tokens + dropout(h, dropout_p) @ w.fc2_weight.T + w.fc2_bias
