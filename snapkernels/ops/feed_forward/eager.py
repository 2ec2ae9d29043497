"""The feed-forward sublayer as a careful user writes it: the baseline of every later ratio."""

import torch
from torch.nn.functional import dropout, gelu, layer_norm, linear

from snapkernels.ops.feed_forward.weights import FeedForwardWeights


def feed_forward(
    tokens: torch.Tensor, w: FeedForwardWeights, dropout_p: float, eps: float
) -> torch.Tensor:
    u = layer_norm(tokens, tokens.shape[-1:], w.norm_weight, w.norm_bias, eps)
    h = gelu(linear(u, w.fc1_weight, w.fc1_bias))
    if dropout_p:
        h = dropout(h, dropout_p)
    return tokens + linear(h, w.fc2_weight, w.fc2_bias)
