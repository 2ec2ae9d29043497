// Scores of tokens by columns, for the kernels that have all of a token's columns together: a
// warpgroup makes those of 64 tokens and half of the columns at a time.
#pragma once

#include "group_attn/tiles.cuh"

namespace snapkernels {

constexpr int kTokenTiles = 4;
constexpr int kTokenSlots = 6;

struct TokenRings {
  Ring<kTokenTiles, kTileBytes> tiles;
  Ring<kTokenSlots, kSlotBytes> slots;

  static constexpr int kBarriersAt = kTokenTiles * kTileBytes + kTokenSlots * kSlotBytes;
  static constexpr int kLinesAt = kBarriersAt + 16 * (kTokenTiles + kTokenSlots);

  // Of shared memory, with a Line of every column for each warpgroup.
  template <typename Line>
  static constexpr int bytes() {
    return kLinesAt + kScoreConsumers * kGroupColumns * static_cast<int>(sizeof(Line));
  }

  __device__ explicit TokenRings(uint32_t base)
      : tiles{base, base + kBarriersAt},
        slots{base + kTokenTiles * kTileBytes, base + kBarriersAt + 16 * kTokenTiles} {}
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

// By a warpgroup: the products of its 64 tokens with kCount slots of every step, of half of the
// columns each, and, where wanted, the sums of its tokens.
template <bool kMoments, int kCount>
__device__ inline void make_scores(Scores (&scores)[kCount], TokenSums& sums, TokenRings& rings,
                                   int width) {
  const int thread = threadIdx.x % 128;
  const uint32_t tokens = (threadIdx.x / 128 - 1) * 64 * kMatrixRow;  // of a tile
  TokenRings read = rings;  // follows, to what the tensor cores are done with
  const auto free_step = [&] {
    if (thread % 32 == 0) phase_arrive(read.tiles.free());
    read.tiles.next();
#pragma unroll
    for (int i = 0; i < kCount; ++i) free_slot<kClusterBlocks>(read.slots, thread);
  };
#pragma unroll
  for (int i = 0; i < kCount; ++i) clear(scores[i]);
#pragma unroll 1
  for (int channel = 0; channel < width; channel += kScoreStep) {
    rings.tiles.wait_full();
    const uint32_t tile = rings.tiles.place() + tokens;
    rings.tiles.next();
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      rings.slots.wait_full();
      const uint64_t slot = matrix_view(rings.slots.place());
      rings.slots.next();
      multiply_fence();
#pragma unroll
      for (int k = 0; k < kScoreStep / 16; ++k) {
        multiply(scores[i], further(matrix_view(tile), 32 * k), further(slot, 32 * k));
      }
    }
    multiply_commit();
    if (kMoments) sums.add<4>(tile, thread / 2, thread % 2 * 4, channel == 0);
    if (channel > 0) {
      multiply_wait<1>();
      free_step();
    }
  }
  multiply_wait<0>();
#pragma unroll
  for (int i = 0; i < kCount; ++i) settle(scores[i]);
  free_step();
}

// P, or another of half of the columns, as wgmma takes it: of 16 columns two pairs of token r,
// r + 8, r and r + 8.
using HalfWeights = uint32_t[kScoreHalf / 16][4];

// By a warpgroup: the products of all columns of its tokens, which are P or another and in
// registers, with 128 channels of four slots.
constexpr int kHeldChannels = 128;
constexpr int kHeldStep = kSlotBytes / (2 * kHeldChannels);  // columns of a slot
static_assert(2 * kHeldStep == kScoreHalf);

__device__ inline void add_held(Accumulators<kHeldChannels / 8>& sum,
                                const HalfWeights (&weights)[2], TokenRings& rings, int thread) {
  auto read = rings.slots;
#pragma unroll
  for (int step = 0; step < kGroupColumns / kHeldStep; ++step) {
    rings.slots.wait_full();
    multiply_fence();
#pragma unroll
    for (int k = 0; k < kHeldStep / 16; ++k) {
      multiply_held_columns(
          sum, weights[step / 2][step % 2 * kHeldStep / 16 + k],
          further(columns_view(rings.slots.place(), kPieceBytes), k * 16 * kMatrixRow));
    }
    multiply_commit();
    rings.slots.next();
    if (step > 0) {
      multiply_wait<1>();
      free_slot<kClusterBlocks>(read, thread);
    }
  }
  multiply_wait<0>();
  settle(sum);
  free_slot<kClusterBlocks>(read, thread);
}

// The softmax of each head of a half in base 2, of a lane's tokens r and r + 8.
// `lines` has of each column of the half the sum of A and the bias of scores.
template <int kLatents>
__device__ inline void softmax_heads(HalfWeights& weights, Scores& scores, const Moments& moments,
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
      const float4 two = *reinterpret_cast<const float4*>(lines + 8 * block + pair);
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
        weights[block / 2][2 * (block % 2) + i] =
            bf16_pair(scores[block][2 * i] * sum[i], scores[block][2 * i + 1] * sum[i]);
      }
    }
  }
}

// 16 bytes that no block reads soon: they leave L2 to others.
__device__ inline void store_once(uint4* to, const uint4& from) { __stcs(to, from); }

// A lane's first token of a tile; this and what follows from it is made again where it is wanted,
// since registers are short.
__device__ inline int token_of_lane() {
  const uint32_t thread = thread_again();
  return (thread / 32 - 4) * 16 + thread % 32 / 4;
}

// Where a lane's tokens, of the tile from `tile_token` on, have their first 16 bytes of P or dS.
__device__ inline int64_t weights_of_lane(const GroupArguments& of, int group, int tile_token) {
  const int64_t token = static_cast<int64_t>(group) * of.tokens + tile_token + token_of_lane();
  return token * (kGroupColumns / 8) + thread_again() % 4;
}

// Half of the columns of a lane's tokens, to (groups, tokens, kGroupColumns), columns in order.
__device__ inline void write_half(const HalfWeights& weights, void* all, int half,
                                  const GroupArguments& of, int group, int tile_token) {
  const int left = of.tokens - tile_token - token_of_lane();
  auto* to = static_cast<uint4*>(all) + weights_of_lane(of, group, tile_token) +
             half * kScoreHalf / 8;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    if (8 * i >= left) break;
#pragma unroll
    for (int v = 0; v < kScoreHalf / 32; ++v) {
      store_once(to + i * 8 * (kGroupColumns / 8) + 4 * v,
                 make_uint4(weights[2 * v][i], weights[2 * v][2 + i], weights[2 * v + 1][i],
                            weights[2 * v + 1][2 + i]));
    }
  }
}

}  // namespace snapkernels
