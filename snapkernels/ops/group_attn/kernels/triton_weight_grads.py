"""Gradients of an absorbed matrix and of LayerNorm's gain and shift before it, in Triton.

Absorbed, the matrix is scaled = weight gain scale, and its bias has shifted = weight shift added.
One pass over the weight makes its gradient, the gain's and the shift's from those of scaled and
shifted, and these two again.

Legend: as in triton_latents.py; K parts of a sum.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from snapkernels.ops.group_attn import config


class AbsorbedGrads(NamedTuple):
    """The gradients, and scaled and shifted themselves.

    Attributes:
        weight: (I, C) in the weight's dtype, its gradient.
        gain: (C,) float32, its gradient.
        shift: (C,) float32, its gradient.
        scaled: (I, C) in the weight's dtype, itself; empty where not wanted.
        shifted: (K, I) float32, itself where summed over K; empty where not wanted.
    """

    weight: torch.Tensor
    gain: torch.Tensor
    shift: torch.Tensor
    scaled: torch.Tensor
    shifted: torch.Tensor


@triton.jit
def absorbed_grads_kernel(
    p_weight,
    p_gain,
    p_shift,
    p_d_scaled,
    p_d_shifted,
    p_d_weight,
    p_sums,
    p_scaled,
    p_shifted,
    scale,
    INNER: tl.constexpr,
    DIM: tl.constexpr,
    AGAIN: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """BLOCK_I rows by BLOCK_C channels. Of sums over more it writes its part: no atomics."""
    slices: tl.constexpr = (DIM + BLOCK_C - 1) // BLOCK_C
    k_I, k_C = tl.program_id(0) // slices, tl.program_id(0) % slices
    i_I = k_I * BLOCK_I + tl.arange(0, BLOCK_I)
    c_C = k_C * BLOCK_C + tl.arange(0, BLOCK_C)
    m_I, m_C = i_I < INNER, c_C < DIM
    at_IC = i_I[:, None] * DIM + c_C[None, :]
    m_IC = m_I[:, None] & m_C[None, :]
    weight_IC = tl.load(p_weight + at_IC, mask=m_IC, other=0.0).to(tl.float32)
    gain_C = tl.load(p_gain + c_C, mask=m_C, other=0.0).to(tl.float32) * scale
    shift_C = tl.load(p_shift + c_C, mask=m_C, other=0.0).to(tl.float32)
    d_scaled_IC = tl.load(p_d_scaled + at_IC, mask=m_IC, other=0.0)
    d_shifted_I = tl.load(p_d_shifted + i_I, mask=m_I, other=0.0).to(tl.float32)
    d_weight_IC = d_scaled_IC * gain_C[None, :] + d_shifted_I[:, None] * shift_C[None, :]
    tl.store(p_d_weight + at_IC, d_weight_IC.to(p_d_weight.dtype.element_ty), mask=m_IC)
    p_C = p_sums + k_I * 2 * DIM + c_C
    tl.store(p_C, tl.sum(d_scaled_IC * weight_IC, axis=0) * scale, mask=m_C)
    tl.store(p_C + DIM, tl.sum(d_shifted_I[:, None] * weight_IC, axis=0), mask=m_C)
    if AGAIN:
        scaled_IC = weight_IC * gain_C[None, :]
        tl.store(p_scaled + at_IC, scaled_IC.to(p_scaled.dtype.element_ty), mask=m_IC)
        shifted_I = tl.sum(weight_IC * shift_C[None, :], axis=1)
        tl.store(p_shifted + k_C * INNER + i_I, shifted_I, mask=m_I)


def of_absorbed(
    weight_IC: torch.Tensor,
    gain_C: torch.Tensor,
    shift_C: torch.Tensor,
    scale: float,
    d_scaled_IC: torch.Tensor,
    d_shifted_I: torch.Tensor,
    *,
    again: bool,
) -> AbsorbedGrads:
    """From `d_scaled_IC`, float32, and `d_shifted_I`; scaled and shifted only where `again`."""
    inner, width = weight_IC.shape
    block_i = config.block(inner, config.TRITON_WEIGHT_ROWS)
    block_c = config.block(width, config.TRITON_WEIGHT_CHANNELS)
    parts, slices = triton.cdiv(inner, block_i), triton.cdiv(width, block_c)
    d_weight_IC = weight_IC.new_empty(inner, width)
    sums_K2C = d_scaled_IC.new_empty(parts, 2, width)
    scaled_IC = weight_IC.new_empty(inner * again, width)
    shifted_KI = d_scaled_IC.new_empty(slices, inner * again)
    with torch.cuda.device_of(weight_IC):  # Triton launches on the current device
        absorbed_grads_kernel[(parts * slices,)](
            weight_IC.contiguous(),
            gain_C.contiguous(),
            shift_C.contiguous(),
            d_scaled_IC.contiguous(),
            d_shifted_I.contiguous(),
            d_weight_IC,
            sums_K2C,
            scaled_IC,
            shifted_KI,
            scale,
            inner,
            width,
            again,
            block_i,
            block_c,
            num_warps=config.TRITON_WEIGHT_WARPS,
        )
    d_gain_C, d_shift_C = sums_K2C.sum(0)
    return AbsorbedGrads(d_weight_IC, d_gain_C, d_shift_C, scaled_IC, shifted_KI)
