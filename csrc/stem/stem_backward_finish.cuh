// The rest of the stem's gradients, after the pass over g of stem_backward.cuh.
//
// With z = [xhat, rstd], V = [W_c, b_c], and c1 and c2 of every token now known,
//
//   A = sum_t g z^T,  S = sum_t c2 z z^T,  u = sum_t c1 z,
//   gradient of [weight, bias] = norm_weight A - 1 u^T - V S,  of norm_weight = row sums of V A.
//
// Three small kernels: S and u of the pixels, by blocks that each have some tokens; the sums of
// the parts, in their order; and the combination. None has an atomic: the same gives the same.
#pragma once

#include "stem/stem_backward.cuh"

namespace snapkernels {

constexpr int kMomentThreads = 256;
constexpr int kMomentBlocksEach = 2;  // of a multiprocessor: one loads while the other multiplies
constexpr int kSumParts = 8;          // of a block: 264 parts are 33 loads in a row, not 264
constexpr int kSumVectors = 32;       // float4 of a block
constexpr int kCombineRows = 8;       // of D, of a block: 128 blocks for 1024
constexpr int kCombineThreads = 512;

template <int kChannels>
struct StemMomentShared {
  static constexpr int kMatrix = StemBackwardShared<kChannels>::kMatrix;
  static constexpr int kWarpgroups = kChannels > 3 ? 2 : 1;  // that multiply, 64 rows each
  static constexpr int kScaled = kMatrix;                    // [c2 xhat, ..] after xhat
  static constexpr int kBuffer = kMatrix + kWarpgroups * 64 * kMatrixRow;
  static constexpr int kBytes = 2 * kBuffer;
};

// c1 and c2 of token k: slices added, and divided by D.
__device__ inline float2 coefficients_of(const StemBackwardMap& m,
                                         const StemBackwardArguments& given, uint32_t k) {
  const float2* from = reinterpret_cast<const float2*>(given.coefficients) + k;
  float2 sum{};
#pragma unroll 4
  for (int part = 0; part < 2 * m.slices; ++part, from += m.tokens) {
    const float2 some = *from;
    sum = {sum.x + some.x, sum.y + some.y};
  }
  return {sum.x * m.share, sum.y * m.share};
}

// Rows [c2 xhat, c2 rstd, c1, what rounding c1 left] times columns [xhat, rstd, what rounding rstd
// left], over one block's tokens. Two buffers, so that one barrier a tile is enough.
template <int kChannels>
__global__ void __launch_bounds__(kMomentThreads, kMomentBlocksEach)
    stem_moments_kernel(const __grid_constant__ StemBackwardMap m,
                        const __grid_constant__ StemBackwardArguments given) {
  using Shared = StemBackwardShared<kChannels>;
  using Buffers = StemMomentShared<kChannels>;
  constexpr int kFeatures = Shared::kFeatures;
  extern __shared__ __align__(1024) unsigned char stages[];
  const int lane = threadIdx.x % 32, token = threadIdx.x % 64;
  const int of_block = __shfl_sync(~0u, static_cast<int>(threadIdx.x / 32), 0);
  const int row = of_block / 2, warp = of_block % 4, warpgroup = of_block / 4;
  const int tiles = (m.tokens + kBackwardTokens - 1) / kBackwardTokens;
  const int first = static_cast<int64_t>(blockIdx.x) * tiles / given.blocks;
  const int last = static_cast<int64_t>(blockIdx.x + 1) * tiles / given.blocks;
  after_kernel_before();

  Accumulators<Shared::kBlocks> sum = {};
  uint32_t k = first * kBackwardTokens + token;
  const uint32_t most = m.tokens;
  StemPixels<kChannels> pixels(m, given, k, most, row);
  float2 c = coefficients_of(m, given, min(k, most - 1));
  for (int tile = first; tile < last; ++tile) {
    unsigned char* const buffer = stages + tile % 2 * Buffers::kBuffer;
    const auto at = [&](int feature) {
      return buffer + swizzled(feature, token / 8) + token % 8 * 2;
    };
    const auto put = [&](unsigned char* to, float x, float scaled) {
      *reinterpret_cast<uint16_t*>(to) = bf16_pair(x, 0.f);
      *reinterpret_cast<uint16_t*>(to + Buffers::kScaled) = bf16_pair(scaled, 0.f);
    };
    if (k >= most) c = {};
    pixels.finish(m, given, k);
    constexpr int kApart = kStemPatch * kStemPatch * kMatrixRow;  // of channels
    unsigned char* const to[kStemPatch] = {at(row * 4), at(row * 4 + 1), at(row * 4 + 2),
                                           at(row * 4 + 3)};
#pragma unroll
    for (int channel = 0; channel < kChannels; ++channel) {
      const float4& xhat = pixels.of[channel];
      put(to[0] + channel * kApart, xhat.x, c.y * xhat.x);
      put(to[1] + channel * kApart, xhat.y, c.y * xhat.y);
      put(to[2] + channel * kApart, xhat.z, c.y * xhat.z);
      put(to[3] + channel * kApart, xhat.w, c.y * xhat.w);
    }
    const float rstd = k < most ? pixels.rstd : 0.f, rstd_rounded = bf16_rounded(rstd);
    const float c1_rounded = bf16_rounded(c.x);
    // Two rows after the features are this thread's.
    const int extra = kFeatures + 2 * row;
    put(at(extra), row == 0 ? rstd_rounded : 0.f,
        row == 0   ? c.y * rstd
        : row == 1 ? c.x - c1_rounded
                   : 0.f);
    put(at(extra + 1), row == 0 ? rstd - rstd_rounded : 0.f, row == 0 ? c1_rounded : 0.f);
    publish();
    __syncthreads();

    if (warpgroup < Buffers::kWarpgroups) {
      const uint32_t from = shared_address(buffer);
      const uint64_t columns = matrix_view(from);
      const uint64_t rows = matrix_view(from + Buffers::kScaled + warpgroup * 64 * kMatrixRow);
      multiply_fence();
#pragma unroll
      for (int step = 0; step < kBackwardTokens / 16; ++step)
        multiply<false, true>(sum, further(rows, step * 32), further(columns, step * 32));
      multiply_commit();
    }
    if (tile + 1 < last) {
      k += kBackwardTokens;
      pixels = {m, given, k, most, row};
      c = coefficients_of(m, given, min(k, most - 1));
    }
    multiply_wait<0>();
    settle<Shared::kBlocks>(sum);
  }

  if (warpgroup >= Buffers::kWarpgroups) return;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int line = 64 * warpgroup + 16 * warp + lane / 4 + 8 * half;
    if (line < Shared::kColumns) {
      const int64_t of_part = static_cast<int64_t>(blockIdx.x) * Shared::kColumns + line;
      float2* const to =
          reinterpret_cast<float2*>(given.moments + of_part * Shared::kColumns) + lane % 4;
#pragma unroll
      for (int j = 0; j < Shared::kBlocks; ++j)
        to[4 * j] = {sum[j][2 * half], sum[j][2 * half + 1]};
    }
  }
}

// The sums of `products` over ranges and of `moments` over blocks.
__global__ void __launch_bounds__(kSumParts * kSumVectors)
    stem_sums_kernel(const __grid_constant__ StemBackwardArguments given, int product_vectors,
                     int moment_vectors) {
  __shared__ float4 parts[kSumParts][kSumVectors];
  const int in_block = threadIdx.x % kSumVectors, part = threadIdx.x / kSumVectors;
  const int vector = blockIdx.x * kSumVectors + in_block;
  const bool of_products = vector < product_vectors;
  const int vectors = of_products ? product_vectors : moment_vectors;
  const int count = of_products ? given.ranges : given.blocks;
  const int at = of_products ? vector : vector - product_vectors;
  const float4* const from =
      reinterpret_cast<const float4*>(of_products ? given.products : given.moments) + at;
  after_kernel_before();

  float4 sum{};
  if (at < vectors) {
#pragma unroll 8
    for (int i = part; i < count; i += kSumParts) {
      const float4 some = from[static_cast<int64_t>(i) * vectors];
      sum = {sum.x + some.x, sum.y + some.y, sum.z + some.z, sum.w + some.w};
    }
  }
  parts[part][in_block] = sum;
  __syncthreads();
  if (part != 0 || at >= vectors) return;
#pragma unroll
  for (int i = 1; i < kSumParts; ++i) {
    const float4 some = parts[i][in_block];
    sum = {sum.x + some.x, sum.y + some.y, sum.z + some.z, sum.w + some.w};
  }
  reinterpret_cast<float4*>(given.sums)[vector] = sum;
}

// Eight rows of the gradients: four threads a column of [weight, bias], two rows each.
template <int kChannels>
__global__ void __launch_bounds__(kCombineThreads)
    stem_combine_kernel(const __grid_constant__ StemBackwardArguments given, int width) {
  using Shared = StemBackwardShared<kChannels>;
  constexpr int kFeatures = Shared::kFeatures, kColumns = Shared::kColumns;
  constexpr int kRows = kCombineRows / 4;
  __shared__ float s[kFeatures + 1][kColumns], v[kCombineRows][kColumns];
  __shared__ float norm_weight[kCombineThreads / 32][kRows];
  const int f = threadIdx.x % 128, first = threadIdx.x / 128 * kRows;
  const int d0 = blockIdx.x * kCombineRows;
  const auto bf16 = [](const void* from, int64_t i) {
    return bf16_low(static_cast<const uint16_t*>(from)[i]);
  };
  after_kernel_before();

  const float* const moments = given.sums + static_cast<int64_t>(width) * kColumns;
  const float4* const vectors = reinterpret_cast<const float4*>(moments);
  for (int i = threadIdx.x; i < (kFeatures + 1) * kColumns / 4; i += kCombineThreads)
    reinterpret_cast<float4*>(&s[0][0])[i] = vectors[i];
  for (int i = threadIdx.x; i < kCombineRows * (kFeatures + 1); i += kCombineThreads) {
    const int row = i / (kFeatures + 1), column = i - row * (kFeatures + 1), d = d0 + row;
    const float value = column < kFeatures
                            ? bf16(given.weight, static_cast<int64_t>(d) * kFeatures + column)
                            : bf16(given.bias, d);
    v[row][column] = value - given.means[column];
  }
  __syncthreads();

  // Column F and the next are of rstd and of what rounding it left.
  const bool of_bias = f == kFeatures;
  float gradient[kRows] = {}, row_sum[kRows] = {};
  if (f <= kFeatures) {
    const float* const c1 = moments + (kFeatures + 1) * kColumns + f;
    float u = c1[0] + c1[kColumns];
    if (of_bias) u += c1[1] + c1[kColumns + 1];
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int d = d0 + first + i;
      const float* const a = given.sums + static_cast<int64_t>(d) * kColumns + f;
      const float product = of_bias ? a[0] + a[1] : a[0];
      gradient[i] = bf16(given.norm_weight, d) * product - u;
      row_sum[i] = v[first + i][f] * product;
      if (of_bias) static_cast<uint16_t*>(given.d_norm_bias)[d] = bf16_pair(a[2], 0.f);
    }
    for (int other = 0; other <= kFeatures; ++other) {
      const float moment = of_bias ? s[other][f] + s[other][f + 1] : s[other][f];
#pragma unroll
      for (int i = 0; i < kRows; ++i) gradient[i] -= v[first + i][other] * moment;
    }
  }
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    const int d = d0 + first + i;
    const uint16_t rounded = bf16_pair(gradient[i], 0.f);
    if (f < kFeatures)
      static_cast<uint16_t*>(given.d_weight)[static_cast<int64_t>(d) * kFeatures + f] = rounded;
    if (of_bias) static_cast<uint16_t*>(given.d_bias)[d] = rounded;
#pragma unroll
    for (int other = 1; other < 32; other *= 2)
      row_sum[i] += __shfl_xor_sync(~0u, row_sum[i], other);
    if (threadIdx.x % 32 == 0) norm_weight[threadIdx.x / 32][i] = row_sum[i];
  }
  __syncthreads();
  if (threadIdx.x < kCombineRows) {
    const int row = threadIdx.x;
    const float(*const warps)[kRows] = norm_weight + row / kRows * 4;
    const float sum = warps[0][row % kRows] + warps[1][row % kRows] + warps[2][row % kRows] +
                      warps[3][row % kRows];
    static_cast<uint16_t*>(given.d_norm_weight)[d0 + row] = bf16_pair(sum, 0.f);
  }
}

}  // namespace snapkernels
