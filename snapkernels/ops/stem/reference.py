"""The stem, the equation, token by token. float64 inputs give the float64 answer.

With pixel (y, x) of frame t in patch n of group g, and zeros below the last row,
tokens[b, g, n] = LN(W [scale_b video, upsampled low_res] + bias) + positions[g % S, n].
"""

import torch

from snapkernels.ops.stem.weights import StemWeights
from snapkernels.patches import PatchLayout, places


def stem(
    video: torch.Tensor,
    scale: torch.Tensor,
    low_res: torch.Tensor | None,
    w: StemWeights,
    patch: int,
    group: tuple[int, int, int],
    eps: float,
) -> torch.Tensor:
    t, h, w_pixels = video.shape[2:]
    layout = PatchLayout.padded((t, h, w_pixels), patch, group)
    t_GN, row_GN, column_GN = places(layout, video.device)
    inside = torch.arange(patch, device=video.device)
    t_GNIJ = t_GN[:, :, None, None]
    y_GNIJ = (row_GN[:, :, None] * patch + inside)[..., None]
    x_GNIJ = (column_GN[:, :, None] * patch + inside)[:, :, None, :]
    real = y_GNIJ < h
    y_GNIJ = y_GNIJ.clamp(max=h - 1)

    pixels = video[:, :, t_GNIJ, y_GNIJ, x_GNIJ] * scale[:, None, None, None, None, None]
    if low_res is not None:
        read = _bilinear(low_res, t_GNIJ, y_GNIJ, x_GNIJ, (h, w_pixels))
        pixels = torch.cat([pixels, read.to(pixels.dtype)], dim=1)
    features = torch.where(real, pixels, 0).to(w.weight.dtype)  # (B, C, G, N, I, J)
    y = features.movedim(1, 3).flatten(3) @ w.weight.T + w.bias
    centred = y - y.mean(-1, keepdim=True)
    normed = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    tables = w.positions.repeat(layout.num_groups // len(w.positions), 1, 1)
    return normed * w.norm_weight + w.norm_bias + tables


def _bilinear(
    low_res: torch.Tensor, t: torch.Tensor, y: torch.Tensor, x: torch.Tensor, size: tuple[int, int]
) -> torch.Tensor:
    """`low_res` (B, C, T, h, w) at pixels (t, y, x) of a video of `size`: half-pixel centres."""

    def corners(at: torch.Tensor, length: int, full: int) -> tuple[torch.Tensor, ...]:
        source = ((at.double() + 0.5) * length / full - 0.5).clamp(min=0)
        first = source.long()
        return first, (first + 1).clamp(max=length - 1), (source - first).to(low_res.dtype)

    y0, y1, down = corners(y, low_res.shape[3], size[0])
    x0, x1, right = corners(x, low_res.shape[4], size[1])
    above = low_res[:, :, t, y0, x0] * (1 - right) + low_res[:, :, t, y0, x1] * right
    below = low_res[:, :, t, y1, x0] * (1 - right) + low_res[:, :, t, y1, x1] * right
    return above * (1 - down) + below * down
