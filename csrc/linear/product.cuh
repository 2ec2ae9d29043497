// residual + a weight^T + bias, or GELU(a weight^T + bias), of e4m3 or bfloat16.
//
// A block has 256 rows and 128 columns, 128 rows of them each of its two warpgroups of consumers; a
// third copies. Two blocks are a cluster: they have the same rows and the next 128 columns, and
// each copies half of the rows for both. Rows of the weight come in the order in which a lane's
// accumulators are columns that follow each other, so it stores 16 bytes at a time.
//
// Sums of e4m3 are kept to some 14 bits by the tensor cores, each addend cut to the largest's: over
// a long depth that is an error of its own. So after kPromote stages of 128 bytes they are added to
// sums in float32 and begin anew; one warpgroup does that while the other multiplies. With 0 they
// are not, which suffices for bfloat16.
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
constexpr int kProductHalves = kProductRows / kProductConsumers / 64;
constexpr int kProductHalfBytes = 64 * kMatrixRow;
constexpr int kProductStages = 4;
constexpr int kProductRowsBytes = kProductRows * kMatrixRow;
constexpr int kProductSliceBytes = kProductSlice * kMatrixRow;
constexpr int kProductStageBytes = kProductRowsBytes + kProductSliceBytes;
// Of each warpgroup, its columns' scales and biases; then the barriers.
constexpr int kProductLines = kProductStages * kProductStageBytes;
constexpr int kProductLinesBytes = 2 * 4 * kProductSlice;
constexpr int kProductBarriers = kProductLines + kProductConsumers * kProductLinesBytes;
constexpr int kProductShared = kProductBarriers + 16 * kProductStages;

// Of the 168 registers a thread that a block of 384 starts with.
constexpr int kProductCopier = 40;
constexpr int kProductRegisters = 232;

// Tiles of kProductRows by kProductColumns, one for a cluster. Up to kProductGroup of them, one
// below the other, have the same columns, and so on to the right: what is read at a time is small.
constexpr int kProductGroup = 8;

struct ProductWork {
  int down, across;

  __host__ __device__ explicit ProductWork(const ProductArguments& of)
      : down((of.rows + kProductRows - 1) / kProductRows), across(of.columns / kProductColumns) {}
  __host__ __device__ int items() const { return down * across; }
  // (row, column) of a tile.
  __device__ int2 tile(int item) const {
    const int group = item / (kProductGroup * across);
    const int first = group * kProductGroup, high = min(kProductGroup, down - first);
    const int within = item - group * kProductGroup * across;
    return {(first + within % high) * kProductRows, within / high * kProductColumns};
  }
};

template <int kTogether, typename Operand>
__device__ inline void copy_product(const ProductArguments& of, const CUtensorMap* a,
                                    const CUtensorMap* weight,
                                    Ring<kProductStages, kProductStageBytes> ring, int rank) {
  const ProductWork work(of);
  constexpr int kStep = kMatrixRow / Operand::kBytes;
  constexpr int kShare = kProductRows / kProductBlocks;
  for (int item = blockIdx.x / kProductBlocks; item < work.items();
       item += gridDim.x / kProductBlocks) {
    const int2 tile = work.tile(item);
    for (int depth = 0; depth < of.depth; depth += kStep) {
      ring.wait_free();
      phase_expect(ring.full(), kProductStageBytes);
      copy_box_to((1 << kProductBlocks) - 1, ring.place() + rank * kShare * kMatrixRow, a, depth,
                  tile.x + rank * kShare, 0, ring.full());
      copy_box_in_order(ring.place() + kProductRowsBytes, weight, depth,
                        (tile.y + rank * kProductSlice) / (4 * kTogether), ring.full());
      ring.next();
    }
  }
}

// Columns that follow each other in a lane: 16 bytes of the result.
template <typename Operand, bool kGelu>
constexpr int kProductTogether = Operand::kBytes == 1 && kGelu ? 16 : 8;

using ProductSums = Accumulators<16>[kProductHalves];

// A stage of a warpgroup's rows times one of the weight, under way from here on.
template <typename Operand>
__device__ inline void multiply_stage(ProductSums& sums, uint32_t rows, uint32_t slice) {
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

// The sums of a tile: of a warpgroup's rows from `first_row` bytes on.
template <typename Operand, int kPromote>
__device__ inline void multiply_tile(ProductSums& sums, int steps,
                                     Ring<kProductStages, kProductStageBytes>& ring,
                                     uint32_t first_row, int thread) {
#pragma unroll
  for (int half = 0; half < kProductHalves; ++half) clear(sums[half]);
  auto read = ring;
  if constexpr (kPromote == 0) {
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
      ring.wait_full();
      multiply_stage<Operand>(sums, ring.place() + first_row, ring.place() + kProductRowsBytes);
      ring.next();
      if (step > 0) {
        multiply_wait<1>();
        free_slot<kProductBlocks>(read, thread);
      }
    }
    multiply_wait<0>();
#pragma unroll
    for (int half = 0; half < kProductHalves; ++half) settle(sums[half]);
    free_slot<kProductBlocks>(read, thread);
  } else {
#pragma unroll 1
    for (int step = 0; step < steps; step += kPromote) {
#pragma unroll
      for (int half = 0; half < kProductHalves; ++half) {
        Accumulators<16> part;
        auto at = read;
        multiply_fence();
#pragma unroll
        for (int stage = 0; stage < kPromote; ++stage) {
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
        for (int j = 0; j < 16; ++j) {
#pragma unroll
          for (int i = 0; i < 4; ++i) sums[half][j][i] += part[j][i];
        }
      }
#pragma unroll
      for (int stage = 0; stage < kPromote; ++stage) free_slot<kProductBlocks>(read, thread);
    }
    ring = read;
  }
}

// Scales and biases of the block's columns, by a warpgroup for itself.
template <typename Operand>
__device__ inline void load_lines(const ProductArguments& of, uint32_t lines, int column,
                                  int thread) {
  const float bias = __bfloat162float(static_cast<const __nv_bfloat16*>(of.bias)[column + thread]);
  store_float(lines + 4 * (kProductSlice + thread), bias);
  if constexpr (Operand::kBytes == 1) {
    store_float(lines + 4 * thread, of.column_scale[column + thread]);
  }
}

template <int kCount>
__device__ inline void load_floats(float (&to)[kCount], uint32_t from) {
#pragma unroll
  for (int i = 0; i < kCount; i += 4) {
    const uint4 four = load_vector(from + 4 * i);
    to[i] = __uint_as_float(four.x);
    to[i + 1] = __uint_as_float(four.y);
    to[i + 2] = __uint_as_float(four.z);
    to[i + 3] = __uint_as_float(four.w);
  }
}

// Eight bfloat16 added to as many floats.
__device__ inline void add_pairs(float (&y)[8], const uint4& pairs) {
  const uint32_t words[4] = {pairs.x, pairs.y, pairs.z, pairs.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    y[2 * i] += bf16_low(words[i]);
    y[2 * i + 1] += bf16_high(words[i]);
  }
}

// 16 bytes of a row that is there; of one beyond the last, zeros. Volatile: not before the sums are
// done, whose registers it would take.
__device__ inline uint4 load_row(const uint16_t* from, bool some) {
  uint4 loaded{};
  if (some) {
    asm volatile("ld.global.nc.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(loaded.x), "=r"(loaded.y), "=r"(loaded.z), "=r"(loaded.w)
                 : "l"(from));
  }
  return loaded;
}

// The rows of a warpgroup's residual, on their way to L2 while their sums are made.
__device__ inline void fetch_residual(const ProductArguments& of, int row, int column,
                                      int thread) {
  if (!of.residual || row + thread >= of.rows) return;
  const uint16_t* from = static_cast<const uint16_t*>(of.residual) +
                         static_cast<int64_t>(row + thread) * of.columns + column;
  asm volatile("prefetch.global.L2 [%0];" ::"l"(from));
  asm volatile("prefetch.global.L2 [%0];" ::"l"(from + 64));
}

// What becomes of a lane's sums. Of every 4 kTogether columns it has kTogether that follow each
// other, 16 bytes of the result; of rows, r and r + 8 of every half.
template <typename Operand, bool kGelu>
__device__ inline void end_tile(const ProductArguments& of, const ProductSums& sums, int row,
                                int column, uint32_t lines) {
  constexpr bool kFp8 = Operand::kBytes == 1, kQuantised = kFp8 && kGelu;
  constexpr int kTogether = kProductTogether<Operand, kGelu>;
  constexpr int kGroups = kProductSlice / 4 / kTogether;
  constexpr int kRows = 2 * kProductHalves;
  constexpr int kAhead = 2;  // groups of the residual
  const int lane = thread_again() % 32, first = lane % 4 * kTogether;
  row += thread_again() % 128 / 32 * 16 + lane / 4;
  const auto row_of = [&](int i) { return row + i / 2 * 64 + i % 2 * 8; };
  int columns;  // not known before: what follows from it takes no registers
  asm volatile("mov.b32 %0, %1;" : "=r"(columns) : "r"(of.columns));
  const int64_t place = static_cast<int64_t>(row) * columns + column + first;
  const auto further_on = [&](int i, int group) {
    return (i / 2 * 64 + i % 2 * 8) * columns + group * 4 * kTogether;
  };
  uint4 residual[kGelu ? 1 : kGroups][kRows];
  const auto load_residual = [&](int group) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const auto* from = static_cast<const uint16_t*>(of.residual) + place;
      residual[group][i] =
          load_row(from + further_on(i, group), of.residual && row_of(i) < of.rows);
    }
  };
  if constexpr (!kGelu) {
#pragma unroll
    for (int group = 0; group < kAhead; ++group) load_residual(group);
  }
  float row_scales[kRows], inverses[kRows];
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    const bool some = row_of(i) < of.rows;
    if constexpr (kFp8) row_scales[i] = some ? of.row_scale[row_of(i)] : 1;
    if constexpr (kQuantised) inverses[i] = some ? 1 / of.hidden_scale[row_of(i)] : 1;
  }
#pragma unroll
  for (int group = 0; group < kGroups; ++group) {
    if constexpr (!kGelu) {
      if (group + kAhead < kGroups) load_residual(group + kAhead);
    }
    const int from = group * 4 * kTogether + first;
    float scales[kTogether], biases[kTogether];
    if constexpr (kFp8) load_floats(scales, lines + 4 * from);
    load_floats(biases, lines + 4 * (kProductSlice + from));
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      float y[kTogether];
#pragma unroll
      for (int j = 0; j < kTogether; ++j) {
        const float sum = sums[i / 2][group * kTogether / 2 + j / 2][i % 2 * 2 + j % 2];
        y[j] = kFp8 ? fmaf(sum * row_scales[i], scales[j], biases[j]) : sum + biases[j];
        if constexpr (kGelu) y[j] = gelu(y[j]);
        if constexpr (kQuantised) y[j] *= inverses[i];
      }
      uint4 four;
      if constexpr (kQuantised) {
        four = {e4m3_four(y[0], y[1], y[2], y[3]), e4m3_four(y[4], y[5], y[6], y[7]),
                e4m3_four(y[8], y[9], y[10], y[11]), e4m3_four(y[12], y[13], y[14], y[15])};
      } else {
        if constexpr (!kGelu) add_pairs(y, residual[group][i]);
        four = {bf16_pair(y[0], y[1]), bf16_pair(y[2], y[3]), bf16_pair(y[4], y[5]),
                bf16_pair(y[6], y[7])};
      }
      if (row_of(i) < of.rows) {
        constexpr int kBytes = kQuantised ? 1 : 2;
        auto* to = static_cast<uint8_t*>(of.out) + place * kBytes;
        *reinterpret_cast<uint4*>(to + further_on(i, group) * kBytes) = four;
      }
    }
  }
}

template <typename Operand, bool kGelu, int kPromote>
__global__ void __launch_bounds__(kProductThreads, 1)
    product_kernel(const __grid_constant__ CUtensorMap a,
                   const __grid_constant__ CUtensorMap weight, ProductArguments of) {
  extern __shared__ __align__(1024) uint8_t shared[];
  const uint32_t base = shared_address(shared);
  const int rank = rank_in_cluster();
  Ring<kProductStages, kProductStageBytes> ring{base, base + kProductBarriers};
  if (threadIdx.x == 0) {
    ring.begin(1, kProductConsumers * kProductBlocks);  // a thread of each warpgroup
    phases_begun();
  }
  __syncthreads();
  cluster_wait();
  after_kernel_before();

  if (threadIdx.x < 128) {
    registers_shrink<kProductCopier>();
    if (threadIdx.x == 0) {
      copy_product<kProductTogether<Operand, kGelu>, Operand>(of, &a, &weight, ring, rank);
    }
  } else {
    registers_grow<kProductRegisters>();
    const int thread = threadIdx.x % 128, warpgroup = threadIdx.x / 128 - 1;
    constexpr int kRows = kProductRows / kProductConsumers;
    const uint32_t lines = base + kProductLines + warpgroup * kProductLinesBytes;
    const int steps = of.depth * Operand::kBytes / kMatrixRow;
    const ProductWork work(of);
    for (int item = blockIdx.x / kProductBlocks; item < work.items();
         item += gridDim.x / kProductBlocks) {
      const int2 tile = work.tile(item);
      const int column = tile.y + rank * kProductSlice;
      barrier_wait(thread_again() / 128, 128);  // the lines of the tile before are read
      load_lines<Operand>(of, lines, column, thread);
      if constexpr (!kGelu) fetch_residual(of, tile.x + warpgroup * kRows, column, thread);
      ProductSums sums;
      multiply_tile<Operand, kPromote>(sums, steps, ring, warpgroup * kRows * kMatrixRow, thread);
      barrier_wait(thread_again() / 128, 128);
      end_tile<Operand, kGelu>(of, sums, tile.x + warpgroup * kRows, column, lines);
    }
  }
  cluster_wait();
}

}  // namespace snapkernels
