"""The weights of latent_attention_fp8, made of trained ones."""

import torch

from snapkernels.ops.feed_forward.quantise import quantise_rows
from snapkernels.ops.latent_attn.weights import Fp8SelfAttentionWeights, SelfAttentionWeights


@torch.no_grad()
def quantise_latent_attention(weights: SelfAttentionWeights) -> Fp8SelfAttentionWeights:
    """The parameters as `latent_attention_fp8` takes them, on the same device, without gradients.

    Copies, all of them, and moved to where 8-bit numbers hold most of what varies. Exactly the same
    sublayer, but for the roundings:

    - k's bias. A c that is the same in every key adds the same number, q . c, to all scores of a
      query, and a softmax is of their differences. So k has the bias that takes LayerNorm's off it.
    - v's bias. The weights of a query add up to 1, so what is the same in every value is so in
      every context: o takes it into its bias, and v has none of it.
    - Channels. Those of q are times t and of k by t, so that both vary alike, t = sqrt(std k / std
      q); those of v by u = std v, and o's columns times u. A deviation is that of a matrix's
      row times LayerNorm's weight, as of random latents. Rows take t and u in their scales.

    Args:
        weights: see `SelfAttentionWeights`; of the dtype that the tokens will have.

    Raises:
        ValueError: a matrix that `quantise_rows` does not take.
    """
    w, dtype = weights, weights.q_bias.dtype
    qkv_weight, qkv_scale = quantise_rows(torch.cat([w.q_weight, w.k_weight, w.v_weight]))
    qkv_JD = qkv_weight.float() * qkv_scale[:, None]
    _, k_I, v_I = (qkv_JD @ w.norm_bias.float()).chunk(3)  # what LayerNorm's bias adds
    q_std_I, k_std_I, v_std_I = (qkv_JD * w.norm_weight.float()).norm(dim=1).chunk(3)
    t_I, u_I = _ratio(k_std_I, q_std_I).sqrt(), _ratio(v_std_I, torch.ones_like(v_std_I))
    factor_J = torch.cat([t_I, 1 / t_I, 1 / u_I])
    o_DI = w.o_weight.float()
    o_weight, o_scale = quantise_rows(o_DI * u_I)
    return Fp8SelfAttentionWeights(
        norm_weight=w.norm_weight.detach().clone(),
        norm_bias=w.norm_bias.detach().clone(),
        qkv_weight=qkv_weight,
        qkv_scale=qkv_scale * factor_J,
        qkv_bias=(torch.cat([w.q_bias.float(), -k_I, -v_I]) * factor_J).to(dtype),
        o_weight=o_weight,
        o_scale=o_scale,
        o_bias=(w.o_bias.float() + o_DI @ (v_I + w.v_bias.float())).to(dtype),
    )


def _ratio(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Of deviations, channel by channel; 1 where a channel does not vary."""
    return torch.where((one == 0) | (other == 0), 1.0, one / other)
