// The gradients of the head's tokens and weights: one pass over the tokens.
//
// With xhat = (x - mean) rstd and dF the gradient at a token's features,
//
//   d_token = scale rstd (norm_weight (dF W) - c1 - c2 xhat),  R = sum_t xhat dF,  q = sum_t dF.
//
// mean, rstd, c1 and c2 are at hand for every token (the forward, or head_rows_kernel, made them),
// so a slice of a token's columns needs nothing of the others. A block has a slice of 256 columns
// of a range of tokens, reads them once and writes their gradient, and keeps R in registers as long
// as it lives. head_finish_kernel adds the ranges, in order, and makes the weights' gradients.
//
// A warpgroup fills three stages, each of 64 tokens: their columns, dF and four numbers each. Two
// warpgroups calculate, each with 128 of the columns:
// - g = dF W: 64 x 128 of 48 K, whose columns are so ordered that lane 4 r + q of a warp has
//   columns 32 v + 8 q + (0 .. 7) of tokens r and r + 8: 16 bytes of bfloat16, and 64 with its
//   neighbours. So tokens are read and gradients written without an exchange between lanes.
// - R: xhat goes to shared memory as [token][column], where both of the product's operands have
//   rows of K, tokens.
// At the upsampler's size the tensor cores take 800 cycles for 64 tokens, instructions 1,800 and
// device memory 5,500.
#pragma once

#include "bf16.cuh"
#include "head/head_backward.h"
#include "wgmma.cuh"

namespace snapkernels {

constexpr int kHeadStages = 3;  // two under way are 64 KB, four times what the latency wants
constexpr int kHeadCalculators = 256;  // threads
constexpr int kHeadFillers = 128;      // after them, of 384: 168 registers each, shared out anew
constexpr int kHeadCalculatorRegisters = 216;
constexpr int kHeadFillerRegisters = 72;
constexpr int kHeadHalf = kHeadSlice / 2;  // columns of a warpgroup
constexpr int kHeadSumParts = 8;           // of a stage's tokens, in q
constexpr int kHeadFinishColumns = 8;      // of D of a block: 128 blocks for 1024

struct HeadBackwardMap {
  int tokens, width, slices, ranges;
};

// Shared memory of a block, in bytes from its begin.
template <int kFeatures>
struct HeadBackwardShared {
  // Of a token's 512 bytes: rows r and r + 1 are four chunks of 16 apart, and so in other banks.
  static constexpr int kPitch = kHeadSlice * 2 + 64;
  // In a stage, after the tokens: dF as [token][feature], and a token's four numbers.
  static constexpr int kGrad = kHeadStageTokens * kPitch;
  static constexpr int kRows = kGrad + kHeadStageTokens * kMatrixRow;
  static constexpr int kStage = kRows + kHeadStageTokens * 16;
  static constexpr int kWeight = kHeadStages * kStage;  // [column of g][feature] of each warpgroup
  static constexpr int kXhat = kWeight + kHeadSlice * kMatrixRow;  // [64 columns][token][column]
  static constexpr int kBlock = kHeadStageTokens * kMatrixRow;     // 64 columns of it
  static constexpr int kGain = kXhat + kHeadSlice / 64 * kBlock;   // norm_weight, float32
  static constexpr int kBarriers = kGain + kHeadSlice * 4;
  static constexpr int kBytes = kBarriers + 2 * kHeadStages * 8;
  static_assert(kStage % 1024 == 0 && kGrad % 1024 == 0 && kBytes <= 232448);
};

// What a block does: 256 columns of the stages `first` to `last` - 1 of all tokens.
struct HeadShare {
  int slice, range, first, last;

  __device__ explicit HeadShare(const HeadBackwardMap& m) {
    // A range's slices run together, and find its dF in L2.
    range = blockIdx.x / m.slices;
    slice = blockIdx.x - range * m.slices;
    const int64_t stages = (m.tokens + int64_t{kHeadStageTokens} - 1) / kHeadStageTokens;
    first = range * stages / m.ranges;
    last = (range + 1) * stages / m.ranges;
  }
};

// The filling warpgroup. Of tokens past the last dF is zeros, and the rest is not written.
template <int kFeatures>
__device__ void fill_stages(const HeadBackwardMap& m, const HeadBackwardArguments& given,
                            const HeadShare& of, int thread, uint32_t base) {
  using Shared = HeadBackwardShared<kFeatures>;
  constexpr int kChunks = kFeatures / 8;  // 16 bytes each
  const uint32_t full = base + Shared::kBarriers, empty = full + kHeadStages * 8;
  const uint64_t passing = first_to_leave(), shared_by_slices = stays();
  const char* const tokens =
      static_cast<const char*>(given.tokens) + of.slice * (kHeadSlice * int64_t{2});
  int stage = 0, parity = 1, before = 0;
  for (int tile = of.first; tile < of.last; ++tile) {
    const int64_t token = int64_t{tile} * kHeadStageTokens;
    const int some = min(m.tokens - tile * kHeadStageTokens, kHeadStageTokens);
    const uint32_t to = base + stage * Shared::kStage, barrier = full + stage * 8;
    phase_wait(empty + stage * 8, parity);
    if (thread == 0) phase_expect(barrier, some * (kHeadSlice * 2 + 16));
    barrier_wait(1, kHeadFillers);  // it expects before a copy arrives
    if (thread < some)
      copy_bulk(to + thread * Shared::kPitch, tokens + (token + thread) * m.width * 2,
                kHeadSlice * 2, barrier, passing);
    if (thread == kHeadStageTokens)
      copy_bulk(to + Shared::kRows, given.rows + token * 4, some * 16, barrier, shared_by_slices);
    const char* const grad =
        static_cast<const char*>(given.feature_grad) + token * (kFeatures * 2);
#pragma unroll
    for (int i = 0; i < kHeadStageTokens * kChunks / kHeadFillers; ++i) {
      const int at = thread + kHeadFillers * i, row = at / kChunks;
      copy_to_shared(to + Shared::kGrad + swizzled(row, at % kChunks),
                     grad + (row < some ? at * 16 : 0), row < some, shared_by_slices);
    }
    copies_commit();
    if (tile > of.first) {  // the stage before is complete, this one under way
      copies_wait<1>();
      publish();
      phase_arrive(full + before * 8);
    }
    before = stage;
    if (++stage == kHeadStages) stage = 0, parity ^= 1;
  }
  copies_wait<0>();
  publish();
  phase_arrive(full + before * 8);
}

// The slice's W as [column of g][feature], and its norm_weight. Column 8 j + 2 q + i of a
// warpgroup's product is column 32 (j / 4) + 8 q + 2 (j % 4) + i of its 128 of D.
template <int kFeatures>
__device__ void share_weights(const HeadBackwardMap& m, const HeadBackwardArguments& given,
                              const HeadShare& of, int thread, unsigned char* shared) {
  using Shared = HeadBackwardShared<kFeatures>;
  const int d = of.slice * kHeadSlice + thread, in_32 = thread % 32;
  const int column = thread / 32 * 32 + in_32 % 8 / 2 * 8 + in_32 / 8 * 2 + in_32 % 2;
  const uint16_t* const weight = static_cast<const uint16_t*>(given.weight) + d;
  uint32_t pairs[kFeatures / 2];
#pragma unroll
  for (int p = 0; p < kFeatures / 2; ++p)
    pairs[p] = weight[(2 * p) * m.width] | uint32_t{weight[(2 * p + 1) * m.width]} << 16;
#pragma unroll
  for (int chunk = 0; chunk < kFeatures / 8; ++chunk)
    *reinterpret_cast<uint4*>(shared + Shared::kWeight + swizzled(column, chunk)) = {
        pairs[4 * chunk], pairs[4 * chunk + 1], pairs[4 * chunk + 2], pairs[4 * chunk + 3]};
  reinterpret_cast<float*>(shared + Shared::kGain)[thread] =
      bf16_low(static_cast<const uint16_t*>(given.norm_weight)[d]);
  publish();
  barrier_wait(4, kHeadCalculators);
}

// A lane's part of two tokens' gradient: 8 columns of each 32.
using HeadGradient = uint4[kHeadHalf / 32][2];

// A calculating warpgroup's 64 tokens of a stage: their gradient, and xhat to shared memory.
template <int kFeatures>
__device__ void finish_tokens(const HeadBackwardMap& m, const Accumulators<16>& g, int tile,
                              const unsigned char* stage, int warpgroup, int warp, int lane,
                              float scale, unsigned char* shared, HeadGradient& gradient) {
  using Shared = HeadBackwardShared<kFeatures>;
  const int r = lane / 4, q = lane % 4, column = warpgroup * kHeadHalf + 8 * q;
  const float* const gains = reinterpret_cast<const float*>(shared + Shared::kGain) + column;
  unsigned char* const xhat = shared + Shared::kXhat + warpgroup * 2 * Shared::kBlock;
  const int64_t first = int64_t{tile} * kHeadStageTokens;
  float4 of_token[2];
  bool some[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = 16 * warp + r + 8 * half;
    some[half] = first + row < m.tokens;
    of_token[half] = reinterpret_cast<const float4*>(stage + Shared::kRows)[row];
    if (!some[half]) of_token[half] = {};
  }
#pragma unroll
  for (int v = 0; v < kHeadHalf / 32; ++v) {
    float gain[8];
#pragma unroll
    for (int i = 0; i < 2; ++i)
      *reinterpret_cast<float4*>(gain + 4 * i) =
          *reinterpret_cast<const float4*>(gains + 32 * v + 4 * i);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = 16 * warp + r + 8 * half;
      const float4 &token = of_token[half];  // mean, 1 / standard deviation, c1, c2
      uint4 x = *reinterpret_cast<const uint4*>(stage + row * Shared::kPitch +
                                                (column + 32 * v) * 2);
      if (!some[half]) x = {};
      const uint32_t pairs[4] = {x.x, x.y, x.z, x.w};
      uint32_t of_xhat[4], of_grad[4];
#pragma unroll
      for (int p = 0; p < 4; ++p) {
        const float low = (bf16_low(pairs[p]) - token.x) * token.y;
        const float high = (bf16_high(pairs[p]) - token.x) * token.y;
        of_xhat[p] = bf16_pair(low, high);
        const float* const of_g = &g[4 * v + p][2 * half];
        const float rest_low = fmaf(-token.w, low, fmaf(of_g[0], gain[2 * p], -token.z));
        const float rest_high = fmaf(-token.w, high, fmaf(of_g[1], gain[2 * p + 1], -token.z));
        of_grad[p] = bf16_pair(rest_low * (token.y * scale), rest_high * (token.y * scale));
      }
      *reinterpret_cast<uint4*>(xhat + v / 2 * Shared::kBlock +
                                swizzled(row, v % 2 * 4 + q)) = {of_xhat[0], of_xhat[1],
                                                                 of_xhat[2], of_xhat[3]};
      gradient[v][half] = {of_grad[0], of_grad[1], of_grad[2], of_grad[3]};
    }
  }
}

__device__ inline void store_tokens(const HeadBackwardMap& m, const HeadBackwardArguments& given,
                                    const HeadShare& of, int tile, int warpgroup, int warp,
                                    int lane, const HeadGradient& gradient) {
  const int column = of.slice * kHeadSlice + warpgroup * kHeadHalf + lane % 4 * 8;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int64_t token = int64_t{tile} * kHeadStageTokens + 16 * warp + lane / 4 + 8 * half;
    if (token >= m.tokens) continue;
    uint4* const to = static_cast<uint4*>(given.d_tokens) + (token * m.width + column) / 8;
#pragma unroll
    for (int v = 0; v < kHeadHalf / 32; ++v) to[4 * v] = gradient[v][half];
  }
}

// Two features of an eighth of a stage's tokens, added to `sum`.
template <int kFeatures>
__device__ void add_features(const unsigned char* grad, int thread, float2& sum) {
  const int pair = thread % (kFeatures / 2), part = thread / (kFeatures / 2);
#pragma unroll
  for (int i = 0; i < kHeadStageTokens / kHeadSumParts; ++i) {
    const int row = part * (kHeadStageTokens / kHeadSumParts) + i;
    const uint32_t both =
        reinterpret_cast<const uint32_t*>(grad + swizzled(row, pair / 4))[pair % 4];
    sum.x += bf16_low(both);
    sum.y += bf16_high(both);
  }
}

template <int kFeatures>
__device__ void calculate(const HeadBackwardMap& m, const HeadBackwardArguments& given,
                          const HeadShare& of, int warpgroup, int warp, int lane,
                          unsigned char* shared) {
  using Shared = HeadBackwardShared<kFeatures>;
  constexpr int kBlocks = kFeatures / 8;
  const int r = lane / 4, q = lane % 4, thread = threadIdx.x;
  const uint32_t base = shared_address(shared);
  const uint32_t full = base + Shared::kBarriers, empty = full + kHeadStages * 8;
  const uint64_t weight = matrix_view(base + Shared::kWeight + warpgroup * kHeadHalf * kMatrixRow);
  const uint64_t xhat = matrix_view(base + Shared::kXhat + warpgroup * 2 * Shared::kBlock);
  const float scale = given.scale == nullptr ? 1.f : *given.scale;
  const bool of_weights = given.products != nullptr;
  // Slices have the same dF: the first adds it up.
  const bool adds = of_weights && of.slice == 0 && thread < kHeadSumParts * kFeatures / 2;

  Accumulators<kBlocks> product[2] = {};  // R of 64 columns each
  float2 sum{};
  int stage = 0, parity = 0;
  for (int tile = of.first; tile < of.last; ++tile) {
    const unsigned char* const begin = shared + stage * Shared::kStage;
    const uint64_t grad = matrix_view(base + stage * Shared::kStage + Shared::kGrad);
    phase_wait(full + stage * 8, parity);
    Accumulators<16> g;
    multiply_fence();
    multiply<false>(g, grad, weight);
#pragma unroll
    for (int step = 1; step < kFeatures / 16; ++step)
      multiply<true>(g, further(grad, step * 32), further(weight, step * 32));
    multiply_commit();
    if (adds) add_features<kFeatures>(begin + Shared::kGrad, thread, sum);
    multiply_wait<0>();
    settle<16>(g);
    HeadGradient gradient;
    finish_tokens<kFeatures>(m, g, tile, begin, warpgroup, warp, lane, scale, shared, gradient);

    if (of_weights) {
      publish();
      barrier_wait(2 + warpgroup, 128);
      multiply_fence();
#pragma unroll
      for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int step = 0; step < kHeadStageTokens / 16; ++step)
          multiply_columns(product[i], further(xhat, i * Shared::kBlock + step * 16 * kMatrixRow),
                           further(grad, step * 16 * kMatrixRow));
      }
      multiply_commit();
    }
    // Not before publish(), which would wait for it.
    if (given.d_tokens != nullptr)
      store_tokens(m, given, of, tile, warpgroup, warp, lane, gradient);
    if (of_weights) {
      multiply_wait<0>();
      settle<kBlocks>(product[0]);
      settle<kBlocks>(product[1]);
      barrier_wait(2 + warpgroup, 128);  // before another warp writes the next xhat
    }
    __syncwarp();
    if (lane == 0) phase_arrive(empty + stage * 8);
    if (++stage == kHeadStages) stage = 0, parity ^= 1;
  }
  if (!of_weights) return;

  const int d = of.slice * kHeadSlice + warpgroup * kHeadHalf + 16 * warp + r;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t line = int64_t{of.range} * m.width + d + 64 * i + 8 * half;
      float2* const to = reinterpret_cast<float2*>(given.products + line * kFeatures) + q;
#pragma unroll
      for (int j = 0; j < kBlocks; ++j)
        to[4 * j] = {product[i][j][2 * half], product[i][j][2 * half + 1]};
    }
  }
  if (of.slice != 0) return;
  barrier_wait(4, kHeadCalculators);  // nobody multiplies any more: xhat's place is free
  float2* const parts = reinterpret_cast<float2*>(shared + Shared::kXhat);
  if (adds) parts[thread] = sum;
  barrier_wait(4, kHeadCalculators);
  if (thread >= kFeatures / 2) return;
  sum = parts[thread];
#pragma unroll
  for (int part = 1; part < kHeadSumParts; ++part) {
    const float2 more = parts[part * (kFeatures / 2) + thread];
    sum = {sum.x + more.x, sum.y + more.y};
  }
  reinterpret_cast<float2*>(given.sums)[of.range * (kFeatures / 2) + thread] = sum;
}

template <int kFeatures>
__global__ void __launch_bounds__(kHeadCalculators + kHeadFillers, 1)
    head_backward_kernel(const __grid_constant__ HeadBackwardMap m,
                         const __grid_constant__ HeadBackwardArguments given) {
  using Shared = HeadBackwardShared<kFeatures>;
  extern __shared__ __align__(1024) unsigned char shared_bytes[];
  const int lane = threadIdx.x % 32;
  // Shuffled to be known as a warp's: its addresses are in uniform registers.
  const int of_block = __shfl_sync(~0u, static_cast<int>(threadIdx.x / 32), 0);
  const HeadShare of(m);
  if (threadIdx.x == 0) {
    const uint32_t full = shared_address(shared_bytes) + Shared::kBarriers;
    for (int stage = 0; stage < kHeadStages; ++stage) {
      phase_begin(full + stage * 8, kHeadFillers + 1);
      phase_begin(full + (kHeadStages + stage) * 8, kHeadCalculators / 32);
    }
    phases_begun();
  }
  __syncthreads();
  after_kernel_before();
  if (of_block >= kHeadCalculators / 32) {
    registers_shrink<kHeadFillerRegisters>();
    fill_stages<kFeatures>(m, given, of, threadIdx.x - kHeadCalculators,
                           shared_address(shared_bytes));
  } else {
    registers_grow<kHeadCalculatorRegisters>();
    share_weights<kFeatures>(m, given, of, threadIdx.x, shared_bytes);
    calculate<kFeatures>(m, given, of, of_block / 4, of_block % 4, lane, shared_bytes);
  }
}

// The gradients of the weights, of eight columns of D: a thread has one feature of one column.
template <int kFeatures>
__global__ void __launch_bounds__(kHeadFinishColumns* kFeatures)
    head_finish_kernel(const __grid_constant__ HeadBackwardMap m,
                       const __grid_constant__ HeadBackwardArguments given) {
  constexpr int kThreads = kHeadFinishColumns * kFeatures;
  __shared__ float q[kFeatures], gain_terms[kHeadFinishColumns][kFeatures],
      shift_terms[kHeadFinishColumns][kFeatures];
  const int feature = threadIdx.x % kFeatures, column = threadIdx.x / kFeatures;
  const int d = blockIdx.x * kHeadFinishColumns + column;
  after_kernel_before();

  const float scale = given.scale == nullptr ? 1.f : *given.scale;
  const float* const products = given.products + d * kFeatures + feature;
  float sum = 0.f, of_sums = 0.f;
#pragma unroll 8
  for (int range = 0; range < m.ranges; ++range)
    sum += products[int64_t{range} * m.width * kFeatures];
  if (column == 0) {
#pragma unroll 8
    for (int range = 0; range < m.ranges; ++range)
      of_sums += given.sums[range * kFeatures + feature];
    q[feature] = of_sums * scale;
    if (blockIdx.x == 0)
      static_cast<uint16_t*>(given.d_bias)[feature] = bf16_pair(of_sums * scale, 0.f);
  }
  __syncthreads();
  const auto bf16 = [](const void* from, int64_t i) {
    return bf16_low(static_cast<const uint16_t*>(from)[i]);
  };
  sum *= scale;
  const int64_t at = int64_t{feature} * m.width + d;
  const float weight = bf16(given.weight, at);
  const float gradient =
      fmaf(sum, bf16(given.norm_weight, d), q[feature] * bf16(given.norm_bias, d));
  static_cast<uint16_t*>(given.d_weight)[at] = bf16_pair(gradient, 0.f);
  gain_terms[column][feature] = weight * sum;
  shift_terms[column][feature] = weight * q[feature];
  __syncthreads();

  // A warp adds a column's terms.
  const int lane = threadIdx.x % 32;
  for (int of = threadIdx.x / 32; of < kHeadFinishColumns; of += kThreads / 32) {
    float gain = 0.f, shift = 0.f;
    for (int i = lane; i < kFeatures; i += 32) {
      gain += gain_terms[of][i];
      shift += shift_terms[of][i];
    }
#pragma unroll
    for (int other = 16; other > 0; other /= 2) {
      gain += __shfl_xor_sync(~0u, gain, other);
      shift += __shfl_xor_sync(~0u, shift, other);
    }
    const int to = blockIdx.x * kHeadFinishColumns + of;
    if (lane == 0) {
      static_cast<uint16_t*>(given.d_norm_weight)[to] = bf16_pair(gain, 0.f);
      static_cast<uint16_t*>(given.d_norm_bias)[to] = bf16_pair(shift, 0.f);
    }
  }
}

}  // namespace snapkernels
