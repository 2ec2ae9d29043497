"""patchify as a careful user writes it: one view, one permuted copy."""

import torch

from snapkernels.ops.patch.layout import PatchLayout

# (B, C, groups T, group T, groups H, group H, patch, groups W, group W, patch)
# -> (B, groups T, H, W, group T, H, W, C, patch, patch), and back.
TO_TOKENS = (0, 2, 4, 7, 3, 5, 8, 1, 6, 9)
TO_VIDEO = (0, 7, 1, 4, 2, 5, 8, 3, 6, 9)


def patchify(video: torch.Tensor, layout: PatchLayout) -> torch.Tensor:
    (groups_t, groups_h, groups_w), (gt, gh, gw), p = layout.groups, layout.group, layout.patch
    pieces = (
        video.unflatten(4, (groups_w, gw, p))
        .unflatten(3, (groups_h, gh, p))
        .unflatten(2, (groups_t, gt))
    )
    batch, channels = video.shape[:2]
    return (
        pieces.permute(TO_TOKENS)
        .reshape(batch, layout.num_groups, layout.group_tokens, channels * p * p)
        .contiguous()
    )


def unpatchify(tokens: torch.Tensor, layout: PatchLayout) -> torch.Tensor:
    batch, channels = len(tokens), tokens.shape[-1] // layout.patch**2
    pieces = (
        tokens.unflatten(3, (channels, layout.patch, layout.patch))
        .unflatten(2, layout.group)
        .unflatten(1, layout.groups)
    )
    return pieces.permute(TO_VIDEO).reshape(batch, channels, *layout.size)
