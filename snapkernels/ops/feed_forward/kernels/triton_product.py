"""The family's product in Triton, and what follows it: scales, bias, GELU, dropout, residual.

Legend: M tokens, N outputs, K what is summed over; of a program's tile in the kernel.
"""

# The arguments of a Triton function have no Python types.
# mypy: allow-untyped-defs

import torch
import triton
import triton.language as tl

from snapkernels.ops.feed_forward import config
from snapkernels.ops.feed_forward.kernels.triton_e4m3 import to_e4m3
from snapkernels.philox_triton import philox_kept


@triton.jit
def product_kernel(
    p_a,
    p_w,
    p_a_scale,
    p_w_scale,
    p_bias,
    p_residual,
    p_y_scale,
    p_y,
    rows,
    seed_lo,
    seed_hi,
    least,
    factor,
    N: tl.constexpr,
    K: tl.constexpr,
    GELU: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """y = a w^T, scaled where a is e4m3, + bias, through GELU and dropout, + residual."""
    tile_m, tile_n = tile_of(tl.program_id(0), rows, N, BLOCK_M, BLOCK_N, GROUP)
    first_m, first_n = tile_m.to(tl.int64) * BLOCK_M, tile_n.to(tl.int64) * BLOCK_N
    m_M, n_N = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    left_m, left_n = (rows - first_m).to(tl.int32), (N - first_n).to(tl.int32)
    acc_MN = summed(
        p_a + first_m * K,
        p_w + first_n * K,
        tl.minimum(m_M, left_m - 1),  # past the end the last is read again, and never stored
        tl.minimum(n_N, left_n - 1),
        K,
        BLOCK_K,
    )
    is_m_M, is_n_N = m_M < left_m, n_N < left_n
    if p_a_scale is not None:
        a_scale_M = tl.load(p_a_scale + first_m + m_M, mask=is_m_M, other=0.0)
        w_scale_N = tl.load(p_w_scale + first_n + n_N, mask=is_n_N, other=0.0)
        acc_MN = acc_MN * a_scale_M[:, None] * w_scale_N[None, :]
    bias_N = tl.load(p_bias + first_n + n_N, mask=is_n_N, other=0.0).to(tl.float32)
    y_MN = acc_MN + bias_N[None, :]
    if GELU:
        y_MN = exact_gelu(y_MN)
    at_MN = first_m * N + first_n + m_M[:, None] * N + n_N[None, :]
    is_MN = is_m_M[:, None] & is_n_N[None, :]
    if factor is not None:
        block_N = first_m * (N // 4) + first_n // 4 + tl.arange(0, BLOCK_N // 4)
        block_MN = m_M[:, None] * (N // 4) + block_N[None, :]
        y_MN *= tl.where(philox_kept(seed_lo, seed_hi, block_MN, least), factor, 0.0)
    if p_residual is not None:
        y_MN += tl.load(p_residual + at_MN, mask=is_MN, other=0.0).to(tl.float32)
    if p_y_scale is None:
        tl.store(p_y + at_MN, y_MN.to(p_y.dtype.element_ty), mask=is_MN)
    else:
        y_scale_M = tl.load(p_y_scale + first_m + m_M, mask=is_m_M, other=0.0)
        tl.store(p_y + at_MN, to_e4m3(y_MN, y_scale_M[:, None]), mask=is_MN)


@triton.jit
def tile_of(
    program, rows, N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    """A program's tile: GROUP rows of tiles column by column, so that what they read is in L2."""
    tiles_m, tiles_n = tl.cdiv(rows, BLOCK_M), tl.cdiv(N, BLOCK_N)
    of_group = GROUP * tiles_n
    first = program // of_group * GROUP
    height = tl.minimum(tiles_m - first, GROUP)
    return first + program % of_group % height, program % of_group // height


@triton.jit
def exact_gelu(x):
    """x Phi(x), with erf."""
    return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def summed(p_a, p_w, m_M, n_N, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """The sum over K of a and w, in float32."""
    k_K = tl.arange(0, BLOCK_K)
    p_MK = p_a + m_M[:, None] * K + k_K[None, :]
    p_NK = p_w + n_N[:, None] * K + k_K[None, :]
    acc_MN = tl.zeros((m_M.shape[0], n_N.shape[0]), tl.float32)
    for k in range(0, K, BLOCK_K):
        if K % BLOCK_K == 0:
            a_MK, w_NK = tl.load(p_MK), tl.load(p_NK)
        else:
            a_MK = tl.load(p_MK, mask=k_K[None, :] < K - k, other=0.0)
            w_NK = tl.load(p_NK, mask=k_K[None, :] < K - k, other=0.0)
        if p_a.dtype.element_ty == tl.float8e4nv:
            # The tensor cores of Hopper and Ada keep 14 bits of a sum of fp8 products, so what
            # BLOCK_K = 128 of them give is added up outside. Named as imprecise, the product is
            # not merged with the addition into one that accumulates, as Triton does otherwise.
            acc_MN += tl.dot(a_MK, tl.trans(w_NK), max_num_imprecise_acc=BLOCK_K)
        else:
            acc_MN = tl.dot(a_MK, tl.trans(w_NK), acc_MN, input_precision="ieee")
        p_MK += BLOCK_K
        p_NK += BLOCK_K
    return acc_MN


def product(
    a_MK: torch.Tensor,
    w_NK: torch.Tensor,
    bias_N: torch.Tensor,
    residual_MN: torch.Tensor | None = None,
    *,
    scales: tuple[torch.Tensor, torch.Tensor] | None = None,
    gelu: bool = False,
    dropout: tuple[float, int] | None = None,
    y_scale_M: torch.Tensor | None = None,
) -> torch.Tensor:
    """[Dropout of] [GELU of] a_MK w_NK^T + bias [+ residual], (M, N).

    Args:
        a_MK: contiguous, like the residual; in the dtype of `w_NK`.
        scales: (M) and (N) float32, of e4m3 operands.
        dropout: the probability of zeroing a value, and a seed.
        y_scale_M: float32; the result is then e4m3, of these scales, else in the bias's dtype.
    """
    (rows, depth), (outputs, _) = a_MK.shape, w_NK.shape
    dtype = bias_N.dtype if y_scale_M is None else torch.float8_e4m3fn
    y_MN = a_MK.new_empty((rows, outputs), dtype=dtype)
    blocks = config.triton_blocks(a_MK.element_size(), rows, outputs, depth)
    a_scale, w_scale = scales or (None, None)
    drop: tuple[int | float | None, ...] = (None,) * 4
    if dropout is not None:
        probability, seed = dropout
        drop = seed & 0xFFFFFFFF, seed >> 32, int(probability * 2**32), 1 / (1 - probability)
    grid = (triton.cdiv(rows, blocks.m) * triton.cdiv(outputs, blocks.n),)
    with torch.cuda.device_of(a_MK):  # Triton launches on the current device
        product_kernel[grid](
            a_MK,
            w_NK.contiguous(),
            a_scale,
            None if w_scale is None else w_scale.contiguous(),
            bias_N.contiguous(),
            residual_MN,
            y_scale_M,
            y_MN,
            rows,
            *drop,
            outputs,
            depth,
            gelu,
            *blocks,
            config.TRITON_GROUP,
            num_warps=config.TRITON_WARPS,
            num_stages=config.TRITON_STAGES,
        )
    return y_MN
