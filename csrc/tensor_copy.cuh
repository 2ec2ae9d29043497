// Copies of boxes of a tensor into the matrices of wgmma.cuh, by one thread, and what the blocks of
// a cluster need to share them.
#pragma once

#include <cuda.h>

#include "wgmma.cuh"

namespace snapkernels {

// The box at (column, row, matrix) of `map`; what of it is outside is zeros, and counts as come.
__device__ inline void copy_box(uint32_t to, const CUtensorMap* map, int column, int row,
                                int matrix, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%2, %3, %4}], [%5];" ::"r"(to),
      "l"(map), "r"(column), "r"(row), "r"(matrix), "r"(barrier)
      : "memory");
}

// The same, with how L2 is to hold it.
__device__ inline void copy_box(uint32_t to, const CUtensorMap* map, int column, int row,
                                int matrix, uint32_t barrier, uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      ".L2::cache_hint [%0], [%1, {%2, %3, %4}], [%5], %6;" ::"r"(to),
      "l"(map), "r"(column), "r"(row), "r"(matrix), "r"(barrier), "l"(policy)
      : "memory");
}

// The same into every block of the cluster that `blocks` has a bit of, each counting it by its own
// barrier: `to` and `barrier` are offsets that all of them share.
__device__ inline void copy_box_to(int blocks, uint32_t to, const CUtensorMap* map, int column,
                                   int row, int matrix, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      ".multicast::cluster [%0], [%1, {%2, %3, %4}], [%5], %6;" ::"r"(to),
      "l"(map), "r"(column), "r"(row), "r"(matrix), "r"(barrier),
      "h"(static_cast<uint16_t>(blocks))
      : "memory");
}

// The same of a map of five dimensions, whose second and third are in the box whole.
__device__ inline void copy_box_of_five(int blocks, uint32_t to, const CUtensorMap* map,
                                        int column, int fourth, int fifth, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      ".multicast::cluster [%0], [%1, {%2, 0, 0, %3, %4}], [%5], %6;" ::"r"(to),
      "l"(map), "r"(column), "r"(fourth), "r"(fifth), "r"(barrier),
      "h"(static_cast<uint16_t>(blocks))
      : "memory");
}

// The same of a map in fours (tensor_map.h), from row 32 `thirty_twos` on, or of a half of its 128.
__device__ inline void copy_box_in_fours(int blocks, uint32_t to, const CUtensorMap* map,
                                         int column, int thirty_twos, int half, uint32_t barrier) {
  copy_box_of_five(blocks, to, map, column, thirty_twos, half, barrier);
}

// The same of 64 rows of a map in order, from row 32 `thirty_twos` on.
__device__ inline void copy_box_in_order(int blocks, uint32_t to, const CUtensorMap* map,
                                         int column, int thirty_twos, uint32_t barrier) {
  copy_box_of_five(blocks, to, map, column, 0, thirty_twos, barrier);
}

// The same into this block alone, of the box that begins with rows `group` of such a map.
__device__ inline void copy_box_in_order(uint32_t to, const CUtensorMap* map, int column,
                                         int group, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%2, 0, 0, 0, %3}], [%4];" ::"r"(to),
      "l"(map), "r"(column), "r"(group), "r"(barrier)
      : "memory");
}

// To the box at (column, row, matrix) of `map` what lies at `from`, which has been published.
__device__ inline void copy_box_out(const CUtensorMap* map, int column, int row, int matrix,
                                    uint32_t from) {
  asm volatile(
      "cp.async.bulk.tensor.3d.global.shared::cta.tile.bulk_group [%0, {%1, %2, %3}], [%4];" ::"l"(
          map),
      "r"(column), "r"(row), "r"(matrix), "r"(from)
      : "memory");
}

__device__ inline void copies_out_commit() {
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

// Until what this thread committed has left shared memory.
__device__ inline void copies_out_left() {
  asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
}

// threadIdx.x, read where it is called: what follows from it takes no registers before.
__device__ inline uint32_t thread_again() {
  uint32_t thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread;
}

// A number that the compiler does not know from before: what follows from it is computed again, and
// takes no registers until then.
__device__ inline int again(int number) {
  asm volatile("mov.b32 %0, %0;" : "+r"(number));
  return number;
}

__device__ inline int rank_in_cluster() {
  int rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// Arrives at the barrier at this offset of block `rank` of the cluster, which may be one's own.
__device__ inline void phase_arrive_at(uint32_t barrier, int rank) {
  asm volatile(
      "{\n"
      ".reg .b32 there;\n"
      "mapa.shared::cluster.u32 there, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [there];\n"
      "}" ::"r"(barrier),
      "r"(rank)
      : "memory");
}

// Of all threads of all blocks of the cluster.
__device__ inline void cluster_wait() {
  asm volatile(
      "barrier.cluster.arrive.release;\n"
      "barrier.cluster.wait.acquire;" ::
          : "memory");
}

// A ring of places in shared memory with two barriers each: full, and free again.
template <int kPlaces, int kBytes>
struct Ring {
  uint32_t places, barriers;
  int at = 0, parity = 0;

  __device__ uint32_t place() const { return places + at * kBytes; }
  __device__ uint32_t full() const { return barriers + 16 * at; }
  __device__ uint32_t free() const { return full() + 8; }
  __device__ void wait_full() const { phase_wait(full(), parity); }
  __device__ void wait_free() const { phase_wait(free(), parity ^ 1); }
  __device__ void next() {
    if (++at == kPlaces) {
      at = 0;
      parity ^= 1;
    }
  }
  // By one thread, before any use: how many arrivals fill a place, and how many free it.
  __device__ void begin(int fills, int frees) const {
    for (int place = 0; place < kPlaces; ++place) {
      phase_begin(barriers + 16 * place, fills);
      phase_begin(barriers + 16 * place + 8, frees);
    }
  }
};

// By a warpgroup that has read it: the place is free, in all blocks of the cluster, which share it.
template <int kBlocks, typename Slots>
__device__ inline void free_slot(Slots& read, int thread) {
  if (thread == 0) {
    for (int rank = 0; rank < kBlocks; ++rank) phase_arrive_at(read.free(), rank);
  }
  read.next();
}

}  // namespace snapkernels
