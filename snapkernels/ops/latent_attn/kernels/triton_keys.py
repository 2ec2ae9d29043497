"""Keys and values as 8-bit integers, a tile at a time, as the core's products take them.

Legend: B videos, L latents, I = H E inner width, of H heads of E channels; T tiles of K latents.
E and K are padded with zeros.
"""

# The arguments of a Triton function have no Python types.
# mypy: allow-untyped-defs

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from snapkernels.ops.latent_attn import config
from snapkernels.ops.latent_attn.kernels.triton_int8 import int8_scale, magnitude_bits, to_int8


class Keys(NamedTuple):
    """What the core reads of keys and values.

    Attributes:
        k: (B H, T, K, E) int8.
        v: (B H, T, E, K) int8: 8-bit tensor cores sum over what lies side by side in memory.
        scales: (B H, T, 2) float32, of a tile's keys and of its values.
        sums: (B H, T, E) int32, of a tile's values over its latents.
    """

    k: torch.Tensor
    v: torch.Tensor
    scales: torch.Tensor
    sums: torch.Tensor


@triton.jit
def keys_kernel(
    p_qkv,
    p_k,
    p_v,
    p_scales,
    p_sums,
    latents,
    HEADS: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """A program has a tile of one head, keys and then values."""
    at = tl.program_id(0).to(tl.int64)  # of a tile among those of all heads of all videos
    tiles = tl.cdiv(latents, BLOCK_K)
    head, tile = at // tiles, at % tiles
    k_K, e_E = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_E)
    l_K = tile * BLOCK_K + k_K
    INNER: tl.constexpr = HEADS * CHANNELS
    p_KE = p_qkv + ((head // HEADS * latents + l_K) * (3 * INNER))[:, None]
    p_KE += (head % HEADS * CHANNELS + e_E)[None, :]
    m_KE = (l_K < latents)[:, None] & (e_E < CHANNELS)[None, :]
    k_KE, k_scale = quantised(tl.load(p_KE + INNER, mask=m_KE, other=0.0))
    v_KE, v_scale = quantised(tl.load(p_KE + 2 * INNER, mask=m_KE, other=0.0))
    first = at * (BLOCK_K * BLOCK_E)
    tl.store(p_k + first + k_K[:, None] * BLOCK_E + e_E[None, :], k_KE)
    tl.store(p_v + first + e_E[:, None] * BLOCK_K + k_K[None, :], tl.trans(v_KE))
    tl.store(p_scales + at * 2, k_scale)
    tl.store(p_scales + at * 2 + 1, v_scale)
    tl.store(p_sums + at * BLOCK_E + e_E, tl.sum(v_KE.to(tl.int32), axis=0))


@triton.jit
def quantised(x_KE):
    """The tile as 8-bit integers, and its scale."""
    x_KE = x_KE.to(tl.float32)
    scale = int8_scale(tl.max(tl.max(magnitude_bits(x_KE), axis=1), axis=0))
    return to_int8(x_KE, scale), scale


def quantised_keys(qkv_BLJ: torch.Tensor, num_heads: int, blocks: config.CoreBlocks) -> Keys:
    """Keys and values of `qkv_BLJ`, (B, L, 3 I) and contiguous, q, k and v after each other."""
    batch, latents, width = qkv_BLJ.shape
    heads, tiles = batch * num_heads, triton.cdiv(latents, blocks.k)
    k = qkv_BLJ.new_empty((heads, tiles, blocks.k, blocks.e), dtype=torch.int8)
    v = qkv_BLJ.new_empty((heads, tiles, blocks.e, blocks.k), dtype=torch.int8)
    scales = qkv_BLJ.new_empty((heads, tiles, 2), dtype=torch.float32)
    sums = qkv_BLJ.new_empty((heads, tiles, blocks.e), dtype=torch.int32)
    with torch.cuda.device_of(qkv_BLJ):  # Triton launches on the current device
        keys_kernel[(heads * tiles,)](
            qkv_BLJ,
            k,
            v,
            scales,
            sums,
            latents,
            num_heads,
            width // (3 * num_heads),
            blocks.k,
            blocks.e,
            num_warps=config.TRITON_KEYS_WARPS,
        )
    return Keys(k, v, scales, sums)
