// group_read's backward, second pass: dx = P W + dS A, with what LayerNorm's backward takes off.
//
// A block has 128 tokens and 256 channels; the other of its cluster has the next 128 tokens, and
// each copies half of W and of A for both. Columns of P and dS are in order, and so are rows of W
// and A as they are copied. What is wanted of x is on its way while the tensor cores multiply.
#pragma once

#include "group_attn/score_grads.cuh"

namespace snapkernels {

constexpr int kPatchSlice = 256;   // channels
constexpr int kPatchColumns = 64;  // of a stage
constexpr int kPatchStages = 4;
constexpr int kPatchBoxBytes = kPatchColumns * kMatrixRow;  // 64 columns of 64 channels
constexpr int kPatchBoxes = kPatchSlice / 64;
constexpr int kPatchStageBytes = kTileBytes + kPatchBoxes * kPatchBoxBytes;
constexpr int kPatchBarriers = kPatchStages * kPatchStageBytes;
constexpr int kPatchShared = kPatchBarriers + 16 * kPatchStages;

struct PatchWork {
  ScoreWork tiles;
  int slices, items;

  __device__ PatchWork(const GroupArguments& of)
      : tiles(of), slices(of.width / kPatchSlice), items(tiles.items * slices) {}
};

__global__ void __launch_bounds__(kScoreThreads, 1)
    group_patch_grads_kernel(const __grid_constant__ CUtensorMap weights,
                             const __grid_constant__ CUtensorMap score_grads,
                             const __grid_constant__ CUtensorMap rows,
                             const __grid_constant__ CUtensorMap absorbed,
                             GroupReadBackwardArguments given) {
  extern __shared__ __align__(1024) uint8_t shared[];
  const uint32_t base = shared_address(shared);
  const PatchWork work(given.of);
  const int rank = rank_in_cluster();
  Ring<kPatchStages, kPatchStageBytes> ring{base, base + kPatchBarriers};
  if (threadIdx.x == 0) {
    ring.begin(1, kScoreConsumers * kClusterBlocks);  // a thread of each warpgroup
    phases_begun();
  }
  __syncthreads();
  cluster_wait();
  after_kernel_before();

  if (threadIdx.x < 128) {
    registers_shrink<kCopierRegisters>();
    if (threadIdx.x == 0) {
      for (int item = work.tiles.first(); item < work.items; item += work.tiles.step()) {
        const int tile = item / work.slices, channel = item % work.slices * kPatchSlice;
        const int group = work.tiles.group(tile), token = work.tiles.token(tile, rank);
        for (int pass = 0; pass < 2; ++pass) {
          for (int column = 0; column < kGroupColumns; column += kPatchColumns) {
            ring.wait_free();
            phase_expect(ring.full(), kPatchStageBytes);
            copy_box(ring.place(), pass ? &score_grads : &weights, column, token, group,
                     ring.full());
            constexpr int kShare = kPatchBoxes / kClusterBlocks;
            for (int box = rank * kShare; box < (rank + 1) * kShare; ++box) {
              copy_box_in_order((1 << kClusterBlocks) - 1,
                                ring.place() + kTileBytes + box * kPatchBoxBytes,
                                pass ? &absorbed : &rows, channel + 64 * box,
                                (group * kGroupColumns + column) / 32, ring.full());
            }
            ring.next();
          }
        }
      }
    }
  } else {
    registers_grow<kScoreRegisters>();
    const int thread = threadIdx.x % 128, lane = thread % 32;
    const uint32_t first_row = (threadIdx.x / 128 - 1) * 64 * kMatrixRow;
    const int row = (threadIdx.x / 32 - 4) * 16 + lane / 4;  // of the tile
    const int row_vectors = given.of.width / 8;
    for (int item = work.tiles.first(); item < work.items; item += work.tiles.step()) {
      const int tile = item / work.slices, channel = item % work.slices * kPatchSlice;
      const int tile_token = work.tiles.token(tile, rank);
      const bool some = tile_token < given.of.tokens;
      const int64_t token =
          static_cast<int64_t>(work.tiles.group(tile)) * given.of.tokens + tile_token + row;
      const int64_t at = token * row_vectors + channel / 8 + lane % 4;
      const auto* from = static_cast<const uint4*>(given.of.patches) + at;
      uint4 x[2][kPatchSlice / 32];
      float2 lines[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if (!some) break;
        lines[i] = given.lines[token + 8 * i];
#pragma unroll
        for (int v = 0; v < kPatchSlice / 32; ++v) {
          x[i][v] = load_ahead(from + 8 * i * row_vectors + 4 * v);
        }
      }
      Accumulators<32> sum;
      clear(sum);
      auto read = ring;
#pragma unroll 1
      for (int step = 0; step < 2 * kGroupColumns / kPatchColumns; ++step) {
        ring.wait_full();
        const uint64_t held = matrix_view(ring.place() + first_row);
        const uint64_t boxes = columns_view(ring.place() + kTileBytes, kPatchBoxBytes);
        ring.next();
        multiply_fence();
#pragma unroll
        for (int k = 0; k < kPatchColumns / 16; ++k) {
          multiply_columns(sum, further(held, 32 * k), further(boxes, k * 16 * kMatrixRow));
        }
        multiply_commit();
        if (step > 0) {
          multiply_wait<1>();
          free_slot(read, thread);
        }
      }
      multiply_wait<0>();
      settle(sum);
      free_slot(read, thread);
      if (!some) continue;
      auto* to = static_cast<uint4*>(given.grads.out) + at;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int v = 0; v < kPatchSlice / 32; ++v) {
          const uint4 pairs = exchanged(x[i][v]);
          const uint32_t olds[4] = {pairs.x, pairs.y, pairs.z, pairs.w};
          uint32_t news[4];
#pragma unroll
          for (int b = 0; b < 4; ++b) {
            const float2 two =
                with_line(sum[4 * v + b] + 2 * i, olds[b], lines[i].x, lines[i].y);
            news[b] = bf16_pair(two.x, two.y);
          }
          to[8 * i * row_vectors + 4 * v] =
              exchanged(make_uint4(news[0], news[1], news[2], news[3]));
        }
      }
    }
  }
  cluster_wait();
}

}  // namespace snapkernels
