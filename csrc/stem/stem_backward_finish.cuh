// The rest of the stem's gradients, after the pass over g of stem_backward.cuh.
//
// With z = [xhat, rstd], V = [W_c, b_c], and c1 and c2 of every token now known,
//
//   A = sum_t g z^T,  S = sum_t c2 z z^T,  u = sum_t c1 z,
//   gradient of [weight, bias] = norm_weight A - 1 u^T - V S,  of norm_weight = row sums of V A.
//
// Three small kernels: S and u of the features, by blocks that each have some tiles; the sums of
// what they found; and the combination, which adds the products of the ranges first. All sums are
// in a fixed order and none has an atomic: the same gives the same.
#pragma once

#include "stem/stem_backward.cuh"

namespace snapkernels {

constexpr int kMomentStages = 6;  // 100 KB under way, of the one block a multiprocessor has
constexpr int kSumParts = 32;     // of a block: 132 parts are 5 loads in a row
constexpr int kSumVectors = 8;    // float4 of a block
constexpr int kCombineRows = 8;   // of D, of a block: 128 blocks for 1024
constexpr int kCombineThreads = 512;

// Shared memory of a block of the moments: stages of xhat and the parts of c1 and c2, what each
// warpgroup added of those, and barriers.
template <int kChannels>
struct StemMomentShared {
  static constexpr int kMatrix = StemXhat<kChannels>::kMatrix;
  static constexpr int kWarpgroups = kChannels > 3 ? 2 : 1;  // 64 rows each
  static constexpr int kThreads = kWarpgroups * 128 + 32;    // a warp fetches
  static constexpr int kPart = kBackwardTokens * 8;          // bytes of c1 and c2 of 128 columns
  static constexpr int kTotals = 2 * 2 * kBackwardTokens * 4;  // of a warpgroup: c1, c2; twice

  static __host__ __device__ int stage(int slices) { return kMatrix + 2 * slices * kPart; }
  static __host__ __device__ int totals(int slices) { return kMomentStages * stage(slices); }
  static __host__ __device__ int barriers(int slices) {
    return totals(slices) + kWarpgroups * kTotals;
  }
  static int bytes(int slices) { return barriers(slices) + 2 * kMomentStages * 8; }
};

// What one thread does for all stages: tiles from `first` on of the block's range. The features
// were complete before the kernel before let this one start, c1 and c2 are when it ends.
template <int kChannels>
__device__ void fetch_moments(const StemBackwardMap& m, const StemBackwardArguments& given,
                              const StemShare& of, int first, int count, uint32_t base) {
  using Shared = StemMomentShared<kChannels>;
  const int stage_bytes = Shared::stage(m.slices), of_parts = 2 * m.slices * Shared::kPart;
  const uint32_t full = base + Shared::barriers(m.slices), empty = full + kMomentStages * 8;
  const unsigned char* matrix = StemXhat<kChannels>::matrix(given, of.range, first);
  const char* parts = reinterpret_cast<const char*>(given.coefficients) +
                      (static_cast<int64_t>(of.range) * given.tiles + first) * of_parts;
  const uint64_t passing = first_to_leave();
  const auto fetch_xhat = [&](int stage) {
    phase_expect(full + stage * 8, stage_bytes);
    copy_bulk(base + stage * stage_bytes, matrix, Shared::kMatrix, full + stage * 8, passing);
    matrix += Shared::kMatrix;
  };
  const auto fetch_parts = [&](int stage) {
    copy_bulk(base + stage * stage_bytes + Shared::kMatrix, parts, of_parts, full + stage * 8,
              passing);
    parts += of_parts;
  };
  const int early = min(count, kMomentStages);
  for (int i = 0; i < early; ++i) fetch_xhat(i);
  kernel_before_done();
  next_kernel_may_start();
  for (int i = 0; i < early; ++i) fetch_parts(i);
  int stage = 0, parity = 0;
  for (int i = early; i < count; ++i) {
    phase_wait(empty + stage * 8, parity);
    fetch_xhat(stage);
    fetch_parts(stage);
    if (++stage == kMomentStages) stage = 0, parity ^= 1;
  }
}

// c1 and c2 of 64 tokens, parts added and divided by D, by a warpgroup: two threads a token.
__device__ inline void add_parts(const unsigned char* parts, int slices, float share, int thread,
                                 float* totals) {
  const int token = thread / 2, which = thread % 2;
  const float2* from =
      reinterpret_cast<const float2*>(parts) + which * slices * kBackwardTokens + token;
  float2 sum{};
#pragma unroll 4
  for (int part = 0; part < slices; ++part, from += kBackwardTokens) {
    const float2 some = *from;
    sum = {sum.x + some.x, sum.y + some.y};
  }
  sum.x += __shfl_xor_sync(~0u, sum.x, 1);
  sum.y += __shfl_xor_sync(~0u, sum.y, 1);
  totals[which * kBackwardTokens + token] = (which ? sum.y : sum.x) * share;
}

// The warp's 16 rows of [c2 xhat, c2 rstd, c1, what rounding c1 left, zeros] for 16 tokens, from
// those of xhat and rstd in `a`. Rows after the features are eight.
__device__ inline void scale_rows(uint32_t (&a)[4], const float* totals, bool of_features, int r,
                                  int q) {
#pragma unroll
  for (int far = 0; far < 2; ++far) {
    const float* const c1 = totals + 2 * q + 8 * far;
    const float2 c2 = *reinterpret_cast<const float2*>(c1 + kBackwardTokens);
    uint32_t &upper = a[2 * far], &lower = a[2 * far + 1];  // rows r and r + 8
    if (of_features) {
      upper = bf16_pair(bf16_low(upper) * c2.x, bf16_high(upper) * c2.y);
      lower = bf16_pair(bf16_low(lower) * c2.x, bf16_high(lower) * c2.y);
    } else {
      const float2 exact = *reinterpret_cast<const float2*>(c1);
      const uint32_t rounded = bf16_pair(exact.x, exact.y);
      const uint32_t left = bf16_pair(exact.x - bf16_low(rounded), exact.y - bf16_high(rounded));
      const uint32_t next = __shfl_down_sync(~0u, upper, 4);  // what rounding rstd left
      const uint32_t of_rstd = bf16_pair((bf16_low(upper) + bf16_low(next)) * c2.x,
                                         (bf16_high(upper) + bf16_high(next)) * c2.y);
      upper = r == 0 ? of_rstd : r == 1 ? rounded : r == 2 ? left : 0;
      lower = 0;
    }
  }
}

// Rows [c2 xhat, c2 rstd, c1, what rounding c1 left] times columns [xhat, rstd, what rounding rstd
// left, and what nobody reads], over a share of a range's tiles. The rows never see shared memory:
// a warp scales them in the registers that the tensor cores read.
template <int kChannels>
__global__ void __launch_bounds__(StemMomentShared<kChannels>::kThreads, 1)
    stem_moments_kernel(const __grid_constant__ StemBackwardMap m,
                        const __grid_constant__ StemBackwardArguments given) {
  using Xhat = StemXhat<kChannels>;
  using Shared = StemMomentShared<kChannels>;
  extern __shared__ __align__(1024) unsigned char stages[];
  const int lane = threadIdx.x % 32, r = lane / 4, q = lane % 4;
  const int of_block = __shfl_sync(~0u, static_cast<int>(threadIdx.x / 32), 0);
  const int warp = of_block % 4, warpgroup = of_block / 4;
  const StemShare of(m, given.ranges);
  const int first = of.slice * of.tiles / m.slices, last = (of.slice + 1) * of.tiles / m.slices;
  const uint32_t base = shared_address(stages);
  const uint32_t full = base + Shared::barriers(m.slices), empty = full + kMomentStages * 8;
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < kMomentStages; ++stage) {
      phase_begin(full + stage * 8, 1);
      phase_begin(empty + stage * 8, Shared::kWarpgroups * 4);
    }
    publish();
  }
  __syncthreads();
  if (warpgroup == Shared::kWarpgroups) {
    if (lane == 0) fetch_moments<kChannels>(m, given, of, first, last - first, base);
    return;
  }

  const int first_row = 64 * warpgroup + 16 * warp, stage_bytes = Shared::stage(m.slices);
  // Where ldmatrix has its rows from; of those that no matrix has, others, which nobody reads.
  const int row = first_row + lane % 16 < Xhat::kColumns ? first_row + lane % 16 : lane % 8;
  float* const totals = reinterpret_cast<float*>(stages + Shared::totals(m.slices)) +
                        warpgroup * (Shared::kTotals / 4);
  Accumulators<Xhat::kBlocks> sum = {};
  int stage = 0, parity = 0;
  for (int tile = first; tile < last; ++tile) {
    const uint32_t xhat = base + stage * stage_bytes;
    phase_wait(full + stage * 8, parity);
    // Two buffers, so that one barrier a tile is enough.
    float* const of_tile = totals + tile % 2 * (2 * kBackwardTokens);
    add_parts(stages + stage * stage_bytes + Shared::kMatrix, m.slices, m.share, threadIdx.x % 128,
              of_tile);
    barrier_wait(1 + warpgroup, 128);
    constexpr int kSteps = kBackwardTokens / 16;
    uint32_t a[kSteps][4];
#pragma unroll
    for (int step = 0; step < kSteps; ++step)
      load_matrices(a[step], xhat + swizzled(row, 2 * step + lane / 16));
#pragma unroll
    for (int step = 0; step < kSteps; ++step)
      scale_rows(a[step], of_tile + 16 * step, first_row < Xhat::kFeatures, r, q);
    const uint64_t columns = matrix_view(xhat);
    multiply_fence();
#pragma unroll
    for (int step = 0; step < kSteps; ++step)
      multiply_held(sum, a[step], further(columns, step * 32));
    multiply_commit();
    multiply_wait<0>();
    settle<Xhat::kBlocks>(sum);
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {  // until here they are the tensor cores'
#pragma unroll
      for (int i = 0; i < 4; ++i) asm volatile("" ::"r"(a[step][i]));
    }
    __syncwarp();
    if (lane == 0) phase_arrive(empty + stage * 8);
    if (++stage == kMomentStages) stage = 0, parity ^= 1;
  }

#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int line = first_row + r + 8 * half;
    if (line < Xhat::kColumns) {
      const int64_t of_part = static_cast<int64_t>(blockIdx.x) * Xhat::kColumns + line;
      float2* const to = reinterpret_cast<float2*>(given.moments + of_part * Xhat::kColumns) + q;
#pragma unroll
      for (int j = 0; j < Xhat::kBlocks; ++j)
        to[4 * j] = {sum[j][2 * half], sum[j][2 * half + 1]};
    }
  }
}

__device__ inline float4 added(float4 a, float4 b) {
  return {a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w};
}

// The sum of `moments` over `count` blocks, each `vectors` float4: a multiple of kSumVectors.
__global__ void __launch_bounds__(kSumParts * kSumVectors)
    stem_sums_kernel(const __grid_constant__ StemBackwardArguments given, int vectors, int count) {
  __shared__ float4 parts[kSumParts * kSumVectors / 32][kSumVectors];
  const int in_block = threadIdx.x % kSumVectors, part = threadIdx.x / kSumVectors;
  const int vector = blockIdx.x * kSumVectors + in_block;
  const float4* const from = reinterpret_cast<const float4*>(given.moments) + vector;
  next_kernel_may_start();  // it finds the products done: the moments waited for them
  kernel_before_done();

  float4 sum{};
#pragma unroll 5
  for (int i = part; i < count; i += kSumParts)
    sum = added(sum, from[static_cast<int64_t>(i) * vectors]);
#pragma unroll
  for (int other = kSumVectors; other < 32; other *= 2) {
    const float4 some = {
        __shfl_xor_sync(~0u, sum.x, other), __shfl_xor_sync(~0u, sum.y, other),
        __shfl_xor_sync(~0u, sum.z, other), __shfl_xor_sync(~0u, sum.w, other)};
    sum = added(sum, some);
  }
  if (threadIdx.x % 32 < kSumVectors) parts[threadIdx.x / 32][in_block] = sum;
  __syncthreads();
  if (threadIdx.x >= kSumVectors) return;
#pragma unroll
  for (int i = 1; i < kSumParts * kSumVectors / 32; ++i) sum = added(sum, parts[i][in_block]);
  reinterpret_cast<float4*>(given.sums)[vector] = sum;
}

// Eight rows of the gradients: four threads a column of [weight, bias], two rows each.
template <int kChannels>
__global__ void __launch_bounds__(kCombineThreads)
    stem_combine_kernel(const __grid_constant__ StemBackwardArguments given, int width) {
  using Shared = StemBackwardShared<kChannels>;
  constexpr int kFeatures = Shared::kFeatures, kColumns = Shared::kColumns;
  constexpr int kRows = kCombineRows / 4;
  constexpr int kVectors = kCombineRows * kColumns / 4, kParts = kCombineThreads / kVectors;
  __shared__ __align__(16) float s[kFeatures + 1][kColumns];
  __shared__ __align__(16) float a[kCombineRows][kColumns];
  __shared__ __align__(16) float v[kCombineRows][kColumns];
  __shared__ float norm_weight[kCombineThreads / 32][kRows];
  const int f = threadIdx.x % 128, first = threadIdx.x / 128 * kRows;
  const int d0 = blockIdx.x * kCombineRows;
  const auto bf16 = [](const void* from, int64_t i) {
    return bf16_low(static_cast<const uint16_t*>(from)[i]);
  };

  // The products: their kernel was done before the moments let the sums start, and those this.
  const int part = threadIdx.x / kVectors, vector = threadIdx.x % kVectors;
  float4 sum{};
  if (part < kParts) {
    const int64_t apart = static_cast<int64_t>(width) * kColumns / 4;
    const float4* const from = reinterpret_cast<const float4*>(given.products) +
                               static_cast<int64_t>(blockIdx.x) * kVectors + vector;
#pragma unroll 9
    for (int i = part; i < given.ranges; i += kParts) sum = added(sum, from[i * apart]);
  }
  for (int i = threadIdx.x; i < kCombineRows * (kFeatures + 1); i += kCombineThreads) {
    const int row = i / (kFeatures + 1), column = i - row * (kFeatures + 1), d = d0 + row;
    const float value = column < kFeatures
                            ? bf16(given.weight, static_cast<int64_t>(d) * kFeatures + column)
                            : bf16(given.bias, d);
    v[row][column] = value - given.means[column];
  }
  static_assert((kParts - 1) * kVectors * 4 <= (kFeatures + 1) * kColumns);
  float4* const vectors = reinterpret_cast<float4*>(&s[0][0]);  // of the other parts, first
  if (part > 0 && part < kParts) vectors[(part - 1) * kVectors + vector] = sum;
  __syncthreads();
  if (part == 0) {
#pragma unroll
    for (int i = 0; i < kParts - 1; ++i) sum = added(sum, vectors[i * kVectors + vector]);
    reinterpret_cast<float4*>(&a[0][0])[vector] = sum;
  }
  __syncthreads();
  kernel_before_done();
  next_kernel_may_start();
  for (int i = threadIdx.x; i < (kFeatures + 1) * kColumns / 4; i += kCombineThreads)
    vectors[i] = reinterpret_cast<const float4*>(given.sums)[i];
  __syncthreads();

  // Column F and the next are of rstd and of what rounding it left.
  const bool of_bias = f == kFeatures;
  float gradient[kRows] = {}, row_sum[kRows] = {};
  if (f <= kFeatures) {
    const float* const c1 = given.sums + (kFeatures + 1) * kColumns + f;
    float u = c1[0] + c1[kColumns];
    if (of_bias) u += c1[1] + c1[kColumns + 1];
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int d = d0 + first + i;
      const float* const found = &a[first + i][f];
      const float product = of_bias ? found[0] + found[1] : found[0];
      gradient[i] = bf16(given.norm_weight, d) * product - u;
      row_sum[i] = v[first + i][f] * product;
      if (of_bias) static_cast<uint16_t*>(given.d_norm_bias)[d] = bf16_pair(found[2], 0.f);
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
