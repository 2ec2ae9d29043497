"""The parameters of the stem."""

from typing import NamedTuple

import torch


class StemWeights(NamedTuple):
    """Parameters of the stem.

    D is the width of a token, P the features of a patch, N the patches of a group, S the number of
    position tables: 1 shared by the groups, or one each. The matrix is (out, in), as in nn.Linear;
    its columns are ordered (channel, pixel row, pixel column), the low-resolution video's channels
    last. `DIMS` has every shape.
    """

    weight: torch.Tensor
    bias: torch.Tensor
    norm_weight: torch.Tensor
    norm_bias: torch.Tensor
    positions: torch.Tensor


DIMS = {
    "weight": ("D", "P"),
    "bias": ("D",),
    "norm_weight": ("D",),
    "norm_bias": ("D",),
    "positions": ("S", "N", "D"),
}
