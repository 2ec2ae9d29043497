// group_write: patches + softmax(scores + score_bias) values + bias, in one pass over the patches.
//
// A warpgroup makes the scores of 64 tokens and half of the heads, then of the others: all at once
// would leave no registers for P beside them. The 24 columns of a head are 6 in each of 4 lanes, so
// the softmax takes two shuffles; P goes from registers to the tensor cores, as the A of products
// with 128 channels of the values, 96 columns at a time. The values' channels are permuted so that
// a lane ends with 8 in a row: 16 bytes of patches and of what is written.
//
// At the upsampler's size the products take the tensor cores 49,000 cycles for 128 tokens, which
// take device memory 40,000. While one warpgroup has its softmax or its end, the other multiplies.
#pragma once

#include "group_attn/token_scores.cuh"

namespace snapkernels {

// Mean and rstd of a lane's tokens, of the tile from `tile_token` on.
__device__ inline void write_moments(const Moments& moments, const GroupWriteArguments& given,
                                     int group, int tile_token) {
  const int token = tile_token + token_of_lane();
  const int64_t at = static_cast<int64_t>(group) * given.of.tokens + token;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    if (threadIdx.x % 4 == 0 && token + 8 * i < given.of.tokens) {
      given.mean[at + 8 * i] = moments.mean[i];
      given.rstd[at + 8 * i] = moments.rstd[i];
    }
  }
}

// 128 channels of a lane's tokens, from accumulators in which 32 v + 8 q + 2 b + e is e of block
// 4 v + b.
__device__ inline void write_channels(const Accumulators<16>& sum, const uint4 (&patches)[2][4],
                                      const uint4* bias, uint4* out, int64_t row_vectors,
                                      int rows) {
#pragma unroll
  for (int v = 0; v < 4; ++v) {
    const uint4 added = __ldg(bias + 4 * v);
    const uint32_t biases[4] = {added.x, added.y, added.z, added.w};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint4& old = patches[i][v];
      const uint32_t olds[4] = {old.x, old.y, old.z, old.w};
      uint32_t news[4];
#pragma unroll
      for (int b = 0; b < 4; ++b) {
        const float* branch = sum[4 * v + b] + 2 * i;
        news[b] = bf16_pair(branch[0] + bf16_low(biases[b]) + bf16_low(olds[b]),
                            branch[1] + bf16_high(biases[b]) + bf16_high(olds[b]));
      }
      if (i < rows) {
        out[8 * i * row_vectors + 4 * v] = make_uint4(news[0], news[1], news[2], news[3]);
      }
    }
  }
}

template <int kLatents>
__global__ void __launch_bounds__(kScoreThreads, 1)
    group_write_kernel(const __grid_constant__ CUtensorMap patches,
                       const __grid_constant__ CUtensorMap absorbed,
                       const __grid_constant__ CUtensorMap values, GroupWriteArguments given) {
  extern __shared__ __align__(1024) uint8_t shared[];
  const uint32_t base = shared_address(shared);
  const ScoreWork work(given.of);
  const int width = given.of.width, rank = rank_in_cluster();
  TokenRings rings(base);
  if (threadIdx.x == 0) {
    rings.tiles.begin(1, 4 * kScoreConsumers);               // each warp has read it for moments
    rings.slots.begin(1, kScoreConsumers * kClusterBlocks);  // a thread of each warpgroup
    phases_begun();
  }
  __syncthreads();
  cluster_wait();
  after_kernel_before();

  if (threadIdx.x < 128) {
    registers_shrink<kCopierRegisters>();
    if (threadIdx.x == 0) {
      for (int item = work.first(); item < work.items; item += work.step()) {
        for (int half = 0; half < 2; ++half) {
          for (int channel = 0; channel < width; channel += kScoreStep) {
            copy_tile(rings.tiles, &patches, channel, work.token(item, rank), work.group(item));
          }
        }
      }
    } else if (threadIdx.x == 32) {
      for (int item = work.first(); item < work.items; item += work.step()) {
        const int group = work.group(item);
        for (int half = 0; half < 2; ++half) {
          for (int channel = 0; channel < width; channel += kScoreStep) {
            copy_piece(rings.slots, &absorbed, rank, channel,
                       half * kScoreHalf + rank * kScoreHalf / 2, group);
          }
        }
        for (int channel = 0; channel < width; channel += kHeldChannels) {
          for (int column = 0; column < kGroupColumns; column += kHeldStep) {
            copy_piece(rings.slots, &values, rank, channel + rank * 64, column, group);
          }
        }
      }
    }
  } else {
    registers_grow<kScoreRegisters>();
    const int thread = threadIdx.x % 128, lane = thread % 32;
    const int row = (threadIdx.x / 32 - 4) * 16 + lane / 4;  // of the tile
    const int64_t row_vectors = width / 8;
    const int warpgroup = threadIdx.x / 128 - 1;
    auto* lines = reinterpret_cast<float2*>(shared + TokenRings::kLinesAt) +
                  warpgroup * kGroupColumns;
    for (int item = work.first(); item < work.items; item += work.step()) {
      const int group = work.group(item), token = work.token(item, rank) + row;
      const int rows = (token < given.of.tokens) + (token + 8 < given.of.tokens);
      const int64_t at = (static_cast<int64_t>(group) * given.of.tokens + token) * row_vectors;
      barrier_wait(1 + warpgroup, 128);  // the lines of the item before are read
#pragma unroll
      for (int column = thread; column < kGroupColumns; column += 128) {
        const int of_all = group * kGroupColumns + column;
        lines[column] = {given.of.absorbed_sum[of_all], given.score_bias[of_all]};
      }
      barrier_wait(1 + warpgroup, 128);
      HalfWeights weights[2];
      {
        Scores scores[1];
        TokenSums sums;
        make_scores<true>(scores, sums, rings, width);
        const Moments moments = moments_of_rows(sums, width, given.eps);
        softmax_heads<kLatents>(weights[0], scores[0], moments, lines);
        if (given.weights != nullptr) {
          write_half(weights[0], given.weights, 0, given.of, group, work.token(item, rank));
          write_moments(moments, given, group, work.token(item, rank));
        }
        make_scores<false>(scores, sums, rings, width);
        softmax_heads<kLatents>(weights[1], scores[0], moments, lines + kScoreHalf);
        if (given.weights != nullptr) {
          write_half(weights[1], given.weights, 1, given.of, group, work.token(item, rank));
        }
      }
#pragma unroll 1
      for (int channel = 0; channel < width; channel += kHeldChannels) {
        const int64_t first = at + channel / 8 + lane % 4;
        uint4 old[2][4];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const auto* from = static_cast<const uint4*>(given.of.patches) + first;
#pragma unroll
          for (int v = 0; v < 4; ++v) {
            old[i][v] = i < rows ? from[8 * i * row_vectors + 4 * v] : make_uint4(0, 0, 0, 0);
          }
        }
        Accumulators<16> sum;
        clear(sum);
        add_held(sum, weights, rings, thread);
        write_channels(sum, old, static_cast<const uint4*>(given.bias) + channel / 8 + lane % 4,
                       static_cast<uint4*>(given.out) + first, row_vectors, rows);
      }
    }
  }
  cluster_wait();
}

}  // namespace snapkernels
