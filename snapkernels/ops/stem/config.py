"""Launch choices of the stem kernels, and what each backend can take."""

from math import prod

import torch

from snapkernels import extension
from snapkernels.dispatch import triton_refuses as refuses_device

CUDA_PATCH = 4  # a row of a patch is one float4
CUDA_MOST_CHANNELS = 6  # of both videos: the pixels of two patches stay in registers
CUDA_COLUMNS = 64  # of D at once, so D is in 64s
CUDA_SHARED_BYTES = 232448  # of a block: W, bias, norm_weight and norm_bias stay there
CUDA_MOST_TOKENS = 2**31 - 64  # a tile of 64 may be the last
CUDA_MOST_PIXELS = 2**31 - 1  # of a frame
CUDA_BACKWARD_CHANNELS = (3, 6)  # of both videos, the first with three: 48 or 96 features
CUDA_BACKWARD_COLUMNS = 256  # of D, of a block: 104 of its accumulators a thread, 52 more beside
CUDA_BACKWARD_LEAST_GROUPS = 13  # of all videos: with fewer 64 tokens may have 7 positions
CUDA_BACKWARD_TOKENS = 64  # of a stage
CUDA_BACKWARD_PART = 128  # columns of D in one part of c1 and c2
CUDA_BACKWARD_EXTRA = 8  # columns of a product beside the features
VECTOR = 16  # bytes of the CUDA kernel's loads and stores
WEIGHTS = ("weight", "bias", "norm_weight", "norm_bias", "positions")

TRITON_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
TRITON_MOST_WIDTH = 2048  # of a token: its padded row stays in registers from product to output
TRITON_MOST_FEATURES = 509  # of a patch; three more columns make 512, a row of backward tiles
TRITON_TILE = 32768  # accumulators of a forward program: half of a multiprocessor's registers
TRITON_MOST_TOKENS = 32  # of a forward tile: 1024 wide at 64 accumulators a thread of 16 warps
TRITON_ACCUMULATORS = 64  # of a thread: as many again hold the epilogue without a spill
TRITON_STEP_FEATURES = 16  # of one step of a product: 3 and 6 steps are 48 and 96 without padding
TRITON_MOST_WARPS = 16  # 32 leave a thread 64 registers
TRITON_STAGES = 2  # steps whose loads are under way at once; 3 spill at 96 features

TRITON_BACKWARD_STAGES = 3  # as in the forward; the longer loops there do not spill

# Backward, rows: tokens x features of H in registers, half as many beside the pixels' gradient,
# which spills on sm_80 otherwise; tokens x width of the gradient streamed.
TRITON_ROWS_TILE = 8192  # 32 accumulators a thread, beside 32 features
TRITON_ROWS_MOST_TOKENS = 64  # one wgmma tile is 64 rows
TRITON_ROWS_STEP_BYTES = 16384  # of the matrix, in one step along the width: 3 fit beside the rest
TRITON_ROWS_WARPS = 8  # the gather has 32 features a thread then, 64 spill

# Backward, columns: width x features in registers, tokens streamed.
TRITON_COLUMNS_TILE = 16384  # 64 accumulators a thread
TRITON_COLUMNS_MOST_WIDTH = 128  # two rows of wgmma tiles
TRITON_COLUMNS_TOKENS = 64  # of one step
TRITON_COLUMNS_WARPS = 8  # two wgmma warpgroups
TRITON_COLUMNS_PROGRAMS = 256  # two for each multiprocessor of an H100
TRITON_COLUMNS_LEAST_TOKENS = 512  # of one program: its partial sums then cost less than its reads

TRITON_FP32_SHARE = 4  # float32's tiles are this much smaller: its operands fill registers


def cuda_refuses(
    video: torch.Tensor,
    scale: torch.Tensor,
    low_res: torch.Tensor | None,
    w: tuple[torch.Tensor, ...],
    patch: int,
    group: tuple[int, int, int],
    eps: float,
) -> str | None:
    """Why the CUDA kernel cannot run this call, or None."""
    if reason := extension.refuses(video):
        return reason
    if patch != CUDA_PATCH:
        return f"a patch's side is {patch}, not {CUDA_PATCH}"
    channels = video.shape[1] + (0 if low_res is None else low_res.shape[1])
    if channels > CUDA_MOST_CHANNELS:
        return f"both videos have {channels} channels, more than {CUDA_MOST_CHANNELS}"
    width, features = w[0].shape
    if width % CUDA_COLUMNS:
        return f"a token is {width} wide, not a multiple of {CUDA_COLUMNS}"
    held = width * (2 * features + 20) + 16 * features
    if held > CUDA_SHARED_BYTES:
        return f"the weights have {held} bytes, more than the {CUDA_SHARED_BYTES} of shared memory"
    pixels = {"video": video, "scale": scale}
    if low_res is not None:
        pixels["low_res"] = low_res
    weights = dict(zip(WEIGHTS, w, strict=True))
    for name, tensor in (pixels | weights).items():
        dtype = torch.float32 if name in pixels else torch.bfloat16
        if tensor.dtype != dtype:
            return f"{name} is {tensor.dtype}, not {dtype}"
        if not tensor.is_contiguous():
            return f"{name} has strides {tensor.stride()}: it must be contiguous"
        if name not in ("scale", "low_res") and tensor.data_ptr() % VECTOR:
            return f"{name} does not start at a multiple of {VECTOR} bytes"
    batch, _, frames, h, w_pixels = video.shape
    rows = -(-h // (patch * group[1])) * group[1]
    tokens = batch * frames * rows * (w_pixels // patch)
    if tokens > CUDA_MOST_TOKENS:
        return f"there are {tokens} tokens, more than {CUDA_MOST_TOKENS}"
    frame = max(prod(tensor.shape[3:]) for tensor in pixels.values())
    if frame > CUDA_MOST_PIXELS:
        return f"a frame has {frame} pixels, more than {CUDA_MOST_PIXELS}"
    return None


def cuda_backward_refuses(
    video: torch.Tensor,
    scale: torch.Tensor,
    low_res: torch.Tensor | None,
    w: tuple[torch.Tensor, ...],
    patch: int,
    group: tuple[int, int, int],
    eps: float,
) -> str | None:
    """Why the CUDA kernel of the weights' gradients cannot run this call, or None."""
    if reason := cuda_refuses(video, scale, low_res, w, patch, group, eps):
        return reason
    channels = video.shape[1] + (0 if low_res is None else low_res.shape[1])
    if video.shape[1] != CUDA_BACKWARD_CHANNELS[0] or channels not in CUDA_BACKWARD_CHANNELS:
        return f"the video has {video.shape[1]} channels, both have {channels}: not 3, or 3 and 3"
    if w[0].shape[0] % CUDA_BACKWARD_COLUMNS:
        return f"a token is {w[0].shape[0]} wide, not a multiple of {CUDA_BACKWARD_COLUMNS}"
    tables, patches = w[4].shape[:2]
    if tables != 1:
        return f"there are {tables} position tables, not one"
    batch, _, frames, h, w_pixels = video.shape
    rows = -(-h // (patch * group[1])) * group[1]
    groups = batch * frames * rows * (w_pixels // patch) // max(patches, 1)
    if groups < CUDA_BACKWARD_LEAST_GROUPS:
        return f"all videos have {groups} groups, fewer than {CUDA_BACKWARD_LEAST_GROUPS}"
    return None


def triton_refuses(
    video: torch.Tensor,
    scale: torch.Tensor,
    low_res: torch.Tensor | None,
    w: tuple[torch.Tensor, ...],
    *_: object,
) -> str | None:
    """Why the Triton kernels cannot run this call, or None."""
    if reason := refuses_device(video):
        return reason
    width, features = w[0].shape
    named = {"video": video, "scale": scale, "low_res": low_res, "weight": w[0]}
    for name, tensor in named.items():
        if tensor is not None and tensor.dtype not in TRITON_DTYPES:
            return f"{name} is {tensor.dtype}, not bfloat16, float16 or float32"
    if width > TRITON_MOST_WIDTH:
        return f"a token is {width} wide, more than {TRITON_MOST_WIDTH}"
    if features > TRITON_MOST_FEATURES:
        return f"a patch has {features} features, more than {TRITON_MOST_FEATURES}"
    return None
