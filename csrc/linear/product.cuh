// residual + a weight^T + bias, or GELU(a weight^T + bias), of e4m3 or bfloat16.
//
// A block has 256 rows and 128 columns, 128 rows of them each of its two warpgroups of consumers; a
// third copies. Two blocks are a cluster: they have the same rows and the next 128 columns, and
// each copies half of the rows for both. Blocks of 96 columns are for few tiles, of which that
// makes more (product_launch.cuh). Rows of the weight come in the order in which a lane's
// accumulators are columns that follow each other, so it stores 16 bytes at a time.
//
// Sums of e4m3 are kept to some 14 bits by the tensor cores, each addend cut to the sum's last:
// over a long depth that is an error of its own if they have one sign. So after kPromote stages of
// 128 bytes they are added to sums in float32 and begin anew; one warpgroup does that while the
// other multiplies. Those of a LayerNorm's rows are not (product_launch.cuh), nor those of
// bfloat16, which are float32 to begin with: 0.
#pragma once

#include "linear/linear.h"
#include "linear/products.cuh"
#include "tensor_copy.cuh"

namespace snapkernels {

constexpr int kProductConsumers = 2;  // warpgroups
constexpr int kProductThreads = 128 * (1 + kProductConsumers);
constexpr int kProductBlocks = 2;  // of a cluster
constexpr int kProductRows = 256;  // of a block
constexpr int kProductSlice = kProductColumns / kProductBlocks;  // columns of a block
constexpr int kProductNarrow = 96;  // or so many
constexpr int kProductHalves = kProductRows / kProductConsumers / 64;
constexpr int kProductHalfBytes = 64 * kMatrixRow;
constexpr int kProductStages = 4;
constexpr int kProductRowsBytes = kProductRows * kMatrixRow;
constexpr int kProductSliceBytes = kProductSlice * kMatrixRow;
constexpr int kProductStageBytes = kProductRowsBytes + kProductSliceBytes;
// What a warpgroup's end reads: its columns' scales and biases, its 128 rows' scales, what their
// GELU is quantised by, and room for what its warps tell each other.
constexpr int kProductBiases = 4 * kProductSlice;
constexpr int kProductLinesBytes = kProductBiases + 2 * kProductSlice;
constexpr int kProductHidden = 4 * 128;
constexpr int kProductScratch = 2 * kProductHidden;
constexpr int kProductOwnBytes = kProductScratch + 32;
// Of each warpgroup, both; then the barriers.
constexpr int kProductLines = kProductStages * kProductStageBytes;
constexpr int kProductEndBytes = kProductLinesBytes + kProductOwnBytes;
constexpr int kProductBarriers = kProductLines + kProductConsumers * kProductEndBytes;
constexpr int kProductMail = kProductBarriers + 16 * kProductStages;
constexpr int kProductRecords = 8;  // of 16 bytes and a barrier
constexpr int kProductShared = kProductMail + (16 + 8) * kProductRecords;

// Of the 168 registers a thread that a block of 384 starts with.
constexpr int kProductCopier = 40;
constexpr int kProductRegisters = 232;

// Tiles of kProductRows by the columns of two blocks, one for a cluster. Up to kProductGroup of
// them, one below the other, have the same columns, and so on to the right: what is read at a time
// is small.
constexpr int kProductGroup = 8;
constexpr int kProductUnit = 2;  // stages: of these a tile is as many units as its depth has

// Scales and biases of the block's kColumns columns, by a warpgroup; they are there after
// copies_wait_all() and a barrier of it.
template <typename Operand, int kColumns>
__device__ inline void copy_lines(const ProductArguments& of, uint32_t lines, int column,
                                  int thread) {
  if (thread < kColumns / 8) {
    const auto* biases = static_cast<const __nv_bfloat16*>(of.bias) + column;
    copy_to_shared(lines + kProductBiases + 16 * thread, biases + 8 * thread);
  }
  thread -= 64;
  if (Operand::kBytes == 1 && thread >= 0 && thread < kColumns / 4) {
    copy_to_shared(lines + 16 * thread, of.column_scale + column + 4 * thread);
  }
}

struct ProductWork {
  int columns, down, across, units;  // columns and units: of a tile

  __host__ __device__ ProductWork(const ProductArguments& of, int item_bytes, int block_columns)
      : columns(block_columns * kProductBlocks),
        down((of.rows + kProductRows - 1) / kProductRows),
        across(of.columns / columns),
        units(of.depth * item_bytes / (kMatrixRow * kProductUnit)) {}
  __host__ __device__ int items() const { return down * across; }
  // (row, column) of a tile.
  __device__ int2 tile(int item) const {
    const int group = item / (kProductGroup * across);
    const int first = group * kProductGroup, high = min(kProductGroup, down - first);
    const int within = item - group * kProductGroup * across;
    return {(first + within % high) * kProductRows, within / high * columns};
  }
};

// What a cluster computes, a tile or a part of one at a time. Either every so many-th tile; or, if
// tiles may be split, `share` units that follow each other. Who has a tile's beginning ends it: the
// last piece of a share, and it needs the first pieces of others. All clusters find room at once
// (product_blocks); were it not so, shares are counted from the last cluster down, and one waits
// only for those of smaller numbers, which GPUs have so far started first.
struct ProductPieces {
  ProductWork work;
  bool split;
  int unit, last;

  __device__ ProductPieces(const ProductArguments& of, int item_bytes, int block_columns)
      : work(of, item_bytes, block_columns),
        split(of.share > 0),
        last(work.items() * work.units) {
    unit = split ? share() * of.share : blockIdx.x / kProductBlocks * work.units;
    if (split) last = min(last, unit + of.share);
  }
  __device__ static int shares() { return gridDim.x / kProductBlocks; }
  __device__ static int share() { return shares() - 1 - blockIdx.x / kProductBlocks; }
  __device__ bool some() const { return unit < last; }
  __device__ int item() const { return unit / work.units; }
  __device__ int end() const { return (item() + 1) * work.units; }
  __device__ int from() const { return unit % work.units; }
  __device__ int count() const { return min(work.units - from(), last - unit); }
  __device__ void next() { unit += count() + (split ? 0 : (shares() - 1) * work.units); }
};

// A piece as its consumers read it: they have no registers to find it themselves. Its copier is
// ahead of them by the ring's stages at most, which are two pieces.
struct ProductRecord {
  int row, column;  // of the block
  int steps;        // stages; none: there is no more
  int end;          // unit before which the tile ends; 0: who has its beginning ends it
};

struct ProductRecords {
  uint32_t places, barriers;

  __device__ uint32_t barrier(int piece) const { return barriers + 8 * (piece % kProductRecords); }
  __device__ uint32_t place(int piece) const { return places + 16 * (piece % kProductRecords); }
  __device__ void write(int piece, const ProductRecord& of) const {
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(place(piece)), "r"(of.row),
                 "r"(of.column), "r"(of.steps), "r"(of.end)
                 : "memory");
    phase_arrive(barrier(piece));
  }
  __device__ void wait(int piece) const {
    phase_wait(barrier(piece), piece / kProductRecords % 2);
  }
  __device__ ProductRecord read(int piece) const {
    ProductRecord of;
    asm volatile("ld.volatile.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(of.row), "=r"(of.column), "=r"(of.steps), "=r"(of.end)
                 : "r"(place(piece))
                 : "memory");
    return of;
  }
};

template <typename Operand, typename End>
__device__ inline void copy_product(const ProductArguments& of, const CUtensorMap* a,
                                    const CUtensorMap* weight,
                                    Ring<kProductStages, kProductStageBytes> ring,
                                    const ProductRecords& records, int rank) {
  constexpr int kStep = kMatrixRow / Operand::kBytes;
  constexpr int kShare = kProductRows / kProductBlocks, kEvery = (1 << kProductBlocks) - 1;
  int piece = 0;
  for (ProductPieces pieces(of, Operand::kBytes, End::kColumns); pieces.some(); pieces.next()) {
    const int2 tile = pieces.work.tile(pieces.item());
    const int column = tile.y + rank * End::kColumns;
    const int first = pieces.from() * kProductUnit, steps = pieces.count() * kProductUnit;
    records.write(piece++, {tile.x, column, steps, first > 0 ? 0 : pieces.end()});
    for (int step = first; step < first + steps; ++step) {
      ring.wait_free();
      phase_expect(ring.full(), kProductRowsBytes + End::kColumns * kMatrixRow);
      const uint32_t to = ring.place() + rank * kShare * kMatrixRow;
      const int row = tile.x + rank * kShare;
      if constexpr (End::kFours) {
        copy_box_in_fours(kEvery, to, a, step * kStep, row / 32, 0, ring.full());
      } else {
        copy_box_to(kEvery, to, a, step * kStep, row, 0, ring.full());
      }
      copy_box_in_order(ring.place() + kProductRowsBytes, weight, step * kStep,
                        column / (4 * End::kTogether), ring.full());
      ring.next();
    }
  }
  records.write(piece, {});
}

// Of a warpgroup's rows and 8 kBlocks columns.
template <int kBlocks>
using ProductSums = Accumulators<kBlocks>[kProductHalves];

// A stage of a warpgroup's rows times one of the weight, under way from here on.
template <typename Operand, int kBlocks>
__device__ inline void multiply_stage(ProductSums<kBlocks>& sums, uint32_t rows, uint32_t slice) {
  const uint64_t a = matrix_view(rows), weight = matrix_view(slice);
  multiply_fence();
#pragma unroll
  for (int k = 0; k < kMatrixRow; k += 32) {
#pragma unroll
    for (int half = 0; half < kProductHalves; ++half) {
      Operand::add(sums[half], further(a, half * kProductHalfBytes + k), further(weight, k));
    }
  }
  multiply_commit();
}

// The sums of a piece, of which there are `steps()`: of a warpgroup's rows, `first_row` bytes on.
template <typename Operand, int kBlocks, typename Steps>
__device__ inline void multiply_tile(ProductSums<kBlocks>& sums, const Steps& steps,
                                     Ring<kProductStages, kProductStageBytes>& ring,
                                     uint32_t first_row) {
#pragma unroll
  for (int half = 0; half < kProductHalves; ++half) clear(sums[half]);
  auto read = ring;
  constexpr int kStages = Operand::kPromote;
  if constexpr (kStages == 0) {
#pragma unroll 1
    for (int step = 0; step < steps(); ++step) {
      ring.wait_full();
      multiply_stage<Operand>(sums, ring.place() + first_row, ring.place() + kProductRowsBytes);
      ring.next();
      if (step > 0) {
        multiply_wait<1>();
        free_slot<kProductBlocks>(read, thread_again() % 128);
      }
    }
    multiply_wait<0>();
#pragma unroll
    for (int half = 0; half < kProductHalves; ++half) settle(sums[half]);
    free_slot<kProductBlocks>(read, thread_again() % 128);
  } else {
    static_assert(kProductUnit % kStages == 0);
#pragma unroll 1
    for (int step = 0; step < steps(); step += kStages) {
#pragma unroll
      for (int half = 0; half < kProductHalves; ++half) {
        Accumulators<kBlocks> part;
        auto at = read;
        multiply_fence();
#pragma unroll
        for (int stage = 0; stage < kStages; ++stage) {
          if (half == 0) at.wait_full();
          const uint64_t a = matrix_view(at.place() + first_row + half * kProductHalfBytes);
          const uint64_t weight = matrix_view(at.place() + kProductRowsBytes);
          at.next();
#pragma unroll
          for (int k = 0; k < kMatrixRow; k += 32) {
            if (stage == 0 && k == 0) {
              Operand::first(part, a, weight);
            } else {
              Operand::add(part, further(a, k), further(weight, k));
            }
          }
        }
        multiply_commit();
        multiply_wait<0>();
        settle(part);
#pragma unroll
        for (int j = 0; j < kBlocks; ++j) {
#pragma unroll
          for (int i = 0; i < 4; ++i) sums[half][j][i] += part[j][i];
        }
      }
#pragma unroll
      for (int stage = 0; stage < kStages; ++stage) {
        free_slot<kProductBlocks>(read, thread_again() % 128);
      }
    }
    ring = read;
  }
}

// The part of share `share` that is this warpgroup's.
__device__ inline float4* part_of(const ProductArguments& of, int share) {
  const int block = share * kProductBlocks + rank_in_cluster(), thread = thread_again();
  return of.parts + static_cast<int64_t>(block) * kProductPart +
         (thread / 128 - 1) * (kProductPart / kProductConsumers) + thread % 128;
}

__device__ inline int* flag_of(const ProductArguments& of, int share) {
  const int block = share * kProductBlocks + rank_in_cluster();
  return of.flags + block * kProductConsumers + thread_again() / 128 - 1;
}

// The sums of a piece that does not begin its tile, to whoever has its beginning.
template <int kBlocks>
__device__ inline void hand_over(const ProductArguments& of, const ProductSums<kBlocks>& sums) {
  float4* to = part_of(of, ProductPieces::share());
#pragma unroll
  for (int half = 0; half < kProductHalves; ++half) {
#pragma unroll
    for (int j = 0; j < kBlocks; ++j) {
      const float(&four)[4] = sums[half][j];
      to[(half * kBlocks + j) * 128] = make_float4(four[0], four[1], four[2], four[3]);
    }
  }
  __threadfence();
  barrier_wait(thread_again() / 128, 128);
  if (thread_again() % 128 == 0) {
    asm volatile("st.release.gpu.global.b32 [%0], 1;" ::"l"(
                     flag_of(of, ProductPieces::share()))
                 : "memory");
  }
}

// Those of the shares that have the rest of the tile, which ends before unit `end`; their flags are
// 0 again.
template <int kBlocks>
__device__ inline void take_over(const ProductArguments& of, ProductSums<kBlocks>& sums, int end) {
#pragma unroll 1
  for (int share = ProductPieces::share() + 1; share * of.share < end; ++share) {
    if (thread_again() % 128 == 0) {
      int* flag = flag_of(of, share);
      int there = 0;
      while (!there) {
        asm volatile("ld.acquire.gpu.global.b32 %0, [%1];" : "=r"(there) : "l"(flag) : "memory");
      }
      *flag = 0;
    }
    barrier_wait(thread_again() / 128, 128);
    const float4* from = part_of(of, share);
#pragma unroll
    for (int half = 0; half < kProductHalves; ++half) {
#pragma unroll
      for (int first = 0; first < kBlocks; first += 8) {
        if (again(of.share) == 0) continue;  // never: eight are a branch
#pragma unroll
        for (int j = first; j < first + 8 && j < kBlocks; ++j) {
          const float4 four = __ldcg(from + (half * kBlocks + j) * 128);
          sums[half][j][0] += four.x;
          sums[half][j][1] += four.y;
          sums[half][j][2] += four.z;
          sums[half][j][3] += four.w;
        }
      }
    }
  }
}

// `End`: what becomes of a tile's sums, as ProductEnd (product_end.cuh) has it.
template <typename Operand, typename End>
__global__ void __launch_bounds__(kProductThreads, 1)
    product_kernel(const __grid_constant__ CUtensorMap a,
                   const __grid_constant__ CUtensorMap weight, ProductArguments of) {
  extern __shared__ __align__(1024) uint8_t shared[];
  const uint32_t base = shared_address(shared);
  const int rank = rank_in_cluster();
  Ring<kProductStages, kProductStageBytes> ring{base, base + kProductBarriers};
  const ProductRecords records{base + kProductMail, base + kProductMail + 16 * kProductRecords};
  if (threadIdx.x == 0) {
    ring.begin(1, kProductConsumers * kProductBlocks);  // a thread of each warpgroup
    for (int i = 0; i < kProductRecords; ++i) phase_begin(records.barrier(i), 1);
    phases_begun();
  }
  __syncthreads();
  cluster_wait();
  after_kernel_before();

  if (threadIdx.x < 128) {
    registers_shrink<kProductCopier>();
    if (threadIdx.x == 0) {
      copy_product<Operand, End>(of, &a, &weight, ring, records, rank);
    }
  } else {
    registers_grow<kProductRegisters>();
    constexpr int kRows = kProductRows / kProductConsumers;
    const int first_row = (threadIdx.x / 128 - 1) * kRows;
    const uint32_t lines = base + kProductLines + (threadIdx.x / 128 - 1) * kProductEndBytes;
    for (int piece = 0;; ++piece) {
      records.wait(piece);
      const ProductRecord now = records.read(piece);
      if (now.steps == 0) break;
      barrier_wait(thread_again() / 128, 128);  // the lines of the tile before are read
      copy_lines<Operand, End::kColumns>(of, lines, now.column, thread_again() % 128);
      End::fetch(of, now.row + first_row, now.column, lines + kProductLinesBytes);
      ProductSums<End::kColumns / 8> sums;
      // Read again at every step: a register less.
      const auto steps = [&] { return records.read(again(piece)).steps; };
      multiply_tile<Operand>(sums, steps, ring, first_row * kMatrixRow);
      copies_wait_all();
      const ProductRecord done = records.read(again(piece));
      if (done.end == 0) {
        hand_over(of, sums);
      } else {
        if (of.share > 0) take_over(of, sums, done.end);
        barrier_wait(thread_again() / 128, 128);
        const ProductRecord ended = records.read(again(piece));
        End::end(of, sums, ended.row + first_row, ended.column, lines,
                 lines + kProductLinesBytes);
      }
    }
  }
  cluster_wait();
}

}  // namespace snapkernels
