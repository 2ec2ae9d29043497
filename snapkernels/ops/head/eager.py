"""The head and its ends as a careful user writes them: one PyTorch call a step."""

import torch
from torch.nn.functional import layer_norm, linear

from snapkernels.ops.head.weights import HeadWeights
from snapkernels.patches import PatchLayout, join
from snapkernels.philox import normals


def head(
    tokens: torch.Tensor,
    w: HeadWeights,
    size: tuple[int, int, int],
    patch: int,
    group: tuple[int, int, int],
    eps: float,
) -> torch.Tensor:
    normed = layer_norm(tokens, tokens.shape[-1:], w.norm_weight, w.norm_bias, eps)
    features = linear(normed, w.weight, w.bias)
    video = join(features, PatchLayout.padded(size, patch, group))[..., : size[1], :]
    return video.to(torch.promote_types(video.dtype, torch.float32), copy=True)


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
    of_F, of_video, of_other = mix.to(F.dtype).view(-1, 3, 1, 1, 1, 1).unbind(1)
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
    weight, signal, noise = terms.to(F.dtype).view(-1, 3, 1, 1, 1, 1).unbind(1)
    drawn = normals(seed, sample, tuple(video.shape[1:])).to(F.dtype)
    return (weight * (F - (signal * video.to(F.dtype) + noise * drawn)) ** 2).mean()
