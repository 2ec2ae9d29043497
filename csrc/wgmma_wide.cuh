// Products of 128 to 256 columns, added to `sum`: see wgmma.cuh.
#pragma once

#include "wgmma.cuh"

namespace snapkernels {

// wgmma's view of rows of K with more than 64 of N: 64 of them in each matrix, the next 64 `bytes`
// further.
__device__ inline uint64_t columns_view(uint32_t address, int bytes) {
  return (matrix_view(address) & ~(0x3fffull << 16)) | static_cast<uint64_t>(bytes >> 4) << 16;
}

// Before products are added: with a product that does not add, accumulators would count as read in
// the round before, and keep their registers for all of a loop.
template <int kBlocks>
__device__ inline void clear(Accumulators<kBlocks>& sum) {
#pragma unroll
  for (int j = 0; j < kBlocks; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) sum[j][i] = 0;
  }
}

#define SNAP_FOUR(j) "+f"(sum[j][0]), "+f"(sum[j][1]), "+f"(sum[j][2]), "+f"(sum[j][3])

// 64 x 192, rows of both of M and N.
__device__ inline void multiply(Accumulators<24>& sum, uint64_t a, uint64_t b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n192k16.f32.bf16.bf16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, "
      "%18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, "
      "%34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, "
      "%50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, %64, %65, "
      "%66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, "
      "%82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95}"
      ", %96, %97, 1, 1, 1, 0, 0;"
      : SNAP_FOUR(0), SNAP_FOUR(1), SNAP_FOUR(2), SNAP_FOUR(3), SNAP_FOUR(4), SNAP_FOUR(5),
        SNAP_FOUR(6), SNAP_FOUR(7), SNAP_FOUR(8), SNAP_FOUR(9), SNAP_FOUR(10), SNAP_FOUR(11),
        SNAP_FOUR(12), SNAP_FOUR(13), SNAP_FOUR(14), SNAP_FOUR(15), SNAP_FOUR(16), SNAP_FOUR(17),
        SNAP_FOUR(18), SNAP_FOUR(19), SNAP_FOUR(20), SNAP_FOUR(21), SNAP_FOUR(22), SNAP_FOUR(23)
      : "l"(a), "l"(b));
}

// 64 x 128, with 64 x 16 of A in registers as multiply_held has it; rows of B of K.
__device__ inline void multiply_held_columns(Accumulators<16>& sum, const uint32_t (&a)[4],
                                             uint64_t b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, "
      "%18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, "
      "%34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, "
      "%50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}"
      ", {%64, %65, %66, %67}, %68, 1, 1, 1, 1;"
      : SNAP_FOUR(0), SNAP_FOUR(1), SNAP_FOUR(2), SNAP_FOUR(3), SNAP_FOUR(4), SNAP_FOUR(5),
        SNAP_FOUR(6), SNAP_FOUR(7), SNAP_FOUR(8), SNAP_FOUR(9), SNAP_FOUR(10), SNAP_FOUR(11),
        SNAP_FOUR(12), SNAP_FOUR(13), SNAP_FOUR(14), SNAP_FOUR(15)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

// 64 x 256, rows of `a` of M, of `b` of K.
__device__ inline void multiply_columns(Accumulators<32>& sum, uint64_t a, uint64_t b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, "
      "%18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, "
      "%34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, "
      "%50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, %64, %65, "
      "%66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, "
      "%82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, "
      "%98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, "
      "%111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, "
      "%124, %125, %126, %127}"
      ", %128, %129, 1, 1, 1, 0, 1;"
      : SNAP_FOUR(0), SNAP_FOUR(1), SNAP_FOUR(2), SNAP_FOUR(3), SNAP_FOUR(4), SNAP_FOUR(5),
        SNAP_FOUR(6), SNAP_FOUR(7), SNAP_FOUR(8), SNAP_FOUR(9), SNAP_FOUR(10), SNAP_FOUR(11),
        SNAP_FOUR(12), SNAP_FOUR(13), SNAP_FOUR(14), SNAP_FOUR(15), SNAP_FOUR(16), SNAP_FOUR(17),
        SNAP_FOUR(18), SNAP_FOUR(19), SNAP_FOUR(20), SNAP_FOUR(21), SNAP_FOUR(22), SNAP_FOUR(23),
        SNAP_FOUR(24), SNAP_FOUR(25), SNAP_FOUR(26), SNAP_FOUR(27), SNAP_FOUR(28), SNAP_FOUR(29),
        SNAP_FOUR(30), SNAP_FOUR(31)
      : "l"(a), "l"(b));
}

#undef SNAP_FOUR

}  // namespace snapkernels
