"""Linear layers and the feed-forward sublayer, from LayerNorm to residual, in bf16 and in fp8.

Legend: D width of the tokens, N output width, F hidden width.
"""

import torch

from snapkernels.dispatch import choose, implementation
from snapkernels.library import define
from snapkernels.ops.feed_forward.spec import FEED_FORWARD, LINEAR
from snapkernels.ops.feed_forward.spec_fp8 import FEED_FORWARD_FP8, LINEAR_FP8
from snapkernels.ops.feed_forward.weights import FeedForwardWeights, Fp8FeedForwardWeights
from snapkernels.registry import public


@public(FEED_FORWARD)
def feed_forward(
    tokens: torch.Tensor,
    weights: FeedForwardWeights,
    *,
    dropout: float = 0.0,
    seed: int | None = None,
    eps: float = 1e-6,
    backend: str | None = None,
) -> torch.Tensor:
    """tokens + fc2(dropout(GELU(fc1(LN(tokens))))), with the exact (erf) GELU (paper section 3.4).

    Args:
        tokens: (..., D), floating point; sets the dtype of every other tensor.
        weights: see `FeedForwardWeights`.
        dropout: probability of zeroing a hidden value (appendix B); those that are kept are divided
            by 1 - dropout. Pass 0 outside training.
        seed: from 0 to 2^63 - 1, to be used once: the hidden values that are zeroed are a function
            of it and of their place among those of the call (`snapkernels.philox.kept`), equal by
            every backend. None draws them from PyTorch's default generator, in PyTorch calls.
        eps: of the LayerNorm.
        backend: "cuda", "triton", "eager" or "reference"; None takes the first that can run this
            call and expects to be fastest.

    Returns:
        (..., D), the tokens with the branch added, contiguous.

    Raises:
        ValueError: shapes, dtypes or devices that disagree, dropout outside [0, 1), a seed out of
            range, an unknown backend, or one that cannot run this call.
        NotImplementedError: a second derivative is asked for, or one in forward mode.
    """
    values = (tokens, weights, dropout, seed, eps)
    if dropout and seed is None:
        # What PyTorch draws it differentiates itself: a registered op would draw again.
        FEED_FORWARD.check(*values)
        return implementation(choose(FEED_FORWARD, backend, values))(*values)
    return _feed_forward(*values, backend)


@public(FEED_FORWARD_FP8)
def feed_forward_fp8(
    tokens: torch.Tensor,
    weights: Fp8FeedForwardWeights,
    *,
    eps: float = 1e-6,
    backend: str | None = None,
) -> torch.Tensor:
    """`feed_forward` with both products of e4m3 numbers, for inference: nothing has a gradient.

    The normed tokens are quantised a row at a time, see `quantise_rows`; so are the hidden values,
    by their largest or by a bound on it. Sums are float32.

    Args:
        tokens: (..., D), floating point; sets the dtype of the LayerNorm's and the biases.
        weights: see `Fp8FeedForwardWeights`; `quantise_feed_forward` makes them.
        eps: of the LayerNorm.
        backend: as in `feed_forward`.

    Returns:
        (..., D), the tokens with the branch added, contiguous. A token with a NaN or an infinity
        gives one that is not finite, and changes no other.

    Raises:
        ValueError: shapes, dtypes or devices that disagree, a tensor that requires a gradient
            outside torch.no_grad(), an unknown backend, or one that cannot run this call.
    """
    return _feed_forward_fp8(tokens, weights, eps, backend)


@public(LINEAR)
def linear(
    tokens: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    *,
    norm_weight: torch.Tensor | None = None,
    norm_bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    eps: float = 1e-6,
    backend: str | None = None,
) -> torch.Tensor:
    """residual + weight LN(tokens) + bias, without LayerNorm or residual where they are left out.

    Args:
        tokens: (..., D), floating point; sets the dtype of every other tensor.
        weight: (N, D), as in nn.Linear.
        bias: (N).
        norm_weight, norm_bias: (D), of the LayerNorm; both or neither.
        residual: (..., N), what the result is added to.
        eps: of the LayerNorm.
        backend: as in `feed_forward`.

    Returns:
        (..., N), contiguous.

    Raises:
        ValueError: shapes, dtypes or devices that disagree, one of norm_weight and norm_bias
            without the other, an unknown backend, or one that cannot run this call.
        NotImplementedError: a second derivative is asked for, or one in forward mode.
    """
    return _linear(tokens, weight, bias, norm_weight, norm_bias, residual, eps, backend)


@public(LINEAR_FP8)
def linear_fp8(
    tokens: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor,
    *,
    norm_weight: torch.Tensor | None = None,
    norm_bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    eps: float = 1e-6,
    backend: str | None = None,
) -> torch.Tensor:
    """`linear` with a product of e4m3 numbers, for inference: nothing has a gradient.

    The tokens, normed where there is a LayerNorm, are quantised a row at a time, see
    `quantise_rows`. Sums are float32.

    Args:
        tokens: (..., D), floating point; sets the dtype of bias, LayerNorm and residual.
        weight: (N, D) float8_e4m3fn, with
        weight_scale: (N) float32, as `quantise_rows` makes them.
        bias: (N).
        norm_weight, norm_bias, residual, eps, backend: as in `linear`.

    Returns:
        (..., N), contiguous. A token with a NaN or an infinity gives one that is not finite, and
        changes no other.

    Raises:
        ValueError: as in `linear`, or a tensor that requires a gradient outside torch.no_grad().
    """
    return _linear_fp8(
        tokens, weight, weight_scale, bias, norm_weight, norm_bias, residual, eps, backend
    )


_feed_forward = define(FEED_FORWARD)
_feed_forward_fp8 = define(FEED_FORWARD_FP8)
_linear = define(LINEAR)
_linear_fp8 = define(LINEAR_FP8)
