"""stem: pixels in, patch tokens out, in one pass.

Legend: B videos, C channels, c channels of the low-resolution video, T frames, H x W and h x w
pixels, G groups, N patch tokens of one group, S position tables, P features of a patch, D width of
a token.
"""

import torch

from snapkernels.library import define
from snapkernels.ops.stem.spec import STEM
from snapkernels.ops.stem.weights import StemWeights
from snapkernels.registry import public


@public(STEM)
def stem(
    video: torch.Tensor,
    scale: torch.Tensor,
    low_res: torch.Tensor | None,
    weights: StemWeights,
    *,
    patch: int = 4,
    group: tuple[int, int, int] = (16, 5, 4),
    eps: float = 1e-6,
    backend: str | None = None,
) -> torch.Tensor:
    """LN(Linear(patchify([scale video, upsampled low_res]))) + positions (paper section 3.4).

    The low-resolution video is upsampled bilinearly, frame by frame, with half-pixel centres.
    Where the groups need more rows than the video has, zero rows follow its last (appendix A).
    Patches and groups are ordered as in `patchify`.

    Args:
        video: (B, C, T, H, W), any floating dtype: x_sigma. T must be divisible by group[0], W by
            patch * group[2]. Its gradient is computed only where it is required.
        scale: (B,), any floating dtype: c_in(sigma) of each video, which it is multiplied by; no
            gradient.
        low_res: (B, c, T, h, w), any floating dtype, or None; no gradient.
        weights: see `StemWeights`; P = (C + c) * patch^2. Group g takes position table g % S.
        patch: side of a patch in pixels.
        group: patches of one group along (T, H, W).
        eps: of the LayerNorm.
        backend: "cuda", "triton", "eager" or "reference"; None takes the first that can run this
            call.

    Returns:
        (B, G, N, D) tokens of the weights' dtype, contiguous.

    Raises:
        ValueError: shapes, dtypes or devices that disagree, indivisible sizes, a scale or low_res
            that requires a gradient, an unknown backend, or one that cannot run this call.
    """
    return _stem(video, scale, low_res, weights, patch, group, eps, backend)


_stem = define(STEM)
