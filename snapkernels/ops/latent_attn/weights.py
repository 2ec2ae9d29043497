"""The parameters of one self-attention sublayer."""

from typing import NamedTuple

import torch


class SelfAttentionWeights(NamedTuple):
    """Parameters of one self-attention sublayer, as separate logical matrices.

    D is the width of the tokens, I the inner width (heads times head dimension). Matrices are
    (out, in), as in nn.Linear; `DIMS` has every shape.
    """

    norm_weight: torch.Tensor
    norm_bias: torch.Tensor
    q_weight: torch.Tensor
    q_bias: torch.Tensor
    k_weight: torch.Tensor
    k_bias: torch.Tensor
    v_weight: torch.Tensor
    v_bias: torch.Tensor
    o_weight: torch.Tensor
    o_bias: torch.Tensor


DIMS = {
    "norm_weight": ("D",),
    "norm_bias": ("D",),
    "q_weight": ("I", "D"),
    "q_bias": ("I",),
    "k_weight": ("I", "D"),
    "k_bias": ("I",),
    "v_weight": ("I", "D"),
    "v_bias": ("I",),
    "o_weight": ("D", "I"),
    "o_bias": ("D",),
}
