// Two bfloat16 in a word, the first in its low half; and 2^x, log2 x and 1 / x in one instruction.
#pragma once

#include <cstdint>

namespace snapkernels {

__device__ inline float bf16_low(uint32_t pair) { return __uint_as_float(pair << 16); }
__device__ inline float bf16_high(uint32_t pair) { return __uint_as_float(pair & 0xffff0000u); }

__device__ inline uint32_t bf16_pair(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

// 2^x, to two units in the last place.
__device__ inline float exp2_fast(float x) {
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
  return power;
}

// log2 x of a normal x, to 2^-22 or so; of 0 a large negative number, so that 0 times it is 0.
__device__ inline float log2_fast(float x) {
  float logarithm;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(logarithm) : "f"(fmaxf(x, 1.1754944e-38f)));
  return logarithm;
}

// 1 / x, to one unit.
__device__ inline float reciprocal_fast(float x) {
  float inverse;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(x));
  return inverse;
}

}  // namespace snapkernels
