// group_read's second pass over the patches: their average with the weights of the first.
//
// A block has 192 columns, 64 of each of three warpgroups, and 256 channels; the other block of its
// cluster has the other columns, and each copies half of the patches for both. A warpgroup takes
// the weights through its registers, where every 128 tokens come to the same power of two.
#pragma once

#include "bf16.cuh"
#include "group_attn/group_attn.h"
#include "tensor_copy.cuh"
#include "wgmma_wide.cuh"

namespace snapkernels {

constexpr int kAverageConsumers = 3;
constexpr int kAverageThreads = 128 * (1 + kAverageConsumers);
constexpr int kAverageColumns = 64 * kAverageConsumers;
constexpr int kAverageChannels = 256;
constexpr int kAverageStages = 4;
constexpr int kAverageStep = 64;  // tokens of a stage
constexpr int kAverageBlocks = 2;  // of a cluster
constexpr int kBoxBytes = kAverageStep * kMatrixRow;  // 64 tokens of 64 columns or channels
constexpr int kWeightBytes = kAverageConsumers * kBoxBytes;
constexpr int kAverageStageBytes = kWeightBytes + kAverageChannels / 64 * kBoxBytes;

// Of a column 1 / the sum of weights, and the sum of weights times means, over it; of the channels
// LayerNorm's weight and bias in twos.
struct AverageTotals {
  float scale[kAverageColumns], mean[kAverageColumns];
  uint32_t norm_weight[kAverageChannels / 2], norm_bias[kAverageChannels / 2];
};

constexpr int kAverageTotals = kAverageStages * kAverageStageBytes;
constexpr int kAverageBarriers = kAverageTotals + static_cast<int>(sizeof(AverageTotals));
constexpr int kAverageShared = kAverageBarriers + 16 * kAverageStages;

// 2^power, of a whole number of at most 0, twice in bfloat16.
__device__ inline uint32_t power_pair(float power) {
  const int exponent = max(static_cast<int>(fmaxf(power, -127.f)) + 127, 0);
  return static_cast<uint32_t>(exponent << 7) * 0x00010001u;
}

__device__ inline uint32_t times(uint32_t pair, uint32_t by) {
  uint32_t product;
  asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(product) : "r"(pair), "r"(by));
  return product;
}

// By 2 threads a column, with half of the blocks of tokens each. Returns the largest m of columns r
// and r + 8 of the 16 that a warp has, here as in the products.
__device__ inline float2 add_blocks(AverageTotals& totals, const GroupReadArguments& given,
                                    int group, int channel, int first_column, int thread) {
  if (thread < kAverageChannels) {
    const int which = thread % (kAverageChannels / 2);
    const bool weights = thread < kAverageChannels / 2;
    const void* from = weights ? given.norm_weight : given.norm_bias;
    (weights ? totals.norm_weight : totals.norm_bias)[which] =
        static_cast<const uint32_t*>(from)[channel / 2 + which];
  }
  const int column = thread / 2, half = thread % 2;
  const int blocks = given.of.tokens / kGroupBlock;
  const int64_t at = static_cast<int64_t>(group) * blocks * kGroupColumns + first_column + column;
  float most = -INFINITY;
#pragma unroll 9  // loads on their way at once
  for (int block = half; block < blocks; block += 2) {
    most = fmaxf(most, given.most[at + static_cast<int64_t>(block) * kGroupColumns]);
  }
  most = fmaxf(most, __shfl_xor_sync(~0u, most, 1));
  float sum = 0, mean = 0;
#pragma unroll 9  // loads on their way at once
  for (int block = half; block < blocks; block += 2) {
    const int64_t one = at + static_cast<int64_t>(block) * kGroupColumns;
    const float factor = exp2_fast(given.most[one] - most);
    sum = fmaf(factor, given.sums[one], sum);
    mean = fmaf(factor, given.means[one], mean);
  }
  sum += __shfl_xor_sync(~0u, sum, 1);
  mean += __shfl_xor_sync(~0u, mean, 1);
  if (half == 0) {
    const float scale = reciprocal_fast(sum);
    if (given.log_sum != nullptr && channel == 0) {
      given.log_sum[group * kGroupColumns + first_column + column] = most + log2f(sum);
    }
    totals.scale[column] = scale;
    totals.mean[column] = mean * scale;
  }
  const int lane = thread % 32 / 4 * 2;
  return {__shfl_sync(~0u, most, lane), __shfl_sync(~0u, most, lane + 16)};
}

// Rows are the latents of the average, without LayerNorm's weight and bias if not `kGained`. What
// it starts from is made again, not kept: the products leave 32 registers for all else.
template <int kLatents, bool kGained>
__device__ inline void write_average(const Accumulators<16> (&sum)[2], const AverageTotals& totals,
                                     const GroupReadArguments& given, int group, int channel) {
  const uint32_t thread = thread_again();
  const int lane = thread % 32, row = (thread / 32 - 4) * 16 + lane / 4;
  auto* out = static_cast<uint4*>(kGained ? given.context : given.average);
  out += channel / 8 + lane % 4;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float scale = totals.scale[row + 8 * i], mean = totals.mean[row + 8 * i];
    const int column = rank_in_cluster() * kAverageColumns + row + 8 * i;
    const int64_t latent =
        (column / kLatents * given.of.groups + group) * kLatents + column % kLatents;
    auto* to = out + latent * (given.of.width / 8);
#pragma unroll
    for (int v = 0; v < kAverageChannels / 32; ++v) {
      uint32_t pairs[4];
#pragma unroll
      for (int b = 0; b < 4; ++b) {
        const float* pair = sum[v / 4][v % 4 * 4 + b] + 2 * i;
        float low = fmaf(pair[0], scale, -mean), high = fmaf(pair[1], scale, -mean);
        if constexpr (kGained) {
          const uint32_t w = totals.norm_weight[16 * v + 4 * b + lane % 4];
          const uint32_t c = totals.norm_bias[16 * v + 4 * b + lane % 4];
          low = fmaf(low, bf16_low(w), bf16_low(c));
          high = fmaf(high, bf16_high(w), bf16_high(c));
        }
        pairs[b] = bf16_pair(low, high);
      }
      to[4 * v] = exchanged(make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]));
    }
  }
}

template <int kLatents>
__global__ void __launch_bounds__(kAverageThreads, 1)
    group_read_average_kernel(const __grid_constant__ CUtensorMap patches,
                              const __grid_constant__ CUtensorMap weights,
                              GroupReadArguments given) {
  extern __shared__ __align__(1024) uint8_t shared[];
  const uint32_t base = shared_address(shared);
  auto& totals = *reinterpret_cast<AverageTotals*>(shared + kAverageTotals);
  const int rank = rank_in_cluster(), first_column = rank * kAverageColumns;
  const int slices = given.of.width / kAverageChannels, items = given.of.groups * slices;
  const int blocks = given.of.tokens / kGroupBlock;
  const int first = blockIdx.x / kAverageBlocks, step = gridDim.x / kAverageBlocks;
  Ring<kAverageStages, kAverageStageBytes> ring{base, base + kAverageBarriers};
  if (threadIdx.x == 0) {
    ring.begin(1, 4 * kAverageConsumers * kAverageBlocks);  // each warp of both blocks
    phases_begun();
  }
  __syncthreads();
  cluster_wait();
  after_kernel_before();

  if (threadIdx.x < 128) {
    registers_shrink<32>();
    if (threadIdx.x == 0) {
      for (int item = first; item < items; item += step) {
        const int group = item / slices, channel = item % slices * kAverageChannels;
        for (int token = 0; token < given.of.tokens; token += kAverageStep) {
          ring.wait_free();
          phase_expect(ring.full(), kAverageStageBytes);
          for (int box = 0; box < kAverageConsumers; ++box) {
            copy_box(ring.place() + box * kBoxBytes, &weights, token, first_column + 64 * box,
                     group, ring.full());
          }
          constexpr int kShare = kAverageChannels / 64 / kAverageBlocks;
          for (int box = rank * kShare; box < (rank + 1) * kShare; ++box) {
            copy_box_in_order((1 << kAverageBlocks) - 1,
                              ring.place() + kWeightBytes + box * kBoxBytes, &patches,
                              channel + 64 * box, (group * given.of.tokens + token) / 32,
                              ring.full());
          }
          ring.next();
        }
      }
    }
  } else {
    registers_grow<160>();
    const int lane = threadIdx.x % 32, warpgroup = threadIdx.x / 128 - 1;
    // Of 8 x 8 matrices a lane's is lane / 8: columns from 0 and 8 on, then of the next 8 tokens.
    const int matrix_row = threadIdx.x % 128 / 32 * 16 + lane / 8 % 2 * 8 + lane % 8;
    const uint32_t lane_at = warpgroup * kBoxBytes + swizzled(matrix_row, lane / 16);
    for (int item = first; item < items; item += step) {
      const int group = item / slices, thread = thread_again() - 128;
      barrier_wait(1, 128 * kAverageConsumers);  // the totals of the item before are read
      const float2 top = add_blocks(totals, given, group, item % slices * kAverageChannels,
                                    first_column, thread);
      barrier_wait(1, 128 * kAverageConsumers);
      int at = group * blocks * kGroupColumns + first_column + thread / 32 * 16 +
               thread % 32 / 4;  // of m, below 2^31
      float next[2] = {given.most[at], given.most[at + 8]};
      Accumulators<16> sum[2];
      clear(sum[0]);
      clear(sum[1]);
#pragma unroll 1
      for (int block = 0; block < blocks; ++block) {
        const uint32_t factor[2] = {power_pair(next[0] - top.x), power_pair(next[1] - top.y)};
        if (block + 1 < blocks) at += kGroupColumns;
        next[0] = given.most[at];
        next[1] = given.most[at + 8];
#pragma unroll
        for (int token = 0; token < kGroupBlock; token += kAverageStep) {
          ring.wait_full();
#pragma unroll
          for (int k = 0; k < kAverageStep / 16; ++k) {
            uint32_t held[4];
            load_matrices(held, ring.place() + (lane_at ^ 32 * k));  // two chunks, swizzled
#pragma unroll
            for (int i = 0; i < 4; ++i) held[i] = times(held[i], factor[i % 2]);
            multiply_fence();
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              const uint32_t boxes = ring.place() + kWeightBytes + 2 * half * kBoxBytes;
              multiply_held_columns(
                  sum[half], held, further(columns_view(boxes, kBoxBytes), k * 16 * kMatrixRow));
            }
            multiply_commit();
            multiply_wait<0>();
            settle(sum[0]);
            settle(sum[1]);
          }
          if (lane == 0) {
            for (int other = 0; other < kAverageBlocks; ++other) {
              phase_arrive_at(ring.free(), other);
            }
          }
          ring.next();
        }
      }
      const int channel = item % slices * kAverageChannels;
      if (given.average != nullptr) {
        write_average<kLatents, false>(sum, totals, given, item / slices, channel);
      }
      __syncwarp();  // nothing of one is kept for the other: registers are short
      write_average<kLatents, true>(sum, totals, given, item / slices, channel);
    }
  }
  cluster_wait();
}

}  // namespace snapkernels
