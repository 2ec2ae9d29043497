// GELU(x) = x Phi(x) of a product's sums: in float32, and to be quantised in pairs of 16 bits.
#pragma once

#include "bf16.cuh"

namespace snapkernels {

// Phi(x) = 1 / (1 + 2^-(x p(x^2))): p is fitted so that the result is within 0.12 %, a third of a
// bfloat16's last place, from -5 on, and below within 1e-6.
__device__ inline float gelu(float x) {
  const float square = x * x;
  float p = fmaf(square, -1.3275943679920691e-05f, 1.434396236322697e-03f);
  p = fmaf(square, p, -0.10953633345519917f);
  p = fmaf(square, p, -2.297166139029949f);
  return x * reciprocal_fast(1 + exp2_fast(x * p));
}

// `a` in the lower half. What is beyond 65504 is infinity.
__device__ inline uint32_t half_pair(float a, float b) {
  uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(b), "f"(a));
  return pair;
}

__device__ inline uint32_t half_product(uint32_t a, uint32_t b) {
  uint32_t product;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(product) : "r"(a), "r"(b));
  return product;
}

__device__ inline uint32_t half_sum_of_product(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t sum;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(sum) : "r"(a), "r"(b), "r"(c));
  return sum;
}

// 2 GELU(x) factor of x = a and b, for a `factor` that leaves it among the numbers of 16 bits, with
// Phi(x) = (1 + tanh(x p(x^2))) / 2. p is fitted so that GELU(x) is within 0.0003; the roundings of
// 16 bits are 0.0003 of a deviation for normal x. e4m3 rounds by 0.017 of one.
__device__ inline uint32_t twice_gelu(float a, float b, float factor) {
  constexpr uint32_t kFirst = 0x3a663a66;  // 0.7998
  constexpr uint32_t kThird = 0x28742874;  // 0.03479
  const uint32_t x = half_pair(a, b);
  const uint32_t p = half_sum_of_product(half_product(x, x), kThird, kFirst);
  uint32_t tanh;
  asm("tanh.approx.f16x2 %0, %1;" : "=r"(tanh) : "r"(half_product(x, p)));
  const uint32_t scaled = half_pair(a * factor, b * factor);
  return half_sum_of_product(scaled, tanh, scaled);
}

// Four numbers of 16 bits as e4m3, as e4m3_four (products.cuh) has them.
__device__ inline uint32_t e4m3_four(uint32_t low, uint32_t high) {
  uint16_t low_two, high_two;
  asm("cvt.rn.satfinite.e4m3x2.f16x2 %0, %1;" : "=h"(low_two) : "r"(low));
  asm("cvt.rn.satfinite.e4m3x2.f16x2 %0, %1;" : "=h"(high_two) : "r"(high));
  return static_cast<uint32_t>(high_two) << 16 | low_two;
}

}  // namespace snapkernels
