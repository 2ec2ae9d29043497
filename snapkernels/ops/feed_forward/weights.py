"""The parameters of one feed-forward sublayer, as they are trained and as fp8 keeps them."""

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


class Fp8FeedForwardWeights(NamedTuple):
    """Parameters of one feed-forward sublayer with e4m3 matrices; `quantise_feed_forward` makes it.

    Row n of a matrix is scale[n] times its e4m3 numbers. LayerNorm and biases have the tokens'
    dtype. `FP8_DIMS` has every shape and `FP8_DTYPES` the dtypes that are not the tokens'.

    `hidden_bound`, (2,) float32, is the largest Euclidean length of a row of the quantised fc1, and
    the largest |fc1_bias|. By Cauchy and Schwarz no hidden value of a normed token u, quantised,
    passes LENGTHENED |u|_2 hidden_bound[0] + hidden_bound[1].
    """

    norm_weight: torch.Tensor
    norm_bias: torch.Tensor
    fc1_weight: torch.Tensor
    fc1_scale: torch.Tensor
    fc1_bias: torch.Tensor
    hidden_bound: torch.Tensor
    fc2_weight: torch.Tensor
    fc2_scale: torch.Tensor
    fc2_bias: torch.Tensor


# Quantising a row lengthens it by 1/16 at the most, and by 2^-10 of its scale a number, which is
# less than 0.002 of its length up to a width of 800,000.
LENGTHENED = 1.0645

FP8_DIMS = {
    "norm_weight": ("D",),
    "norm_bias": ("D",),
    "fc1_weight": ("F", "D"),
    "fc1_scale": ("F",),
    "fc1_bias": ("F",),
    "hidden_bound": ("E",),
    "fc2_weight": ("D", "F"),
    "fc2_scale": ("D",),
    "fc2_bias": ("D",),
}
FP8_DTYPES = {
    "fc1_weight": torch.float8_e4m3fn,
    "fc1_scale": torch.float32,
    "hidden_bound": torch.float32,
    "fc2_weight": torch.float8_e4m3fn,
    "fc2_scale": torch.float32,
}
