"""patchify on a CPU: a row of a patch moves as one wide element through torch's own copy.

Four bf16 pixels are one int64, four fp32 pixels one complex128; on two cores that is 1.4 to 8 times
faster than moving them one by one.
"""

import torch

from snapkernels.patches import PatchLayout

WIDE = {2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}


def patchify(video: torch.Tensor, patch: int, group: tuple[int, int, int]) -> torch.Tensor:
    batch, channels, t, h, w = video.shape
    layout = PatchLayout((t, h, w), patch, group)
    tokens = video.new_empty(batch, layout.num_groups, layout.group_tokens, channels * patch**2)
    if not video.numel():
        return tokens
    (groups_t, groups_h, groups_w), (gt, gh, gw) = layout.groups, group
    rows = (
        video.view(WIDE[patch * video.element_size()])
        .unflatten(4, (groups_w, gw))
        .unflatten(3, (groups_h, gh, patch))
        .unflatten(2, (groups_t, gt))
    )
    # (B, C, groups T, group T, groups H, group H, patch, groups W, group W)
    rows = rows.permute(0, 2, 4, 7, 3, 5, 8, 1, 6)
    tokens.view(rows.dtype).view(rows.shape).copy_(rows)
    return tokens


def unpatchify(
    tokens: torch.Tensor, size: tuple[int, int, int], patch: int, group: tuple[int, int, int]
) -> torch.Tensor:
    layout = PatchLayout(size, patch, group)
    batch, channels = len(tokens), tokens.shape[-1] // patch**2
    video = tokens.new_empty(batch, channels, *size)
    if not tokens.numel():
        return video
    rows = (
        tokens.view(WIDE[patch * tokens.element_size()])
        .unflatten(3, (channels, patch))
        .unflatten(2, group)
        .unflatten(1, layout.groups)
    )
    # (B, groups T, groups H, groups W, group T, group H, group W, C, patch)
    rows = rows.permute(0, 7, 1, 4, 2, 5, 8, 3, 6)
    video.view(rows.dtype).view(rows.shape).copy_(rows)
    return video
