"""Noise and dropout by counter: seed, sample and element name a value, on any device.

Nothing is carried from call to call: a video's noise is the same alone, in any batch, on any number
of GPUs, and a kernel can make it where it is needed. This is the definition, in PyTorch;
`philox_triton.py` and `csrc/philox.cuh` are the same in the languages of the kernels. The words
agree bit for bit, so dropout does, and the normals of all three are within 2 ulp of the equation.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10

# The sample that dropout counts by. No video has it, so that one seed may serve noise and dropout.
DROPOUT_SAMPLE = -1

_LOW = 0xFFFFFFFF
# Of B x K counters at once: about 20 MB of temporaries.
_CHUNK = 1 << 16


def words(seed: int, sample: Tensor, blocks: Tensor) -> Tensor:
    """Philox4x32-10 (Salmon, Moraes, Dror and Shaw, 2011), (B, K, 4) int64 in [0, 2^32).

    Args:
        seed: the key, in [0, 2^64): its low word, then its high word.
        sample: (B,) int64, the global index of each video: low and high word are c_2 and c_3.
        blocks: (K,) int64, element // 4: low and high word are c_0 and c_1.

    Raises:
        ValueError: the seed is out of range, or a tensor has another dtype or rank.
    """
    _check(seed, sample)
    if blocks.dtype != torch.int64 or blocks.dim() != 1:
        raise ValueError(f"blocks: {_described(blocks)}, must be (K,) int64")
    key = [seed & _LOW, seed >> 32]
    block_BK, sample_BK = torch.broadcast_tensors(blocks[None, :], sample[:, None])
    c = [half for x in (block_BK, sample_BK) for half in (x & _LOW, x >> 32 & _LOW)]
    for _ in range(ROUNDS):
        high_0, low_0 = _product(MULTIPLIERS[0], c[0])
        high_1, low_1 = _product(MULTIPLIERS[1], c[2])
        c = [high_1 ^ c[1] ^ key[0], low_1, high_0 ^ c[3] ^ key[1], low_0]
        key = [(k + w) & _LOW for k, w in zip(key, WEYL, strict=True)]
    return torch.stack(c, -1)


def normals(seed: int, sample: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Independent standard normals, (B, *shape) float32, rounded once from float64.

    The words w of block k give elements 4 k to 4 k + 3 of a video in contiguous order: z_0 and z_1
    of w_0 and w_1, z_2 and z_3 of w_2 and w_3, by Box and Muller's transform:

        u = float32(w_0 | 1) / 2^32    z_0, z_1 = sqrt(-2 ln u) (cos, sin)(2 pi (w_1 >> 8) / 2^24)

    u is in (0, 1], so every value is finite, and at most 6.67 in magnitude.

    Args:
        seed: in [0, 2^64).
        sample: (B,) int64, the global index of each video.
        shape: of one video.

    Raises:
        ValueError: the seed is out of range, or `sample` has another dtype or rank.
    """
    return _by_block(seed, sample, shape, torch.float32, box_muller)


def kept(
    seed: int, shape: tuple[int, ...], probability: float, device: torch.device | str
) -> Tensor:
    """Which elements dropout keeps, bool of `shape`: each but with `probability`.

    Element e in contiguous order has word e % 4 of block e // 4 of `DROPOUT_SAMPLE` (c_2 and c_3
    are all ones), and is zeroed where that is below floor(probability 2^32).

    Args:
        seed: in [0, 2^64).
        shape: of the tensor.
        probability: of zeroing an element, in [0, 1).
        device: of the result.

    Raises:
        ValueError: the seed is out of range.
    """
    sample = torch.tensor([DROPOUT_SAMPLE], device=device)
    least = int(probability * 2**32)
    return _by_block(seed, sample, shape, torch.bool, lambda words: words >= least)[0]


def box_muller(words: Tensor) -> Tensor:
    """The equation of `normals` in float64, for words (..., 2 n); zero exactly where it is zero."""
    even, odd = words.unflatten(-1, (-1, 2)).unbind(-1)
    # Through float64, which holds the word exactly, so that there is one rounding.
    u = (even | 1).double().float().double() / 2**32
    r = (-2 * u.log()).sqrt()
    # Whole quarter turns are taken off in integers: cos(pi / 2) of a rounded pi would not be 0.
    turned = (odd >> 8) + 2**21
    quarter = turned >> 22 & 3
    angle = ((turned & (2**22 - 1)) - 2**21).double() * (math.pi / 2**23)
    cosine, sine = angle.cos(), angle.sin()
    swap = quarter % 2 == 1
    r = torch.where(quarter >= 2, -r, r)
    z = torch.where(swap, -sine, cosine) * r, torch.where(swap, cosine, sine) * r
    return torch.stack(z, -1).flatten(-2)


def _by_block(
    seed: int,
    sample: Tensor,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    make: Callable[[Tensor], Tensor],
) -> Tensor:
    """(B, *shape) of `dtype`: what `make` makes of the words of each block, four elements."""
    _check(seed, sample)
    size = math.prod(shape)
    batch, count = len(sample), -(-size // 4)
    made_BK4 = torch.empty(batch, count, 4, dtype=dtype, device=sample.device)
    step = max(1, _CHUNK // max(1, batch))
    for start in range(0, count, step):
        blocks = torch.arange(start, min(start + step, count), device=sample.device)
        made_BK4[:, start : start + step] = make(words(seed, sample, blocks))
    return made_BK4.reshape(batch, 4 * count)[:, :size].reshape(batch, *shape)


def _product(multiplier: int, c: Tensor) -> tuple[Tensor, Tensor]:
    """The high and low words of a 64-bit product, by halves, as int64 has no bit to spare."""
    upper, lower = multiplier * (c >> 16), multiplier * (c & 0xFFFF)
    middle = upper + (lower >> 16)
    return middle >> 16, (middle << 16 & _LOW) | (lower & 0xFFFF)


def _check(seed: int, sample: Tensor) -> None:
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed: {seed}, must be in [0, 2^64)")
    if sample.dtype != torch.int64 or sample.dim() != 1:
        raise ValueError(f"sample: {_described(sample)}, must be (B,) int64")


def _described(x: Tensor) -> str:
    return f"{tuple(x.shape)} {str(x.dtype).removeprefix('torch.')}"
