"""patchify as a careful user writes it: one view, one permuted copy."""

import torch

from snapkernels.ops.patch.layout import PatchLayout

# (B, C, groups T, group T, groups H, group H, patch, groups W, group W, patch)
# -> (B, groups T, H, W, group T, H, W, C, patch, patch), and back.
TO_TOKENS = (0, 2, 4, 7, 3, 5, 8, 1, 6, 9)
TO_VIDEO = (0, 7, 1, 4, 2, 5, 8, 3, 6, 9)


def patchify(video: torch.Tensor, patch: int, group: tuple[int, int, int]) -> torch.Tensor:
    batch, channels, t, h, w = video.shape
    layout = PatchLayout((t, h, w), patch, group)
    (groups_t, groups_h, groups_w), (gt, gh, gw) = layout.groups, group
    pieces = (
        video.unflatten(4, (groups_w, gw, patch))
        .unflatten(3, (groups_h, gh, patch))
        .unflatten(2, (groups_t, gt))
    )
    return (
        pieces.permute(TO_TOKENS)
        .reshape(batch, layout.num_groups, layout.group_tokens, channels * patch**2)
        .contiguous()
    )


def unpatchify(
    tokens: torch.Tensor, size: tuple[int, int, int], patch: int, group: tuple[int, int, int]
) -> torch.Tensor:
    layout = PatchLayout(size, patch, group)
    batch, channels = len(tokens), tokens.shape[-1] // patch**2
    pieces = (
        tokens.unflatten(3, (channels, patch, patch))
        .unflatten(2, group)
        .unflatten(1, layout.groups)
    )
    return pieces.permute(TO_VIDEO).reshape(batch, channels, *size)
