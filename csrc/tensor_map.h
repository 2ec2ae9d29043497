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
    const cuuint64_t* strides, const cuuint32_t* box,
    CUtensorMapDataType type = CU_TENSOR_MAP_DATA_TYPE_BFLOAT16) {
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

// Of a contiguous tensor (matrices, rows, columns), in boxes of `box_rows` rows of 64 columns that
// come to lie as wgmma.cuh has matrices.
inline cudaError_t make_tensor_map(CUtensorMap* map, const void* data, int64_t matrices,
                                   int64_t rows, int64_t columns, int box_rows) {
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows),
                              static_cast<cuuint64_t>(matrices)};
  const cuuint64_t strides[] = {2 * sizes[0], 2 * sizes[0] * sizes[1]};
  const cuuint32_t box[] = {64, static_cast<cuuint32_t>(box_rows), 1};
  return encode_tensor_map(map, data, 3, sizes, strides, box);
}

// Of contiguous rows in 32s, of which those of accumulators come to be together: row 8 b + 2 q + e
// of 32 as row 8 q + 2 b + e of a box of 64.
inline cudaError_t make_tensor_map_in_order(CUtensorMap* map, const void* data, int64_t rows,
                                            int64_t columns) {
  const cuuint64_t row = 2 * columns;
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(columns), 2, 4, 4,
                              static_cast<cuuint64_t>(rows / 32)};
  const cuuint64_t strides[] = {row, 8 * row, 2 * row, 32 * row};
  const cuuint32_t box[] = {64, 2, 4, 4, 2};
  return encode_tensor_map(map, data, 5, sizes, strides, box);
}

// Of contiguous rows of items of `bytes`, in boxes of `box_rows` rows of 128 bytes.
inline cudaError_t make_rows_map(CUtensorMap* map, const void* data, CUtensorMapDataType type,
                                 int bytes, int64_t rows, int64_t columns, int box_rows) {
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows), 1};
  const cuuint64_t strides[] = {bytes * sizes[0], bytes * sizes[0] * sizes[1]};
  const cuuint32_t box[] = {static_cast<cuuint32_t>(128 / bytes),
                            static_cast<cuuint32_t>(box_rows), 1};
  return encode_tensor_map(map, data, 3, sizes, strides, box, type);
}

// The same, with rows in the order in which each of four lanes has `together` of them that follow
// each other: of 4 `together`, row `together` q + 2 b + e as row 8 b + 2 q + e.
inline cudaError_t make_rows_map_in_order(CUtensorMap* map, const void* data,
                                          CUtensorMapDataType type, int bytes, int64_t rows,
                                          int64_t columns, int box_rows, int together) {
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
