// What copy_box (tensor_copy.cuh) reads boxes of: made on the host, for one launch.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstdint>

namespace snapkernels {

// Of a tensor of `rank` dimensions, the first of them contiguous and 128 bytes of it in a box;
// `strides` are in bytes, of all others. The driver's function is found when first needed: a
// machine without one loads the library all the same.
inline cudaError_t encode_tensor_map(
    CUtensorMap* map, const void* data, int rank, const cuuint64_t* sizes,
    const cuuint64_t* strides, const cuuint32_t* box, CUtensorMapDataType type) {
  static const auto encode = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result;
    const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found,
                                                               12000, cudaEnableDefault, &result);
    const bool there = error == cudaSuccess && result == cudaDriverEntryPointSuccess;
    return there ? reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(found) : nullptr;
  }();
  if (!encode) return cudaErrorNotSupported;
  const cuuint32_t every[] = {1, 1, 1, 1, 1};
  const CUresult made = encode(
      map, type, rank, const_cast<void*>(data), sizes, strides, box, every,
      CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
      CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return made == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

// Of a contiguous tensor (matrices, rows, columns) of items of `bytes`, in boxes of `box_rows` rows
// of 128 bytes that come to lie as wgmma.cuh has matrices.
inline cudaError_t make_tensor_map(CUtensorMap* map, const void* data, int64_t matrices,
                                   int64_t rows, int64_t columns, int box_rows,
                                   CUtensorMapDataType type = CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
                                   int bytes = 2) {
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows),
                              static_cast<cuuint64_t>(matrices)};
  const cuuint64_t strides[] = {bytes * sizes[0], bytes * sizes[0] * sizes[1]};
  const cuuint32_t box[] = {static_cast<cuuint32_t>(128 / bytes),
                            static_cast<cuuint32_t>(box_rows), 1};
  return encode_tensor_map(map, data, 3, sizes, strides, box, type);
}

// Of contiguous rows in the order in which a lane of a warpgroup's 128 has four that follow each
// other: row 32 w + 4 r + 2 h + e as row 64 h + 16 w + 8 e + r of a box, or of every half h.
inline cudaError_t make_tensor_map_in_fours(CUtensorMap* map, const void* data, int64_t rows,
                                            int64_t columns, int halves, CUtensorMapDataType type,
                                            int bytes) {
  const cuuint64_t row = bytes * columns;
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(columns), 8, 2,
                              static_cast<cuuint64_t>(rows / 32), 2};
  const cuuint64_t strides[] = {4 * row, row, 32 * row, 2 * row};
  const cuuint32_t box[] = {static_cast<cuuint32_t>(128 / bytes), 8, 2, 4,
                            static_cast<cuuint32_t>(halves)};
  return encode_tensor_map(map, data, 5, sizes, strides, box, type);
}

// Of contiguous rows in the order in which each of four lanes, which have pairs of accumulators,
// has `together` of them that follow each other: of 4 `together`, row `together` q + 2 b + e as
// row 8 b + 2 q + e of a box.
inline cudaError_t make_tensor_map_in_order(
    CUtensorMap* map, const void* data, int64_t rows, int64_t columns, int box_rows = 64,
    int together = 8, CUtensorMapDataType type = CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, int bytes = 2) {
  const cuuint64_t row = bytes * columns;
  const cuuint32_t pairs = together / 2;
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(columns), 2, 4, pairs,
                              static_cast<cuuint64_t>(rows / (4 * together))};
  const cuuint64_t strides[] = {row, together * row, 2 * row, 4 * together * row};
  const cuuint32_t box[] = {static_cast<cuuint32_t>(128 / bytes), 2, 4, pairs,
                            static_cast<cuuint32_t>(box_rows / (4 * together))};
  return encode_tensor_map(map, data, 5, sizes, strides, box, type);
}

}  // namespace snapkernels
