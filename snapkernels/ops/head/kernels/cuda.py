"""head and its ends in CUDA C++: csrc/head/head_forward.cuh, head_backward.cuh."""

from typing import Any

import torch

from snapkernels.ops.head.config import CUDA_BACKWARD_COLUMNS, CUDA_BACKWARD_TOKENS, CUDA_PARTIALS
from snapkernels.ops.head.kernels import backward
from snapkernels.ops.head.kernels.triton_mix import Grads
from snapkernels.ops.head.weights import HeadWeights

Kept = tuple[torch.Tensor | None, torch.Tensor | None]  # what a forward saves, or nothing
Saving = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
NOTHING: Kept = (None, None)


def head(
    tokens: torch.Tensor,
    w: HeadWeights,
    size: tuple[int, int, int],
    patch: int,
    group: tuple[int, int, int],
    eps: float,
) -> torch.Tensor:
    return _head(tokens, w, size, patch, group, eps, NOTHING)


def head_saving(
    tokens: torch.Tensor,
    w: HeadWeights,
    size: tuple[int, int, int],
    patch: int,
    group: tuple[int, int, int],
    eps: float,
) -> Saving:
    """F, and the features and moments of the tokens."""
    saved = _to_save(tokens, w, 2)
    return _head(tokens, w, size, patch, group, eps, saved), *saved


def _head(
    tokens: torch.Tensor,
    w: HeadWeights,
    size: tuple[int, int, int],
    patch: int,
    group: tuple[int, int, int],
    eps: float,
    saved: Kept,
) -> torch.Tensor:
    shape = (len(tokens), len(w.bias) // patch**2, *size)
    F = tokens.new_empty(shape, dtype=torch.float32)
    torch.ops.snapkernels_cuda.head(tokens, *w, F, *saved, group, eps)
    return F


def head_mix(
    tokens: torch.Tensor,
    video: torch.Tensor,
    other: torch.Tensor | None,
    mix: torch.Tensor,
    w: HeadWeights,
    patch: int,
    group: tuple[int, int, int],
    eps: float,
) -> torch.Tensor:
    return _head_mix(tokens, video, other, mix, w, group, eps, NOTHING)


def head_mix_saving(
    tokens: torch.Tensor,
    video: torch.Tensor,
    other: torch.Tensor | None,
    mix: torch.Tensor,
    w: HeadWeights,
    patch: int,
    group: tuple[int, int, int],
    eps: float,
) -> Saving:
    """The mixture, and the features and moments of the tokens."""
    saved = _to_save(tokens, w, 2)
    return _head_mix(tokens, video, other, mix, w, group, eps, saved), *saved


def _head_mix(
    tokens: torch.Tensor,
    video: torch.Tensor,
    other: torch.Tensor | None,
    mix: torch.Tensor,
    w: HeadWeights,
    group: tuple[int, int, int],
    eps: float,
    saved: Kept,
) -> torch.Tensor:
    mixed = torch.empty_like(video)
    torch.ops.snapkernels_cuda.head_mix(tokens, video, other, mix, *w, mixed, *saved, group, eps)
    return mixed


def head_loss(
    tokens: torch.Tensor,
    video: torch.Tensor,
    sample: torch.Tensor,
    terms: torch.Tensor,
    w: HeadWeights,
    seed: int,
    patch: int,
    group: tuple[int, int, int],
    eps: float,
) -> torch.Tensor:
    return _head_loss(tokens, video, sample, terms, w, seed, group, eps, NOTHING)


def head_loss_saving(
    tokens: torch.Tensor,
    video: torch.Tensor,
    sample: torch.Tensor,
    terms: torch.Tensor,
    w: HeadWeights,
    seed: int,
    patch: int,
    group: tuple[int, int, int],
    eps: float,
) -> Saving:
    """The loss, and the gradient at the features and the rows of the tokens."""
    saved = _to_save(tokens, w, 4)
    return _head_loss(tokens, video, sample, terms, w, seed, group, eps, saved), *saved


def _head_loss(
    tokens: torch.Tensor,
    video: torch.Tensor,
    sample: torch.Tensor,
    terms: torch.Tensor,
    w: HeadWeights,
    seed: int,
    group: tuple[int, int, int],
    eps: float,
    saved: Kept,
) -> torch.Tensor:
    partial, loss = video.new_empty(CUDA_PARTIALS), video.new_empty(())
    torch.ops.snapkernels_cuda.head_loss(
        tokens, video, sample, terms, *w, partial, loss, *saved, seed, group, eps
    )
    return loss


def _to_save(
    tokens: torch.Tensor, w: HeadWeights, numbers: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Room for what a forward saves: features of `tokens`, and `numbers` float32 of each."""
    places = tokens.shape[:3]
    features = tokens.new_empty((*places, len(w.bias)))
    return features, tokens.new_empty((*places, numbers), dtype=torch.float32)


def gradients_of_rows(
    needs: tuple[bool, ...],
    tokens: torch.Tensor,
    w: HeadWeights,
    feature_grad: torch.Tensor,
    rows: torch.Tensor,
    scale: torch.Tensor | None,
) -> Grads:
    """The gradients of (tokens, *w) that `needs` asks for, of at least one token."""
    need_tokens, *need_weights = needs
    (features, width), tiles = w.weight.shape, -(-rows.numel() // (4 * CUDA_BACKWARD_TOKENS))
    processors = torch.cuda.get_device_properties(tokens.device).multi_processor_count
    ranges = min(tiles, max(1, processors // (width // CUDA_BACKWARD_COLUMNS)))
    dtokens = torch.empty_like(tokens) if need_tokens else None
    dweights: Grads = (None,) * len(need_weights)
    products = sums = None
    if any(need_weights):
        dweights = tuple(torch.empty_like(one) for one in w)
        products, sums = rows.new_empty(ranges, width, features), rows.new_empty(ranges, features)
    torch.ops.snapkernels_cuda.head_backward(
        tokens,
        feature_grad,
        rows,
        scale,
        *w[:3],
        dtokens,
        *dweights,
        products,
        sums,
        ranges,
    )
    pairs = zip(dweights, need_weights, strict=True)
    return dtokens, *(one if need else None for one, need in pairs)


def head_backward(needs: tuple[bool, ...], *rest: Any) -> Grads:
    return backward.head_backward(gradients_of_rows, needs, *rest)


def head_mix_backward(needs: tuple[bool, ...], *rest: Any) -> Grads:
    return backward.head_mix_backward(gradients_of_rows, needs, *rest)


def head_loss_backward(needs: tuple[bool, ...], *rest: Any) -> Grads:
    return backward.head_loss_backward(gradients_of_rows, needs, *rest)
