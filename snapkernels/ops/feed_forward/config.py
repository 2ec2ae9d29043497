"""Launch choices of the feed-forward family's kernels, and what each backend can take.

Of Triton's choices none is measured against another: what stands here of them is what fits. A tile
of 128 x 128 is 64 accumulators a thread and, with e4m3, 64 of what is added to them; a stage is 32
KB of operands, and three stages are the 99 KB of an sm_86 or sm_89.
"""

from typing import NamedTuple

import torch

from snapkernels import extension
from snapkernels.dispatch import triton_refuses
from snapkernels.ops.feed_forward.weights import FeedForwardWeights, Fp8FeedForwardWeights

TRITON_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# By bytes of an element: 1 and 2 for the tensor cores, 4 for float32, whose products are unrolled.
TRITON_ROWS = {1: 128, 2: 128, 4: 32}  # tokens of a program
TRITON_COLUMNS = {1: 128, 2: 128, 4: 64}  # outputs
TRITON_DEPTH = {1: 128, 2: 64, 4: 32}  # of the sum at once; of e4m3 also what is promoted at once
TRITON_LEAST_DEPTH = {1: 32, 2: 16, 4: 16}  # of a product
TRITON_WARPS = 8  # two groups for wgmma's 64 rows
TRITON_STAGES = 3
TRITON_GROUP = 8  # rows of tiles that go through the columns together
TRITON_ROW_ELEMENTS = 16  # of a token, of a thread that norms it: two 16-byte loads of bf16
TRITON_MOST_WIDTH = 16 * 32 * 32  # of a token: the elements of a block of 1024 threads
FP8_CAPABILITY = (8, 9)  # compute capability of the first GPUs that convert to and multiply e4m3
DROPOUT_ELEMENTS = 4  # that share a block of Philox, and so a row

CUDA_COLUMNS = 256  # of a product: two blocks of a cluster have half each
CUDA_DEPTH = 256  # bytes of what is summed over: two stages, after which sums of e4m3 are promoted
CUDA_WIDTH = 256  # of a token that is normed or quantised: a warp's 32 lanes have 8 elements each
CUDA_MOST_WIDTH = 4096  # which a warp's registers hold
CUDA_MOST_TOKENS = 2**26
CUDA_MOST_COLUMNS = 2**24  # 72 rows of them are counted in an int
# Below it cuBLAS and separate passes are faster, of a sublayer 3072 and 12288 wide on an H200; with
# 12288 tokens they are not.
CUDA_LEAST_TOKENS = 8192
CUDA_PART = 256 * 128  # sums of a block, a tile of a product
VECTOR = 16  # bytes of one load

_FASTER = "cuBLAS and separate passes are faster"
_UNMEASURED = "is not measured to be faster than cuBLAS and separate passes"


def triton_refuses_linear(tokens: torch.Tensor, *_: object) -> str | None:
    """Why the Triton kernels cannot multiply `tokens`, or None."""
    return _triton_refuses(tokens)


def triton_refuses_fp8(tokens: torch.Tensor, *_: object) -> str | None:
    """Why the Triton kernels cannot quantise `tokens` and multiply them so, or None."""
    return _triton_refuses(tokens) or _fp8_refuses(tokens)


def triton_refuses_feed_forward(
    tokens: torch.Tensor, w: FeedForwardWeights, dropout: float, seed: int | None, eps: float
) -> str | None:
    """Why the Triton kernels cannot run the sublayer on `tokens`, or None."""
    if dropout and seed is None:
        return "without a seed dropout draws from PyTorch's generator"
    if dropout and len(w.fc1_bias) % DROPOUT_ELEMENTS:
        return f"with dropout the hidden width has to be a multiple of {DROPOUT_ELEMENTS}"
    return _triton_refuses(tokens)


def triton_declines_bf16(*_: object) -> str:
    """Why the Triton kernels do not run unasked in place of cuBLAS."""
    return _UNMEASURED


def _triton_refuses(tokens: torch.Tensor) -> str | None:
    width = tokens.shape[-1]
    if tokens.dtype not in TRITON_DTYPES:
        return f"the tokens are {tokens.dtype}, not bfloat16, float16 or float32"
    if width > TRITON_MOST_WIDTH:
        return f"a token is {width} wide, more than {TRITON_MOST_WIDTH}"
    return triton_refuses(tokens)


def _fp8_refuses(tokens: torch.Tensor) -> str | None:
    if not tokens.is_cuda:
        return None
    capability = torch.cuda.get_device_capability(tokens.device)
    if capability >= FP8_CAPABILITY:
        return None
    return (
        f"the GPU has compute capability {_dotted(capability)}, less than "
        f"{_dotted(FP8_CAPABILITY)}, and no fp8"
    )


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))


def cuda_refuses_linear(
    tokens: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    norm_weight: torch.Tensor | None,
    norm_bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    eps: float,
) -> str | None:
    """Why the CUDA kernels cannot multiply `tokens` by `weight`, or None."""
    given = {"weight": weight, "bias": bias, "residual": residual}
    given |= {"norm_weight": norm_weight, "norm_bias": norm_bias}
    return _cuda_refuses(tokens, given, norm_weight is not None, (weight.shape,), 2)


def cuda_declines_bf16(tokens: torch.Tensor, *_: object) -> str | None:
    """Why the CUDA kernels do not pay in place of cuBLAS in bf16, or None."""
    count = tokens.shape[:-1].numel()
    if count >= CUDA_LEAST_TOKENS:
        return None
    return f"there are {count} tokens: below {CUDA_LEAST_TOKENS} {_FASTER}"


def cuda_refuses_linear_fp8(
    tokens: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor,
    norm_weight: torch.Tensor | None,
    norm_bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    eps: float,
) -> str | None:
    """Why the CUDA kernels cannot quantise `tokens` and multiply them by `weight`, or None."""
    given = {"weight": weight, "weight_scale": weight_scale, "bias": bias, "residual": residual}
    given |= {"norm_weight": norm_weight, "norm_bias": norm_bias}
    return _cuda_refuses(tokens, given, True, (weight.shape,), 1)


def cuda_refuses_feed_forward(
    tokens: torch.Tensor, w: FeedForwardWeights, dropout: float, seed: int | None, eps: float
) -> str | None:
    """Why the CUDA kernels cannot run the sublayer on `tokens`, or None."""
    if dropout:
        return "there is dropout"
    shapes = w.fc1_weight.shape, w.fc2_weight.shape
    return _cuda_refuses(tokens, w._asdict(), True, shapes, 2)


def cuda_refuses_feed_forward_fp8(
    tokens: torch.Tensor, w: Fp8FeedForwardWeights, eps: float
) -> str | None:
    """Why the CUDA kernels cannot run the sublayer on `tokens` in fp8, or None."""
    shapes = w.fc1_weight.shape, w.fc2_weight.shape
    return _cuda_refuses(tokens, w._asdict(), True, shapes, 1)


def _cuda_refuses(
    tokens: torch.Tensor,
    given: dict[str, torch.Tensor | None],
    in_rows: bool,
    shapes: tuple[torch.Size, ...],
    item: int,
) -> str | None:
    """`in_rows`: tokens are normed or quantised; `item`: bytes of a product's elements."""
    if reason := extension.refuses(tokens):
        return reason
    if tokens.dtype != torch.bfloat16:
        return f"the tokens are {tokens.dtype}, not torch.bfloat16"
    width = tokens.shape[-1]
    if in_rows and (width % CUDA_WIDTH or width > CUDA_MOST_WIDTH):
        return f"a token is {width} wide, not a multiple of {CUDA_WIDTH} up to {CUDA_MOST_WIDTH}"
    for columns, depth in shapes:
        if not columns * depth:
            return f"a matrix is ({columns}, {depth}), without an element"
        if columns > CUDA_MOST_COLUMNS:
            return f"a matrix has {columns} rows, more than {CUDA_MOST_COLUMNS}"
        if columns % CUDA_COLUMNS or depth * item % CUDA_DEPTH:
            return (
                f"a matrix is ({columns}, {depth}), not multiples of {CUDA_COLUMNS} and "
                f"{CUDA_DEPTH // item}"
            )
    if tokens.numel() > CUDA_MOST_TOKENS * width:
        return f"there are more than {CUDA_MOST_TOKENS} tokens"
    for name, tensor in {"tokens": tokens, **given}.items():
        if tensor is not None and tensor.data_ptr() % VECTOR:
            return f"{name} does not start at a multiple of {VECTOR} bytes"
    return None


class TritonBlocks(NamedTuple):
    """A program's tile: tokens, outputs, and of the sum at once; powers of two."""

    m: int
    n: int
    k: int


def triton_blocks(item: int, rows: int, outputs: int, depth: int) -> TritonBlocks:
    """The tile of a (rows, depth) by (outputs, depth) product of elements of `item` bytes."""
    return TritonBlocks(
        max(16, min(power_of_two(rows), TRITON_ROWS[item])),
        max(16, min(power_of_two(outputs), TRITON_COLUMNS[item])),
        max(TRITON_LEAST_DEPTH[item], min(power_of_two(depth), TRITON_DEPTH[item])),
    )


def triton_row_warps(block: int) -> int:
    """Warps for a token of `block` elements, a power of two."""
    return max(1, min(block // (32 * TRITON_ROW_ELEMENTS), 32))


def power_of_two(least: int) -> int:
    """The smallest power of two from `least` on."""
    return 1 << (least - 1).bit_length()
