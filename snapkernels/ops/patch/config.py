"""Launch choices of the patch kernels, and what each backend can take."""

from math import gcd

import torch

from snapkernels import extension
from snapkernels.dispatch import triton_refuses

# Pixels of one program are BLOCK_W patches wide and every channel high: this many bytes.
TRITON_BLOCK_BYTES = 16384
TRITON_WARPS = 4
TRITON_MOST_FEATURES = 16384  # of a patch, padded to powers of two; Triton ends at 2**20

CELL_BYTES = (4, 8, 16)
VECTOR = 16  # bytes of the CUDA kernel's loads and stores
MOST_COLUMNS = 65535  # a tile each, the largest grid.y
MOST_TOKEN_BYTES = 32768  # a tile of the narrowest cells then fits shared memory
WIDE_BYTES = (2, 4, 8, 16)  # a patch's row as one element, kernels/cpu.py


def cuda_refuses_video(video: torch.Tensor, patch: int, group: tuple[int, int, int]) -> str | None:
    """Why the CUDA kernel cannot cut `video`, or None."""
    shape = video.shape
    return _cuda_refuses("video", video, patch, shape[4], shape[1] * patch * patch)


def cuda_refuses_tokens(
    tokens: torch.Tensor, size: tuple[int, int, int], patch: int, group: tuple[int, int, int]
) -> str | None:
    """Why the CUDA kernel cannot join `tokens`, or None."""
    return _cuda_refuses("tokens", tokens, patch, size[2], tokens.shape[3])


def _cuda_refuses(
    name: str, tensor: torch.Tensor, patch: int, width: int, features: int
) -> str | None:
    if reason := extension.refuses(tensor):
        return reason
    item = tensor.element_size()
    if patch * item not in CELL_BYTES:
        return f"a patch's row has {patch} * {item} bytes, not 4, 8 or 16"
    if width * item % VECTOR or features * item % VECTOR:
        return f"a row of {width * item} bytes or a token of {features * item} is not in 16s"
    if width // patch > MOST_COLUMNS:
        return f"a row has {width // patch} patches, more than {MOST_COLUMNS}"
    if features * item > MOST_TOKEN_BYTES:
        return f"a token has {features * item} bytes, more than {MOST_TOKEN_BYTES}"
    if not tensor.is_contiguous():
        *outer, inner = strides = tensor.stride()
        if inner != 1 or gcd(*outer) * item % VECTOR:
            return f"{name} has strides {strides}: the last must be 1, the others in 16 bytes"
    if tensor.data_ptr() % VECTOR:
        return f"{name} does not start at a multiple of 16 bytes"
    return None


def triton_refuses_video(video: torch.Tensor, patch: int, *_: object) -> str | None:
    """Why the Triton kernel cannot cut `video`, or None."""
    return triton_refuses(video) or _too_many(video.shape[1] * patch, patch)


def triton_refuses_tokens(
    tokens: torch.Tensor, size: tuple[int, int, int], patch: int, *_: object
) -> str | None:
    """Why the Triton kernel cannot join `tokens`, or None."""
    return triton_refuses(tokens) or _too_many(tokens.shape[3] // patch, patch)


def _too_many(rows: int, patch: int) -> str | None:
    block = (1 << (rows - 1).bit_length() if rows else 0) * (1 << (patch - 1).bit_length())
    if block <= TRITON_MOST_FEATURES:
        return None
    return f"a patch has {rows} * {patch} features, padded more than {TRITON_MOST_FEATURES}"


def cpu_refuses(tensor: torch.Tensor, *options: object) -> str | None:
    """Why rows of patches cannot move as wide elements, or None."""
    patch = options[-2]
    assert isinstance(patch, int)
    item = tensor.element_size()
    if tensor.is_cuda:
        return "it is for CPU tensors"
    if patch * item not in WIDE_BYTES:
        return f"a patch's row has {patch} * {item} bytes, not 2, 4, 8 or 16"
    strides = tensor.stride()
    if strides[-1] != 1 or any(s % patch for s in strides[:-1]) or tensor.storage_offset() % patch:
        return f"strides {strides} or the storage offset are not in whole rows of a patch"
    return None
