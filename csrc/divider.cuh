// Division by a number known at launch: a multiply and a shift, where the hardware takes 20 steps.
#pragma once

#include <cstdint>

namespace snapkernels {

// Exact for dividends below 2^31 (Granlund and Montgomery, 1994: round-up method).
struct Divider {
  uint32_t divisor, multiplier, shift;

  explicit Divider(uint32_t d) : divisor(d), shift(0) {
    while ((1ull << shift) < d) ++shift;
    multiplier = static_cast<uint32_t>(((1ull << 32) * ((1ull << shift) - d)) / d + 1);
  }

  __device__ uint32_t quotient(uint32_t n) const { return (__umulhi(n, multiplier) + n) >> shift; }
};

}  // namespace snapkernels
