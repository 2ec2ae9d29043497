"""The parameters of one self-attention sublayer, as they are trained and as fp8 keeps them."""

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


class Fp8SelfAttentionWeights(NamedTuple):
    """Parameters of one self-attention sublayer with e4m3 matrices.

    `quantise_latent_attention` makes it. Row n of a matrix is scale[n] times its e4m3 numbers; the
    rows of qkv are those of q, then k, then v. LayerNorm and biases have the tokens' dtype.
    `FP8_DIMS` has every shape and `FP8_DTYPES` the dtypes that are not the tokens'. J is 3 I.
    """

    norm_weight: torch.Tensor
    norm_bias: torch.Tensor
    qkv_weight: torch.Tensor
    qkv_scale: torch.Tensor
    qkv_bias: torch.Tensor
    o_weight: torch.Tensor
    o_scale: torch.Tensor
    o_bias: torch.Tensor


FP8_DIMS = {
    "norm_weight": ("D",),
    "norm_bias": ("D",),
    "qkv_weight": ("J", "D"),
    "qkv_scale": ("J",),
    "qkv_bias": ("J",),
    "o_weight": ("D", "I"),
    "o_scale": ("D",),
    "o_bias": ("D",),
}
FP8_DTYPES = {
    "qkv_weight": torch.float8_e4m3fn,
    "qkv_scale": torch.float32,
    "o_weight": torch.float8_e4m3fn,
    "o_scale": torch.float32,
}
