"""Self-attention over all latent tokens, from LayerNorm to residual, as it is trained and in fp8.

Legend: B batch, L latent tokens, D their width, I inner width (heads times head dimension).
"""

import torch

from snapkernels.dispatch import choose, implementation
from snapkernels.library import define
from snapkernels.ops.latent_attn.spec import LATENT_ATTENTION
from snapkernels.ops.latent_attn.spec_fp8 import LATENT_ATTENTION_FP8
from snapkernels.ops.latent_attn.weights import Fp8SelfAttentionWeights, SelfAttentionWeights
from snapkernels.registry import public


@public(LATENT_ATTENTION)
def latent_attention(
    latents: torch.Tensor,
    weights: SelfAttentionWeights,
    *,
    num_heads: int,
    eps: float = 1e-6,
    backend: str | None = None,
) -> torch.Tensor:
    """Every latent attends to all latents (paper section 3.4, figure 3b "SAttn").

    latents + o(softmax(q k^T / sqrt(head dim)) v), with q, k and v from LN(latents).

    Args:
        latents: (B, L, D), floating point; sets the dtype of every other tensor.
        weights: see `SelfAttentionWeights`.
        num_heads: must divide the inner width I.
        eps: of the LayerNorm.
        backend: "eager" (default) or "reference".

    Returns:
        (B, L, D), the latents with the branch added.

    Raises:
        ValueError: shapes, dtypes or devices that disagree, num_heads that does not divide I, or
            an unknown backend.
    """
    values = (latents, weights, num_heads, eps)
    LATENT_ATTENTION.check(*values)
    return implementation(choose(LATENT_ATTENTION, backend, values))(*values)


@public(LATENT_ATTENTION_FP8)
def latent_attention_fp8(
    latents: torch.Tensor,
    weights: Fp8SelfAttentionWeights,
    *,
    num_heads: int,
    eps: float = 1e-6,
    backend: str | None = None,
) -> torch.Tensor:
    """`latent_attention` with projections of e4m3 numbers, for inference: nothing has a gradient.

    The normed latents and the context are quantised a row at a time, see `quantise_rows`. Which
    numbers q, k and v are between the projections, the latents' dtype or 8-bit integers, is the
    backend's choice (`snapkernels/ops/latent_attn`).

    Args:
        latents: (B, L, D), floating point; sets the dtype of the LayerNorm's and the biases.
        weights: see `Fp8SelfAttentionWeights`; `quantise_latent_attention` makes them.
        num_heads: must divide the inner width I.
        eps: of the LayerNorm.
        backend: "cuda", "triton", "eager" or "reference"; None takes the first that can run this
            call.

    Returns:
        (B, L, D), the latents with the branch added, contiguous. A latent with a NaN or an infinity
        makes those of its video not finite, and changes no other video.

    Raises:
        ValueError: shapes, dtypes or devices that disagree, num_heads that does not divide I, a
            tensor that requires a gradient outside torch.no_grad(), an unknown backend, or one that
            cannot run this call.
    """
    return _latent_attention_fp8(latents, weights, num_heads, eps, backend)


_latent_attention_fp8 = define(LATENT_ATTENTION_FP8)
