// What the kernels over groups share: tiles of patch tokens and slots of what their latents were
// folded into, on their way to the tensor cores.
//
// A block has two warpgroups of consumers, and one that copies. Two blocks are a cluster: they have
// the next 128 tokens of the same group, and each copies half of every slot for both, since slots
// come from L2 again for every tile and are three times what the tile is.
//
// Products are of x as it is in memory. LayerNorm comes after them, rstd (x . A - mean sum(A)),
// with the sum of what A was rounded to and accumulators in float32, so nothing is lost to a large
// mean. Mean and rstd are made of x in shared memory while the tensor cores multiply.
#pragma once

#include "bf16.cuh"
#include "group_attn/group_attn.h"
#include "tensor_copy.cuh"
#include "wgmma_wide.cuh"

namespace snapkernels {

constexpr int kScoreConsumers = 2;  // warpgroups
constexpr int kScoreThreads = 128 * (1 + kScoreConsumers);
constexpr int kScoreTokens = 128;              // of a tile
constexpr int kScoreStep = 64;                 // channels, of a place of x
constexpr int kScoreHalf = kGroupColumns / 2;  // columns, of a slot
constexpr int kClusterBlocks = 2;

// Of the 168 registers a thread that a block of 384 starts with.
constexpr int kCopierRegisters = 40;
constexpr int kScoreRegisters = 232;
static_assert(kCopierRegisters + kScoreConsumers * kScoreRegisters <= 3 * 168);

constexpr int kTileBytes = kScoreTokens * kMatrixRow;
constexpr int kPieceBytes = kScoreHalf / 2 * kMatrixRow;  // 96 rows of 128 bytes
constexpr int kSlotBytes = kPieceBytes * kClusterBlocks;  // a piece from each block

// What clusters share out: pairs of tiles, group by group.
inline __host__ __device__ int score_pairs(const GroupArguments& of) {
  return (of.tokens + kClusterBlocks * kScoreTokens - 1) / (kClusterBlocks * kScoreTokens);
}

inline int score_items(const GroupArguments& of) { return of.groups * score_pairs(of); }

struct ScoreWork {
  int pairs, items;  // of a group, of all

  __device__ ScoreWork(const GroupArguments& of)
      : pairs(score_pairs(of)), items(of.groups * pairs) {}
  __device__ int first() const { return blockIdx.x / kClusterBlocks; }
  __device__ int step() const { return gridDim.x / kClusterBlocks; }
  __device__ int group(int item) const { return item / pairs; }
  // The first token of this block's tile.
  __device__ int token(int item, int rank) const {
    return (item % pairs * kClusterBlocks + rank) * kScoreTokens;
  }
};

// By one thread: 64 channels of a tile.
template <typename Tiles>
__device__ inline void copy_tile(Tiles& tiles, const CUtensorMap* patches, int channel, int token,
                                 int group) {
  tiles.wait_free();
  phase_expect(tiles.full(), kTileBytes);
  copy_box(tiles.place(), patches, channel, token, group, tiles.full());
  tiles.next();
}

// By one thread of each block of the cluster: a slot of `map`, of which this block brings the piece
// at (column, row) to both.
template <typename Slots>
__device__ inline void copy_piece(Slots& slots, const CUtensorMap* map, int rank, int column,
                                  int row, int group) {
  slots.wait_free();
  phase_expect(slots.full(), kSlotBytes);
  copy_box_to((1 << kClusterBlocks) - 1, slots.place() + rank * kPieceBytes, map, column, row,
              group, slots.full());
  slots.next();
}

// Sums over a token's channels less the first of them, or over half of its channels.
struct TokenSums {
  float shift, sum, square;

  // The 8 kChunks channels of row `row` of `tile` from chunk `chunk` on.
  template <int kChunks>
  __device__ void add(uint32_t tile, int row, int chunk, bool first) {
    if (first) {
      uint32_t pair;
      asm volatile("ld.shared.b32 %0, [%1];" : "=r"(pair) : "r"(tile + swizzled(row, 0)));
      shift = bf16_low(pair);
      sum = square = 0;
    }
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      uint32_t pairs[4];
      asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                   : "=r"(pairs[0]), "=r"(pairs[1]), "=r"(pairs[2]), "=r"(pairs[3])
                   : "r"(tile + swizzled(row, chunk + i)));
      float sums[4], squares[4];  // which do not wait for each other
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float low = bf16_low(pairs[j]) - shift, high = bf16_high(pairs[j]) - shift;
        sums[j] = low + high;
        squares[j] = fmaf(low, low, high * high);
      }
      sum += (sums[0] + sums[1]) + (sums[2] + sums[3]);
      square += (squares[0] + squares[1]) + (squares[2] + squares[3]);
    }
  }

  // Of a whole token.
  __device__ float2 mean_rstd(int width, float eps) const {
    const float centre = sum / width;
    const float variance = square / width - centre * centre;
    return {centre + shift, rsqrtf((variance < 0 ? 0 : variance) + eps)};  // NaN stays
  }
};

}  // namespace snapkernels
