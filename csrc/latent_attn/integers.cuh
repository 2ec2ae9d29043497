// Products of 8-bit integers, 64 rows at a time, 32 of K: sums of 32 bits, which are exact.
#pragma once

#include <cstdint>

#include "wgmma.cuh"

namespace snapkernels {

// As Accumulators, of integers.
template <int kBlocks>
using Counts = int[kBlocks][4];

#define SNAP_FOUR(how, j) how(sum[j][0]), how(sum[j][1]), how(sum[j][2]), how(sum[j][3])
#define SNAP_EIGHT(how, j)                                                               \
  SNAP_FOUR(how, j), SNAP_FOUR(how, j + 1), SNAP_FOUR(how, j + 2), SNAP_FOUR(how, j + 3), \
      SNAP_FOUR(how, j + 4), SNAP_FOUR(how, j + 5), SNAP_FOUR(how, j + 6), SNAP_FOUR(how, j + 7)
#define SNAP_32                                                                           \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, " \
  "%19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
#define SNAP_64                                                                           \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, " \
  "%19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, "  \
  "%36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, "  \
  "%53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "

// 64 x 128, rows of both of M and N, with signs.
__device__ inline void multiply_first(Counts<16>& sum, uint64_t a, uint64_t b) {
  asm volatile("wgmma.mma_async.sync.aligned.m64n128k32.s32.s8.s8 " SNAP_64 "%64, %65, 0;"
               : SNAP_EIGHT("=r", 0), SNAP_EIGHT("=r", 8)
               : "l"(a), "l"(b));
}

__device__ inline void multiply_add(Counts<16>& sum, uint64_t a, uint64_t b) {
  asm volatile("wgmma.mma_async.sync.aligned.m64n128k32.s32.s8.s8 " SNAP_64 "%64, %65, 1;"
               : SNAP_EIGHT("+r", 0), SNAP_EIGHT("+r", 8)
               : "l"(a), "l"(b));
}

// 64 x 128 and 64 x 64, with 64 x 32 of A in registers, without signs: bytes 4 q to 4 q + 3 of row
// r and of row r + 8, then the same 16 bytes further, in lane 4 r + q.
// The first of a sum, and those that are added to it.
__device__ inline void multiply_held_first(Counts<16>& sum, const uint32_t (&a)[4], uint64_t b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n128k32.s32.u8.s8 " SNAP_64 "{%64, %65, %66, %67}, %68, 0;"
      : SNAP_EIGHT("=r", 0), SNAP_EIGHT("=r", 8)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

__device__ inline void multiply_held_first(Counts<8>& sum, const uint32_t (&a)[4], uint64_t b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n64k32.s32.u8.s8 " SNAP_32 "{%32, %33, %34, %35}, %36, 0;"
      : SNAP_EIGHT("=r", 0)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

__device__ inline void multiply_held(Counts<16>& sum, const uint32_t (&a)[4], uint64_t b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n128k32.s32.u8.s8 " SNAP_64 "{%64, %65, %66, %67}, %68, 1;"
      : SNAP_EIGHT("+r", 0), SNAP_EIGHT("+r", 8)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

__device__ inline void multiply_held(Counts<8>& sum, const uint32_t (&a)[4], uint64_t b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n64k32.s32.u8.s8 " SNAP_32 "{%32, %33, %34, %35}, %36, 1;"
      : SNAP_EIGHT("+r", 0)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

#undef SNAP_64
#undef SNAP_32
#undef SNAP_EIGHT
#undef SNAP_FOUR

// The compiler may not use them before.
template <int kBlocks>
__device__ inline void settle(Counts<kBlocks>& sum) {
#pragma unroll
  for (int j = 0; j < kBlocks; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) asm volatile("" : "+r"(sum[j][i])::"memory");
  }
}

// The nearest integer of a float within 2^22 of 0, in its last bits: a byte of it is the integer's.
__device__ inline uint32_t rounded(float value, float scale) {
  return __float_as_uint(fmaf(value, scale, 12582912.f));
}

// Four bytes, each the last of a word.
__device__ inline uint32_t last_bytes(uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  return __byte_perm(__byte_perm(a, b, 0x0040), __byte_perm(c, d, 0x0040), 0x5410);
}

// The nearest integers, 255 at most, in bytes.
__device__ inline uint32_t bytes(const float (&four)[4]) {
  uint32_t low, all;
  asm("cvt.pack.sat.u8.s32.b32 %0, %1, %2, 0;"
      : "=r"(low)
      : "r"(__float2int_rn(four[3])), "r"(__float2int_rn(four[2])));
  asm("cvt.pack.sat.u8.s32.b32 %0, %1, %2, %3;"
      : "=r"(all)
      : "r"(__float2int_rn(four[1])), "r"(__float2int_rn(four[0])), "r"(low));
  return all;
}

// A mask of the first `count` bytes of four.
__device__ inline uint32_t first_bytes(int count) {
  return count >= 4 ? ~0u : (1u << (8 * max(count, 0))) - 1;
}

}  // namespace snapkernels
