"""Launch choices of the latent attention's kernels, and what each backend can take.

None of Triton's choices is measured against another: what stands here is what fits. A program of
128 queries has 64 sums of its context a thread, 64 of a tile's and, of 128 keys, 64 scores.
"""

from typing import NamedTuple

import torch

from snapkernels.ops.feed_forward.config import (
    CUDA_COLUMNS,
    CUDA_MOST_COLUMNS,
    CUDA_MOST_WIDTH,
    TRITON_MOST_WIDTH,
    cuda_refuses_linear_fp8,
    triton_refuses_fp8,
)
from snapkernels.ops.latent_attn.weights import Fp8SelfAttentionWeights

TRITON_QUERIES = 128  # of a program
TRITON_KEYS = 128  # of a tile, which has one scale for its keys and one for its values
TRITON_MOST_CHANNELS = 128  # of a head
TRITON_LEAST_QUERIES = 16  # of a product
TRITON_LEAST_DEPTH = 32  # of a product of 8-bit numbers
TRITON_KEYS_WARPS = 8
TRITON_CORE_WARPS = 8
TRITON_CORE_STAGES = 2  # 32 KB each, beside 16 KB of queries: the 99 KB of an sm_89 have no third

CUDA_TILE = 128  # tokens that keys and values have one scale for: a video begins with one
CUDA_ROWS = 256  # of a product's tile: all videos together are so many, or a multiple
CUDA_MOST_SCALES = 2**31 - 1  # of queries, of all heads: an int counts them
# Channels of heads whose core is of integers. With heads of 64, which it has too, SDPA is faster on
# an H200, by 1 to 6 % of the sublayer.
CUDA_INTEGERS = (128,)
CUDA_FULLEST = 2  # and a video fills at least 1 / CUDA_FULLEST of its tiles


class CoreBlocks(NamedTuple):
    """Queries of a program, keys of a tile and channels of a head, padded: powers of two."""

    q: int
    k: int
    e: int


def core_blocks(latents: int, channels: int) -> CoreBlocks:
    """The blocks for `latents` tokens of a video and heads of `channels`."""
    tokens = power_of_two(latents)
    return CoreBlocks(
        max(TRITON_LEAST_QUERIES, min(tokens, TRITON_QUERIES)),
        max(TRITON_LEAST_DEPTH, min(tokens, TRITON_KEYS)),
        max(TRITON_LEAST_DEPTH, power_of_two(channels)),
    )


def power_of_two(least: int) -> int:
    """The smallest power of two from `least` on."""
    return 1 << (least - 1).bit_length()


def cuda_refuses(
    latents: torch.Tensor, w: Fp8SelfAttentionWeights, num_heads: int, eps: float
) -> str | None:
    """Why the CUDA kernels cannot multiply `latents` by the matrices of `w`, or None."""
    inner = w.o_weight.shape[1]
    if inner > CUDA_MOST_WIDTH:
        return f"the inner width is {inner}, more than {CUDA_MOST_WIDTH}"
    norm = w.norm_weight, w.norm_bias
    qkv, o = (w.qkv_weight, w.qkv_scale, w.qkv_bias), (w.o_weight, w.o_scale, w.o_bias)
    return cuda_refuses_linear_fp8(latents, *qkv, *norm, None, eps) or cuda_refuses_linear_fp8(
        latents, *o, *norm, latents, eps
    )


def cuda_has_integers(latents: torch.Tensor, inner: int, num_heads: int) -> bool:
    """Whether the CUDA kernels' core is that of 8-bit integers; else it is SDPA's."""
    padded, tokens = cuda_padded(latents), latents.shape[0] * latents.shape[1]
    fits = inner % CUDA_COLUMNS == 0 and padded <= CUDA_MOST_COLUMNS
    counted = num_heads * padded <= CUDA_MOST_SCALES
    pays = inner // num_heads in CUDA_INTEGERS and tokens * CUDA_FULLEST >= padded
    return fits and counted and pays


def cuda_padded(latents: torch.Tensor) -> int:
    """Rows of (B, L, D) `latents` with every video's to a multiple of `CUDA_TILE`."""
    videos, length, _ = latents.shape
    rows = videos * -(-length // CUDA_TILE) * CUDA_TILE
    return -(-rows // CUDA_ROWS) * CUDA_ROWS


def triton_refuses(
    latents: torch.Tensor, w: Fp8SelfAttentionWeights, num_heads: int, eps: float
) -> str | None:
    """Why the Triton kernels cannot run the sublayer on `latents`, or None."""
    inner = w.o_weight.shape[1]
    if inner > TRITON_MOST_WIDTH:
        return f"the inner width is {inner}, more than {TRITON_MOST_WIDTH}"
    if inner > TRITON_MOST_CHANNELS * num_heads:
        return f"a head has {inner // num_heads} channels, more than {TRITON_MOST_CHANNELS}"
    if inner // num_heads % 2:  # of one and three the compiled core was wrong, of two it is right
        return f"a head has an odd number of channels, {inner // num_heads}"
    return triton_refuses_fp8(latents)
