"""The latents' small products around an absorbed cross-attention, in Triton.

Where a group's latents are few, W_k of the read (W_q of the write) is multiplied into the latents
instead of the patches: A has a row for every head and latent, as wide as a patch token. Likewise
the write's values are multiplied by W_o first, and the read's context by W_v last.

Legend: G groups of all videos, L latents of a group, R = G L rows of latents, H heads, E channels
of a head, I = H E, J = H L columns of scores, j = h L + l, C width of a patch token, D width of
the side that is updated. In kernels: R rows, O columns, K or E terms of a program's product.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from snapkernels.ops.group_attn import config


class Absorbed(NamedTuple):
    """A matrix of the heads multiplied into what meets it from the latents.

    Attributes:
        rows: (G, J, C) in the latents' dtype.
        sums: (G, J) float32, of `rows` over C, as they were rounded.
        number: (G, J) float32, one more of each row, or None.
    """

    rows: torch.Tensor
    sums: torch.Tensor
    number: torch.Tensor | None


@triton.jit
def absorb_kernel(
    p_heads,
    p_weight,
    p_gain,
    p_shift,
    p_q_bias,
    p_average,
    p_A,
    p_sums,
    p_bias,
    rows,
    scale,
    LATENTS: tl.constexpr,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    DIM: tl.constexpr,
    BIASED: tl.constexpr,
    WEIGHED: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """A of one head and a block of latents, its sums over C, and a number more for each row.

    That is the write's score bias or, of a backward, the product of A and the read's average.

    A program goes over all of C, so that the sums need no second pass and no atomics.
    """
    h = tl.program_id(0) % HEADS
    r_R = (tl.program_id(0) // HEADS * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
    m_R = r_R < rows
    j_R = (r_R // LATENTS * HEADS + h) * LATENTS + r_R % LATENTS
    sums_R = tl.zeros((BLOCK_R,), tl.float32)
    bias_R = tl.zeros((BLOCK_R,), tl.float32)
    for c in range(0, DIM, BLOCK_C):
        c_C = c + tl.arange(0, BLOCK_C)
        m_C = c_C < DIM
        product_RC = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
        for e in range(0, WIDTH, BLOCK_E):
            e_E = e + tl.arange(0, BLOCK_E)
            m_E = e_E < WIDTH
            p_RE = p_heads + r_R[:, None] * (HEADS * WIDTH) + (h * WIDTH + e_E)[None, :]
            heads_RE = tl.load(p_RE, mask=m_R[:, None] & m_E[None, :], other=0.0)
            p_EC = p_weight + (h * WIDTH + e_E)[:, None] * DIM + c_C[None, :]
            weight_EC = tl.load(p_EC, mask=m_E[:, None] & m_C[None, :], other=0.0)
            product_RC = tl.dot(heads_RE, weight_EC, product_RC, input_precision="ieee")
        product_RC *= scale
        gain_C = tl.load(p_gain + c_C, mask=m_C, other=0.0).to(tl.float32)
        A_RC = (product_RC * gain_C[None, :]).to(p_A.dtype.element_ty)
        p_RC = p_A + j_R[:, None] * DIM + c_C[None, :]
        tl.store(p_RC, A_RC, mask=m_R[:, None] & m_C[None, :])
        sums_R += tl.sum(A_RC.to(tl.float32), axis=1)
        if WEIGHED:
            p_RC = p_average + (h * rows + r_R)[:, None] * DIM + c_C[None, :]
            average_RC = tl.load(p_RC, mask=m_R[:, None] & m_C[None, :], other=0.0)
            bias_R += tl.sum(A_RC.to(tl.float32) * average_RC.to(tl.float32), axis=1)
        if BIASED:
            shift_C = tl.load(p_shift + c_C, mask=m_C, other=0.0).to(tl.float32)
            bias_R += tl.sum(product_RC * shift_C[None, :], axis=1)
    tl.store(p_sums + j_R, sums_R, mask=m_R)
    if BIASED:
        for e in range(0, WIDTH, BLOCK_E):
            e_E = e + tl.arange(0, BLOCK_E)
            m_E = e_E < WIDTH
            p_RE = p_heads + r_R[:, None] * (HEADS * WIDTH) + (h * WIDTH + e_E)[None, :]
            heads_RE = tl.load(p_RE, mask=m_R[:, None] & m_E[None, :], other=0.0)
            q_bias_E = tl.load(p_q_bias + h * WIDTH + e_E, mask=m_E, other=0.0).to(tl.float32)
            bias_R += tl.sum(heads_RE.to(tl.float32) * (q_bias_E * scale)[None, :], axis=1)
    if BIASED or WEIGHED:
        tl.store(p_bias + j_R, bias_R, mask=m_R)


@triton.jit
def place_in_order(c_C):
    """Where column c of a product is in order: of 32, 8 q + 2 b + e at 8 b + 2 q + e."""
    return c_C // 32 * 32 + c_C % 8 // 2 * 8 + c_C % 32 // 8 * 2 + c_C % 2


@triton.jit
def product_kernel(
    p_x,
    p_weight,
    p_bias,
    p_factor,
    p_readable,
    p_residual,
    p_y,
    p_rest,
    rows,
    x_head,
    x_row,
    weight_head,
    weight_row,
    y_head,
    y_group,
    y_row,
    LATENTS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_FACTOR: tl.constexpr,
    HAS_READABLE: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_REST: tl.constexpr,
    IN_ORDER: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """y = x weight^T (+ bias, of each head its own) (0 of an unreadable row) (+ residual).

    With a factor, (heads, rows), a row's bias is multiplied by it. The rest is what y's rounding
    took off, rounded itself.

    Program (tile, head). Heads lie `x_head`, `weight_head` and `y_head` elements apart, groups of
    y `y_group`, and rows, of y within a group, `x_row`, `weight_row` and `y_row`. The residual
    lies as y does. IN_ORDER: of 32 columns of y, 8 b + 2 q + e is column 8 q + 2 b + e of the
    product, b and q 0 to 3 and e 0 or 1, which the lanes of csrc/group_attn have together.
    """
    h = tl.program_id(1).to(tl.int64)
    tiles: tl.constexpr = (COLUMNS + BLOCK_O - 1) // BLOCK_O
    r_R = (tl.program_id(0) // tiles * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
    o_O = tl.program_id(0) % tiles * BLOCK_O + tl.arange(0, BLOCK_O)
    m_R, m_O = r_R < rows, o_O < COLUMNS
    weight_O = o_O
    if IN_ORDER:
        weight_O = place_in_order(o_O)  # its own inverse
    y_RO = tl.zeros((BLOCK_R, BLOCK_O), tl.float32)
    for k in range(0, DEPTH, BLOCK_K):
        k_K = k + tl.arange(0, BLOCK_K)
        m_K = k_K < DEPTH
        p_RK = p_x + h * x_head + r_R[:, None] * x_row + k_K[None, :]
        x_RK = tl.load(p_RK, mask=m_R[:, None] & m_K[None, :], other=0.0)
        p_KO = p_weight + h * weight_head + k_K[:, None] + weight_O[None, :] * weight_row
        weight_KO = tl.load(p_KO, mask=m_K[:, None] & m_O[None, :], other=0.0)
        y_RO = tl.dot(x_RK, weight_KO, y_RO, input_precision="ieee")
    if HAS_BIAS:
        bias_O = tl.load(p_bias + h * COLUMNS + o_O, mask=m_O, other=0.0).to(tl.float32)
        if HAS_FACTOR:
            factor_R = tl.load(p_factor + h * rows + r_R, mask=m_R, other=0.0)
            y_RO += factor_R[:, None] * bias_O[None, :]
        else:
            y_RO += bias_O[None, :]
    if HAS_READABLE:
        readable_R = tl.load(p_readable + r_R, mask=m_R, other=0)
        y_RO = tl.where((readable_R != 0)[:, None], y_RO, 0.0)
    at_R = r_R // LATENTS * y_group + r_R % LATENTS * y_row
    at_RO = h * y_head + at_R[:, None] + o_O[None, :]
    m_RO = m_R[:, None] & m_O[None, :]
    if HAS_RESIDUAL:
        y_RO += tl.load(p_residual + at_RO, mask=m_RO, other=0.0).to(tl.float32)
    rounded_RO = y_RO.to(p_y.dtype.element_ty)
    tl.store(p_y + at_RO, rounded_RO, mask=m_RO)
    if HAS_REST:
        rest_RO = y_RO - rounded_RO.to(tl.float32)
        tl.store(p_rest + at_RO, rest_RO.to(p_y.dtype.element_ty), mask=m_RO)


def absorbed(
    heads_RI: torch.Tensor,
    weight_IC: torch.Tensor,
    norm_weight_C: torch.Tensor,
    num_heads: int,
    groups: int,
    scale: float,
) -> Absorbed:
    """A[h L + l] = norm_weight * (heads_h[l] weight_h) * scale, rounded."""
    return _absorb(heads_RI, weight_IC, norm_weight_C, num_heads, groups, scale)


def absorbed_weighed(
    heads_RI: torch.Tensor,
    weight_IC: torch.Tensor,
    norm_weight_C: torch.Tensor,
    average_HRC: torch.Tensor,
    num_heads: int,
    groups: int,
) -> Absorbed:
    """W as `absorbed` without a scale, and the number delta = W . average."""
    return _absorb(
        heads_RI, weight_IC, norm_weight_C, num_heads, groups, 1.0,
        average_HRC=average_HRC.contiguous())  # fmt: skip


def absorbed_biased(
    heads_RI: torch.Tensor,
    weight_IC: torch.Tensor,
    norm_weight_C: torch.Tensor,
    norm_bias_C: torch.Tensor,
    q_bias_I: torch.Tensor,
    num_heads: int,
    groups: int,
    scale: float,
) -> Absorbed:
    """As `absorbed`, and what a column of the write's scores is off by for its number.

    bias[h L + l] = scale * (norm_bias . (heads_h[l] weight_h) + heads_h[l] . q_bias_h), float32.
    """
    return _absorb(
        heads_RI, weight_IC, norm_weight_C, num_heads, groups, scale,
        norm_bias_C=norm_bias_C.contiguous(), q_bias_I=q_bias_I.contiguous())  # fmt: skip


def _absorb(
    heads_RI: torch.Tensor,
    weight_IC: torch.Tensor,
    norm_weight_C: torch.Tensor,
    num_heads: int,
    groups: int,
    scale: float,
    *,
    norm_bias_C: torch.Tensor | None = None,
    q_bias_I: torch.Tensor | None = None,
    average_HRC: torch.Tensor | None = None,
) -> Absorbed:
    (rows, inner), width, item = heads_RI.shape, weight_IC.shape[1], heads_RI.element_size()
    latents, channels = rows // groups, inner // num_heads
    A_GJC = heads_RI.new_empty(groups, num_heads * latents, width)
    sums_GJ = heads_RI.new_empty(A_GJC.shape[:2], dtype=torch.float32)
    biased, weighed = norm_bias_C is not None, average_HRC is not None
    number_GJ = torch.empty_like(sums_GJ) if biased or weighed else None
    gain = norm_weight_C.contiguous()
    block_r = config.block(rows, config.TRITON_LATENT_ROWS[item])
    with torch.cuda.device_of(heads_RI):  # Triton launches on the current device
        absorb_kernel[(triton.cdiv(rows, block_r) * num_heads,)](
            heads_RI.contiguous(),
            weight_IC.contiguous(),
            gain,
            gain if norm_bias_C is None else norm_bias_C,
            gain if q_bias_I is None else q_bias_I,
            gain if average_HRC is None else average_HRC,
            A_GJC,
            sums_GJ,
            sums_GJ if number_GJ is None else number_GJ,
            rows,
            scale,
            latents,
            num_heads,
            channels,
            width,
            biased,
            weighed,
            block_r,
            config.block(width, config.TRITON_ABSORB_COLUMNS[item]),
            config.block(channels, config.TRITON_LATENT_DEPTH[item]),
            num_warps=config.TRITON_ABSORB_WARPS,
            num_stages=config.TRITON_LATENT_STAGES,
        )
    return Absorbed(A_GJC, sums_GJ, number_GJ)


def values(
    heads_RI: torch.Tensor,
    o_weight_DI: torch.Tensor,
    num_heads: int,
    groups: int,
    *,
    in_order: bool = False,
) -> torch.Tensor:
    """C_GJD: row h L + l is heads_h[l] o_weight_h^T, rounded: what P's column adds to a token.

    `in_order`: D is in the order that `product_kernel` has for csrc/group_attn.
    """
    (rows, inner), width = heads_RI.shape, o_weight_DI.shape[0]
    latents, channels = rows // groups, inner // num_heads
    C_GJD = heads_RI.new_empty(groups, num_heads * latents, width)
    _launch(
        heads_RI.contiguous(),
        o_weight_DI.contiguous(),
        C_GJD,
        rows=rows,
        heads=num_heads,
        latents=latents,
        columns=width,
        depth=channels,
        x_strides=(channels, inner),
        weight_strides=(channels, inner),
        y_strides=(latents * width, num_heads * latents * width, width),
        in_order=in_order,
    )
    return C_GJD


def heads_of(
    context_HRC: torch.Tensor,
    weight_IC: torch.Tensor,
    bias_I: torch.Tensor | None = None,
    factor_HR: torch.Tensor | None = None,
    readable_R: torch.Tensor | None = None,
    rest_RI: torch.Tensor | None = None,
) -> torch.Tensor:
    """heads_RI: of each head context weight_h^T + bias_h (times its factor); 0 if not readable.

    What that is rounded by goes to `rest_RI`.
    """
    (num_heads, rows, width), inner = context_HRC.shape, len(weight_IC)
    channels = inner // num_heads
    heads_RI = context_HRC.new_empty(rows, inner)
    _launch(
        context_HRC.contiguous(),
        weight_IC.contiguous(),
        heads_RI,
        rows=rows,
        heads=num_heads,
        latents=1,
        columns=channels,
        depth=width,
        x_strides=(rows * width, width),
        weight_strides=(channels * width, width),
        y_strides=(channels, inner, 0),
        bias=None if bias_I is None else bias_I.contiguous(),
        factor=None if factor_HR is None else factor_HR.contiguous(),
        readable=None if readable_R is None else readable_R.contiguous(),
        rest=rest_RI,
    )
    return heads_RI


def output(
    heads_RI: torch.Tensor,
    o_weight_DI: torch.Tensor,
    o_bias_D: torch.Tensor,
    residual_RD: torch.Tensor,
) -> torch.Tensor:
    """y_RD = residual + heads o_weight^T + o_bias, in float32 until it is rounded."""
    (rows, inner), width = heads_RI.shape, len(o_bias_D)
    y_RD = heads_RI.new_empty(rows, width)
    _launch(
        heads_RI.contiguous(),
        o_weight_DI.contiguous(),
        y_RD,
        rows=rows,
        heads=1,
        latents=1,
        columns=width,
        depth=inner,
        x_strides=(0, inner),
        weight_strides=(0, inner),
        y_strides=(0, width, 0),
        bias=o_bias_D.contiguous(),
        residual=residual_RD.contiguous(),
        most_columns=config.TRITON_OUTPUT_COLUMNS,
    )
    return y_RD


def _launch(
    x: torch.Tensor,
    weight: torch.Tensor,
    y: torch.Tensor,
    *,
    rows: int,
    heads: int,
    latents: int,
    columns: int,
    depth: int,
    x_strides: tuple[int, int],
    weight_strides: tuple[int, int],
    y_strides: tuple[int, int, int],
    bias: torch.Tensor | None = None,
    factor: torch.Tensor | None = None,
    readable: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    rest: torch.Tensor | None = None,
    in_order: bool = False,
    most_columns: dict[int, int] = config.TRITON_LATENT_COLUMNS,
) -> None:
    item = x.element_size()
    block_r = config.block(rows, config.TRITON_LATENT_ROWS[item])
    block_o = config.block(columns, most_columns[item])
    grid = (triton.cdiv(rows, block_r) * triton.cdiv(columns, block_o), heads)
    with torch.cuda.device_of(x):  # Triton launches on the current device
        product_kernel[grid](
            x,
            weight,
            x if bias is None else bias,
            x if factor is None else factor,
            x if readable is None else readable,
            x if residual is None else residual,
            y,
            y if rest is None else rest,
            rows,
            *x_strides,
            *weight_strides,
            *y_strides,
            latents,
            columns,
            depth,
            bias is not None,
            factor is not None,
            readable is not None,
            residual is not None,
            rest is not None,
            in_order,
            block_r,
            block_o,
            config.block(depth, config.TRITON_LATENT_DEPTH[item]),
            num_warps=config.TRITON_LATENT_WARPS,
            num_stages=config.TRITON_LATENT_STAGES,
        )
