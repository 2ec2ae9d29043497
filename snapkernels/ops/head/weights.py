"""The parameters of the head."""

from typing import NamedTuple

import torch


class HeadWeights(NamedTuple):
    """Parameters of the head.

    D is the width of a token, P the features of a patch. The matrix is (out, in), as in nn.Linear;
    its rows are ordered (channel, pixel row, pixel column). `DIMS` has every shape.
    """

    norm_weight: torch.Tensor
    norm_bias: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor


DIMS = {
    "norm_weight": ("D",),
    "norm_bias": ("D",),
    "weight": ("P", "D"),
    "bias": ("P",),
}
