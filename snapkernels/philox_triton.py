"""`philox.py` inside a Triton kernel: noise, with the arithmetic of `csrc/philox.cuh`, and dropout.

`philox_normals` of a (BLOCK,) tensor of block indices returns four (BLOCK,) tensors, of elements
4 block, 4 block + 1, 4 block + 2 and 4 block + 3; two `tl.join` put them in order where needed.
"""

# The arguments of a Triton function have no Python types.
# mypy: allow-untyped-defs

import triton
import triton.language as tl

from snapkernels import env

# The interpreter's tl.fma rounds the product, which would take the error past 2 ulp.
_FUSED = tl.constexpr(not env.INTERPRET)

# The bits of 2/3, and 32 in the exponent's place.
_TWO_THIRDS = tl.constexpr(0x3F2AAAAB)
_TWO_32 = tl.constexpr(32 << 23)
# 2 ln 2, its upper 18 bits and the rest, over the 2^23 that the exponent is multiplied by.
_HIGH = tl.constexpr(float.fromhex("0x1.62e4p-23"))
_LOW = tl.constexpr(float.fromhex("0x1.7f7d1cp-42"))


@triton.jit
def philox_words(seed_lo, seed_hi, c0, c1, c2, c3):
    """Philox4x32-10 of uint32 tensors or scalars; four tensors of their common shape.

    The rounds of `tl.philox_impl`, with one 64-bit product where that takes two halves of it.
    """
    for _ in tl.static_range(10):
        a = c0.to(tl.uint64) * 0xD2511F53
        b = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (b >> 32).to(tl.uint32) ^ c1 ^ seed_lo
        c2 = (a >> 32).to(tl.uint32) ^ c3 ^ seed_hi
        c1 = b.to(tl.uint32)
        c3 = a.to(tl.uint32)
        seed_lo += 0x9E3779B9
        seed_hi += 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def philox_kept(seed_lo, seed_hi, block, least):
    """Which elements dropout keeps: `kept` of philox.py, with least = floor(p 2^32).

    Of int64 blocks (M, B) those of elements 4 block to 4 block + 3, in order: (M, 4 B).
    """
    ones = tl.full(block.shape, 0xFFFFFFFF, tl.uint32)
    w0, w1, w2, w3 = philox_words(
        tl.cast(seed_lo, tl.uint32),
        tl.cast(seed_hi, tl.uint32),
        block.to(tl.uint32),
        (block.to(tl.uint64) >> 32).to(tl.uint32),
        ones,
        ones,
    )
    least = tl.cast(least, tl.uint32)
    even, odd = tl.join(w0 >= least, w2 >= least), tl.join(w1 >= least, w3 >= least)
    return tl.reshape(tl.join(even, odd), (block.shape[0], 4 * block.shape[1]))


@triton.jit
def philox_normals(seed_lo, seed_hi, block, sample):
    """z0, z1, z2, z3, float32 of block's shape: elements 4 block to 4 block + 3 of a sample.

    block is an int64 tensor, sample an integer or a tensor of block's shape. The seed's words may
    have any integer type: a launch makes i32, i64 or a constant of a number, as its value is.
    """
    # Unsigned, as the interpreter takes a launch's 2^31 for -2^31 in a signed shift.
    block, sample = block.to(tl.uint64), tl.cast(sample, tl.uint64)
    w0, w1, w2, w3 = philox_words(
        tl.cast(seed_lo, tl.uint32),
        tl.cast(seed_hi, tl.uint32),
        block.to(tl.uint32),
        (block >> 32).to(tl.uint32),
        sample.to(tl.uint32),
        (sample >> 32).to(tl.uint32),
    )
    z0, z1 = philox_pair(w0, w1)
    z2, z3 = philox_pair(w2, w3)
    return z0, z1, z2, z3


@triton.jit
def philox_pair(even, odd):
    """Two independent normals of two words, within 2 ulp."""
    # The angle is a whole number of quarter turns plus v eighths of a turn, v in [-1, 1): v is cut
    # out of the bits and exact. An odd octant's complement is a negative v.
    turned = odd.to(tl.int32, bitcast=True) + (1 << 29)
    v = (((turned >> 7) & 0x7FFFFE) | 0x40000000).to(tl.float32, bitcast=True) - 3.0
    w = v * v

    # sin(pi/4 v) = 3/4 v + v s and cos(pi/4 v) = 1 + c: the leading products are exact, so rounding
    # only touches what is small beside them.
    s = _fma(w, -3.59111764e-05, 0.00248993817)
    s = _fma(s, w, -0.0807454064)
    s = _fma(s, w, 0.0353981592)
    c = _fma(w, 3.4939867e-06, -0.000325868634)
    c = _fma(c, w, 0.0158542842)
    c = _fma(c, w, -0.058425128)
    c = _fma(c, w, -0.25 * w)

    # Two quarter turns change both signs, one swaps the two and changes the cosine's.
    r = _radius(even).to(tl.int32, bitcast=True) ^ (turned & -0x80000000)
    r = r.to(tl.float32, bitcast=True)
    sine = _fma(r, 0.75 * v, r * (v * s))
    cosine = _fma(r, c, r)
    swapped = (turned & 0x40000000) != 0
    # Triton's -x is 0 - x, an instruction; a factor of -1 is a modifier of the selection.
    return tl.where(swapped, sine * -1.0, cosine), tl.where(swapped, cosine, sine)


@triton.jit
def _radius(word):
    """sqrt(-2 ln u) of u = float32(word | 1) / 2^32, within 0.75 ulp; 0 at u = 1."""
    # u = m 2^e with m in [2/3, 4/3), so that m - 1 is exact and e is 0 wherever ln u is near 0.
    bits = (word | 1).to(tl.float32).to(tl.int32, bitcast=True)
    shifted_e = (bits - (_TWO_THIRDS + _TWO_32)) & -0x800000
    e = shifted_e.to(tl.float32)
    f = (bits - shifted_e - _TWO_32).to(tl.float32, bitcast=True) - 1.0

    # -2 ln(1 + f) = -2 f + f^2 q; minimax over the interval, weighed for the sum's relative error.
    q = _fma(f, 0.279317826, -0.2818183)
    q = _fma(q, f, 0.237733409)
    q = _fma(q, f, -0.279656529)
    q = _fma(q, f, 0.334178209)
    q = _fma(q, f, -0.400238216)
    q = _fma(q, f, 0.499974698)
    q = _fma(q, f, -0.666663766)
    q = _fma(q, f, 1.00000024)

    # -2 ln u = tail - head; 2 e ln 2 is exact with the upper 18 bits of 2 ln 2, and what rounding
    # the head loses is in the tail.
    head = _fma(e, _HIGH, 2.0 * f)
    lost = _fma(f, -2.0, _fma(e, -_HIGH, head))
    tail = _fma(f * f, q, _fma(e, -_LOW, lost))

    # One Newton step on the unrounded difference: more exact than a rounded one's rounded root, and
    # cheaper than tl.sqrt_rn. The maximum keeps u = 1 from infinity times 0.
    squared = tail - head
    inverse = tl.rsqrt(tl.maximum(squared, 1e-30))
    root = squared * inverse
    return _fma(tail - _fma(root, root, head), 0.5 * inverse, root)


@triton.jit
def _fma(a, b, c):
    """a b + c of float32 numbers, with one rounding."""
    if _FUSED:
        return tl.fma(a, b, c)
    else:
        # Literals become float32 first, as they do for tl.fma; the product is exact.
        product = a.to(tl.float64) * tl.cast(b, tl.float32).to(tl.float64)
        return (product + tl.cast(c, tl.float32).to(tl.float64)).to(tl.float32)
