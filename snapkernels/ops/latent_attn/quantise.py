"""The weights of latent_attention_fp8, made of trained ones."""

import torch

from snapkernels.ops.feed_forward.quantise import quantise_rows
from snapkernels.ops.latent_attn.weights import Fp8SelfAttentionWeights, SelfAttentionWeights


@torch.no_grad()
def quantise_latent_attention(weights: SelfAttentionWeights) -> Fp8SelfAttentionWeights:
    """The parameters as `latent_attention_fp8` takes them, on the same device, without gradients.

    Copies, all of them. k's bias is not the trained one: a c that is the same in every key adds the
    same number, q . c, to all scores of a query, and a softmax is of their differences alone. Here
    it is what takes LayerNorm's bias off the keys, minus its product by W_k as that is quantised:
    numbers around zero use the whole range of 8 bits.

    Args:
        weights: see `SelfAttentionWeights`; of the dtype that the tokens will have.

    Raises:
        ValueError: a matrix that `quantise_rows` does not take.
    """
    w = weights
    qkv_weight, qkv_scale = quantise_rows(torch.cat([w.q_weight, w.k_weight, w.v_weight]))
    o_weight, o_scale = quantise_rows(w.o_weight)
    keys = slice(len(w.q_weight), 2 * len(w.q_weight))
    k_ID = qkv_weight[keys].float() * qkv_scale[keys, None]
    k_bias = -(k_ID @ w.norm_bias.float()).to(w.k_bias.dtype)
    return Fp8SelfAttentionWeights(
        norm_weight=w.norm_weight.detach().clone(),
        norm_bias=w.norm_bias.detach().clone(),
        qkv_weight=qkv_weight,
        qkv_scale=qkv_scale,
        qkv_bias=torch.cat([w.q_bias, k_bias, w.v_bias]),
        o_weight=o_weight,
        o_scale=o_scale,
        o_bias=w.o_bias.detach().clone(),
    )
