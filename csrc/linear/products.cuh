// What a linear multiplies: e4m3 or bfloat16, 128 bytes of a row at a time.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp8.h>

#include "bf16.cuh"
#include "wgmma_wide.cuh"

namespace snapkernels {

#define SNAP_48                                                                               \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, "    \
  "%19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, "     \
  "%36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47}, %48, %49, "
#define SNAP_64                                                                               \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, "    \
  "%19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, "     \
  "%36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, "     \
  "%53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, %64, %65, "
#define SNAP_FOUR(how, j) how(sum[j][0]), how(sum[j][1]), how(sum[j][2]), how(sum[j][3])
#define SNAP_TWELVE(how, j) SNAP_FOUR(how, j), SNAP_FOUR(how, j + 1), SNAP_FOUR(how, j + 2)
#define SNAP_ALL_48(how) \
  SNAP_TWELVE(how, 0), SNAP_TWELVE(how, 3), SNAP_TWELVE(how, 6), SNAP_TWELVE(how, 9)
#define SNAP_ALL_64(how) SNAP_ALL_48(how), SNAP_TWELVE(how, 12), SNAP_FOUR(how, 15)

// 64 x 96 and 64 x 128, 32 bytes of K: the first of a sum, and one that is added to it.
struct Fp8 {
  static constexpr int kPromote = 2;  // stages, after which sums are added to others
  static constexpr int kBytes = 1;
  static constexpr auto kMap = CU_TENSOR_MAP_DATA_TYPE_UINT8;
  static __device__ void first(Accumulators<12>& sum, uint64_t a, uint64_t b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n96k32.f32.e4m3.e4m3 " SNAP_48 "0, 1, 1;"
                 : SNAP_ALL_48("=f")
                 : "l"(a), "l"(b));
  }
  static __device__ void add(Accumulators<12>& sum, uint64_t a, uint64_t b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n96k32.f32.e4m3.e4m3 " SNAP_48 "1, 1, 1;"
                 : SNAP_ALL_48("+f")
                 : "l"(a), "l"(b));
  }
  static __device__ void first(Accumulators<16>& sum, uint64_t a, uint64_t b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3 " SNAP_64 "0, 1, 1;"
                 : SNAP_ALL_64("=f")
                 : "l"(a), "l"(b));
  }
  static __device__ void add(Accumulators<16>& sum, uint64_t a, uint64_t b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3 " SNAP_64 "1, 1, 1;"
                 : SNAP_ALL_64("+f")
                 : "l"(a), "l"(b));
  }
};

// The same, its sums left where they are added.
struct Fp8Unpromoted : Fp8 {
  static constexpr int kPromote = 0;
};

struct Bf16 {
  static constexpr int kPromote = 0;
  static constexpr int kBytes = 2;
  static constexpr auto kMap = CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  static __device__ void add(Accumulators<16>& sum, uint64_t a, uint64_t b) {
    multiply<true>(sum, a, b);
  }
};

#undef SNAP_ALL_64
#undef SNAP_ALL_48
#undef SNAP_TWELVE
#undef SNAP_FOUR
#undef SNAP_64
#undef SNAP_48

// The larger, or NaN if one is.
__device__ inline float larger(float one, float other) {
  float most;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(most) : "f"(one), "f"(other));
  return most;
}

// Four floats as e4m3, rounded to nearest; beyond 448 it is 448, and NaN is NaN.
__device__ inline uint32_t e4m3_four(float a, float b, float c, float d) {
  uint16_t low, high;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(low) : "f"(b), "f"(a));
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(high) : "f"(d), "f"(c));
  return static_cast<uint32_t>(high) << 16 | low;
}

// Eight bfloat16 as floats.
__device__ inline void unpacked(float (&to)[8], const uint4& from) {
  const uint32_t words[4] = {from.x, from.y, from.z, from.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    to[2 * i] = bf16_low(words[i]);
    to[2 * i + 1] = bf16_high(words[i]);
  }
}

}  // namespace snapkernels
