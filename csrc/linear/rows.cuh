// LayerNorm and quantising in one pass over the rows, a warp each: a row is in its registers.
#pragma once

#include "linear/linear.h"
#include "linear/products.cuh"

namespace snapkernels {

constexpr int kRowsWarps = 8;
constexpr float kMostE4m3 = 448;
// e4m3 may make a number, and so a row, longer by a sixteenth; the rest is for what is subnormal
// there, and for the roundings of the sums.
constexpr float kLonger = 1.0645f;
// What a row of zeros is taken for, so that 1 / scale is finite.
constexpr float kLeast = 1e-30f;

__device__ inline float warp_sum(float value) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(~0u, value, step);
  return value;
}

__device__ inline float warp_most(float value) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) {
    value = larger(value, __shfl_xor_sync(~0u, value, step));
  }
  return value;
}

// kChunks: of 256 columns, 8 of them a lane's.
template <int kChunks, bool kQuantised>
__global__ void __launch_bounds__(32 * kRowsWarps) rows_kernel(RowsArguments given) {
  after_kernel_before();
  const int lane = threadIdx.x % 32;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kRowsWarps + threadIdx.x / 32;
  int64_t token = row;
  if (blockIdx.x == 0) {
    for (int i = threadIdx.x; i < given.num_flags; i += blockDim.x) given.flags[i] = 0;
  }
  constexpr int kWidth = 256 * kChunks;
  if (kQuantised && given.padded) {
    const int video = static_cast<int>(row) / given.stride;
    const int place = static_cast<int>(row) - video * given.stride;
    token = place < given.length ? static_cast<int64_t>(video) * given.length + place : given.rows;
  }
  if (token >= given.rows) {
    if (!kQuantised || row >= given.padded) return;
    uint2* out = reinterpret_cast<uint2*>(given.out) + row * (kWidth / 8) + lane;
#pragma unroll
    for (int i = 0; i < kChunks; ++i) out[32 * i] = make_uint2(0, 0);
    if (lane == 0) given.scale[row] = 0;
    return;
  }
  const uint4* tokens =
      reinterpret_cast<const uint4*>(given.tokens) + token * (kWidth / 8) + lane;
  uint4 packed[kChunks];
#pragma unroll
  for (int i = 0; i < kChunks; ++i) packed[i] = tokens[32 * i];
  float x[kChunks][8];
#pragma unroll
  for (int i = 0; i < kChunks; ++i) unpacked(x[i], packed[i]);
  if (given.norm_weight) {
    float sum = 0, square = 0;
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
#pragma unroll
      for (int j = 0; j < 8; ++j) sum += x[i][j];
    }
    const float mean = warp_sum(sum) / kWidth;
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        x[i][j] -= mean;
        square = fmaf(x[i][j], x[i][j], square);
      }
    }
    const float rstd = rsqrtf(warp_sum(square) / kWidth + given.eps);
    const uint4* weights = reinterpret_cast<const uint4*>(given.norm_weight) + lane;
    const uint4* biases = reinterpret_cast<const uint4*>(given.norm_bias) + lane;
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      float weight[8], bias[8];
      unpacked(weight, weights[32 * i]);
      unpacked(bias, biases[32 * i]);
#pragma unroll
      for (int j = 0; j < 8; ++j) x[i][j] = fmaf(x[i][j] * rstd, weight[j], bias[j]);
    }
  }
  if constexpr (kQuantised) {
    float most = kLeast, square = 0;
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        most = larger(most, fabsf(x[i][j]));
        square = fmaf(x[i][j], x[i][j], square);
      }
    }
    most = warp_most(most);
    const float inverse = kMostE4m3 / most;
    uint2* out = reinterpret_cast<uint2*>(given.out) + row * (kWidth / 8) + lane;
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      float(&of)[8] = x[i];
#pragma unroll
      for (int j = 0; j < 8; ++j) of[j] *= inverse;
      out[32 * i] = make_uint2(e4m3_four(of[0], of[1], of[2], of[3]),
                               e4m3_four(of[4], of[5], of[6], of[7]));
    }
    if (lane == 0) given.scale[row] = most / kMostE4m3;
    if (given.hidden_scale) {
      const float length = sqrtf(warp_sum(square));
      if (lane == 0) {
        const float bound = fmaf(kLonger * length, given.hidden_bound[0], given.hidden_bound[1]);
        given.hidden_scale[row] = larger(bound, kLeast) / kMostE4m3;
      }
    }
  } else {
    uint4* out = reinterpret_cast<uint4*>(given.out) + row * (kWidth / 8) + lane;
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      const float(&of)[8] = x[i];
      out[32 * i] = make_uint4(bf16_pair(of[0], of[1]), bf16_pair(of[2], of[3]),
                               bf16_pair(of[4], of[5]), bf16_pair(of[6], of[7]));
    }
  }
}

}  // namespace snapkernels
