"""latent_attention: self-attention over all latent tokens, from LayerNorm to residual.

Legend: B batch, L latent tokens, D their width, I inner width (heads times head dimension).
"""

import torch

from snapkernels.dispatch import choose, implementation
from snapkernels.ops.latent_attn.spec import LATENT_ATTENTION
from snapkernels.ops.latent_attn.weights import SelfAttentionWeights
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
