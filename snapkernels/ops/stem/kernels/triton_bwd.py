"""The gradients of the stem in Triton.

With x the features of a token and a 1 after them, V = [weight, bias] less its mean over D, and g
the gradient of the output,

    y - mean(y) = V x,  H = (g norm_weight) V,  c1 = mean_d(g norm_weight),  c2 = rstd/D H . x
    gradient of x = rstd (H - c2 rstd V^T V x)
    Z = rstd x,  A = sum_t g_t Z_t,  S = sum_t c2 Z_t Z_t,  u = sum_t c1 Z_t
    gradient of [weight, bias] = norm_weight A - 1 u - V S,  of norm_weight = sum_p V A

so that neither y nor its gradient is stored: rows read g once and leave Z and what S and u are made
of, columns multiply those and g by Z. Sums over tokens are written by ranges of tokens and added in
order. A value that the product's dtype would round too much (rstd, c1, V^T V) is two: itself
rounded, and what that left.

The legend is that of triton_fwd.
"""

import torch
import triton
import triton.language as tl
from torch.nn.functional import pad

from snapkernels.ops.stem import config
from snapkernels.ops.stem.kernels.triton_fwd import (
    VideoCall,
    features_of,
    pixels_of,
    place_of,
    share,
    video_call,
)
from snapkernels.ops.stem.weights import StemWeights


@triton.jit
def stem_bwd_kernel_rows(
    p_grad,
    p_rstd,
    p_video,
    p_scale,
    p_low,
    p_scaled,
    p_lost,
    p_gram,
    p_z,
    p_sums,
    p_pixels,
    tokens,
    frames,
    height,
    width,
    low_height,
    low_width,
    groups_h,
    groups_w,
    group_t,
    group_h,
    group_w,
    CHANNELS: tl.constexpr,
    LOW_CHANNELS: tl.constexpr,
    PATCH: tl.constexpr,
    DIM: tl.constexpr,
    OF_WEIGHTS: tl.constexpr,
    OF_PIXELS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """`scaled` is [norm_weight V, norm_weight, 1], (D, F), and `lost` the mean over D of what its
    rounding added; `gram` is V^T V, (F, F), rounded, and then what that left.
    """
    FEATURES: tl.constexpr = (CHANNELS + LOW_CHANNELS) * PATCH * PATCH
    size = (frames, height, width, low_height, low_width)
    token_M = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    m_M = token_M < tokens
    at = place_of(token_M, frames, groups_h, groups_w, group_t, group_h, group_w)
    f_F = tl.arange(0, BLOCK_F)
    dtype = p_scaled.dtype.element_ty

    h_MF = tl.zeros((BLOCK_M, BLOCK_F), tl.float32)
    row_M = token_M.to(tl.int64) * DIM
    for d0 in range(0, DIM, BLOCK_D):
        d_D = d0 + tl.arange(0, BLOCK_D)
        m_D = d_D < DIM
        p_MD = p_grad + row_M[:, None] + d_D[None, :]
        g_MD = tl.load(p_MD, mask=m_M[:, None] & m_D[None, :], other=0)
        p_DF = p_scaled + d_D[:, None] * BLOCK_F + f_F[None, :]
        scaled_DF = tl.load(p_DF, mask=m_D[:, None], other=0)
        h_MF = tl.dot(g_MD, scaled_DF, h_MF, input_precision="ieee")

    x_MF = features_of(p_video, p_scale, p_low, at, m_M, f_F, size, CHANNELS, LOW_CHANNELS, PATCH)
    x_MF = tl.where((f_F == FEATURES)[None, :], 1.0, x_MF)  # rounded once, in z
    rstd_M = tl.load(p_rstd + token_M, mask=m_M, other=0)
    c1_M = tl.sum(tl.where((f_F == FEATURES + 1)[None, :], h_MF, 0.0), 1) / DIM
    # A gradient far from zero on average is nearly cancelled by c1: its mean goes without error.
    total_M = tl.sum(tl.where((f_F == FEATURES + 2)[None, :], h_MF, 0.0), 1)
    h_MF -= total_M[:, None] * tl.load(p_lost + f_F)[None, :]
    c2_M = tl.sum(h_MF * x_MF, 1) * rstd_M / DIM

    if OF_WEIGHTS:
        z_MF = rstd_M[:, None] * x_MF
        p_MF = (token_M.to(tl.int64) * BLOCK_F)[:, None] + f_F[None, :]
        rest_M = rstd_M - rstd_M.to(dtype).to(tl.float32)
        whole_MF = _columns(z_MF, rest_M, tl.full((BLOCK_M,), 1.0, tl.float32), f_F, FEATURES)
        tl.store(p_z + p_MF, whole_MF.to(dtype), mask=m_M[:, None])
        rest_M = c1_M - c1_M.to(dtype).to(tl.float32)
        whole_MF = _columns(c2_M[:, None] * z_MF, c1_M, rest_M, f_F, FEATURES)
        tl.store(p_sums + p_MF, whole_MF.to(dtype), mask=m_M[:, None])

    if OF_PIXELS:
        back_MF = tl.zeros((BLOCK_M, BLOCK_F), tl.float32)
        for k0 in range(0, FEATURES + 1, BLOCK_K):
            f_K = k0 + tl.arange(0, BLOCK_K)
            x_MK = features_of(
                p_video, p_scale, p_low, at, m_M, f_K, size, CHANNELS, LOW_CHANNELS, PATCH
            )
            x_MK = tl.where((f_K == FEATURES)[None, :], 1.0, x_MK).to(dtype)
            p_KF = p_gram + f_K[:, None] * BLOCK_F + f_F[None, :]
            back_MF = tl.dot(x_MK, tl.load(p_KF), back_MF, input_precision="ieee")
            if dtype != tl.float32:
                rest_KF = tl.load(p_KF + BLOCK_F * BLOCK_F)
                back_MF = tl.dot(x_MK, rest_KF, back_MF, input_precision="ieee")
        dx_MF = rstd_M[:, None] * (h_MF - (c2_M * rstd_M)[:, None] * back_MF)
        scale_M = tl.load(p_scale + at[0], mask=m_M, other=0).to(tl.float32)
        at_MF, m_MF = pixels_of(at, m_M, f_F, size, CHANNELS, PATCH)
        tl.store(p_pixels + at_MF, scale_M[:, None] * dx_MF, mask=m_MF)


@triton.jit
def stem_bwd_kernel_columns(
    p_rows,
    p_z,
    p_partial,
    tokens,
    range_tokens,
    columns,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """rows^T z of one slice of columns of `rows` over one range of tokens."""
    d_D = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    f_F = tl.arange(0, BLOCK_F)
    part = tl.program_id(1)
    first = part * range_tokens
    last = tl.minimum(first + range_tokens, tokens)
    m_D = d_D < columns

    sum_DF = tl.zeros((BLOCK_D, BLOCK_F), tl.float32)
    for m0 in range(first, last, BLOCK_M):
        token_M = m0 + tl.arange(0, BLOCK_M)
        m_M = token_M < last
        p_MD = p_rows + (token_M.to(tl.int64) * columns)[:, None] + d_D[None, :]
        row_MD = tl.load(p_MD, mask=m_M[:, None] & m_D[None, :], other=0)
        p_MF = p_z + (token_M.to(tl.int64) * BLOCK_F)[:, None] + f_F[None, :]
        z_MF = tl.load(p_MF, mask=m_M[:, None], other=0)
        sum_DF = tl.dot(tl.trans(row_MD), z_MF, sum_DF, input_precision="ieee")

    p_DF = (part * columns + d_D).to(tl.int64) * BLOCK_F
    tl.store(p_partial + p_DF[:, None] + f_F[None, :], sum_DF, mask=m_D[:, None])


@triton.jit
def _columns(x_MF, first_M, second_M, f_F, FEATURES: tl.constexpr):
    """x with two more columns after the features and their 1."""
    x_MF = tl.where((f_F == FEATURES + 1)[None, :], first_M[:, None], x_MF)
    return tl.where((f_F == FEATURES + 2)[None, :], second_M[:, None], x_MF)


def stem_backward(
    needs: tuple[bool, ...],
    grad: torch.Tensor,
    rstd: torch.Tensor,
    video: torch.Tensor,
    scale: torch.Tensor,
    low_res: torch.Tensor | None,
    w: StemWeights,
    patch: int,
    group: tuple[int, int, int],
    eps: float,
) -> tuple[torch.Tensor | None, ...]:
    """The gradients of (video, *w) that `needs` asks for, the others None."""
    leaves = (video, *w)
    if not grad.numel():
        pairs = zip(leaves, needs, strict=True)
        return tuple(torch.zeros_like(one) if need else None for one, need in pairs)
    found: list[torch.Tensor | None] = [None] * len(leaves)
    grad, features = grad.contiguous(), w.weight.shape[1]
    with torch.cuda.device_of(video), torch._C._DisableAutocast():
        V = torch.cat([w.weight, w.bias[:, None]], 1).float()
        V -= V.mean(0)
        if any(needs[:5]):
            call = video_call(video, scale, low_res, patch, group)
            z, sums, found[0] = _rows(needs, grad, rstd, video, call, w.norm_weight.float(), V)
        if any(needs[1:5]):
            A = _times_z(grad.flatten(0, 2), z)
            found[4] = A[:, features + 2]
            A = _joined(A, features)
            found[3] = (V * A).sum(1)
        if needs[1] or needs[2]:
            S_u = _joined(_times_z(sums, z), features)
            S, u = S_u[: features + 1], S_u[features + 1] + S_u[features + 2]
            both = w.norm_weight.float()[:, None] * A - u - V @ S
            found[1], found[2] = both[:, :features], both[:, features]
        if needs[5]:
            found[5] = grad.view(-1, *w.positions.shape).sum(0, dtype=torch.float32)
    return tuple(
        one.to(leaf.dtype).contiguous() if need and one is not None else None
        for one, leaf, need in zip(found, leaves, needs, strict=True)
    )


def _rows(
    needs: tuple[bool, ...],
    grad: torch.Tensor,
    rstd: torch.Tensor,
    video: torch.Tensor,
    call: VideoCall,
    gain: torch.Tensor,
    V: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Z with rstd's rest and a 1, the rows that make S and u of it, and the video's gradient."""
    tokens, (dim, columns) = rstd.numel(), V.shape
    block_f = max(16, triton.next_power_of_2(columns + 2))
    exact = torch.cat([V * gain[:, None], gain[:, None], torch.ones_like(gain)[:, None]], 1)
    exact = pad(exact, (0, block_f - columns - 2))
    scaled = exact.to(grad.dtype)
    lost = (scaled.float() - exact).mean(0)
    gram = scaled  # not read without the video's gradient
    if needs[0]:
        product = pad(V.T @ V, (0, block_f - columns) * 2)
        rounded = product.to(grad.dtype)
        gram = torch.stack([rounded, (product - rounded.float()).to(grad.dtype)])
    of_weights = any(needs[1:5])
    z = grad.new_empty((tokens if of_weights else 0, block_f))
    sums = torch.empty_like(z)
    pixels = torch.empty_like(video, memory_format=torch.contiguous_format) if needs[0] else None
    tile = config.TRITON_ROWS_TILE // share(grad) // (2 if needs[0] else 1)
    block_m = min(config.TRITON_ROWS_MOST_TOKENS, max(16, tile // block_f))
    step = config.TRITON_ROWS_STEP_BYTES // (block_f * grad.element_size())
    stem_bwd_kernel_rows[(triton.cdiv(tokens, block_m),)](
        grad,
        rstd.contiguous(),
        *call.tensors,
        scaled,
        lost,
        gram,
        z,
        sums,
        grad if pixels is None else pixels,
        tokens,
        *call.geometry,
        *call.channels,
        dim,
        of_weights,
        needs[0],
        block_m,
        min(64, max(16, step)),
        block_f,
        config.TRITON_STEP_FEATURES,
        num_warps=config.TRITON_ROWS_WARPS,
        num_stages=config.TRITON_BACKWARD_STAGES,
    )
    return z, sums, pixels


def _times_z(rows: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    """rows^T z over the tokens, in float32."""
    (tokens, columns), block_f = rows.shape, z.shape[1]
    tile = config.TRITON_COLUMNS_TILE // share(z)
    most = min(config.TRITON_COLUMNS_MOST_WIDTH, triton.next_power_of_2(columns))
    block_d = max(16, min(most, tile // block_f))
    slices = triton.cdiv(columns, block_d)
    parts = max(1, config.TRITON_COLUMNS_PROGRAMS // slices)
    block_m = config.TRITON_COLUMNS_TOKENS // share(z)
    length = max(config.TRITON_COLUMNS_LEAST_TOKENS, triton.cdiv(tokens, parts))
    length = triton.cdiv(length, block_m) * block_m
    parts = triton.cdiv(tokens, length)
    partial = z.new_empty((parts, columns, block_f), dtype=torch.float32)
    stem_bwd_kernel_columns[(slices, parts)](
        rows,
        z,
        partial,
        tokens,
        length,
        columns,
        block_m,
        block_d,
        block_f,
        num_warps=config.TRITON_COLUMNS_WARPS,
        num_stages=config.TRITON_BACKWARD_STAGES,
    )
    return partial.sum(0)


def _joined(product: torch.Tensor, features: int) -> torch.Tensor:
    """The columns of Z, with what was left of rstd added to its own."""
    of_rstd = product[:, features : features + 2].sum(1, keepdim=True)
    return torch.cat([product[:, :features], of_rstd], 1)
