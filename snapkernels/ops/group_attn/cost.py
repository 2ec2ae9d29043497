"""The two exact algorithms of grouped cross-attention, by the operations they take.

projected: queries, keys and values of every token, then attention.
absorbed: the projections of the patch side are folded into the latents, which the patches then meet
as they are, in heads * latents rows of their own width. Less work where these rows are few.

Legend: L latent tokens and N patch tokens of one group, D and C the widths of the side that is
updated and of the side that is read, I inner width.
"""

from collections.abc import Mapping
from functools import lru_cache

import torch

from snapkernels.ops.group_attn.weights import CrossAttentionWeights

Sizes = Mapping[str, int]

# Patch tokens of a call below which absorbed kernels wait for each other more than they save: on an
# H100, of the upsampler's widths, read was as fast as eager at 9,216 (0.17 ms), write between 2,304
# and 4,608 (0.09 ms); bench/scaling.py times them.
LEAST_READ_TOKENS = 16384
LEAST_WRITE_TOKENS = 4096


def projected_read_flops(sizes: Sizes) -> int:
    """Operations of one group of `group_read`, by projecting both sides."""
    return _projected(sizes, sizes["L"], sizes["N"])


def projected_write_flops(sizes: Sizes) -> int:
    """Operations of one group of `group_write`, by projecting both sides."""
    return _projected(sizes, sizes["N"], sizes["L"])


def absorbed_read_flops(sizes: Sizes) -> int:
    """Operations of one group of `group_read`, with the patch side's projections absorbed."""
    return _absorbed(sizes, sizes["C"])


def absorbed_write_flops(sizes: Sizes) -> int:
    """Operations of one group of `group_write`, with the patch side's projections absorbed."""
    return _absorbed(sizes, sizes["D"])


def _projected(sizes: Sizes, queries: int, keys: int) -> int:
    """q and o, k and v, scores and weighted values."""
    return 4 * sizes["I"] * (queries * sizes["D"] + keys * sizes["C"] + queries * keys)


def _absorbed(sizes: Sizes, patch_dim: int) -> int:
    """The latents through all four matrices, scores and sums at the patches' width."""
    rows = sizes["num_heads"] * sizes["L"]
    of_latents = 4 * sizes["L"] * sizes["I"] * (sizes["D"] + sizes["C"])
    return of_latents + 4 * rows * sizes["N"] * patch_dim


def absorbs_read(sizes: Sizes) -> bool:
    """Whether absorption is the less work in `group_read`, whatever the number of groups."""
    return absorbed_read_flops(sizes) < projected_read_flops(sizes)


def absorbs_write(sizes: Sizes) -> bool:
    """Likewise in `group_write`."""
    return absorbed_write_flops(sizes) < projected_write_flops(sizes)


def read_keeps(sizes: Sizes) -> bool:
    """Whether a call of `group_read` of these sizes is absorbed, and keeps something."""
    tokens = sizes["B"] * sizes["G"] * sizes["N"]
    return absorbs_read(sizes) and tokens >= LEAST_READ_TOKENS


def write_keeps(sizes: Sizes) -> bool:
    """Likewise of `group_write`."""
    tokens = sizes["B"] * sizes["G"] * sizes["N"]
    return absorbs_write(sizes) and tokens >= LEAST_WRITE_TOKENS


def absorbed_declines_read(
    latents: torch.Tensor,
    patches: torch.Tensor,
    w: CrossAttentionWeights,
    mask: torch.Tensor | None,
    num_heads: int,
    eps: float,
) -> str | None:
    """Why absorption does not pay in a call of `group_read`, or None."""
    (num_latents, latent_dim), (num_patches, patch_dim) = latents.shape[2:], patches.shape[2:]
    inner, tokens = w.q_weight.shape[0], patches.shape[:3].numel()
    return _dearer(
        num_latents, latent_dim, num_patches, patch_dim, inner, num_heads, True
    ) or _too_few(tokens, LEAST_READ_TOKENS)


def absorbed_declines_write(
    patches: torch.Tensor,
    latents: torch.Tensor,
    w: CrossAttentionWeights,
    num_heads: int,
    eps: float,
) -> str | None:
    """Why absorption does not pay in a call of `group_write`, or None."""
    (num_latents, latent_dim), (num_patches, patch_dim) = latents.shape[2:], patches.shape[2:]
    inner, tokens = w.q_weight.shape[0], patches.shape[:3].numel()
    return _dearer(
        num_latents, latent_dim, num_patches, patch_dim, inner, num_heads, False
    ) or _too_few(tokens, LEAST_WRITE_TOKENS)


@lru_cache(256)
def _dearer(
    num_latents: int,
    latent_dim: int,
    num_patches: int,
    patch_dim: int,
    inner: int,
    num_heads: int,
    read: bool,
) -> str | None:
    sizes = {"L": num_latents, "N": num_patches, "I": inner, "num_heads": num_heads}
    if read:
        sizes |= {"D": latent_dim, "C": patch_dim}
        absorbed, projected = absorbed_read_flops(sizes), projected_read_flops(sizes)
    else:
        sizes |= {"D": patch_dim, "C": latent_dim}
        absorbed, projected = absorbed_write_flops(sizes), projected_write_flops(sizes)
    if absorbed < projected:
        return None
    return f"absorbed {absorbed / 1e9:.3g} GFLOP a group, projected {projected / 1e9:.3g}"


def _too_few(tokens: int, least: int) -> str | None:
    return None if tokens >= least else f"{tokens} patch tokens in all, fewer than {least}"
