"""The parameters of one feed-forward sublayer."""

from typing import NamedTuple

import torch


class FeedForwardWeights(NamedTuple):
    """Parameters of one feed-forward sublayer.

    D is the width of the tokens, F the hidden width. Matrices are (out, in), as in nn.Linear;
    `DIMS` has every shape.
    """

    norm_weight: torch.Tensor
    norm_bias: torch.Tensor
    fc1_weight: torch.Tensor
    fc1_bias: torch.Tensor
    fc2_weight: torch.Tensor
    fc2_bias: torch.Tensor


DIMS = {
    "norm_weight": ("D",),
    "norm_bias": ("D",),
    "fc1_weight": ("F", "D"),
    "fc1_bias": ("F",),
    "fc2_weight": ("D", "F"),
    "fc2_bias": ("D",),
}
