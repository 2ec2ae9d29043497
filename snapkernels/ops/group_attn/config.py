"""Launch choices of the absorbed kernels, and what each backend can take."""

from typing import NamedTuple

import torch

from snapkernels import extension
from snapkernels.dispatch import has_triton, triton_refuses
from snapkernels.ops.group_attn.weights import CrossAttentionWeights

TRITON_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
TRITON_MOST_LATENTS = 128  # of a group: the columns of one head are a tile's at the least

# By bytes of an element: 2 for the tensor cores, 4 for float32, whose products are unrolled.
# Scores. 128 tokens are two rows of wgmma's tiles, so that A, which every tile reads whole out of
# L2, is read half as often as of 64; 192 columns beside them are 96 accumulators a thread.
TRITON_TOKENS = {2: 128, 4: 32}  # of a program
TRITON_COLUMNS = {2: 192, 4: 64}  # of scores, of a program: whole heads, so at least one
TRITON_GRAD_COLUMNS = {2: 48, 4: 16}  # where P and its gradient are in registers: of 96 some spill
TRITON_LEAST_COLUMNS = 16  # of a product
TRITON_LEAST_REST = 8  # latents of a head's second piece: fewer are no 16-byte store
TRITON_SCORES_CHANNELS = {2: 64, 4: 32}  # of C at once
TRITON_STATS_CHANNELS = {2: 64, 4: 32}  # of C at once for mean and variance: 128 spill on sm_80
TRITON_STATS_STAGES = 4  # of their loads, which nothing else hides
TRITON_SCORES_WARPS = 8
TRITON_SCORES_STAGES = 3  # 40 KB each

# Sums over tokens, the read's context among them: rows of A by channels, tokens streamed as the
# scores' programs had them.
TRITON_CONTEXT_ROWS = {2: 128, 4: 32}
TRITON_CONTEXT_CHANNELS = {2: 128, 4: 32}
TRITON_CONTEXT_WARPS = 8
TRITON_CONTEXT_STAGES = 3  # 64 KB each; with 2 a step's loads begin when the one before has ended
TRITON_CONTEXT_BLOCKS = 8  # blocks of tokens whose maxima are read at once

# The write's update, and the patches' gradients: tokens by channels, columns of P streamed.
TRITON_UPDATE_TOKENS = {2: 128, 4: 32}
TRITON_UPDATE_CHANNELS = {2: 128, 4: 32}
TRITON_UPDATE_COLUMNS = {2: 64, 4: 32}  # of P at once
TRITON_UPDATE_WARPS = 8
TRITON_UPDATE_STAGES = 3

# Ends of sums over tokens that CUDA's backward leaves to cuBLAS: rows of A by channels.
TRITON_ENDS_COLUMNS = 32
TRITON_ENDS_CHANNELS = 128
TRITON_ENDS_WARPS = 4

# Gradients of an absorbed matrix: of 1024 x 1024, 256 programs and 16 parts of each sum.
TRITON_WEIGHT_ROWS = 64
TRITON_WEIGHT_CHANNELS = 64
TRITON_WEIGHT_WARPS = 4

TRITON_NORM_WARPS = 4  # for a row of latents: 3.4 us of 768 rows, 4.5 with 8

# The latents' small products: at 768 rows, 192 to 288 programs for 132 multiprocessors.
TRITON_LATENT_ROWS = {2: 64, 4: 32}
TRITON_LATENT_COLUMNS = {2: 64, 4: 32}
TRITON_ABSORB_COLUMNS = {2: 128, 4: 32}  # of A at once: 64 take 28 us with the score bias, 128 22
TRITON_OUTPUT_COLUMNS = {2: 128, 4: 32}  # of o's product, which has D columns and one head
TRITON_LATENT_DEPTH = {2: 64, 4: 32}  # of the sum at once
TRITON_LATENT_WARPS = 4
TRITON_ABSORB_WARPS = 8
TRITON_LATENT_STAGES = 3


# CUDA: what csrc/group_attn/group_attn.h has constants for.
CUDA_LATENTS = 24  # of a group
CUDA_COLUMNS = 384  # of scores: heads times latents, the registers of two warpgroups
CUDA_CHANNELS = 256  # what the width of a patch token comes in
CUDA_READ_TOKENS = 128  # what the patch tokens of a group that is read come in
CUDA_SUMS_TOKENS = 16  # whose sums the backward's kernels write
CUDA_MOST_TOKENS = (
    2**31 // 3 - 256
)  # of all groups: of read 3 numbers a token are counted in 32 bits
VECTOR = 16  # bytes of the kernels' loads and stores


class ScoreBlocks(NamedTuple):
    """A program of the scores: tokens, heads, and the latents of a head in one or two pieces.

    Blocks are powers of two, and 24 latents are not: as 16 + 8 they need no padding. `rest` is 0
    where one piece is as good.
    """

    tokens: int
    heads: int
    first: int
    rest: int


def score_blocks(
    item: int, num_heads: int, latents: int, most: dict[int, int] = TRITON_COLUMNS
) -> ScoreBlocks:
    """The blocks for `latents` of a group, in a dtype of `item` bytes, of `most` columns."""
    first, rest = power_of_two(latents), 0
    if (smaller := max(TRITON_LEAST_REST, power_of_two(latents - first // 2))) < first // 2:
        first, rest = first // 2, smaller
    heads = power_of_two(num_heads)
    while heads > 1 and heads * (first + rest) > most[item]:
        heads //= 2
    least = TRITON_LEAST_COLUMNS // min(first, rest or first)
    return ScoreBlocks(TRITON_TOKENS[item], max(heads, least), first, rest)


def block(count: int, most: int) -> int:
    """A block for `count` of something: a power of two from 16, which products need, to `most`."""
    return max(16, min(power_of_two(count), most))


def power_of_two(least: int) -> int:
    """The smallest power of two from `least` on."""
    return 1 << (least - 1).bit_length()


def triton_refuses_read(
    latents: torch.Tensor, patches: torch.Tensor, w: tuple[torch.Tensor, ...], *_: object
) -> str | None:
    """Why the Triton kernels cannot read `patches` into `latents`, or None."""
    if not patches.shape[2]:
        return "a group has no patches"
    return _triton_refuses(latents, latents)


def triton_refuses_write(
    patches: torch.Tensor, latents: torch.Tensor, w: tuple[torch.Tensor, ...], *_: object
) -> str | None:
    """Why the Triton kernels cannot write `latents` into `patches`, or None."""
    if not latents.shape[2]:
        return "a group has no latents"
    return _triton_refuses(patches, latents)


def _triton_refuses(updated: torch.Tensor, latents: torch.Tensor) -> str | None:
    if updated.dtype not in TRITON_DTYPES:
        return f"the tokens are {updated.dtype}, not bfloat16, float16 or float32"
    if latents.shape[2] > TRITON_MOST_LATENTS:
        return f"a group has {latents.shape[2]} latents, more than {TRITON_MOST_LATENTS}"
    return triton_refuses(updated)


def cuda_refuses_read(
    latents: torch.Tensor,
    patches: torch.Tensor,
    w: CrossAttentionWeights,
    mask: torch.Tensor | None,
    num_heads: int,
    eps: float,
) -> str | None:
    """Why the CUDA kernels cannot read `patches` into `latents`, or None."""
    if mask is not None:
        return "there is a mask"
    if not patches.shape[2] or patches.shape[2] % CUDA_READ_TOKENS:
        return f"a group has {patches.shape[2]} patches, not a multiple of {CUDA_READ_TOKENS}"
    return _cuda_refuses(patches, latents, w, num_heads, ("kv_norm_weight", "kv_norm_bias"))


def cuda_refuses_write(
    patches: torch.Tensor,
    latents: torch.Tensor,
    w: CrossAttentionWeights,
    num_heads: int,
    eps: float,
) -> str | None:
    """Why the CUDA kernels cannot write `latents` into `patches`, or None."""
    return _cuda_refuses(patches, latents, w, num_heads, ("o_bias",))


def _cuda_refuses(
    patches: torch.Tensor,
    latents: torch.Tensor,
    w: CrossAttentionWeights,
    num_heads: int,
    read: tuple[str, ...],
) -> str | None:
    """`read` names the weights that the kernels themselves load, in vectors."""
    if reason := extension.refuses(patches):
        return reason
    if not has_triton():
        return "the package triton is not installed"
    if patches.dtype != torch.bfloat16:
        return f"the tokens are {patches.dtype}, not torch.bfloat16"
    (batch, groups, tokens, width), num_latents = patches.shape, latents.shape[2]
    if num_latents != CUDA_LATENTS or num_heads * num_latents != CUDA_COLUMNS:
        return (
            f"a group has {num_latents} latents and {num_heads} heads, not {CUDA_LATENTS} and "
            f"{CUDA_COLUMNS // CUDA_LATENTS}"
        )
    if width % CUDA_CHANNELS:
        return f"a patch token is {width} wide, not a multiple of {CUDA_CHANNELS}"
    if batch * groups * tokens > CUDA_MOST_TOKENS:
        return f"there are {batch * groups * tokens} patch tokens, more than {CUDA_MOST_TOKENS}"
    if not patches.is_contiguous():
        return f"patches has strides {patches.stride()}: it must be contiguous"
    for name, tensor in {"patches": patches, **{one: getattr(w, one) for one in read}}.items():
        if tensor.data_ptr() % VECTOR:
            return f"{name} does not start at a multiple of {VECTOR} bytes"
    return None
