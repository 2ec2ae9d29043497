"""What is left of sums over tokens that were products with columns in order, in Triton.

Such a product is (G, J, C) with the columns of 32s as csrc/group_attn has P in memory. What means
add comes off, and rows go to their heads.

Legend: as in triton_token_sums.py; K parts of the tokens.
"""

import torch
import triton
import triton.language as tl

from snapkernels.ops.group_attn import config
from snapkernels.ops.group_attn.kernels.triton_latents import place_in_order


@triton.jit
def sum_ends_kernel(
    p_product,
    p_moments,
    p_average,
    p_sums,
    p_total,
    groups,
    COLUMNS: tl.constexpr,
    LATENTS: tl.constexpr,
    DIM: tl.constexpr,
    HAS_MOMENTS: tl.constexpr,
    HAS_AVERAGE: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """BLOCK_J columns of a group by BLOCK_D channels."""
    blocks: tl.constexpr = (COLUMNS + BLOCK_J - 1) // BLOCK_J
    slices: tl.constexpr = (DIM + BLOCK_D - 1) // BLOCK_D
    g = (tl.program_id(0) // (blocks * slices)).to(tl.int64)
    j_J = tl.program_id(0) // slices % blocks * BLOCK_J + tl.arange(0, BLOCK_J)
    d_D = tl.program_id(0) % slices * BLOCK_D + tl.arange(0, BLOCK_D)
    m_J = j_J < COLUMNS
    row_J = (j_J // LATENTS * groups + g) * LATENTS + j_J % LATENTS
    moment_J = tl.zeros((BLOCK_J,), tl.float32)
    total_J = tl.zeros((BLOCK_J,), tl.float32)
    if HAS_MOMENTS:
        p_J = p_moments + g * 2 * COLUMNS + j_J
        moment_J = tl.load(p_J, mask=m_J, other=0.0)
        total_J = tl.load(p_J + COLUMNS, mask=m_J, other=0.0)
        tl.store(p_total + row_J, total_J, mask=m_J)  # the same by every slice
    from_J = g * COLUMNS + place_in_order(j_J)
    m_JD = m_J[:, None] & (d_D < DIM)[None, :]
    p_JD = p_product + from_J[:, None] * DIM + d_D[None, :]
    sum_JD = tl.load(p_JD, mask=m_JD, other=0.0).to(tl.float32) - moment_J[:, None]
    at_JD = row_J[:, None] * DIM + d_D[None, :]
    if HAS_AVERAGE:
        average_JD = tl.load(p_average + at_JD, mask=m_JD, other=0.0).to(tl.float32)
        sum_JD -= total_J[:, None] * average_JD
    tl.store(p_sums + at_JD, sum_JD.to(p_sums.dtype.element_ty), mask=m_JD)


def scores_sums(
    product_GJC: torch.Tensor,
    parts_GK2J: torch.Tensor,
    num_heads: int,
    *,
    average_HRC: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(dA_HRC in bfloat16, total_HR) of the float32 sums of dS x.

    Of `parts_GK2J`, columns as they are, the sums over K are those of dS times the means, and the
    totals, of dS without 1 / standard deviation. The read gives the average, of which what dS sums
    to is taken off.
    """
    groups, columns, _ = product_GJC.shape
    total_HR = parts_GK2J.new_empty(num_heads, groups * columns // num_heads)
    dA_HRC = _launch(product_GJC, num_heads, parts_GK2J.sum(1), average_HRC, total_HR)
    return dA_HRC, total_HR


def values_sums(product_GJD: torch.Tensor, num_heads: int) -> torch.Tensor:
    """dW_HRD of the sums of P dy."""
    return _launch(product_GJD, num_heads, None, None, None)


def _launch(
    product_GJC: torch.Tensor,
    num_heads: int,
    moments_G2J: torch.Tensor | None,
    average_HRC: torch.Tensor | None,
    total_HR: torch.Tensor | None,
) -> torch.Tensor:
    groups, columns, width = product_GJC.shape
    latents = columns // num_heads
    sums_HRC = product_GJC.new_empty(num_heads, groups * latents, width, dtype=torch.bfloat16)
    block_j = config.TRITON_ENDS_COLUMNS
    block_d = config.block(width, config.TRITON_ENDS_CHANNELS)
    optional = moments_G2J, average_HRC, sums_HRC, total_HR
    with torch.cuda.device_of(product_GJC):  # Triton launches on the current device
        sum_ends_kernel[(groups * triton.cdiv(columns, block_j) * triton.cdiv(width, block_d),)](
            product_GJC,
            *(sums_HRC if one is None else one for one in optional),
            groups,
            columns,
            latents,
            width,
            moments_G2J is not None,
            average_HRC is not None,
            block_j,
            block_d,
            num_warps=config.TRITON_ENDS_WARPS,
        )
    return sums_HRC
