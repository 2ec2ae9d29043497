"""feed_forward: the feed-forward sublayer, from LayerNorm to residual.

Legend: D width of the tokens, F hidden width.
"""

import torch

from snapkernels.dispatch import choose, implementation
from snapkernels.ops.feed_forward.spec import FEED_FORWARD
from snapkernels.ops.feed_forward.weights import FeedForwardWeights
from snapkernels.registry import public


@public(FEED_FORWARD)
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
    values = (tokens, weights, dropout, eps)
    FEED_FORWARD.check(*values)
    return implementation(choose(FEED_FORWARD, backend, values))(*values)
