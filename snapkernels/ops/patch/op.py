"""patchify and unpatchify: a video as grouped patch tokens, and back.

Legend: B batch, C channels, T frames, H x W pixels, G groups, N patch tokens of one group,
P features of one patch (C * patch * patch).
"""

from typing import Any

import torch

from snapkernels.library import define
from snapkernels.ops.patch.spec import PATCHIFY, UNPATCHIFY
from snapkernels.registry import public


@public(PATCHIFY)
def patchify(
    video: torch.Tensor,
    *,
    patch: int = 4,
    group: tuple[int, int, int] = (16, 5, 4),
    backend: str | None = None,
) -> torch.Tensor:
    """Cut a video into 1 x patch x patch patches, in grouped order (paper section 3.4, table 8).

    Groups are counted frame-major, then row, then column; so are the patches inside a group. The
    features of a patch are ordered (channel, row, column), as in a Conv2d weight.

    Args:
        video: (B, C, T, H, W), any floating dtype, any strides. T must be divisible by group[0],
            H by patch * group[1], W by patch * group[2].
        patch: side of a patch in pixels.
        group: patches of one group along (T, H, W).
        backend: "cuda", "triton", "cpu", "eager" or "reference"; None takes the first that can run
            this call.

    Returns:
        (B, G, N, C * patch * patch) tokens of the video's dtype, contiguous.

    Raises:
        ValueError: wrong rank, dtype, patch, group, indivisible size, unknown backend, or one that
            cannot run this call.
    """
    return _patchify(video, patch, group, backend)


@public(UNPATCHIFY)
def unpatchify(
    tokens: torch.Tensor,
    *,
    size: tuple[int, int, int],
    patch: int = 4,
    group: tuple[int, int, int] = (16, 5, 4),
    backend: str | None = None,
) -> torch.Tensor:
    """Put grouped patch tokens back in their places: the inverse of `patchify`.

    Args:
        tokens: (B, G, N, C * patch * patch), any floating dtype, any strides.
        size: (T, H, W) of the video in frames and pixels.
        patch, group, backend: as in `patchify`.

    Returns:
        (B, C, T, H, W) video of the tokens' dtype, contiguous.

    Raises:
        ValueError: wrong rank or dtype, indivisible size, tokens that do not fill the size, or a
            backend as in `patchify`.
    """
    return _unpatchify(tokens, size, patch, group, backend)


def _keep_patchify(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    video, *ctx.call = inputs
    ctx.size = video.shape[2:]


def _patchify_backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    patch, group, backend = ctx.call
    return torch.ops.snapkernels.unpatchify(grad, ctx.size, patch, group, backend), None, None, None


def _keep_unpatchify(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    _, _, *ctx.call = inputs


def _unpatchify_backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    return torch.ops.snapkernels.patchify(grad, *ctx.call), None, None, None, None


_patchify = define(PATCHIFY, _keep_patchify, _patchify_backward)
_unpatchify = define(UNPATCHIFY, _keep_unpatchify, _unpatchify_backward)
