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

#include "group_attn/tiles.cuh"

namespace snapkernels {

constexpr int kWriteTiles = 4;
constexpr int kWriteSlots = 6;
constexpr int kWriteChannels = 128;                            // of a product
constexpr int kWriteStep = kSlotBytes / (2 * kWriteChannels);  // columns of P in it: 96

struct WriteRings {
  Ring<kWriteTiles, kTileBytes> tiles;
  Ring<kWriteSlots, kSlotBytes> slots;

  static constexpr int kLinesAt = kWriteTiles * kTileBytes + kWriteSlots * kSlotBytes;
  static constexpr int kBarriersAt = kLinesAt + kScoreConsumers * kGroupColumns * 8;
  static constexpr int kBytes = kBarriersAt + 16 * (kWriteTiles + kWriteSlots);

  __device__ explicit WriteRings(uint32_t base)
      : tiles{base, base + kBarriersAt},
        slots{base + kWriteTiles * kTileBytes, base + kBarriersAt + 16 * kWriteTiles} {}
};

// Of 64 tokens, 16 of a warp, and half of the columns.
using Scores = Accumulators<kScoreHalf / 8>;

// Of tokens r and r + 8 of a warp's 16, in every lane 4 r + q.
struct Moments {
  float mean[2], rstd[2];
};

// `sums` are of half a token in each thread of a warpgroup.
__device__ inline Moments moments_of_rows(TokenSums sums, int width, float eps) {
  sums.sum += __shfl_xor_sync(~0u, sums.sum, 1);
  sums.square += __shfl_xor_sync(~0u, sums.square, 1);
  const float2 found = sums.mean_rstd(width, eps);
  Moments moments;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int lane = 2 * (threadIdx.x % 32 / 4 + 8 * i);
    moments.mean[i] = __shfl_sync(~0u, found.x, lane);
    moments.rstd[i] = __shfl_sync(~0u, found.y, lane);
  }
  return moments;
}

// By a warpgroup: x . A of its 64 tokens and half of the columns and, where wanted, the sums of its
// tokens.
template <bool kMoments>
__device__ inline void make_scores(Scores& scores, TokenSums& sums, WriteRings& rings, int width) {
  const int thread = threadIdx.x % 128;
  const uint32_t tokens = (threadIdx.x / 128 - 1) * 64 * kMatrixRow;  // of a tile
  WriteRings read = rings;  // follows, to what the tensor cores are done with
  const auto free_step = [&] {
    if (thread % 32 == 0) phase_arrive(read.tiles.free());
    read.tiles.next();
    free_slot(read.slots, thread);
  };
  clear(scores);
#pragma unroll 1
  for (int channel = 0; channel < width; channel += kScoreStep) {
    rings.tiles.wait_full();
    rings.slots.wait_full();
    const uint32_t tile = rings.tiles.place() + tokens;
    const uint64_t slot = matrix_view(rings.slots.place());
    rings.tiles.next();
    rings.slots.next();
    multiply_fence();
#pragma unroll
    for (int k = 0; k < kScoreStep / 16; ++k) {
      multiply(scores, further(matrix_view(tile), 32 * k), further(slot, 32 * k));
    }
    multiply_commit();
    if (kMoments) sums.add<4>(tile, thread / 2, thread % 2 * 4, channel == 0);
    if (channel > 0) {
      multiply_wait<1>();
      free_step();
    }
  }
  multiply_wait<0>();
  settle(scores);
  free_step();
}

// P as wgmma takes it: of 16 columns two pairs of token r, r + 8, r and r + 8.
using Weights = uint32_t[kGroupColumns / 16][4];

// The softmax of each head of a half in base 2, of a lane's tokens r and r + 8.
// `lines` has of each column the sum of A and the bias of scores.
template <int kLatents, int kHalf>
__device__ inline void softmax_heads(Weights& weights, Scores& scores, const Moments& moments,
                                     const float2* lines) {
  constexpr int kBlocks = kLatents / 8;
  const int pair = 2 * (threadIdx.x % 4);
  float slope[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) slope[i] = -moments.mean[i] * moments.rstd[i];
#pragma unroll
  for (int head = 0; head < kScoreHalf / kLatents; ++head) {
    float most[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0};
#pragma unroll
    for (int block = head * kBlocks; block < (head + 1) * kBlocks; ++block) {
      const float4 two =
          *reinterpret_cast<const float4*>(lines + kHalf * kScoreHalf + 8 * block + pair);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float& score = scores[block][i];
        score = fmaf(score, moments.rstd[i / 2],
                     fmaf(slope[i / 2], i % 2 ? two.z : two.x, i % 2 ? two.w : two.y));
        most[i / 2] = fmaxf(most[i / 2], score);
      }
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      most[i] = fmaxf(most[i], __shfl_xor_sync(~0u, most[i], 1));
      most[i] = fmaxf(most[i], __shfl_xor_sync(~0u, most[i], 2));
    }
#pragma unroll
    for (int block = head * kBlocks; block < (head + 1) * kBlocks; ++block) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float& score = scores[block][i];
        score = exp2_fast(score - most[i / 2]);
        sum[i / 2] += score;
      }
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      sum[i] += __shfl_xor_sync(~0u, sum[i], 1);
      sum[i] += __shfl_xor_sync(~0u, sum[i], 2);
      sum[i] = reciprocal_fast(sum[i]);
    }
#pragma unroll
    for (int block = head * kBlocks; block < (head + 1) * kBlocks; ++block) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        weights[kHalf * kScoreHalf / 16 + block / 2][2 * (block % 2) + i] =
            bf16_pair(scores[block][2 * i] * sum[i], scores[block][2 * i + 1] * sum[i]);
      }
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
  WriteRings rings(base);
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
        for (int channel = 0; channel < width; channel += kWriteChannels) {
          for (int column = 0; column < kGroupColumns; column += kWriteStep) {
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
    auto* lines = reinterpret_cast<float2*>(shared + WriteRings::kLinesAt) +
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
      Weights weights;
      {
        Scores scores;
        TokenSums sums;
        make_scores<true>(scores, sums, rings, width);
        const Moments moments = moments_of_rows(sums, width, given.of.eps);
        softmax_heads<kLatents, 0>(weights, scores, moments, lines);
        make_scores<false>(scores, sums, rings, width);
        softmax_heads<kLatents, 1>(weights, scores, moments, lines);
      }
#pragma unroll 1
      for (int channel = 0; channel < width; channel += kWriteChannels) {
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
        auto read = rings.slots;
#pragma unroll
        for (int step = 0; step < kGroupColumns / kWriteStep; ++step) {
          rings.slots.wait_full();
          multiply_fence();
#pragma unroll
          for (int k = 0; k < kWriteStep / 16; ++k) {
            multiply_held_columns(
                sum, weights[step * kWriteStep / 16 + k],
                further(columns_view(rings.slots.place(), kPieceBytes), k * 16 * kMatrixRow));
          }
          multiply_commit();
          rings.slots.next();
          if (step > 0) {
            multiply_wait<1>();
            free_slot(read, thread);
          }
        }
        multiply_wait<0>();
        settle(sum);
        free_slot(read, thread);
        write_channels(sum, old, static_cast<const uint4*>(given.bias) + channel / 8 + lane % 4,
                       static_cast<uint4*>(given.out) + first, row_vectors, rows);
      }
    }
  }
  cluster_wait();
}

}  // namespace snapkernels
