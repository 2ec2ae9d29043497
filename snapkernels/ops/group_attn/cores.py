"""Which of PyTorch's attention cores runs between the projections, where one is known to be best.

ms forward / backward on an H100 (bf16, torch 2.11, cuDNN 9.19), heads of 64, by batch, heads,
queries x keys:

    32, 16, 24 x 4608    flash .267 / 1.245   cuDNN .214 /  .645   efficient .320 / 10.9
    32, 16, 4608 x 24    flash .438 / 2.464   cuDNN .299 / 1.525   efficient .402 / 1.261
    128, 16, 96 x 320    flash .122 /  .589   cuDNN .088 /  .391   efficient .189 /  .727
    128, 16, 320 x 96    flash .178 /  .837   cuDNN .106 /  .506   efficient .198 /  .540

PyTorch's own choice is flash. Asking for another through `sdpa_kernel` takes the host 18 us a call,
PyTorch's function of that core none.
"""

from functools import cache
from typing import Literal

import torch

from snapkernels.ops.group_attn.weights import CrossAttentionWeights

Core = Literal["cudnn", "efficient"]
CUDNN_DTYPES = (torch.bfloat16, torch.float16)
CUDNN_MOST_HEAD_DIM = 128
# With so few keys the efficient core's backward gains more than its forward loses.
FEW_KEYS = 32


def core(
    like: torch.Tensor, queries: int, keys: int, head_dim: int, *, masked: bool, tracked: bool
) -> Core | None:
    """The best core of a call of `like`'s dtype and device, or None for PyTorch's own choice.

    `queries` and `keys` are those of one group; a call that is `tracked` is to be differentiated.
    """
    if masked or not like.is_cuda or like.dtype not in CUDNN_DTYPES or not like.numel():
        return None
    # cuDNN has no attention over a single token.
    if head_dim % 8 or head_dim > CUDNN_MOST_HEAD_DIM or min(queries, keys) < 2:
        return None
    if _deterministic() or not _measured(like.device):
        return None
    if tracked and keys <= FEW_KEYS and torch.backends.cuda.mem_efficient_sdp_enabled():
        return "efficient"
    return "cudnn" if torch.backends.cuda.cudnn_sdp_enabled() else None


def projected_declines_read(
    latents: torch.Tensor,
    patches: torch.Tensor,
    w: CrossAttentionWeights,
    mask: torch.Tensor | None,
    num_heads: int,
    eps: float,
) -> str | None:
    """Why plain calls of PyTorch do as well in a call of `group_read`, or None."""
    sizes = latents.shape[2], patches.shape[2], len(w.q_bias) // num_heads
    if core(latents, *sizes, masked=mask is not None, tracked=False) is None:
        return "no attention core is known to be better here than PyTorch's own choice"
    return None


def projected_declines_write(
    patches: torch.Tensor,
    latents: torch.Tensor,
    w: CrossAttentionWeights,
    num_heads: int,
    eps: float,
) -> str | None:
    """Why plain calls of PyTorch do as well in a call of `group_write`, or None."""
    return projected_declines_read(patches, latents, w, None, num_heads, eps)


def _deterministic() -> bool:
    """Whether PyTorch is to refuse these cores, whose backward sums in any order."""
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    return torch.are_deterministic_algorithms_enabled() and not warns


@cache
def _measured(device: torch.device) -> bool:
    """Whether `device` is of the kind that the table above was measured on."""
    return (
        torch.cuda.get_device_capability(device) == (9, 0) and torch.backends.cudnn.is_available()
    )
