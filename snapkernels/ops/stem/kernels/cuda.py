"""stem in CUDA C++: csrc/stem/stem_forward.cuh, stem_backward.cuh."""

import torch

from snapkernels.ops.stem import config
from snapkernels.ops.stem.kernels.triton_bwd import stem_backward as triton_backward
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


def stem_backward(
    needs: tuple[bool, ...],
    grad: torch.Tensor,
    rstd: torch.Tensor,
    video: torch.Tensor,
    scale: torch.Tensor,
    low_res: torch.Tensor | None,
    w: StemWeights,
    patch: int,
    group: tuple[int, int, int],
    eps: float,
) -> tuple[torch.Tensor | None, ...]:
    """The gradients of (video, *w) that `needs` asks for, the others None.

    Triton has that of the video, and what `config.cuda_backward_refuses`.
    """
    call = (video, scale, low_res, w, patch, group, eps)
    if needs[0] or not grad.numel() or config.cuda_backward_refuses(*call):
        return triton_backward(needs, grad, rstd, *call)
    grad = grad.contiguous()
    if grad.data_ptr() % config.VECTOR:
        grad = grad.clone()
    (dim, columns), patches = w.weight.shape, w.positions.shape[1]
    columns += config.CUDA_BACKWARD_EXTRA
    processors = torch.cuda.get_device_properties(grad.device).multi_processor_count
    slices = dim // config.CUDA_BACKWARD_COLUMNS
    ranges = min(patches, max(1, processors // slices))
    longest = -(-patches // ranges) * (rstd.numel() // patches)
    tiles = -(-longest // config.CUDA_BACKWARD_TOKENS)
    features = w.weight.new_empty((ranges, tiles, columns, config.CUDA_BACKWARD_TOKENS))
    scratch = (
        (ranges, dim, columns),
        (ranges, tiles, dim // config.CUDA_BACKWARD_PART, config.CUDA_BACKWARD_TOKENS, 2),
        (ranges * slices, columns, columns),
        (columns,),
        (columns, columns),
    )
    found = [torch.empty_like(one) for one in w]
    torch.ops.snapkernels_cuda.stem_backward(
        grad,
        rstd.contiguous(),
        video,
        scale,
        low_res,
        *w[:3],
        *found,
        features,
        *(rstd.new_empty(shape) for shape in scratch),
        group,
    )
    return None, *(one if need else None for one, need in zip(found, needs[1:], strict=True))
