"""Launch choices of the head's kernels, and what each backend can take."""

from typing import NamedTuple

import torch

from snapkernels import extension
from snapkernels.dispatch import triton_refuses

TRITON_ROWS = {2: 64, 4: 32}  # tokens of a program by bytes of an element: wgmma's least are 64
TRITON_WARPS = 8  # two groups for wgmma's 64 rows: registers leave room for two programs then
TRITON_STATS_COLUMNS = 128  # of D at once for mean and variance: 256 take the second program's
TRITON_COLUMNS = {2: 64, 4: 32}  # of D at once in a product: a product in float32 is unrolled
TRITON_SLICE = 4096  # most elements of W at once: of a patch of many features, fewer columns
TRITON_STAGES = 3  # of the loads of tokens and W, which are in L2 then: 50 KB of shared memory
TRITON_MOST_FEATURES = 256  # of a patch, padded: the product's tile stays in registers
# The backward's pass over the tokens. Triton holds x of a step twice, as it was read and as the
# tensor cores have g, so 64 tokens of 128 columns take 244 registers, and of 64 columns spill on
# sm_80; 32 of 64 take 120, so that two programs fit.
TRITON_BWD_TOKENS = {2: 32, 4: 16}  # of a step, by bytes of an element: float32 is unrolled
TRITON_BWD_COLUMNS = 64  # of D, of a program: dF is read once for each slice, out of L2
TRITON_BWD_SLICE = {2: 8192, 4: 4096}  # most elements of R at once: of many features, fewer columns
TRITON_BWD_PARTS = 33  # ranges of tokens: at D = 1024, 528 programs, twice two on each of 132
TRITON_BWD_WARPS = 8
TRITON_BWD_STAGES = 3
TRITON_ROW_TOKENS = 64  # of a program that gathers dF: 18 KB of loads at once, and many programs
TRITON_ROW_WARPS = 4
TRITON_VECTOR_COLUMNS = 1024  # of D at once in W times a vector
TRITON_MIX_BLOCK = 2048  # elements of video_mix's program: two 16-byte loads a thread and video
TRITON_MIX_WARPS = 8

CUDA_PATCH = 4  # a row of a patch is one float4
CUDA_WIDTHS = (256, 512, 768, 1024)  # of a token: an instance of the kernel each
CUDA_CHANNELS = (1, 3)
CUDA_PARTIALS = 1024  # sums of a loss, one a block: kHeadPartials of csrc/head/head.h
CUDA_MOST_TOKENS = 2**31 - 64  # a tile of 64 may be the last
CUDA_BACKWARD_COLUMNS = 256  # of D, of a block of the backward
CUDA_BACKWARD_TOKENS = 64  # of a stage of it
VECTOR = 16  # bytes of the CUDA kernel's loads and stores
WEIGHTS = ("norm_weight", "norm_bias", "weight", "bias")


def cuda_refuses_head(
    tokens: torch.Tensor,
    w: tuple[torch.Tensor, ...],
    size: tuple[int, int, int],
    patch: int,
    group: tuple[int, int, int],
    eps: float,
) -> str | None:
    """Why the CUDA kernel cannot make F of `tokens`, or None."""
    return _cuda_refuses(tokens, w, patch, {}, {})


def cuda_refuses_head_mix(
    tokens: torch.Tensor,
    video: torch.Tensor,
    other: torch.Tensor | None,
    mix: torch.Tensor,
    w: tuple[torch.Tensor, ...],
    patch: int,
    group: tuple[int, int, int],
    eps: float,
) -> str | None:
    """Why the CUDA kernel cannot mix F with `video` and `other`, or None."""
    videos = {"video": video} if other is None else {"video": video, "other": other}
    return _cuda_refuses(tokens, w, patch, videos, {"mix": mix})


def cuda_refuses_head_loss(
    tokens: torch.Tensor,
    video: torch.Tensor,
    sample: torch.Tensor,
    terms: torch.Tensor,
    w: tuple[torch.Tensor, ...],
    seed: int,
    patch: int,
    group: tuple[int, int, int],
    eps: float,
) -> str | None:
    """Why the CUDA kernel cannot make the loss of F, or None."""
    if not sample.is_contiguous():
        return "sample is not contiguous"
    return _cuda_refuses(tokens, w, patch, {"video": video}, {"terms": terms})


def _cuda_refuses(
    tokens: torch.Tensor,
    w: tuple[torch.Tensor, ...],
    patch: int,
    videos: dict[str, torch.Tensor],
    factors: dict[str, torch.Tensor],
) -> str | None:
    if reason := extension.refuses(tokens):
        return reason
    width, (features, *_) = tokens.shape[-1], w[-1].shape
    if patch != CUDA_PATCH:
        return f"the patch is {patch}, not {CUDA_PATCH}"
    if width not in CUDA_WIDTHS:
        return f"a token is {width} wide, not one of {CUDA_WIDTHS}"
    if features not in [channels * patch**2 for channels in CUDA_CHANNELS]:
        return f"a patch has {features // patch**2} channels, not one of {CUDA_CHANNELS}"
    count = tokens.numel() // width
    if not 0 < count <= CUDA_MOST_TOKENS:
        return f"there are {count} tokens, not 1 to {CUDA_MOST_TOKENS}"
    bfloat16s = {"tokens": tokens, **dict(zip(WEIGHTS, w, strict=True))}
    for dtype, tensors in ((torch.bfloat16, bfloat16s), (torch.float32, videos | factors)):
        for name, tensor in tensors.items():
            if tensor.dtype != dtype:
                return f"{name} is {tensor.dtype}, not {dtype}"
            if not tensor.is_contiguous():
                return f"{name} is not contiguous"
    # Factors, which a sampler may cut out of a table, are read one by one.
    for name, tensor in (bfloat16s | videos).items():
        if tensor.data_ptr() % VECTOR:
            return f"{name} does not start at a multiple of {VECTOR} bytes"
    return None


def triton_refuses_head(
    tokens: torch.Tensor,
    w: tuple[torch.Tensor, ...],
    size: tuple[int, int, int],
    patch: int,
    group: tuple[int, int, int],
    eps: float,
) -> str | None:
    """Why the Triton kernel cannot make F of `tokens`, or None."""
    return _triton_refuses(tokens, w)


def triton_refuses_head_mix(
    tokens: torch.Tensor,
    video: torch.Tensor,
    other: torch.Tensor | None,
    mix: torch.Tensor,
    w: tuple[torch.Tensor, ...],
    patch: int,
    group: tuple[int, int, int],
    eps: float,
) -> str | None:
    """Why the Triton kernel cannot mix F with `video` and `other`, or None."""
    return _triton_refuses(tokens, w)


def triton_refuses_head_loss(
    tokens: torch.Tensor,
    video: torch.Tensor,
    sample: torch.Tensor,
    terms: torch.Tensor,
    w: tuple[torch.Tensor, ...],
    seed: int,
    patch: int,
    group: tuple[int, int, int],
    eps: float,
) -> str | None:
    """Why the Triton kernel cannot make the loss of F, or None."""
    return _triton_refuses(tokens, w)


def triton_refuses_video_mix(
    F: torch.Tensor, video: torch.Tensor, other: torch.Tensor | None, mix: torch.Tensor
) -> str | None:
    """Why the Triton kernel cannot mix `F` with `video` and `other`, or None."""
    return _triton_refuses_dtype("F", F) or triton_refuses(F)


def _triton_refuses(tokens: torch.Tensor, w: tuple[torch.Tensor, ...]) -> str | None:
    if reason := _triton_refuses_dtype("tokens", tokens) or triton_refuses(tokens):
        return reason
    features = w[-1].shape[0]
    if features > TRITON_MOST_FEATURES:
        return f"a patch has {features} features, more than {TRITON_MOST_FEATURES}"
    return None


def _triton_refuses_dtype(name: str, tensor: torch.Tensor) -> str | None:
    if tensor.dtype == torch.float64:
        return f"{name} is float64, and its sums would be float32"
    return None


class TritonBlocks(NamedTuple):
    """Tokens of a program, features of a patch, and columns of D at once: powers of two."""

    m: int
    p: int
    columns: int


def triton_blocks(tokens: torch.Tensor, weight: torch.Tensor) -> TritonBlocks:
    """The blocks of a kernel that multiplies `tokens` by `weight`."""
    item, (features, width) = tokens.element_size(), weight.shape
    p = max(16, power_of_two(features))  # 16: the least that tensor cores multiply
    columns = min(max(16, power_of_two(width)), TRITON_COLUMNS[item], TRITON_SLICE // p)
    return TritonBlocks(TRITON_ROWS[item], p, columns)


def triton_backward_blocks(tokens: torch.Tensor, weight: torch.Tensor) -> TritonBlocks:
    """The blocks of the backward's pass over `tokens`."""
    item, (features, width) = tokens.element_size(), weight.shape
    p = max(16, power_of_two(features))
    columns = min(max(16, power_of_two(width)), TRITON_BWD_COLUMNS, TRITON_BWD_SLICE[item] // p)
    return TritonBlocks(TRITON_BWD_TOKENS[item], p, columns)


def power_of_two(least: int) -> int:
    """The smallest power of two from `least` on."""
    return 1 << (least - 1).bit_length()
