"""8-bit integers in Triton kernels: rounding, and the scale of what is rounded."""

# The arguments of a Triton function have no Python types.
# mypy: allow-untyped-defs

import triton
import triton.language as tl

INT8_MOST = tl.constexpr(127.0)
# 1.5 x 2^23: added to a number of magnitude below 2^22 it leaves its nearest integer, ties to even,
# in the last bits of the sum.
TO_INTEGER = tl.constexpr(12582912.0)


@triton.jit
def int8_scale(largest_bits):
    """The scale of numbers of which the largest magnitude has these bits; of inf or NaN, NaN.

    Magnitudes are in the order of their bits, with NaN above inf; tl.max of floats drops a NaN.
    """
    largest = largest_bits.to(tl.float32, bitcast=True)
    return tl.where(largest < float("inf"), tl.div_rn(largest, INT8_MOST), float("nan"))


@triton.jit
def magnitude_bits(x):
    """The bits of |x|, float32."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def to_int8(x, scale):
    """x / scale rounded to nearest even; anything where the scale is NaN, which has to be seen."""
    quotient = tl.div_rn(x, tl.where(scale == 0.0, 1.0, scale))
    # Only a scale that is not normal, and so has few bits, lets a number pass 127.
    quotient = tl.minimum(tl.maximum(quotient, -INT8_MOST), INT8_MOST)
    return (quotient + TO_INTEGER).to(tl.int32, bitcast=True).to(tl.int8)
