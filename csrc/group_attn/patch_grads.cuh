// group_read's backward, second pass: dx = P W + dS A, with what LayerNorm's backward takes off.
//
// A block has 128 tokens and 256 channels; the other of its cluster has the next 128 tokens, and
// each copies half of W and of A for both. Columns of P and dS are in order, and so are rows of W
// and A as they are copied. x comes to shared memory while the tensor cores multiply, is made dx
// there, and leaves it while they multiply for the next tile.
#pragma once

#include "group_attn/score_grads.cuh"

namespace snapkernels {

constexpr int kPatchSlice = 256;   // channels
constexpr int kPatchColumns = 64;  // of a stage
constexpr int kPatchStages = 3;
constexpr int kPatchBoxes = kPatchSlice / 64;               // of 64 channels
constexpr int kPatchBoxBytes = kPatchColumns * kMatrixRow;  // 64 columns or tokens
constexpr int kPatchStageBytes = kTileBytes + kPatchBoxes * kPatchBoxBytes;
constexpr int kPatchTokensBytes = kPatchBoxes * kPatchBoxBytes;  // of a warpgroup
constexpr int kPatchTokens = kPatchStages * kPatchStageBytes;
constexpr int kPatchBarriers = kPatchTokens + kScoreConsumers * kPatchTokensBytes;
constexpr int kPatchArrived = kPatchBarriers + 16 * kPatchStages;
constexpr int kPatchShared = kPatchArrived + 8 * kScoreConsumers;

struct PatchWork {
  ScoreWork tiles;
  int slices, items;

  __device__ PatchWork(const GroupArguments& of)
      : tiles(of), slices(of.width / kPatchSlice), items(tiles.items * slices) {}
};

// A warpgroup's 64 tokens of x in shared memory become dx.
__device__ inline void end_patches(const Accumulators<32>& sum, const float2 (&lines)[2],
                                   uint32_t tokens) {
  const uint32_t thread = thread_again() % 128, lane = thread % 32;
  // Of 8 x 8 matrices a lane's is lane / 8: tokens from 0 and 8 on, then of the next 8 channels.
  const uint32_t row = thread / 32 * 16 + lane / 8 % 2 * 8 + lane % 8;
  const uint32_t lane_at = swizzled(row, lane / 16);
#pragma unroll
  for (int box = 0; box < kPatchBoxes; ++box) {
    uint32_t pairs[4][4];
#pragma unroll
    for (int k = 0; k < 4; ++k) {  // two chunks, swizzled
      load_matrices(pairs[k], tokens + box * kPatchBoxBytes + (lane_at ^ 32 * k));
    }
#pragma unroll
    for (int k = 0; k < 4; ++k) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2& line = lines[i % 2];
        const float2 two = with_line(sum[8 * box + 2 * k + i / 2] + i % 2 * 2, pairs[k][i], line.x,
                                     line.y);
        pairs[k][i] = bf16_pair(two.x, two.y);
      }
      store_matrices(tokens + box * kPatchBoxBytes + (lane_at ^ 32 * k), pairs[k]);
    }
  }
}

__global__ void __launch_bounds__(kScoreThreads, 1)
    group_patch_grads_kernel(const __grid_constant__ CUtensorMap weights,
                             const __grid_constant__ CUtensorMap score_grads,
                             const __grid_constant__ CUtensorMap rows,
                             const __grid_constant__ CUtensorMap absorbed,
                             const __grid_constant__ CUtensorMap patches,
                             const __grid_constant__ CUtensorMap out,
                             GroupReadBackwardArguments given) {
  extern __shared__ __align__(1024) uint8_t shared[];
  const uint32_t base = shared_address(shared);
  const PatchWork work(given.of);
  const int rank = rank_in_cluster();
  Ring<kPatchStages, kPatchStageBytes> ring{base, base + kPatchBarriers};
  if (threadIdx.x == 0) {
    ring.begin(1, kScoreConsumers * kClusterBlocks);  // a thread of each warpgroup
    for (int i = 0; i < kScoreConsumers; ++i) phase_begin(base + kPatchArrived + 8 * i, 1);
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
    const int thread = threadIdx.x % 128, warpgroup = threadIdx.x / 128 - 1;
    const uint32_t first_row = warpgroup * 64 * kMatrixRow;
    const uint32_t tokens = base + kPatchTokens + warpgroup * kPatchTokensBytes;
    const uint32_t arrived = base + kPatchArrived + 8 * warpgroup;
    int parity = 0;
    for (int item = work.tiles.first(); item < work.items; item += work.tiles.step()) {
      const int tile = item / work.slices, channel = item % work.slices * kPatchSlice;
      const int group = work.tiles.group(tile);
      const int tile_token = work.tiles.token(tile, rank) + 64 * warpgroup;
      const bool some = tile_token < given.of.tokens;
      float2 lines[2] = {};
      if (some) {
        const float2* from = given.lines + static_cast<int64_t>(group) * given.of.tokens +
                             tile_token + thread / 32 * 16 + thread % 32 / 4;
        lines[0] = from[0];
        lines[1] = from[8];
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
          free_slot<kClusterBlocks>(read, thread);
        }
        if (step == kPatchStages && some && thread == 0) {
          copies_out_left();
          phase_expect(arrived, kPatchTokensBytes);
          for (int box = 0; box < kPatchBoxes; ++box) {
            copy_box(tokens + box * kPatchBoxBytes, &patches, channel + 64 * box, tile_token,
                     group, arrived, first_to_leave());
          }
        }
      }
      multiply_wait<0>();
      settle(sum);
      free_slot<kClusterBlocks>(read, thread);
      if (!some) continue;
      phase_wait(arrived, parity);
      parity ^= 1;
      end_patches(sum, lines, tokens);
      publish();
      barrier_wait(1 + warpgroup, 128);
      if (thread == 0) {
        for (int box = 0; box < kPatchBoxes; ++box) {
          copy_box_out(&out, channel + 64 * box, tile_token, group,
                       tokens + box * kPatchBoxBytes);
        }
        copies_out_commit();
      }
    }
    if (thread == 0) copies_out_left();
  }
  cluster_wait();
}

}  // namespace snapkernels
