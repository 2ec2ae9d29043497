"""The backward of head, head_mix and head_loss, but for the pass over the tokens.

What was saved becomes the gradient at the features and a row of every token; the backend's
`gradients_of_rows` makes the gradients of that, from here on the same for all three.
"""

from collections.abc import Callable, Sequence

import torch

from snapkernels.ops.head.kernels.triton_mix import Grads, video_mix_backward
from snapkernels.ops.head.kernels.triton_parts import size_of
from snapkernels.ops.head.kernels.triton_rows import rows_of_pixels
from snapkernels.ops.head.weights import HeadWeights

# (needs, tokens, w, feature_grad, rows, scale) -> the gradients of (tokens, *w), None where not
# needed. feature_grad (B, G, N, P) and rows (B, G, N, 4) as the spec's head_loss saves them; scale
# is one float32 that multiplies all gradients, or None.
GradientsOfRows = Callable[..., Grads]


def head_backward(
    gradients_of_rows: GradientsOfRows,
    needs: tuple[bool, ...],
    grad: torch.Tensor,
    features: torch.Tensor,
    moments: torch.Tensor,
    tokens: torch.Tensor,
    w: HeadWeights,
    size: tuple[int, int, int],
    patch: int,
    group: tuple[int, int, int],
    eps: float,
) -> Grads:
    if not any(needs) or not grad.numel():
        return _zeros(needs, tokens, w)
    found = rows_of_pixels(grad, None, features, moments, w, size, patch, group)
    return gradients_of_rows(needs, tokens, w, *found, None)


def head_mix_backward(
    gradients_of_rows: GradientsOfRows,
    needs: tuple[bool, ...],
    grad: torch.Tensor,
    features: torch.Tensor,
    moments: torch.Tensor,
    tokens: torch.Tensor,
    video: torch.Tensor,
    other: torch.Tensor | None,
    mix: torch.Tensor,
    w: HeadWeights,
    patch: int,
    group: tuple[int, int, int],
    eps: float,
) -> Grads:
    need_tokens, need_video, need_other, *need_weights = needs
    # F stands for itself alone: its gradient is not asked for.
    of_videos = (False, need_video, need_other)
    _, dvideo, dother = video_mix_backward(of_videos, grad, grad, video, other, mix)
    rest = (need_tokens, *need_weights)
    if any(rest) and grad.numel():
        found = rows_of_pixels(grad, mix, features, moments, w, size_of(video), patch, group)
        dtokens, *dweights = gradients_of_rows(rest, tokens, w, *found, None)
    else:
        dtokens, *dweights = _zeros(rest, tokens, w)
    return dtokens, dvideo, dother, *dweights


def head_loss_backward(
    gradients_of_rows: GradientsOfRows,
    needs: tuple[bool, ...],
    grad: torch.Tensor,
    feature_grad: torch.Tensor,
    rows: torch.Tensor,
    tokens: torch.Tensor,
    video: torch.Tensor,
    sample: torch.Tensor,
    terms: torch.Tensor,
    w: HeadWeights,
    seed: int,
    patch: int,
    group: tuple[int, int, int],
    eps: float,
) -> Grads:
    if not any(needs) or not video.numel():
        return _zeros(needs, tokens, w)
    scale = grad.float() * (2 / video.numel())
    return gradients_of_rows(needs, tokens, w, feature_grad, rows, scale)


def weight_gradients(
    needs: Sequence[bool],
    w: HeadWeights,
    R: torch.Tensor,
    q: torch.Tensor,
    scale: torch.Tensor | None,
) -> Grads:
    """The gradients of `w` that `needs` asks for, of R = sum dF xhat^T (P, D) and q = sum dF (P,).

    R and q are float32; `scale` multiplies them.
    """
    if scale is not None:
        R, q = R * scale, q * scale
    need_gain, need_shift, need_weight, need_bias = needs
    weight, gain, shift = w.weight.float(), w.norm_weight.float(), w.norm_bias.float()
    # Sums, and not matrix products, which TF32 may be allowed for.
    return (
        (weight * R).sum(0).to(w.norm_weight.dtype) if need_gain else None,
        (weight * q[:, None]).sum(0).to(w.norm_bias.dtype) if need_shift else None,
        (R * gain + q[:, None] * shift).to(w.weight.dtype) if need_weight else None,
        q.to(w.bias.dtype) if need_bias else None,
    )


def _zeros(needs: Sequence[bool], tokens: torch.Tensor, w: HeadWeights) -> Grads:
    """The gradients of no videos."""
    pairs = zip((tokens, *w), needs, strict=True)
    return tuple(torch.zeros_like(one) if need else None for one, need in pairs)
