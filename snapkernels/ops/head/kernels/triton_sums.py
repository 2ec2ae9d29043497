"""The sums over tokens that the head's weight gradients are made of, in Triton.

R = sum dF xhat^T and q = sum dF; a program sums one slice of D over one range of tokens, and the
ranges' sums are added in order.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from snapkernels.ops.head.config import (
    TRITON_SUM_COLUMNS,
    TRITON_SUM_PARTS,
    TRITON_SUM_TOKENS,
    TRITON_SUM_WARPS,
    triton_blocks,
)
from snapkernels.ops.head.kernels.triton_mix import Grads
from snapkernels.ops.head.weights import HeadWeights


@triton.jit
def head_sums_kernel(
    p_dF,
    p_tokens,
    p_mean,
    p_rstd,
    p_R,
    p_q,
    total,
    steps,
    FEATURES: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_P: tl.constexpr,
    SLICE: tl.constexpr,
):
    """R and q of `steps` blocks of tokens: of one slice of D, and of all of P."""
    columns = tl.cdiv(DIM, SLICE)
    part = (tl.program_id(0) // columns).to(tl.int64)
    d_S = tl.program_id(0) % columns * SLICE + tl.arange(0, SLICE)
    m_S = d_S < DIM
    p_P = tl.arange(0, BLOCK_P)
    m_P = p_P < FEATURES
    R_PS = tl.zeros((BLOCK_P, SLICE), tl.float32)
    q_TP = tl.zeros((BLOCK_T, BLOCK_P), tl.float32)
    for step in range(steps):
        t_T = (part * steps + step) * BLOCK_T + tl.arange(0, BLOCK_T)
        m_T = t_T < total
        x_TS = tl.load(
            p_tokens + t_T[:, None] * DIM + d_S[None, :],
            mask=m_T[:, None] & m_S[None, :],
            other=0.0,
        )
        dF_TP = tl.load(
            p_dF + t_T[:, None] * FEATURES + p_P[None, :],
            mask=m_T[:, None] & m_P[None, :],
            other=0.0,
        )
        mean_T = tl.load(p_mean + t_T, mask=m_T, other=0.0)
        rstd_T = tl.load(p_rstd + t_T, mask=m_T, other=0.0)
        xhat_TS = (x_TS.to(tl.float32) - mean_T[:, None]) * rstd_T[:, None]
        xhat_TS = xhat_TS.to(x_TS.dtype)
        rounded_TP = dF_TP.to(x_TS.dtype)
        R_PS = tl.dot(tl.trans(rounded_TP), xhat_TS, R_PS, input_precision="ieee")
        if x_TS.dtype != tl.float32:
            rest_TP = (dF_TP - rounded_TP.to(tl.float32)).to(x_TS.dtype)
            R_PS = tl.dot(tl.trans(rest_TP), xhat_TS, R_PS)
        q_TP += dF_TP
    p_PS = p_R + (part * FEATURES + p_P[:, None]) * DIM + d_S[None, :]
    tl.store(p_PS, R_PS, mask=m_P[:, None] & m_S[None, :])
    first = tl.program_id(0) % columns == 0  # every slice has the same q
    tl.store(p_q + part * FEATURES + p_P, tl.sum(q_TP, axis=0), mask=m_P & first)


def weight_gradients(
    needs: Sequence[bool],
    tokens: torch.Tensor,
    w: HeadWeights,
    dF: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    scale: torch.Tensor | None,
) -> Grads:
    """The gradients of `w` that `needs` asks for, of the sums R and q; `scale` multiplies them."""
    if not any(needs):
        return (None,) * len(needs)
    total, (features, width) = len(mean), w.weight.shape
    block_t = TRITON_SUM_TOKENS[tokens.element_size()]
    blocks = triton.cdiv(total, block_t)
    steps = triton.cdiv(blocks, TRITON_SUM_PARTS)
    parts = triton.cdiv(blocks, steps)
    R = mean.new_empty(parts, features, width)
    q = mean.new_empty(parts, features)
    block_p = triton_blocks(tokens, w.weight).p
    with torch.cuda.device_of(tokens):
        head_sums_kernel[(parts * triton.cdiv(width, TRITON_SUM_COLUMNS),)](
            dF,
            tokens,
            mean,
            rstd,
            R,
            q,
            total,
            steps,
            features,
            width,
            block_t,
            block_p,
            TRITON_SUM_COLUMNS,
            num_warps=TRITON_SUM_WARPS,
        )
    R, q = R.sum(0), q.sum(0)
    if scale is not None:
        R, q = R * scale, q * scale
    need_gain, need_shift, need_weight, need_bias = needs
    weight, gain, shift = w.weight.float(), w.norm_weight.float(), w.norm_bias.float()
    return (
        (weight * R).sum(0).to(w.norm_weight.dtype) if need_gain else None,
        (weight * q[:, None]).sum(0).to(w.norm_bias.dtype) if need_shift else None,
        (R * gain + q[:, None] * shift).to(w.weight.dtype) if need_weight else None,
        q.to(w.bias.dtype) if need_bias else None,
    )
