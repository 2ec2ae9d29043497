"""The core of latent attention in 8-bit integers: softmax(q k^T / sqrt(E)) v, tile by tile of keys.

Both products are of int8, summed exactly in int32 within a tile. What tiles add up to is float32.

Legend: B videos, L latents, I = H E inner width, of H heads of E channels; of a program Q queries,
of a tile K keys.
"""

# The arguments of a Triton function have no Python types.
# mypy: allow-untyped-defs

import torch
import triton
import triton.language as tl

from snapkernels.ops.latent_attn import config
from snapkernels.ops.latent_attn.kernels.triton_int8 import (
    TO_INTEGER,
    int8_scale,
    magnitude_bits,
    to_int8,
)
from snapkernels.ops.latent_attn.kernels.triton_keys import Keys

LOG2_E = 1.4426950408889634
# P is from 0 to 255 and the products are of signed integers: P - 128 is multiplied, and 128 times
# the values' sum is added. So P keeps the bit that its sign would take.
P_MOST, P_SHIFT = tl.constexpr(255.0), tl.constexpr(128)


@triton.jit
def core_kernel(
    p_qkv,
    p_k,
    p_v,
    p_scales,
    p_sums,
    p_context,
    latents,
    temperature,
    HEADS: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """A program has some queries of one head and passes over all of its keys."""
    at = tl.program_id(0).to(tl.int64)
    blocks, tiles = tl.cdiv(latents, BLOCK_Q), tl.cdiv(latents, BLOCK_K)
    head = at // blocks
    l_Q = at % blocks * BLOCK_Q + tl.arange(0, BLOCK_Q)
    k_K, e_E = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_E)
    row_Q = head // HEADS * latents + l_Q
    INNER: tl.constexpr = HEADS * CHANNELS
    m_QE = (l_Q < latents)[:, None] & (e_E < CHANNELS)[None, :]
    column_E = head % HEADS * CHANNELS + e_E
    p_QE = p_qkv + (row_Q * (3 * INNER))[:, None] + column_E[None, :]
    q_QE = tl.load(p_QE, mask=m_QE, other=0.0).to(tl.float32)
    q_scale_Q = int8_scale(tl.max(magnitude_bits(q_QE), axis=1))
    q_QE = to_int8(q_QE, q_scale_Q[:, None])
    q_scale_Q *= temperature

    p_KE = p_k + head * tiles * (BLOCK_K * BLOCK_E) + k_K[:, None] * BLOCK_E + e_E[None, :]
    p_EK = p_v + head * tiles * (BLOCK_K * BLOCK_E) + e_E[:, None] * BLOCK_K + k_K[None, :]
    p_scale = p_scales + head * tiles * 2
    p_sum_E = p_sums + head * tiles * BLOCK_E + e_E
    most_Q = tl.full((BLOCK_Q,), float("-inf"), tl.float32)
    total_Q = tl.zeros((BLOCK_Q,), tl.float32)
    context_QE = tl.zeros((BLOCK_Q, BLOCK_E), tl.float32)
    for first in range(0, latents, BLOCK_K):
        scale_Q = q_scale_Q * tl.load(p_scale)
        scores_QK = tl.dot(q_QE, tl.trans(tl.load(p_KE))).to(tl.float32) * scale_Q[:, None]
        scores_QK = tl.where((k_K < latents - first)[None, :], scores_QK, float("-inf"))
        # By the tile's own largest: a key of another tile that outweighs it costs it no bits.
        highest_Q = tl.max(scores_QK, axis=1)
        # A score that is NaN is NaN in the total, if nowhere else.
        shifted_QK = tl.exp2(scores_QK - highest_Q[:, None]) * P_MOST + TO_INTEGER
        P_QK = (shifted_QK.to(tl.int32, bitcast=True) - P_SHIFT).to(tl.int8)
        of_tile_QE = tl.dot(P_QK, tl.trans(tl.load(p_EK)))
        of_tile_QE += P_SHIFT * tl.load(p_sum_E)[None, :]
        before_Q, most_Q = most_Q, tl.maximum(most_Q, highest_Q)
        kept_Q, share_Q = tl.exp2(before_Q - most_Q), tl.exp2(highest_Q - most_Q)
        total_Q = total_Q * kept_Q + tl.sum(shifted_QK - TO_INTEGER, axis=1) * share_Q
        share_Q *= tl.load(p_scale + 1)
        context_QE = context_QE * kept_Q[:, None] + of_tile_QE.to(tl.float32) * share_Q[:, None]
        p_KE += BLOCK_K * BLOCK_E
        p_EK += BLOCK_K * BLOCK_E
        p_scale += 2
        p_sum_E += BLOCK_E
    context_QE = context_QE / total_Q[:, None]
    p_QE = p_context + (row_Q * INNER)[:, None] + column_E[None, :]
    tl.store(p_QE, context_QE.to(p_context.dtype.element_ty), mask=m_QE)


def attended(
    qkv_BLJ: torch.Tensor, keys: Keys, num_heads: int, blocks: config.CoreBlocks
) -> torch.Tensor:
    """The context (B, L, I), in the dtype of `qkv_BLJ`, whose queries read `keys`."""
    batch, latents, width = qkv_BLJ.shape
    channels = width // (3 * num_heads)
    context_BLI = qkv_BLJ.new_empty(batch, latents, width // 3)
    with torch.cuda.device_of(qkv_BLJ):  # Triton launches on the current device
        core_kernel[(batch * num_heads * triton.cdiv(latents, blocks.q),)](
            qkv_BLJ,
            *keys,
            context_BLI,
            latents,
            LOG2_E * channels**-0.5,
            num_heads,
            channels,
            *blocks,
            num_warps=config.TRITON_CORE_WARPS,
            num_stages=config.TRITON_CORE_STAGES,
        )
    return context_BLI
