// Standard normals by counter: seed, sample and element name a value, whoever computes it and when.
//
// The definition is in snapkernels/philox.py; philox_triton.py has the same arithmetic. All of it
// also runs on the host, where every angle and every uniform number can be tried.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include <cuda_runtime.h>

namespace snapkernels {

namespace philox {

__host__ __device__ inline uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

__host__ __device__ inline float float_of(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

// Within 2 ulp or so; x is a normal number.
__host__ __device__ inline float reciprocal_sqrt(float x) {
#ifdef __CUDA_ARCH__
  float y;  // rsqrtf would add three instructions for subnormal x
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return 1.0f / sqrtf(x);
#endif
}

// sqrt(-2 ln u) of u = float(word | 1) / 2^32, within 0.75 ulp; 0 at u = 1.
__host__ __device__ inline float radius(uint32_t word) {
  // u = m 2^e with m in [2/3, 4/3), so that m - 1 is exact and e is 0 wherever ln u is near 0.
  constexpr uint32_t kTwoThirds = 0x3f2aaaab, kTwo32 = 32u << 23;
  const uint32_t bits = bits_of(static_cast<float>(word | 1));
  const uint32_t shifted_e = (bits - (kTwoThirds + kTwo32)) & 0xff800000;  // e 2^23
  const float e = static_cast<float>(static_cast<int32_t>(shifted_e));
  const float f = float_of(bits - shifted_e - kTwo32) - 1.0f;

  // -2 ln(1 + f) = -2 f + f^2 q; minimax over the interval, weighed for the sum's relative error.
  float q = 0x1.1e057ep-2f;
  q = fmaf(q, f, -0x1.2094fap-2f);
  q = fmaf(q, f, 0x1.e6e0c6p-3f);
  q = fmaf(q, f, -0x1.1e5e48p-2f);
  q = fmaf(q, f, 0x1.5632d0p-2f);
  q = fmaf(q, f, -0x1.99d80cp-2f);
  q = fmaf(q, f, 0x1.fff95ep-2f);
  q = fmaf(q, f, -0x1.5554f4p-1f);
  q = fmaf(q, f, 0x1.000004p+0f);

  // -2 ln u = tail - head. 2 e ln 2 is exact with the upper 18 bits of 2 ln 2; what rounding the
  // head loses is in the tail. e carries a factor 2^23.
  constexpr float kHigh = 0x1.62e4p+0f / (1 << 23), kLow = 0x1.7f7d1cp-19f / (1 << 23);
  const float head = fmaf(e, kHigh, 2.0f * f);
  const float lost = fmaf(f, -2.0f, fmaf(e, -kHigh, head));
  const float tail = fmaf(f * f, q, fmaf(e, -kLow, lost));

  // One Newton step on the unrounded difference: more exact than a rounded one's rounded root, and
  // without the branch of __fsqrt_rn. The maximum keeps u = 1 from infinity times 0.
  const float squared = tail - head;
  const float inverse = reciprocal_sqrt(fmaxf(squared, 1e-30f));
  const float root = squared * inverse;
  return fmaf(tail - fmaf(root, root, head), 0.5f * inverse, root);
}

// Two independent normals of two words, within 2 ulp.
__host__ __device__ inline float2 pair(uint32_t even, uint32_t odd) {
  // The angle is a whole number of quarter turns plus v eighths of a turn, v in [-1, 1): v is cut
  // out of the bits and exact. An odd octant's complement is a negative v.
  const uint32_t turned = odd + (1u << 29);
  const float v = float_of(((turned >> 7) & 0x7ffffe) | 0x40000000) - 3.0f;
  const float w = v * v;

  // sin(pi/4 v) = 3/4 v + v s and cos(pi/4 v) = 1 + c: the leading products are exact, so rounding
  // only touches what is small beside them.
  float s = -0x1.2d3eaap-15f;
  s = fmaf(s, w, 0x1.465c76p-9f);
  s = fmaf(s, w, -0x1.4abbb2p-4f);
  s = fmaf(s, w, 0x1.21fb52p-5f);
  float c = 0x1.d4f478p-19f;
  c = fmaf(c, w, -0x1.55b2b2p-12f);
  c = fmaf(c, w, 0x1.03c1b0p-6f);
  c = fmaf(c, w, -0x1.de9e60p-5f);
  c = fmaf(c, w, -0.25f * w);

  // Two quarter turns change both signs, one swaps the two and changes the cosine's.
  const float r = float_of(bits_of(radius(even)) ^ (turned & 0x80000000));
  const float sine = fmaf(r, 0.75f * v, r * (v * s));
  const float cosine = fmaf(r, c, r);
  const bool swapped = turned & 0x40000000;
  return {swapped ? -sine : cosine, swapped ? cosine : sine};
}

}  // namespace philox

// Philox4x32-10 (Salmon, Moraes, Dror and Shaw, 2011).
__host__ __device__ inline uint4 philox_words(uint2 key, uint4 counter) {
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = static_cast<uint64_t>(0xD2511F53u) * counter.x;
    const uint64_t b = static_cast<uint64_t>(0xCD9E8D57u) * counter.z;
    counter = {static_cast<uint32_t>(b >> 32) ^ counter.y ^ key.x, static_cast<uint32_t>(b),
               static_cast<uint32_t>(a >> 32) ^ counter.w ^ key.y, static_cast<uint32_t>(a)};
    key = {key.x + 0x9E3779B9u, key.y + 0xBB67AE85u};
  }
  return counter;
}

// The normals of elements 4 block to 4 block + 3 of a sample; key is (low, high) of the seed.
__host__ __device__ inline float4 philox_normals(uint2 key, uint64_t block, uint64_t sample) {
  const uint4 words =
      philox_words(key, {static_cast<uint32_t>(block), static_cast<uint32_t>(block >> 32),
                         static_cast<uint32_t>(sample), static_cast<uint32_t>(sample >> 32)});
  const float2 first = philox::pair(words.x, words.y), second = philox::pair(words.z, words.w);
  return {first.x, first.y, second.x, second.y};
}

}  // namespace snapkernels
