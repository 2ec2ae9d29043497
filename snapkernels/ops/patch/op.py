"""patchify and unpatchify: a video as grouped patch tokens, and back.

Legend: B batch, C channels, T frames, H x W pixels, G groups, N patch tokens of one group,
P features of one patch (C * patch * patch).
"""

import torch

from snapkernels.dispatch import choose
from snapkernels.ops.patch import eager, reference
from snapkernels.ops.patch.layout import PatchLayout
from snapkernels.validate import Arguments

PATCHIFY = {"reference": reference.patchify, "eager": eager.patchify}
UNPATCHIFY = {"reference": reference.unpatchify, "eager": eager.unpatchify}


def patchify(
    video: torch.Tensor,
    *,
    patch: int = 4,
    group: tuple[int, int, int] = (16, 5, 4),
    backend: str | None = None,
) -> torch.Tensor:
    """Cut a video into 1 x patch x patch patches, in grouped order (paper section 3.4, table 8).

    Groups are counted frame-major, then row, then column; so are the patches inside a group. The
    features of a patch are ordered (channel, row, column), as in a Conv2d weight.

    Args:
        video: (B, C, T, H, W), any floating dtype, any strides. T must be divisible by group[0],
            H by patch * group[1], W by patch * group[2].
        patch: side of a patch in pixels.
        group: patches of one group along (T, H, W).
        backend: "eager" (default) or "reference".

    Returns:
        (B, G, N, C * patch * patch) tokens of the video's dtype, contiguous.

    Raises:
        ValueError: wrong rank, dtype, patch, group, indivisible size, or unknown backend.
    """
    implementation = choose("patchify", PATCHIFY, backend)
    args = Arguments("patchify")
    args.bind("video", video, ("B", "C", "T", "H", "W"))
    size = (args.sizes["T"], args.sizes["H"], args.sizes["W"])
    return implementation(video, PatchLayout.checked(args, size, patch, group))


def unpatchify(
    tokens: torch.Tensor,
    *,
    size: tuple[int, int, int],
    patch: int = 4,
    group: tuple[int, int, int] = (16, 5, 4),
    backend: str | None = None,
) -> torch.Tensor:
    """Put grouped patch tokens back in their places: the inverse of `patchify`.

    Args:
        tokens: (B, G, N, C * patch * patch), any floating dtype, any strides.
        size: (T, H, W) of the video in frames and pixels.
        patch, group, backend: as in `patchify`.

    Returns:
        (B, C, T, H, W) video of the tokens' dtype, contiguous.

    Raises:
        ValueError: wrong rank or dtype, indivisible size, or tokens that do not fill the size.
    """
    implementation = choose("unpatchify", UNPATCHIFY, backend)
    args = Arguments("unpatchify")
    args.bind("tokens", tokens, ("B", "G", "N", "P"))
    layout = PatchLayout.checked(args, size, patch, group)
    args.divides("patch * patch", patch * patch, "tokens' last dimension P", args.sizes["P"])
    if (args.sizes["G"], args.sizes["N"]) != (layout.num_groups, layout.group_tokens):
        args.fail(
            f"tokens of shape {tuple(tokens.shape)} do not fill size={tuple(size)}: "
            f"G = {layout.num_groups} groups of N = {layout.group_tokens} patches are needed"
        )
    return implementation(tokens, layout)
