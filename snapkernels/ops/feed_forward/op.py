"""feed_forward: the feed-forward sublayer, from LayerNorm to residual.

Legend: B batch, N tokens, D their width, F hidden width.
"""

import torch

from snapkernels.dispatch import choose
from snapkernels.ops.feed_forward import eager, reference
from snapkernels.ops.feed_forward.weights import DIMS, FeedForwardWeights
from snapkernels.validate import Arguments

BACKENDS = {"reference": reference.feed_forward, "eager": eager.feed_forward}


def feed_forward(
    tokens: torch.Tensor,
    weights: FeedForwardWeights,
    *,
    dropout: float = 0.0,
    eps: float = 1e-6,
    backend: str | None = None,
) -> torch.Tensor:
    """tokens + fc2(dropout(GELU(fc1(LN(tokens))))), with the exact (erf) GELU (paper section 3.4).

    Args:
        tokens: (..., D), floating point; sets the dtype of every other tensor.
        weights: see `FeedForwardWeights`.
        dropout: probability of zeroing a hidden value, drawn from PyTorch's default generator
            (appendix B); pass 0 outside training.
        eps: of the LayerNorm.
        backend: "eager" (default) or "reference".

    Returns:
        (..., D), the tokens with the branch added.

    Raises:
        ValueError: shapes, dtypes or devices that disagree, dropout outside [0, 1), or an unknown
            backend.
    """
    implementation = choose("feed_forward", BACKENDS, backend)
    args = Arguments("feed_forward")
    leading = (f"N{i}" for i in range(getattr(tokens, "ndim", 1) - 1))
    args.bind("tokens", tokens, (*leading, "D"))
    args.bind_fields("weights", weights, DIMS)
    if not 0.0 <= dropout < 1.0:
        args.fail(f"dropout must be in [0, 1), got {dropout!r}")
    return implementation(tokens, weights, dropout, eps)
