// How product.cuh's tiles end: scales, bias, GELU, residual, and the numbers that are stored.
#pragma once

#include "linear/gelu.cuh"
#include "linear/product.cuh"

namespace snapkernels {

__device__ inline void load_eight(float (&to)[8], uint32_t from) {
#pragma unroll
  for (int i = 0; i < 8; i += 4) {
    asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(to[i]), "=f"(to[i + 1]), "=f"(to[i + 2]), "=f"(to[i + 3])
                 : "r"(from + 4 * i)
                 : "memory");
  }
}

// Eight bfloat16.
__device__ inline void load_eight_bf16(float (&to)[8], uint32_t from) {
  unpacked(to, load_vector(from));
}

// The scales of 128 rows, of which each warp copies those that it reads: `place` of its lane is
// where. They are there after copies_wait_all() and __syncwarp(). Rows beyond the last have 0, and
// of its inverse nothing is stored.
__device__ inline void copy_row_scales(const ProductArguments& of, int row, int place,
                                       uint32_t own) {
  const bool some = row + place < of.rows;
  copy_word_to_shared(own + 4 * place, of.row_scale + row + place, some);
  if (of.hidden_scale) {
    copy_word_to_shared(own + kProductHidden + 4 * place, of.hidden_scale + row + place, some);
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
__device__ inline void fetch_residual(const ProductArguments& of, int row, int column) {
  const int thread = thread_again() % 128;
  if (!of.residual || row + thread >= of.rows) return;
  const uint16_t* from = static_cast<const uint16_t*>(of.residual) +
                         static_cast<int64_t>(row + thread) * of.columns + column;
  asm volatile("prefetch.global.L2 [%0];" ::"l"(from));
  asm volatile("prefetch.global.L2 [%0];" ::"l"(from + 64));
}

// What becomes of a lane's sums. Of every 4 kTogether columns it has kTogether that follow each
// other, 16 bytes of the result; of rows, r and r + 8 of every half.
template <typename Operand, bool kGelu, int kBlockColumns = kProductSlice>
struct ProductEnd {
  static constexpr int kColumns = kBlockColumns;  // of a block
  using Sums = ProductSums<kColumns / 8>;
  static constexpr int kTogether = Operand::kBytes == 1 && kGelu ? 16 : 8;
  static constexpr bool kFours = false;  // a lane's rows do not follow each other

  // Before the sums of a warpgroup's rows: what their end reads.
  static __device__ void fetch(const ProductArguments& of, int row, int column, uint32_t own) {
    const int thread = thread_again() % 128, lane = thread % 32;
    const int place = lane / 16 * 64 + thread / 32 * 16 + lane % 16;
    if constexpr (Operand::kBytes == 1) copy_row_scales(of, row, place, own);
    if constexpr (!kGelu) fetch_residual(of, row, column);
  }

  static __device__ void end(const ProductArguments& of, const Sums& sums, int row, int column,
                             uint32_t lines, uint32_t own) {
    constexpr bool kFp8 = Operand::kBytes == 1, kQuantised = kFp8 && kGelu;
    constexpr int kGroups = kColumns / 4 / kTogether;
    static_assert(kGroups * 4 * kTogether == kColumns);
    constexpr int kRows = 2 * kProductHalves;
    constexpr int kAhead = 2;  // groups of the residual
    const int lane = thread_again() % 32, first = lane % 4 * kTogether;
    const int place_in_rows = thread_again() % 128 / 32 * 16 + lane / 4;
    row += place_in_rows;
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
    float row_scales[kRows], halves[kRows];  // halves: of the inverse of what is quantised by
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const uint32_t at = own + 4 * (place_in_rows + i / 2 * 64 + i % 2 * 8);
      if constexpr (kFp8) row_scales[i] = load_float(at);
      if constexpr (kQuantised) {
        halves[i] = 0.5f * reciprocal_fast(load_float(at + kProductHidden));
      }
    }
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      if constexpr (!kGelu) {
        if (group + kAhead < kGroups) load_residual(group + kAhead);
      }
      uint32_t words[kRows][4];
#pragma unroll
      for (int part = 0; part < kTogether / 8; ++part) {
        const int at = group * 4 * kTogether + first + 8 * part;
        float scales[8], biases[8];
        if constexpr (kFp8) load_eight(scales, lines + 4 * at);
        load_eight_bf16(biases, lines + kProductBiases + 2 * at);
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
          // A branch, for a compiler that else has many rows at a time and not the registers.
          if (kGelu && i % 2 == 0 && row_of(i) >= of.rows) break;
          float y[8];
#pragma unroll
          for (int j = 0; j < 8; ++j) {
            const int block = group * kTogether / 2 + part * 4 + j / 2;
            const float sum = sums[i / 2][block][i % 2 * 2 + j % 2];
            y[j] = kFp8 ? fmaf(sum * row_scales[i], scales[j], biases[j]) : sum + biases[j];
            if constexpr (kGelu && !kQuantised) y[j] = gelu(y[j]);
          }
          if constexpr (kQuantised) {
            uint32_t pairs[4];
#pragma unroll
            for (int j = 0; j < 4; ++j) pairs[j] = twice_gelu(y[2 * j], y[2 * j + 1], halves[i]);
            words[i][2 * part] = e4m3_four(pairs[0], pairs[1]);
            words[i][2 * part + 1] = e4m3_four(pairs[2], pairs[3]);
          } else {
            if constexpr (!kGelu) {
              float added[8];
              unpacked(added, residual[group][i]);
#pragma unroll
              for (int j = 0; j < 8; ++j) y[j] += added[j];
            }
#pragma unroll
            for (int j = 0; j < 4; ++j) words[i][j] = bf16_pair(y[2 * j], y[2 * j + 1]);
          }
        }
      }
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        if (row_of(i) < of.rows) {
          constexpr int kBytes = kQuantised ? 1 : 2;
          auto* to = static_cast<uint8_t*>(of.out) + (place + further_on(i, group)) * kBytes;
          *reinterpret_cast<uint4*>(to) =
              make_uint4(words[i][0], words[i][1], words[i][2], words[i][3]);
        }
      }
    }
  }
};

}  // namespace snapkernels
