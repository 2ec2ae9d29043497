"""The backward of head, head_mix and head_loss in Triton: one pass over the tokens.

A program has a slice of D and a range of tokens. A token's row (triton_rows.py) has the sums over D
of its gradient, so slices are independent: each token is read once, for its own gradient and for
R = sum of dF xhat^T and q = sum of dF over the range. PyTorch adds the ranges, in their order, and
makes the four gradients of the parameters from R and q. No atomics: two runs agree in every bit.

dF is rounded to the product's dtype where it is kept, as it is where a linear layer has a gradient.

Legend: as in triton_parts.py; t token of a step, R (P, D), q (P).
"""

from typing import Any

import torch
import triton
import triton.language as tl

from snapkernels.ops.head.config import (
    TRITON_BWD_PARTS,
    TRITON_BWD_STAGES,
    TRITON_BWD_WARPS,
    triton_backward_blocks,
)
from snapkernels.ops.head.kernels import backward
from snapkernels.ops.head.kernels.triton_mix import Grads
from snapkernels.ops.head.kernels.triton_parts import load_vector, load_weight, parameters
from snapkernels.ops.head.weights import HeadWeights


@triton.jit
def head_backward_kernel(
    p_tokens,
    p_norm_weight,
    p_weight,
    p_dF,
    p_rows,
    p_scale,
    p_dtokens,
    p_R,
    p_q,
    total,
    steps,
    FEATURES: tl.constexpr,
    DIM: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    NEED_TOKENS: tl.constexpr,
    NEED_SUMS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_P: tl.constexpr,
    SLICE: tl.constexpr,
):
    """dtokens, R and q of one slice of D and `steps` blocks of tokens."""
    columns = tl.cdiv(DIM, SLICE)
    part = (tl.program_id(0) // columns).to(tl.int64)
    d = tl.program_id(0) % columns * SLICE
    d_S, p_P = d + tl.arange(0, SLICE), tl.arange(0, BLOCK_P)
    m_S, m_P = d_S < DIM, p_P < FEATURES
    weight_PS = load_weight(p_weight, d, FEATURES, DIM, BLOCK_P, SLICE)
    gain_S = load_vector(p_norm_weight, d, DIM, SLICE)
    scale = tl.load(p_scale) if HAS_SCALE else 1.0

    t_T = tl.arange(0, BLOCK_T)
    at_TS, at_TP = t_T[:, None] * DIM + d_S[None, :], t_T[:, None] * FEATURES + p_P[None, :]
    R_PS = tl.zeros((BLOCK_P, SLICE), tl.float32)
    q_TP = tl.zeros((BLOCK_T, BLOCK_P), tl.float32)
    for step in range(steps):
        first = (part * steps + step) * BLOCK_T
        m_T = t_T < total - first
        m_TS = m_T[:, None] & m_S[None, :]
        x_TS = tl.load(p_tokens + first * DIM + at_TS, mask=m_TS, other=0.0)
        p_TP = p_dF + first * FEATURES + at_TP
        dF_TP = tl.load(p_TP, mask=m_T[:, None] & m_P[None, :], other=0.0)
        p_T = p_rows + first * 4 + t_T * 4
        mean_T = tl.load(p_T, mask=m_T, other=0.0)
        rstd_T = tl.load(p_T + 1, mask=m_T, other=0.0)
        xhat_TS = (x_TS.to(tl.float32) - mean_T[:, None]) * rstd_T[:, None]
        if NEED_SUMS:
            rounded_TS = xhat_TS.to(x_TS.dtype)
            R_PS = tl.dot(tl.trans(dF_TP), rounded_TS, R_PS, input_precision="ieee")
            q_TP += dF_TP.to(tl.float32)
        if NEED_TOKENS:
            c1_T = tl.load(p_T + 2, mask=m_T, other=0.0)
            c2_T = tl.load(p_T + 3, mask=m_T, other=0.0)
            g_TS = tl.dot(dF_TP, weight_PS, input_precision="ieee") * gain_S[None, :]
            g_TS -= c1_T[:, None] + xhat_TS * c2_T[:, None]
            dtokens_TS = (g_TS * (rstd_T * scale)[:, None]).to(p_dtokens.dtype.element_ty)
            tl.store(p_dtokens + first * DIM + at_TS, dtokens_TS, mask=m_TS)
    if NEED_SUMS:
        p_PS = p_R + (part * FEATURES + p_P[:, None]) * DIM + d_S[None, :]
        tl.store(p_PS, R_PS, mask=m_P[:, None] & m_S[None, :])
        # Every slice has the same q.
        tl.store(p_q + part * FEATURES + p_P, tl.sum(q_TP, axis=0), mask=m_P & (d == 0))


def gradients_of_rows(
    needs: tuple[bool, ...],
    tokens: torch.Tensor,
    w: HeadWeights,
    feature_grad: torch.Tensor,
    rows: torch.Tensor,
    scale: torch.Tensor | None,
) -> Grads:
    """The gradients of (tokens, *w) that `needs` asks for, of at least one token."""
    need_tokens, *need_weights = needs
    need_sums = any(need_weights)
    (features, width), total = w.weight.shape, rows.numel() // 4
    blocks = triton_backward_blocks(tokens, w.weight)
    tiles = triton.cdiv(total, blocks.m)
    steps = triton.cdiv(tiles, TRITON_BWD_PARTS)
    parts = triton.cdiv(tiles, steps)
    tokens, w = tokens.contiguous(), HeadWeights(*parameters(w))
    # What is not needed is not written, and another tensor takes its place.
    dtokens = torch.empty_like(tokens) if need_tokens else tokens
    shapes = ((parts, features, width), (parts, features))
    R, q = (rows.new_empty(shape) if need_sums else rows for shape in shapes)
    with torch.cuda.device_of(tokens):  # Triton launches on the current device
        head_backward_kernel[(parts * triton.cdiv(width, blocks.columns),)](
            tokens,
            w.norm_weight,
            w.weight,
            feature_grad,
            rows,
            rows if scale is None else scale,
            dtokens,
            R,
            q,
            total,
            steps,
            features,
            width,
            scale is not None,
            need_tokens,
            need_sums,
            *blocks,
            num_warps=TRITON_BWD_WARPS,
            num_stages=TRITON_BWD_STAGES,
        )
    dweights: Grads = (None,) * len(need_weights)
    if need_sums:
        dweights = backward.weight_gradients(need_weights, w, R.sum(0), q.sum(0), scale)
    return dtokens if need_tokens else None, *dweights


def head_backward(needs: tuple[bool, ...], *rest: Any) -> Grads:
    return backward.head_backward(gradients_of_rows, needs, *rest)


def head_mix_backward(needs: tuple[bool, ...], *rest: Any) -> Grads:
    return backward.head_mix_backward(gradients_of_rows, needs, *rest)


def head_loss_backward(needs: tuple[bool, ...], *rest: Any) -> Grads:
    return backward.head_loss_backward(gradients_of_rows, needs, *rest)
