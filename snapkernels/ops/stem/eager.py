"""The stem as a careful user writes it: one PyTorch call a step."""

import torch
from torch.nn.functional import interpolate, layer_norm, linear, pad

from snapkernels.ops.stem.weights import StemWeights
from snapkernels.patches import PatchLayout, cut


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
    x = video * scale.view(-1, 1, 1, 1, 1)
    if low_res is not None:
        frames = low_res.to(x.dtype).transpose(1, 2)
        upsampled = interpolate(
            frames.flatten(0, 1), size=(h, w_pixels), mode="bilinear", align_corners=False
        )
        x = torch.cat([x, upsampled.unflatten(0, frames.shape[:2]).transpose(1, 2)], dim=1)
    layout = PatchLayout.padded((t, h, w_pixels), patch, group)
    x = pad(x.to(w.weight.dtype), (0, 0, 0, layout.size[1] - h))
    y = linear(cut(x, layout), w.weight, w.bias)
    normed = layer_norm(y, y.shape[-1:], w.norm_weight, w.norm_bias, eps)
    tables = len(w.positions)
    by_table = normed.unflatten(1, (layout.num_groups // tables, tables)) + w.positions
    return by_table.flatten(1, 2)
