"""forward_process: a video at noise level sigma, the noise counted and not stored.

Legend: B videos, C channels, T frames, H x W pixels.
"""

from typing import Any

import torch

from snapkernels.library import define
from snapkernels.ops.noise.spec import FORWARD_PROCESS
from snapkernels.registry import public


@public(FORWARD_PROCESS)
def forward_process(
    video: torch.Tensor,
    sigma: torch.Tensor,
    sample: torch.Tensor,
    *,
    sigma_in: float,
    seed: int,
    backend: str | None = None,
) -> torch.Tensor:
    """x_sigma = video / sigma_in + sigma eps (paper section 3.2).

    eps is standard normal and a function of `seed`, a video's `sample` and an element's place in
    the video alone: equal whatever the batch, the GPU or the backend (words of Philox4x32-10 bit
    for bit, normals within 2 units in the last place). `head_loss` makes the same again.

    Args:
        video: (B, C, T, H, W), any floating dtype, any strides.
        sigma: (B,) noise levels above 0, any floating dtype; no gradient.
        sample: (B,) int64, not negative: the number of each video, never used twice with one seed.
        sigma_in: the video is divided by it, above 0.
        seed: from 0 to 2^63 - 1.
        backend: "cuda", "triton", "eager" or "reference"; None takes the first that can run this
            call.

    Returns:
        (B, C, T, H, W), float32 or, of a float64 video, float64, contiguous. A sigma on a GPU that
        is not above 0 gives NaN: to look at it would wait for the device.

    Raises:
        ValueError: shapes, dtypes or devices that disagree, a sigma on the CPU that is not above
            0, options out of range, an unknown backend, or one that cannot run this call.
    """
    return _forward_process(video, sigma, sample, sigma_in, seed, backend)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    video, _, _, ctx.sigma_in, *_ = inputs
    ctx.dtype = video.dtype


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    return (grad / ctx.sigma_in).to(ctx.dtype), None, None, None, None, None


_forward_process = define(FORWARD_PROCESS, _keep, _backward)
