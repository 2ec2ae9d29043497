"""group_read and group_write: cross-attention inside each group, from LayerNorm to residual.

Legend: B batch, G groups, L latent tokens of one group, D their width, N patch tokens of one
group, C their width, I inner width (heads times head dimension).
"""

import torch

from snapkernels.library import define
from snapkernels.ops.group_attn.spec import GROUP_READ, GROUP_WRITE
from snapkernels.ops.group_attn.weights import CrossAttentionWeights
from snapkernels.registry import public


@public(GROUP_READ)
def group_read(
    latents: torch.Tensor,
    patches: torch.Tensor,
    weights: CrossAttentionWeights,
    *,
    num_heads: int,
    mask: torch.Tensor | None = None,
    eps: float = 1e-6,
    backend: str | None = None,
) -> torch.Tensor:
    """Latents read the patches of their own group (paper section 3.4, figure 3b "XAttn").

    latents + o(softmax(q k^T / sqrt(head dim)) v) with q from LN(latents), k and v from
    LN(patches). With one group and conditioning tokens for patches it is the conditioning read.

    Args:
        latents: (B, G, L, D), floating point; sets the dtype of every other tensor.
        patches: (B, G, N, C).
        weights: see `CrossAttentionWeights`; the query side has width D, the other width C.
        num_heads: must divide the inner width I.
        mask: (B, G, N) bool, True where a patch may be read. A latent whose group has none gets
            zero attention, so its branch is o's bias.
        eps: of both LayerNorms.
        backend: "cuda", "triton", "eager" or "reference"; None takes the first that can run this
            call and expects to be fastest.

    Returns:
        (B, G, L, D), the latents with the branch added, contiguous.

    Raises:
        ValueError: shapes, dtypes or devices that disagree, num_heads that does not divide I, or
            an unknown backend, or one that cannot run this call.
        NotImplementedError: a second derivative is asked for, or one in forward mode.
    """
    return _group_read(latents, patches, weights, mask, num_heads, eps, backend)


@public(GROUP_WRITE)
def group_write(
    patches: torch.Tensor,
    latents: torch.Tensor,
    weights: CrossAttentionWeights,
    *,
    num_heads: int,
    eps: float = 1e-6,
    backend: str | None = None,
) -> torch.Tensor:
    """Patches are updated from the latents of their own group (paper section 3.4, "write").

    The same equation as `group_read` with the roles changed: q comes from LN(patches), k and v
    from LN(latents).

    Args:
        patches: (B, G, N, D), floating point; sets the dtype of every other tensor.
        latents: (B, G, L, C).
        weights, num_heads, eps, backend: as in `group_read`.

    Returns:
        (B, G, N, D), the patches with the branch added, contiguous.

    Raises:
        ValueError, NotImplementedError: as in `group_read`.
    """
    return _group_write(patches, latents, weights, num_heads, eps, backend)


_group_read = define(GROUP_READ)
_group_write = define(GROUP_WRITE)
