"""e4m3 in Triton kernels: the 8-bit float of the fp8 recipe."""

# The arguments of a Triton function have no Python types.
# mypy: allow-untyped-defs

import triton
import triton.language as tl

E4M3_MOST = tl.constexpr(448.0)


@triton.jit
def to_e4m3(x, scale):
    """x / scale, rounded to nearest even; 0 where the scale is 0, NaN where the quotient is inf.

    A scale is of the greatest magnitude that x can have, so that no finite quotient is above 448
    but by its rounding. The hardware's conversion would make 448 of an inf, too, and hide it.
    """
    quotient = tl.div_rn(x, tl.where(scale == 0.0, 1.0, scale))
    return tl.where(tl.abs(quotient) == float("inf"), float("nan"), quotient).to(tl.float8e4nv)
