// group_read's first pass over the patches: the softmax over tokens, but for what only all tokens
// of a group can say.
//
// The average of 384 columns and 1024 channels does not fit a multiprocessor, so the weights P go
// through memory: 113 MB at the upsampler's size, beside 302 MB of patches in each pass.
//
// A column's maximum over all tokens is not known here. Every 128 tokens have their own m, rounded
// up to a whole number, so that what the second pass makes of it, 2^(m - the largest m), changes no
// bit of a weight's significand. LayerNorm's rstd is in the weight before it is rounded, and its
// mean comes off the average: sum P x - sum P mean, with the same rounded P.
//
// The product is A x^T, columns by tokens: a lane has 32 of the 128 tokens of a column, so sums
// over tokens are additions and two shuffles. A warpgroup has 192 columns and slots of A of its
// own; the two share only tiles of x, and one writes weights while the other multiplies. Mean and
// rstd of the tokens are made beside, by a warpgroup of their own.
#pragma once

#include "group_attn/tiles.cuh"

namespace snapkernels {

// One warpgroup copies, one makes moments; of the 128 registers a thread that 512 start with.
constexpr int kReadThreads = 128 * (2 + kScoreConsumers);
constexpr int kReadOtherRegisters = 24;
static_assert(2 * kReadOtherRegisters + kScoreConsumers * kScoreRegisters <= 4 * 128);

constexpr int kReadTiles = 4;
constexpr int kReadSlots = 3;                // of each warpgroup
constexpr int kReadParts = kScoreHalf / 64;  // products of a warpgroup
static_assert(kScoreTokens == kGroupBlock && kScoreTokens == 128);  // moments: one a thread

// Of the tokens of a tile in twos: their rstd, then their means.
struct TileMoments {
  float twos[kScoreTokens / 2][4];
};

using ReadTilesRing = Ring<kReadTiles, kTileBytes>;
using ReadSlotsRing = Ring<kReadSlots, kSlotBytes>;
using ReadMomentsRing = Ring<2, sizeof(TileMoments)>;

struct ReadRings {
  ReadTilesRing tiles;
  ReadSlotsRing slots;  // of warpgroup 0; those of 1 are kReadSlots further
  ReadMomentsRing moments;

  static constexpr int kSlotsAt = kReadTiles * kTileBytes;
  static constexpr int kMomentsAt = kSlotsAt + kScoreConsumers * kReadSlots * kSlotBytes;
  static constexpr int kTotalsAt = kMomentsAt + 2 * static_cast<int>(sizeof(TileMoments));
  static constexpr int kBarriersAt = kTotalsAt + 4 * kGroupColumns;
  static constexpr int kBytes = kBarriersAt + 16 * (kReadTiles + kScoreConsumers * kReadSlots + 2);

  __device__ ReadRings(uint32_t base, int warpgroup)
      : tiles{base, base + kBarriersAt},
        slots{base + kSlotsAt + warpgroup * kReadSlots * kSlotBytes,
              base + kBarriersAt + 16 * (kReadTiles + warpgroup * kReadSlots)},
        moments{base + kMomentsAt,
                base + kBarriersAt + 16 * (kReadTiles + kScoreConsumers * kReadSlots)} {}
};

// By the first warpgroup, which copies: threads 0 and 32 the slots of a warpgroup each, 64 tiles.
__device__ inline void copy_all(ReadRings rings, const CUtensorMap* patches,
                                const CUtensorMap* absorbed, const GroupArguments& of,
                                const ScoreWork& work) {
  const int warp = threadIdx.x / 32, rank = rank_in_cluster();
  if (threadIdx.x % 32 == 0 && warp < kScoreConsumers) {
    const int row = warp * kScoreHalf + rank * kScoreHalf / 2;
#pragma unroll 1
    for (int item = work.first(); item < work.items; item += work.step()) {
#pragma unroll 1
      for (int channel = 0; channel < of.width; channel += kScoreStep) {
        copy_piece(rings.slots, absorbed, rank, channel, row, work.group(item));
      }
    }
  } else if (threadIdx.x == 32 * kScoreConsumers) {
#pragma unroll 1
    for (int item = work.first(); item < work.items; item += work.step()) {
#pragma unroll 1
      for (int channel = 0; channel < of.width; channel += kScoreStep) {
        copy_tile(rings.tiles, patches, channel, work.token(item, rank), work.group(item));
      }
    }
  }
}

// By the second, with a token in each thread.
__device__ inline void make_moments(ReadRings rings, uint8_t* shared,
                                    const GroupReadArguments& given, const ScoreWork& work) {
  const GroupArguments& of = given.of;
  const int token = threadIdx.x % 128;
  for (int item = work.first(); item < work.items; item += work.step()) {
    TokenSums sums;
    for (int channel = 0; channel < of.width; channel += kScoreStep) {
      rings.tiles.wait_full();
      sums.add<8>(rings.tiles.place(), token, 0, channel == 0);
      __syncwarp();
      if (token % 32 == 0) phase_arrive(rings.tiles.free());
      rings.tiles.next();
    }
    rings.moments.wait_free();
    auto& moments =
        reinterpret_cast<TileMoments*>(shared + ReadRings::kMomentsAt)[rings.moments.at];
    const float2 found = sums.mean_rstd(of.width, given.eps);
    moments.twos[token / 2][token % 2] = found.y;
    moments.twos[token / 2][2 + token % 2] = found.x;
    __syncwarp();
    if (token % 32 == 0) phase_arrive(rings.moments.full());
    rings.moments.next();
    const int of_group = work.token(item, rank_in_cluster()) + token;
    if (given.mean != nullptr && of_group < of.tokens) {
      const int64_t at = static_cast<int64_t>(work.group(item)) * of.tokens + of_group;
      given.mean[at] = found.x;
      given.rstd[at] = found.y;
    }
  }
}

// By a warpgroup: A x^T of 192 columns and the 128 tokens of a tile.
using Products = Accumulators<kScoreTokens / 8>[kReadParts];

__device__ inline void make_products(Products& products, ReadRings& rings, int width) {
  const int thread = threadIdx.x % 128;
  ReadRings read = rings;
  const auto free_step = [&] {
    if (thread == 0) phase_arrive(read.tiles.free());
    read.tiles.next();
    free_slot<kClusterBlocks>(read.slots, thread);
  };
#pragma unroll
  for (int part = 0; part < kReadParts; ++part) clear(products[part]);
#pragma unroll 1
  for (int channel = 0; channel < width; channel += kScoreStep) {
    rings.tiles.wait_full();
    rings.slots.wait_full();
    const uint64_t tile = matrix_view(rings.tiles.place());
    const uint64_t slot = matrix_view(rings.slots.place());
    rings.tiles.next();
    rings.slots.next();
    multiply_fence();
#pragma unroll
    for (int k = 0; k < kScoreStep / 16; ++k) {
#pragma unroll
      for (int part = 0; part < kReadParts; ++part) {
        multiply<true>(products[part], further(slot, part * 64 * kMatrixRow + 32 * k),
                       further(tile, 32 * k));
      }
    }
    multiply_commit();
    if (channel > 0) {
      multiply_wait<1>();
      free_step();
    }
  }
  multiply_wait<0>();
#pragma unroll
  for (int part = 0; part < kReadParts; ++part) settle(products[part]);
  free_step();
}

// By a warpgroup: the sums of A of its columns.
__device__ inline void load_totals(float* totals, const float* from) {
  const uint32_t thread = thread_again(), warpgroup = thread / 128 - 2;
  barrier_wait(1 + warpgroup, 128);  // those of the item before are read
  for (uint32_t column = thread % 128; column < kScoreHalf; column += 128) {
    totals[warpgroup * kScoreHalf + column] = from[warpgroup * kScoreHalf + column];
  }
  barrier_wait(1 + warpgroup, 128);
}

// The sum, or another join, over the four lanes of a column.
template <typename Join>
__device__ inline float over_lanes(float value, Join join) {
  value = join(value, __shfl_xor_sync(~0u, value, 1));
  return join(value, __shfl_xor_sync(~0u, value, 2));
}

// Volatile, or the compiler would keep a tile's in registers, which are taken.
__device__ inline float4 load_two(const TileMoments& moments, int token) {
  float4 two;
  asm volatile("ld.volatile.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(two.x), "=f"(two.y), "=f"(two.z), "=f"(two.w)
               : "r"(shared_address(moments.twos[token / 2])));
  return two;
}

// A lane's first column of part `part` of its warpgroup's; made again where it is wanted.
__device__ inline int column_of_lane(int part) {
  const uint32_t thread = thread_again();
  return (thread / 128 - 2) * kScoreHalf + part * 64 + thread % 128 / 32 * 16 + thread % 32 / 4;
}

__device__ inline int pair_of_lane() { return 2 * (thread_again() % 4); }

// The weights of part `part` of this warpgroup's columns for the tile from `token` on; m and sums.
// `totals` are the sums of A.
__device__ inline void write_weights(const Accumulators<kScoreTokens / 8>& products,
                                     const TileMoments& moments, const float* totals,
                                     const GroupReadArguments& given, int part, int group,
                                     int token) {
  const auto add = [](float a, float b) { return a + b; };
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    __syncwarp();  // nothing of the next column starts before: registers are short
    const float total = totals[column_of_lane(part) + 8 * i];
    const int pair = pair_of_lane();
    float most = -INFINITY;
#pragma unroll
    for (int b = 0; b < kScoreTokens / 8; ++b) {
      const float4 two = load_two(moments, 8 * b + pair);
      most = fmaxf(most, fmaf(-total, two.z, products[b][2 * i]) * two.x);
      most = fmaxf(most, fmaf(-total, two.w, products[b][2 * i + 1]) * two.y);
    }
    most = ceilf(over_lanes(most, [](float a, float b) { return fmaxf(a, b); }));
    const int64_t row = group * kGroupColumns + column_of_lane(part) + 8 * i;
    auto* to = static_cast<uint4*>(given.weights) +
               static_cast<uint32_t>(token / 8 + pair_of_lane() / 2) + row * (given.of.tokens / 8);
    float sum = 0, mean = 0;
#pragma unroll
    for (int v = 0; v < kScoreTokens / 32; ++v) {
      uint32_t pairs[4];
#pragma unroll
      for (int b = 0; b < 4; ++b) {
        const float* product = products[4 * v + b] + 2 * i;
        const float4 two = load_two(moments, 32 * v + 8 * b + pair);
        const float low = exp2_fast(fmaf(fmaf(-total, two.z, product[0]), two.x, -most));
        const float high = exp2_fast(fmaf(fmaf(-total, two.w, product[1]), two.y, -most));
        sum += low + high;
        pairs[b] = bf16_pair(low * two.x, high * two.y);
        mean = fmaf(bf16_low(pairs[b]), two.z, fmaf(bf16_high(pairs[b]), two.w, mean));
      }
      to[4 * v] = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
    }
    sum = over_lanes(sum, add);
    mean = over_lanes(mean, add);
    if (pair_of_lane() == 0) {
      const int block = group * (given.of.tokens / kGroupBlock) + token / kGroupBlock;
      const int at = block * kGroupColumns + column_of_lane(part) + 8 * i;
      given.most[at] = most;
      given.sums[at] = sum;
      given.means[at] = mean;
    }
  }
}

__global__ void __launch_bounds__(kReadThreads, 1)
    group_read_weights_kernel(const __grid_constant__ CUtensorMap patches,
                              const __grid_constant__ CUtensorMap absorbed,
                              GroupReadArguments given) {
  extern __shared__ __align__(1024) uint8_t shared[];
  const uint32_t base = shared_address(shared);
  const ScoreWork work(given.of);
  if (threadIdx.x == 0) {
    for (int warpgroup = 0; warpgroup < kScoreConsumers; ++warpgroup) {
      ReadRings(base, warpgroup).slots.begin(1, kClusterBlocks);
    }
    const ReadRings rings(base, 0);
    rings.tiles.begin(1, kScoreConsumers + 4);  // and each warp that makes moments
    rings.moments.begin(4, 4 * kScoreConsumers);
    phases_begun();
  }
  __syncthreads();
  cluster_wait();
  after_kernel_before();

  if (threadIdx.x < 128) {
    registers_shrink<kReadOtherRegisters>();
    copy_all(ReadRings(base, threadIdx.x / 32 % kScoreConsumers), &patches, &absorbed, given.of,
             work);
  } else if (threadIdx.x < 256) {
    registers_shrink<kReadOtherRegisters>();
    make_moments(ReadRings(base, 0), shared, given, work);
  } else {
    registers_grow<kScoreRegisters>();
    auto* totals = reinterpret_cast<float*>(shared + ReadRings::kTotalsAt);
    ReadRings rings(base, threadIdx.x / 128 - 2);
    for (int item = work.first(); item < work.items; item += work.step()) {
      load_totals(totals, given.of.absorbed_sum + work.group(item) * kGroupColumns);
      Products products;
      make_products(products, rings, given.of.width);
      const int group = work.group(item), token = work.token(item, rank_in_cluster());
      rings.moments.wait_full();
      const auto& moments =
          reinterpret_cast<TileMoments*>(shared + ReadRings::kMomentsAt)[rings.moments.at];
      if (token < given.of.tokens) {
#pragma unroll
        for (int part = 0; part < kReadParts; ++part) {
          write_weights(products[part], moments, totals, given, part, group, token);
        }
      }
      __syncwarp();
      if (threadIdx.x % 32 == 0) phase_arrive(rings.moments.free());
      rings.moments.next();
    }
  }
  cluster_wait();
}

}  // namespace snapkernels
