"""The head and its ends, the equations. float64 inputs give the float64 answer.

F[b, c, t, y, x] = (W LN(tokens[b, g, n]) + bias)[c, i, j], where pixel (y, x) is (i, j) of patch n.
"""

import torch

from snapkernels.ops.head.weights import HeadWeights
from snapkernels.patches import PatchLayout, digits, places
from snapkernels.philox import normals


def head(
    tokens: torch.Tensor,
    w: HeadWeights,
    size: tuple[int, int, int],
    patch: int,
    group: tuple[int, int, int],
    eps: float,
) -> torch.Tensor:
    centred = tokens - tokens.mean(-1, keepdim=True)
    normed = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    features = (normed * w.norm_weight + w.norm_bias) @ w.weight.T + w.bias

    layout = PatchLayout.padded(size, patch, group)
    channels, (frames, height, width) = features.shape[-1] // patch**2, layout.size
    t_GN, row_GN, column_GN = places(layout, tokens.device)
    c, i, j = digits(features.shape[-1], patch, patch, device=tokens.device)
    y_GNP = row_GN[:, :, None] * patch + i
    x_GNP = column_GN[:, :, None] * patch + j
    index = ((c * frames + t_GN[:, :, None]) * height + y_GNP) * width + x_GNP
    pixels = features.new_zeros(len(tokens), channels * frames * height * width)
    video = pixels.index_copy(1, index.flatten(), features.flatten(1))
    video = video.view(len(tokens), channels, *layout.size)[..., : size[1], :]
    return video.to(torch.promote_types(video.dtype, torch.float32))


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
    F = head(tokens, w, (video.shape[2], video.shape[3], video.shape[4]), patch, group, eps)
    return video_mix(F, video, other, mix)


def video_mix(
    F: torch.Tensor, video: torch.Tensor, other: torch.Tensor | None, mix: torch.Tensor
) -> torch.Tensor:
    F = F.to(torch.promote_types(F.dtype, torch.float32)).contiguous()
    of_F, of_video, of_other = mix[:, :, None, None, None, None].to(F.dtype).unbind(1)
    mixed = of_F * F + of_video * video.to(F.dtype)
    return mixed if other is None else mixed + of_other * other.to(F.dtype)


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
    F = head(tokens, w, (video.shape[2], video.shape[3], video.shape[4]), patch, group, eps)
    weight, signal, noise = terms[:, :, None, None, None, None].to(F.dtype).unbind(1)
    drawn = normals(seed, sample, tuple(video.shape[1:])).to(F.dtype)
    return (weight * (F - (signal * video.to(F.dtype) + noise * drawn)).square()).mean()
