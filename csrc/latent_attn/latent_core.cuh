// softmax(q k^T / sqrt(head)) v of 8-bit integers, with exact sums and a softmax in float32.
//
// A block has 128 columns of the heads, which are two heads of 64 or one of 128, and so many
// queries that each of its two warpgroups of consumers has 64 of one head; a third copies. Two
// blocks are a cluster: they have the same head and queries that follow each other, and each copies
// half of the keys and values for both. Those come 128 tokens at a time, as scales have them: k in
// the order in which a lane's scores are four tokens that follow each other, as a product wants its
// rows from registers, and rows of v in that in which a lane's accumulators are 16 columns that do.
//
// P = exp2(score - the row's largest of this tile) is rounded to kWhole steps, and its sum is that
// of what it was rounded to. By the largest so far the many keys beside one that outweighs them
// would be lost in all tiles; in its own they are rounded up or down by a pattern (kDither), so
// that they are not lost together. A tile's products with v are added in float32.
#pragma once

#include <type_traits>

#include "bf16.cuh"
#include "latent_attn/integers.cuh"
#include "latent_attn/latent_attn.h"
#include "linear/products.cuh"
#include "tensor_copy.cuh"

namespace snapkernels {

constexpr int kCoreConsumers = 2;  // warpgroups
constexpr int kCoreThreads = 128 * (1 + kCoreConsumers);
constexpr int kCoreBlocks = 2;  // of a cluster
constexpr int kCoreStages = 6;
constexpr int kCoreHalf = kHeadsTokens * kMatrixRow;  // k of a stage, in bytes, and v
constexpr int kCoreStageBytes = 2 * kCoreHalf;
constexpr int kCoreQueries = kCoreStages * kCoreStageBytes;  // two places of them
constexpr int kCoreQueriesBytes = 128 * kMatrixRow;
constexpr int kCoreBarriers = kCoreQueries + 2 * kCoreQueriesBytes;
constexpr int kCoreShared = kCoreBarriers + 16 * kCoreStages + 16 * 2;

// Of the 168 registers a thread that a block of 384 starts with.
constexpr int kCoreCopier = 40;
constexpr int kCoreRegisters = 232;

// The largest P: 255 is the last that 8 bits hold, and a score may be rounded up.
constexpr float kWhole = 240;
constexpr float kWholeLog = 7.906890595608519f;  // log2
constexpr float kMostCount = 127;                // of q, k and v
constexpr float kLeastUnit = 1e-30f;             // of scores

// What a cluster computes: items one after the other, those of the same keys and values together.
template <int kHead>
struct CoreWork {
  static constexpr int kQueries = 64 * kCoreConsumers * kHead / 128;  // of a block
  const LatentCoreArguments& of;
  int pairs, groups;  // of queries of two blocks; of 128 columns of heads

  __host__ __device__ explicit CoreWork(const LatentCoreArguments& of)
      : of(of),
        pairs((of.length + kCoreBlocks * kQueries - 1) / (kCoreBlocks * kQueries)),
        groups(of.heads * kHead / 128) {}
  __host__ __device__ int items() const { return of.batch * groups * pairs; }
  __device__ int group(int item) const { return item / pairs % groups; }
  __device__ int video(int item) const { return item / pairs / groups; }
  // Of a block, in its video; there may be none.
  __device__ int first_query(int item, int rank) const {
    return (item % pairs * kCoreBlocks + rank) * kQueries;
  }
  __device__ int tiles() const { return of.stride / kHeadsTokens; }  // of a video
};

using CoreRing = Ring<kCoreStages, kCoreStageBytes>;
using CoreQueries = Ring<2, kCoreQueriesBytes>;

template <int kHead>
__device__ inline void copy_core(const CoreWork<kHead>& work, const CUtensorMap* q,
                                 const CUtensorMap* k, const CUtensorMap* v, CoreRing ring,
                                 CoreQueries queries, int rank) {
  constexpr int kEvery = (1 << kCoreBlocks) - 1;
  const int clusters = gridDim.x / kCoreBlocks, inner = work.groups * 128;
  for (int item = blockIdx.x / kCoreBlocks; item < work.items(); item += clusters) {
    const int video = work.video(item), group = work.group(item);
    queries.wait_free();
    phase_expect(queries.full(), work.kQueries * kMatrixRow);
    copy_box(queries.place(), q, group * 128,
             video * work.of.stride + work.first_query(item, rank), 0, queries.full());
    queries.next();
    for (int i = 0; i < work.tiles(); ++i) {
      const int tile = video * work.tiles() + i;
      ring.wait_free();
      phase_expect(ring.full(), kCoreStageBytes);
      const uint32_t half = ring.place() + rank * (kCoreHalf / kCoreBlocks);
      copy_box_in_order(kEvery, half, k, inner + group * 128, tile * 8 + rank * 4, ring.full());
      copy_box_in_order(kEvery, half + kCoreHalf, v, tile * kHeadsTokens, group * 2 + rank,
                        ring.full());
      ring.next();
    }
  }
}

// What a lane has of the softmax of its rows r and r + 8; the total is of its own scores.
struct CoreRows {
  float most[2], total[2];
};

// The scores of a tile, in counts of `unit`, become P, which counts `share` of what is so far, and
// that `kept` of what it was. `some`: tokens from the tile's first on that are of the video.
__device__ inline void weigh(uint32_t (&weights)[16], CoreRows& rows, float (&kept)[2],
                             float (&share)[2], const Counts<16>& scores, const float (&unit)[2],
                             int some) {
  // Sixteenths that are added before rounding, by a lane's scores in turn: a P of 0 stays 0.
  constexpr int kDither[8] = {-7, 1, -3, 5, -5, 3, -1, 7};
  const int lane_token = thread_again() % 4 * 4;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    float score[32];
#pragma unroll
    for (int j = 0; j < 16; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) score[2 * j + e] = static_cast<float>(scores[j][2 * i + e]);
    }
    if (some < kHeadsTokens) {
#pragma unroll
      for (int j = 0; j < 16; ++j) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int token = lane_token + 16 * (j / 2) + 2 * (j % 2) + e;
          if (token >= some) score[2 * j + e] = -__int_as_float(0x7f800000);
        }
      }
    }
    float tops[4] = {score[0], score[1], score[2], score[3]};
#pragma unroll
    for (int j = 4; j < 32; ++j) tops[j % 4] = fmaxf(tops[j % 4], score[j]);
    float top = fmaxf(fmaxf(tops[0], tops[1]), fmaxf(tops[2], tops[3]));
    top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
    top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
    const float of_tile = top * unit[i], most = larger(rows.most[i], of_tile);
    kept[i] = exp2_fast(rows.most[i] - most);
    share[i] = exp2_fast(of_tile - most);
    rows.most[i] = most;
    const float shift = kWholeLog - of_tile;
    uint32_t sum = 0;
#pragma unroll
    for (int word = 0; word < 8; ++word) {
      uint32_t bits[4];
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float weight = exp2_fast(fmaf(score[4 * word + e], unit[i], shift));
        bits[e] = floored(weight, 0.5f + kDither[(4 * word + e) % 8] / 16.f);
      }
      // Row i of the first or second 16 bytes of 32 tokens.
      const uint32_t four = next_bytes(bits[0], bits[1], bits[2], bits[3]);
      weights[word / 2 * 4 + word % 2 * 2 + i] = four;
      sum = __dp4a(four, 0x01010101u, sum);
    }
    rows.total[i] = fmaf(rows.total[i], kept[i], static_cast<float>(sum) * share[i]);
  }
}

// The scale that no weighted mean of a video's values passes, with every head's: by a warp.
__device__ inline float values_scale(const LatentCoreArguments& of, int video) {
  constexpr int kAhead = 8;  // loads under way
  const int tiles = of.stride / kHeadsTokens, all = of.heads * tiles, first = video * tiles;
  float most = 0;
  for (int i = thread_again() % 32; i < all; i += 32 * kAhead) {
    float some[kAhead];
#pragma unroll
    for (int j = 0; j < kAhead; ++j) {
      const int at = min(i + 32 * j, all - 1), head = at / tiles;
      some[j] = of.v_scale[head * (of.padded / kHeadsTokens) + first + at % tiles];
    }
#pragma unroll
    for (int j = 0; j < kAhead; ++j) most = larger(most, some[j]);
  }
#pragma unroll
  for (int step = 16; step > 0; step /= 2) {
    most = larger(most, __shfl_xor_sync(~0u, most, step));
  }
  return most * (kMostCount / 448);
}

template <int kHead>
__global__ void __launch_bounds__(kCoreThreads, 1)
    latent_core_kernel(const __grid_constant__ CUtensorMap q, const __grid_constant__ CUtensorMap k,
                       const __grid_constant__ CUtensorMap v, LatentCoreArguments of) {
  extern __shared__ __align__(1024) uint8_t shared[];
  const uint32_t base = shared_address(shared);
  const int rank = rank_in_cluster();
  CoreRing ring{base, base + kCoreBarriers};
  CoreQueries queries{base + kCoreQueries, base + kCoreBarriers + 16 * kCoreStages};
  if (threadIdx.x == 0) {
    ring.begin(1, kCoreConsumers * kCoreBlocks);  // a thread of each warpgroup
    queries.begin(1, kCoreConsumers);
    phases_begun();
  }
  __syncthreads();
  cluster_wait();
  after_kernel_before();

  const CoreWork<kHead> work(of);
  if (threadIdx.x < 128) {
    registers_shrink<kCoreCopier>();
    if (threadIdx.x == 0) copy_core<kHead>(work, &q, &k, &v, ring, queries, rank);
  } else {
    registers_grow<kCoreRegisters>();
    constexpr int kBlocks = kHead / 8;
    constexpr bool kTwoHeads = kHead == 64;
    const int warpgroup = threadIdx.x / 128 - 1, clusters = gridDim.x / kCoreBlocks;
    const int scales = of.padded / kHeadsTokens;
    // Of 128 bytes a row, or of 128 rows, its own 64.
    const uint32_t in_row = kTwoHeads ? 64 * warpgroup : 0;
    const uint32_t in_values = kTwoHeads ? 64 * kMatrixRow * warpgroup : 0;
    const uint32_t in_queries = kTwoHeads ? in_row : 64 * kMatrixRow * warpgroup;
    for (int item = blockIdx.x / kCoreBlocks; item < work.items(); item += clusters) {
      const int video = work.video(item);
      const int head = work.group(item) * (kTwoHeads ? 2 : 1) + (kTwoHeads ? warpgroup : 0);
      const int row = work.first_query(item, rank) + (kTwoHeads ? 0 : 64 * warpgroup) +
                      thread_again() % 128 / 32 * 16 + thread_again() % 32 / 4;
      float q_unit[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const bool some = row + 8 * i < of.length;
        const int64_t at = static_cast<int64_t>(head) * of.padded + video * of.stride + row + 8 * i;
        q_unit[i] = (some ? of.q_scale[at] : 0) * (1.4426950408889634f * rsqrtf(kHead));
      }
      const float* k_scale = of.k_scale + head * scales + video * work.tiles();
      const float* v_scale = of.v_scale + head * scales + video * work.tiles();
      float sums[kBlocks][4];
#pragma unroll
      for (int j = 0; j < kBlocks; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[j][i] = 0;
      }
      const float least = -__int_as_float(0x7f800000);
      CoreRows rows{{least, least}, {0, 0}};
      queries.wait_full();
      const uint64_t query_view = matrix_view(queries.place() + in_queries);
      Counts<16> scores;
      auto read = ring;
      const auto start_scores = [&] {
        ring.wait_full();
        const uint64_t keys = matrix_view(ring.place() + in_row);
        multiply_fence();
        multiply_first(scores, query_view, keys);
#pragma unroll
        for (int at = 32; at < kHead; at += 32) {
          multiply_add(scores, further(query_view, at), further(keys, at));
        }
        multiply_commit();
        ring.next();
      };
      // A tile, whose scores are under way; so are the next one's before its values are added.
      const auto end_scores = [&](int tile, auto more) {
        const float k_unit = k_scale[tile], v_unit = v_scale[tile];
        // Not 0, by which what is outside of a video would be NaN.
        const float unit[2] = {larger(q_unit[0] * k_unit, kLeastUnit),
                               larger(q_unit[1] * k_unit, kLeastUnit)};
        multiply_wait<0>();
        settle(scores);
        uint32_t weights[16];
        float kept[2], share[2];
        weigh(weights, rows, kept, share, scores, unit, of.length - tile * kHeadsTokens);
        const float factor[2] = {share[0] * v_unit, share[1] * v_unit};

        Counts<kBlocks> part;
        const uint64_t values = matrix_view(read.place() + kCoreHalf + in_values);
        multiply_fence();
#pragma unroll
        for (int step = 0; step < 4; ++step) {
          const uint32_t(&held)[4] = *reinterpret_cast<const uint32_t(*)[4]>(&weights[4 * step]);
          if (step == 0) {
            multiply_held_first(part, held, values);
          } else {
            multiply_held(part, held, further(values, 32 * step));
          }
        }
        multiply_commit();
        if constexpr (decltype(more)::value) start_scores();
        multiply_wait<decltype(more)::value ? 1 : 0>();
        settle(part);
        free_slot<kCoreBlocks>(read, thread_again() % 128);
#pragma unroll
        for (int j = 0; j < kBlocks; ++j) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            sums[j][i] = fmaf(sums[j][i], kept[i / 2],
                              static_cast<float>(part[j][i]) * factor[i / 2]);
          }
        }
      };
      start_scores();
      const float out_scale = values_scale(of, video);
      const int last = work.tiles() - 1;
#pragma unroll 1
      for (int tile = 0; tile < last; ++tile) end_scores(tile, std::true_type());
      end_scores(last, std::false_type());
      if (thread_again() % 128 == 0) phase_arrive(queries.free());
      queries.next();
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        rows.total[i] += __shfl_xor_sync(~0u, rows.total[i], 1);
        rows.total[i] += __shfl_xor_sync(~0u, rows.total[i], 2);
      }

      const int inner = of.heads * kHead;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if (row + 8 * i >= of.length) continue;
        const int64_t at = static_cast<int64_t>(video) * of.length + row + 8 * i;
        if (head == 0 && thread_again() % 4 == 0) of.out_scale[at] = out_scale;
        const float factor = 1 / (rows.total[i] * out_scale);
        auto* to = static_cast<uint8_t*>(of.out) + at * inner + head * kHead;
#pragma unroll
        for (int group = 0; group < kHead / 64; ++group) {
          uint32_t words[4];
#pragma unroll
          for (int word = 0; word < 4; ++word) {
            const int j = group * 8 + 2 * word;
            words[word] =
                e4m3_four(sums[j][2 * i] * factor, sums[j][2 * i + 1] * factor,
                          sums[j + 1][2 * i] * factor, sums[j + 1][2 * i + 1] * factor);
          }
          *reinterpret_cast<uint4*>(to + group * 64 + thread_again() % 4 * 16) =
              make_uint4(words[0], words[1], words[2], words[3]);
        }
      }
    }
  }
  cluster_wait();
}

}  // namespace snapkernels
