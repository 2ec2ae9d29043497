"""Where cuDNN's attention core runs between the projections, and not PyTorch's own choice.

ms forward on an H100 (bf16, torch 2.11, cuDNN 9.19), heads of 64, by batch, heads, queries x keys:

    32, 16, 24 x 4608    flash .267   cuDNN .214   efficient .320
    32, 16, 4608 x 24    flash .438   cuDNN .299   efficient .402
    128, 16, 96 x 320    flash .122   cuDNN .088   efficient .189
    128, 16, 320 x 96    flash .178   cuDNN .106   efficient .198

Asking for it through `sdpa_kernel` takes the host 18 us a call, PyTorch's function of it none.
A call that is to be differentiated has PyTorch's choice: the gradients of cuDNN's core, and of the
efficient one, were 2 to 5 % less exact than flash's.
"""

from functools import cache

import torch

from snapkernels.ops.group_attn.weights import CrossAttentionWeights

CUDNN_DTYPES = (torch.bfloat16, torch.float16)
CUDNN_MOST_HEAD_DIM = 128


def cudnn_is_best(
    like: torch.Tensor, queries: int, keys: int, head_dim: int, *, masked: bool, tracked: bool
) -> bool:
    """Whether cuDNN's core is to run a call of `like`'s dtype and device.

    `queries` and `keys` are those of one group; a call that is `tracked` is to be differentiated.
    """
    if masked or tracked or not like.is_cuda or like.dtype not in CUDNN_DTYPES:
        return False
    # cuDNN has no attention over a single token, or over nothing.
    if head_dim % 8 or head_dim > CUDNN_MOST_HEAD_DIM or min(queries, keys) < 2 or not like.numel():
        return False
    return (
        not _deterministic() and _measured(like.device) and torch.backends.cuda.cudnn_sdp_enabled()
    )


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
    if not cudnn_is_best(latents, *sizes, masked=mask is not None, tracked=False):
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
