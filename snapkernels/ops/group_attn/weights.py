"""The parameters of one cross-attention sublayer."""

from typing import NamedTuple

import torch


class CrossAttentionWeights(NamedTuple):
    """Parameters of one cross-attention sublayer, as separate logical matrices.

    D is the width of the query tokens, C that of the key/value tokens, I the inner width (heads
    times head dimension). Matrices are (out, in), as in nn.Linear; `DIMS` has every shape.
    """

    q_norm_weight: torch.Tensor
    q_norm_bias: torch.Tensor
    kv_norm_weight: torch.Tensor
    kv_norm_bias: torch.Tensor
    q_weight: torch.Tensor
    q_bias: torch.Tensor
    k_weight: torch.Tensor
    k_bias: torch.Tensor
    v_weight: torch.Tensor
    v_bias: torch.Tensor
    o_weight: torch.Tensor
    o_bias: torch.Tensor


DIMS = {
    "q_norm_weight": ("D",),
    "q_norm_bias": ("D",),
    "kv_norm_weight": ("C",),
    "kv_norm_bias": ("C",),
    "q_weight": ("I", "D"),
    "q_bias": ("I",),
    "k_weight": ("I", "C"),
    "k_bias": ("I",),
    "v_weight": ("I", "C"),
    "v_bias": ("I",),
    "o_weight": ("D", "I"),
    "o_bias": ("D",),
}
