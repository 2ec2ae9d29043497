// The same of e4m3 where a depth of 1024 or less lets a block keep its 128 rows of the weight: only
// rows to multiply pass by.
//
// The two warpgroups of consumers take turns: each has 128 rows at a time, and ends them, GELU and
// all, while the other multiplies. Two blocks are a cluster as in product.cuh, and go down the rows
// in step with all others, so that rows come from memory once.
#pragma once

#include "linear/product.cuh"

namespace snapkernels {

constexpr int kResidentDepth = 1024;
constexpr int kResidentRows = 128;
constexpr int kResidentStages = 6;
constexpr int kResidentStageBytes = kResidentRows * kMatrixRow;
constexpr int kResidentRing = kResidentDepth / kMatrixRow * kProductSliceBytes;
constexpr int kResidentLines = kResidentRing + kResidentStages * kResidentStageBytes;
constexpr int kResidentBarriers = kResidentLines + kProductLinesBytes;
constexpr int kResidentHeld = kResidentBarriers + 16 * kResidentStages;
constexpr int kResidentTurns = kResidentHeld + 8;
constexpr int kResidentOwn = kResidentTurns + 8 * kProductConsumers;
constexpr int kResidentShared = kResidentOwn + kProductOwnBytes * kProductConsumers;
static_assert(kResidentShared <= 227 * 1024);

// Of `blocks` those that share out the columns evenly, 256 to a cluster.
inline int resident_blocks(const ProductArguments& of, int blocks) {
  const int step = of.columns / kProductColumns * kProductBlocks;
  return blocks / step * step;
}

// Every kProductColumns columns have as many clusters, which share out the rows.
struct ResidentWork {
  int across, parts, tiles;

  __host__ __device__ ResidentWork(const ProductArguments& of, int clusters)
      : across(of.columns / kProductColumns),
        parts(clusters / across),
        tiles((of.rows + kResidentRows - 1) / kResidentRows) {}
  __device__ int column(int cluster) const { return cluster % across * kProductColumns; }
  __device__ int first(int cluster) const { return part(cluster / across); }
  __device__ int last(int cluster) const { return part(cluster / across + 1); }

 private:
  __device__ int part(int index) const {
    return static_cast<int>(static_cast<int64_t>(tiles) * index / parts);
  }
};

template <typename End>
__global__ void __launch_bounds__(kProductThreads, 1)
    product_resident_kernel(const __grid_constant__ CUtensorMap a,
                            const __grid_constant__ CUtensorMap weight, ProductArguments of) {
  static_assert(End::kColumns == kProductSlice);
  extern __shared__ __align__(1024) uint8_t shared[];
  const uint32_t base = shared_address(shared);
  const int rank = rank_in_cluster(), cluster = blockIdx.x / kProductBlocks;
  Ring<kResidentStages, kResidentStageBytes> ring{base + kResidentRing, base + kResidentBarriers};
  const uint32_t held = base + kResidentHeld;
  if (threadIdx.x == 0) {
    ring.begin(1, kProductBlocks);  // a thread of the warpgroup whose rows they are
    phase_begin(held, 1);
    for (int i = 0; i < kProductConsumers; ++i) phase_begin(base + kResidentTurns + 8 * i, 1);
    phases_begun();
  }
  __syncthreads();
  cluster_wait();
  after_kernel_before();

  const ResidentWork work(of, gridDim.x / kProductBlocks);
  const int column = work.column(cluster) + rank * kProductSlice;
  const int steps = of.depth / kMatrixRow, last = work.last(cluster);
  if (threadIdx.x < 128) {
    registers_shrink<kProductCopier>();
    if (threadIdx.x == 0) {
      phase_expect(held, steps * kProductSliceBytes);
      for (int step = 0; step < steps; ++step) {
        copy_box_in_order(base + step * kProductSliceBytes, &weight, step * kMatrixRow,
                          column / (4 * End::kTogether), held);
      }
      constexpr int kShare = kResidentRows / kProductBlocks, kEvery = (1 << kProductBlocks) - 1;
      static_assert(kShare == 64);
      for (int tile = work.first(cluster); tile < last; ++tile) {
        for (int step = 0; step < steps; ++step) {
          ring.wait_free();
          phase_expect(ring.full(), kResidentStageBytes);
          const uint32_t to = ring.place() + rank * kShare * kMatrixRow;
          const int first_row = tile * kResidentRows;
          if constexpr (End::kFours) {
            copy_box_in_fours(kEvery, to, &a, step * kMatrixRow, first_row / 32, rank, ring.full());
          } else {
            copy_box_to(kEvery, to, &a, step * kMatrixRow, first_row + rank * kShare, 0,
                        ring.full());
          }
          ring.next();
        }
      }
    }
  } else {
    registers_grow<kProductRegisters>();
    const int thread = threadIdx.x % 128, warpgroup = threadIdx.x / 128 - 1;
    const uint32_t own = base + kResidentOwn + kProductOwnBytes * warpgroup;
    if (warpgroup == 0) copy_lines<Fp8, kProductSlice>(of, base + kResidentLines, column, thread);
    copies_wait_all();
    barrier_wait(1, 128 * kProductConsumers);
    phase_wait(held, 0);
    const uint32_t turn = base + kResidentTurns + 8 * warpgroup;
    const uint32_t other = base + kResidentTurns + 8 * (1 - warpgroup);
    int parity = 1 - warpgroup;  // the first turn is the first warpgroup's
    for (int step = 0; step < warpgroup * steps; ++step) ring.next();
    for (int tile = work.first(cluster) + warpgroup; tile < last; tile += kProductConsumers) {
      ProductSums<kProductSlice / 8> sums;
#pragma unroll
      for (int half = 0; half < kProductHalves; ++half) clear(sums[half]);
      __syncwarp();  // what of `own` is the warp's, its lanes have read
      End::fetch(of, tile * kResidentRows, column, own);
      auto read = ring;
      // Until the other has seen all of its stages: only then does a parity tell those of the
      // ring's next round from those of the one before.
      phase_wait(turn, parity);
      parity ^= 1;
#pragma unroll 1
      for (int step = 0; step < steps; ++step) {
        ring.wait_full();
        multiply_stage<Fp8>(sums, ring.place(), base + step * kProductSliceBytes);
        ring.next();
        if (step > 0) {
          multiply_wait<1>();
          free_slot<kProductBlocks>(read, thread);
        }
      }
      if (thread == 0) phase_arrive(other);
      multiply_wait<0>();
#pragma unroll
      for (int half = 0; half < kProductHalves; ++half) settle(sums[half]);
      free_slot<kProductBlocks>(read, thread);
      for (int step = 0; step < steps; ++step) ring.next();  // the other's
      copies_wait_all();
      __syncwarp();
      End::end(of, sums, tile * kResidentRows, column, base + kResidentLines, own);
    }
  }
  cluster_wait();
}

}  // namespace snapkernels
