"""patchify and unpatchify in Triton, for any strides, dtype and patch.

A program takes BLOCK_W patches of one row of patches of one frame. The pixel rows that these
patches have are read along W, transposed in registers and written patch by patch, so that both
sides of the copy are contiguous.

Legend: b batch, t frame, h row of patches, w column of patches, k = (channel, pixel row) and
j pixel column inside a patch; K and J are padded to powers of two. E = BLOCK_W * BLOCK_J pixels of
a row, F = BLOCK_K * BLOCK_J features of a token.
"""

import torch
import triton
import triton.language as tl

from snapkernels.ops.patch.config import TRITON_BLOCK_BYTES, TRITON_WARPS
from snapkernels.patches import PatchLayout


@triton.jit
def patchify_kernel(
    p_video,
    p_tokens,
    stride_b,
    stride_c,
    stride_t,
    stride_y,
    stride_x,
    frames,
    patch_rows,
    columns,
    group_t,
    group_h,
    GROUP_W: tl.constexpr,
    CHANNELS: tl.constexpr,
    PATCH: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    b, t, h, w0 = _patch_row(frames, patch_rows, columns, BLOCK_W)
    channel_K, row_K, m_K, x_E, m_E = _pixels(
        w0, columns, CHANNELS, PATCH, BLOCK_W, BLOCK_K, BLOCK_J
    )
    p_KE = (
        p_video
        + (b * stride_b + t * stride_t + h * PATCH * stride_y)
        + (channel_K * stride_c + row_K * stride_y)[:, None]
        + (x_E * stride_x)[None, :]
    )
    pixels_KE = tl.load(p_KE, mask=m_K[:, None] & m_E[None, :])

    pixels_WKJ = tl.permute(tl.reshape(pixels_KE, (BLOCK_K, BLOCK_W, BLOCK_J)), (1, 0, 2))
    tokens_WF = tl.reshape(pixels_WKJ, (BLOCK_W, BLOCK_K * BLOCK_J))

    g_W, n_W, m_W = _place(t, h, w0, patch_rows, columns, group_t, group_h, GROUP_W, BLOCK_W)
    feature_F, m_F = _features(CHANNELS, PATCH, BLOCK_K, BLOCK_J)
    token_W = b * frames * patch_rows * columns + g_W * group_t * group_h * GROUP_W + n_W
    p_WF = p_tokens + (token_W * (CHANNELS * PATCH * PATCH))[:, None] + feature_F[None, :]
    tl.store(p_WF, tokens_WF, mask=m_W[:, None] & m_F[None, :])


@triton.jit
def unpatchify_kernel(
    p_tokens,
    p_video,
    stride_b,
    stride_g,
    stride_n,
    stride_p,
    frames,
    patch_rows,
    columns,
    group_t,
    group_h,
    GROUP_W: tl.constexpr,
    CHANNELS: tl.constexpr,
    PATCH: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    b, t, h, w0 = _patch_row(frames, patch_rows, columns, BLOCK_W)
    g_W, n_W, m_W = _place(t, h, w0, patch_rows, columns, group_t, group_h, GROUP_W, BLOCK_W)
    feature_F, m_F = _features(CHANNELS, PATCH, BLOCK_K, BLOCK_J)
    p_WF = (
        p_tokens
        + b * stride_b
        + (g_W * stride_g + n_W * stride_n)[:, None]
        + (feature_F * stride_p)[None, :]
    )
    tokens_WF = tl.load(p_WF, mask=m_W[:, None] & m_F[None, :])

    tokens_KWJ = tl.permute(tl.reshape(tokens_WF, (BLOCK_W, BLOCK_K, BLOCK_J)), (1, 0, 2))
    pixels_KE = tl.reshape(tokens_KWJ, (BLOCK_K, BLOCK_W * BLOCK_J))

    channel_K, row_K, m_K, x_E, m_E = _pixels(
        w0, columns, CHANNELS, PATCH, BLOCK_W, BLOCK_K, BLOCK_J
    )
    frame_K = (b * CHANNELS + channel_K) * frames + t
    row_K = frame_K * patch_rows * PATCH + h * PATCH + row_K
    p_K = p_video + row_K * columns * PATCH
    tl.store(p_K[:, None] + x_E[None, :], pixels_KE, mask=m_K[:, None] & m_E[None, :])


@triton.jit
def _patch_row(frames, patch_rows, columns, BLOCK_W: tl.constexpr):
    """This program's video, frame and row of patches (int64), and its first column of patches."""
    tiles = tl.cdiv(columns, BLOCK_W)
    row = tl.program_id(0) // tiles
    w0 = tl.program_id(0) % tiles * BLOCK_W
    frame = row // patch_rows
    b, t, h = frame // frames, frame % frames, row % patch_rows
    return b.to(tl.int64), t.to(tl.int64), h.to(tl.int64), w0


@triton.jit
def _pixels(
    w0,
    columns,
    CHANNELS: tl.constexpr,
    PATCH: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    """Channel and pixel row of every k, pixel column of every e, all int64, and their masks."""
    k_K = tl.arange(0, BLOCK_K).to(tl.int64)
    e_E = tl.arange(0, BLOCK_W * BLOCK_J)
    if BLOCK_J == PATCH:  # the compiler sees that e are contiguous only if it is told so
        x_E = w0 * PATCH + e_E
        m_E = x_E < columns * PATCH
    else:
        x_E = (w0 + e_E // BLOCK_J) * PATCH + e_E % BLOCK_J
        m_E = (w0 + e_E // BLOCK_J < columns) & (e_E % BLOCK_J < PATCH)
    return k_K // PATCH, k_K % PATCH, k_K < CHANNELS * PATCH, x_E.to(tl.int64), m_E


@triton.jit
def _features(
    CHANNELS: tl.constexpr, PATCH: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_J: tl.constexpr
):
    """The feature (channel, pixel row, pixel column) of every f, int64, and its mask."""
    f_F = tl.arange(0, BLOCK_K * BLOCK_J)
    if BLOCK_J == PATCH:
        feature_F = f_F
        m_F = f_F < CHANNELS * PATCH * PATCH
    else:
        feature_F = f_F // BLOCK_J * PATCH + f_F % BLOCK_J
        m_F = (f_F // BLOCK_J < CHANNELS * PATCH) & (f_F % BLOCK_J < PATCH)
    return feature_F.to(tl.int64), m_F


@triton.jit
def _place(
    t, h, w0, patch_rows, columns, group_t, group_h, GROUP_W: tl.constexpr, BLOCK_W: tl.constexpr
):
    """Group and place in the group of every patch w of a row, int64, and its mask."""
    w_W = w0 + tl.arange(0, BLOCK_W)
    groups_h, groups_w = patch_rows // group_h, columns // GROUP_W
    g_W = (t // group_t * groups_h + h // group_h) * groups_w + w_W // GROUP_W
    n_W = (t % group_t * group_h + h % group_h) * GROUP_W + w_W % GROUP_W
    return g_W, n_W, w_W < columns


def patchify(video: torch.Tensor, patch: int, group: tuple[int, int, int]) -> torch.Tensor:
    batch, channels, t, h, w = video.shape
    layout = PatchLayout((t, h, w), patch, group)
    tokens = video.new_empty((batch, layout.num_groups, layout.group_tokens, channels * patch**2))
    _launch(patchify_kernel, video, tokens, batch, channels, layout)
    return tokens


def unpatchify(
    tokens: torch.Tensor, size: tuple[int, int, int], patch: int, group: tuple[int, int, int]
) -> torch.Tensor:
    layout = PatchLayout(size, patch, group)
    batch, channels = len(tokens), tokens.shape[-1] // patch**2
    video = tokens.new_empty((batch, channels, *size))
    _launch(unpatchify_kernel, tokens, video, batch, channels, layout)
    return video


def _launch(
    kernel: triton.JITFunction,
    source: torch.Tensor,
    target: torch.Tensor,
    batch: int,
    channels: int,
    layout: PatchLayout,
) -> None:
    if not target.numel():
        return
    frames, height, width = layout.size
    patch_rows, columns = height // layout.patch, width // layout.patch
    block_k = triton.next_power_of_2(channels * layout.patch)
    block_j = triton.next_power_of_2(layout.patch)
    most = TRITON_BLOCK_BYTES // (block_k * block_j * source.element_size())
    block_w = min(triton.next_power_of_2(columns), max(1, most))
    grid = (batch * frames * patch_rows * triton.cdiv(columns, block_w),)
    with torch.cuda.device_of(source):  # Triton launches on the current device
        kernel[grid](
            source,
            target,
            *source.stride(),
            frames,
            patch_rows,
            columns,
            *layout.group,
            channels,
            layout.patch,
            block_w,
            block_k,
            block_j,
            num_warps=TRITON_WARPS,
        )
