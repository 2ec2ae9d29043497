"""head and its ends: patch tokens in, pixels or a loss out, in one pass.

Legend: B videos, C channels, T frames, H x W pixels, G groups, N patch tokens of one group,
P features of a patch, D width of a token.
"""

import torch

from snapkernels.library import define
from snapkernels.ops.head.spec import HEAD, HEAD_LOSS, HEAD_MIX, VIDEO_MIX
from snapkernels.ops.head.weights import HeadWeights
from snapkernels.registry import public


@public(HEAD)
def head(
    tokens: torch.Tensor,
    weights: HeadWeights,
    *,
    size: tuple[int, int, int],
    patch: int = 4,
    group: tuple[int, int, int] = (16, 5, 4),
    eps: float = 1e-6,
    backend: str | None = None,
) -> torch.Tensor:
    """F = crop(unpatchify(Linear(LN(tokens)))), the network's output (paper section 3.4).

    Patches and groups are ordered as in `patchify`; rows that only fill the last row of groups are
    left out (appendix A).

    Args:
        tokens: (B, G, N, D), floating point; sets the dtype of the weights.
        weights: see `HeadWeights`; P = C * patch^2.
        size: (T, H, W) of the video in frames and pixels. T must be divisible by group[0], W by
            patch * group[2].
        patch: side of a patch in pixels.
        group: patches of one group along (T, H, W).
        eps: of the LayerNorm.
        backend: "cuda", "triton", "eager" or "reference"; None takes the first that can run this
            call.

    Returns:
        (B, C, T, H, W), float32 or, of float64 tokens, float64, contiguous.

    Raises:
        ValueError: shapes, dtypes or devices that disagree, tokens that do not fill the size, an
            unknown backend, or one that cannot run this call.
    """
    return _head(tokens, weights, size, patch, group, eps, backend)


@public(HEAD_MIX)
def head_mix(
    tokens: torch.Tensor,
    video: torch.Tensor,
    other: torch.Tensor | None,
    mix: torch.Tensor,
    weights: HeadWeights,
    *,
    patch: int = 4,
    group: tuple[int, int, int] = (16, 5, 4),
    eps: float = 1e-6,
    backend: str | None = None,
) -> torch.Tensor:
    """mix[:, 0] F + mix[:, 1] video + mix[:, 2] other, with F = `head` of the tokens, not stored.

    That is the denoised D = c_out F + c_skip x_sigma (eq. 2), an Euler step, and, with a second
    video, Heun's correction: each is such a sum.

    Args:
        tokens, weights, patch, group, eps, backend: as in `head`.
        video: (B, C, T, H, W), any floating dtype; its gradient is computed where it is required.
        other: the same, or None.
        mix: (B, 3), any floating dtype; no gradient.

    Returns:
        (B, C, T, H, W), float32 or, of float64 tokens, float64, contiguous.

    Raises:
        ValueError: as `head`, or a mix that requires a gradient.
    """
    return _head_mix(tokens, video, other, mix, weights, patch, group, eps, backend)


@public(HEAD_LOSS)
def head_loss(
    tokens: torch.Tensor,
    video: torch.Tensor,
    sample: torch.Tensor,
    terms: torch.Tensor,
    weights: HeadWeights,
    *,
    seed: int,
    patch: int = 4,
    group: tuple[int, int, int] = (16, 5, 4),
    eps: float = 1e-6,
    backend: str | None = None,
) -> torch.Tensor:
    """Mean of terms[:, 0] (F - terms[:, 1] video - terms[:, 2] eps)^2, F = `head` of the tokens.

    That is the training loss w |F - c_nrm F_tgt|^2 (eq. 3) over real rows, elements and videos, for
    F_tgt is linear in data and noise. Neither F nor the target is stored: eps is made again, as
    `forward_process` made it of the same seed and samples. Where a gradient is wanted, that at F is
    kept, in the tokens' dtype.

    Args:
        tokens, weights, patch, group, eps, backend: as in `head`.
        video: (B, C, T, H, W), any floating dtype: the data; no gradient.
        sample: (B,) int64, as in `forward_process`.
        terms: (B, 3), any floating dtype: w, and what data and noise are multiplied by in
            c_nrm F_tgt; no gradient.
        seed: as in `forward_process`.

    Returns:
        A float32 or, of float64 tokens, float64 scalar. No videos give NaN.

    Raises:
        ValueError: as `head`, a seed out of range, or a video or terms that require a gradient.
    """
    return _head_loss(tokens, video, sample, terms, weights, seed, patch, group, eps, backend)


@public(VIDEO_MIX)
def video_mix(
    F: torch.Tensor,
    video: torch.Tensor,
    other: torch.Tensor | None,
    mix: torch.Tensor,
    *,
    backend: str | None = None,
) -> torch.Tensor:
    """mix[:, 0] F + mix[:, 1] video + mix[:, 2] other: the end of `head_mix`, of an F at hand.

    With both branches' F and x_sigma it is the guided D = c_skip x_sigma + c_out ((1 + w) F(c) -
    w F(null)).

    Args:
        F: (B, C, T, H, W), floating point.
        video: the same shape, any floating dtype.
        other: the same, or None.
        mix: (B, 3), any floating dtype; no gradient.
        backend: "triton", "eager" or "reference"; None takes the first that can run this call.

    Returns:
        (B, C, T, H, W), float32 or, of a float64 F, float64, contiguous.

    Raises:
        ValueError: shapes, dtypes or devices that disagree, a mix that requires a gradient, an
            unknown backend, or one that cannot run this call.
    """
    return _video_mix(F, video, other, mix, backend)


_head = define(HEAD)
_head_mix = define(HEAD_MIX)
_head_loss = define(HEAD_LOSS)
_video_mix = define(VIDEO_MIX)
