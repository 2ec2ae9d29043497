"""stem in CUDA C++: csrc/stem/stem_forward.cuh."""

import torch

from snapkernels.ops.stem.weights import StemWeights
from snapkernels.patches import PatchLayout


def stem(
    video: torch.Tensor,
    scale: torch.Tensor,
    low_res: torch.Tensor | None,
    w: StemWeights,
    patch: int,
    group: tuple[int, int, int],
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens, and the rstd of each: (B, G, N), float32."""
    t, h, w_pixels = video.shape[2:]
    layout = PatchLayout.padded((t, h, w_pixels), patch, group)
    shape = (len(video), layout.num_groups, layout.group_tokens)
    tokens = w.weight.new_empty((*shape, len(w.weight)))
    rstd = w.weight.new_empty(shape, dtype=torch.float32)
    torch.ops.snapkernels_cuda.stem(video, scale, low_res, *w, tokens, rstd, group, eps)
    return tokens, rstd
