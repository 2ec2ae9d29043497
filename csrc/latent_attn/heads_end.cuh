// How a product of q and k, or of v, ends for latent_core.cuh: as 8-bit integers and their scales.
//
// A warpgroup has 128 tokens and 128 columns of heads, two of 64 or one of 128. Of q every token
// has a scale, of k and v every head of the 128 tokens: the largest magnitude / 127. One that is
// not finite makes the scale NaN, which is what all become that it is multiplied with. What is no
// token has scale 0 and becomes zeros, without the bias. No rows or columns are beyond the last.
#pragma once

#include "latent_attn/integers.cuh"
#include "latent_attn/latent_attn.h"
#include "linear/product_end.cuh"
#include "linear/rows.cuh"

namespace snapkernels {

__device__ inline float count_scale(float most) { return most < INFINITY ? most / 127 : NAN; }

// The largest of a warpgroup, of each of kHeads; `lines` are not needed any more.
template <int kHeads>
__device__ inline void share_most(float (&most)[kHeads], uint32_t lines) {
  const int thread = thread_again() % 128;
#pragma unroll
  for (int head = 0; head < kHeads; ++head) most[head] = warp_most(most[head]);
  barrier_wait(thread_again() / 128, 128);
  if (thread % 32 == 0) {
#pragma unroll
    for (int head = 0; head < kHeads; ++head) {
      store_float(lines + 4 * (thread / 32 * kHeads + head), most[head]);
    }
  }
  barrier_wait(thread_again() / 128, 128);
#pragma unroll
  for (int warp = 0; warp < 4; ++warp) {
#pragma unroll
    for (int head = 0; head < kHeads; ++head) {
      most[head] = larger(most[head], load_float(lines + 4 * (warp * kHeads + head)));
    }
  }
}

// kTurned: rows are those of v's weight, columns are tokens, and so the result is v^T. Else rows
// are tokens, and columns those of q and then of k.
template <int kHead, bool kTurned>
struct HeadsEnd {
  static constexpr int kTogether = 16;
  static constexpr int kHeads = 128 / kHead;
  static constexpr int kGroups = kProductSlice / 4 / kTogether;  // of 64 columns
  static constexpr int kRows = 2 * kProductHalves;

  static __device__ void begin(const ProductArguments& of, uint32_t lines, int row, int column,
                               int thread) {
    if constexpr (kTurned) {
      store_float(lines + 4 * thread, of.column_scale[column + thread]);
    } else {
      load_lines<Fp8>(of, lines, column, thread);
    }
  }

  // Which of a warpgroup's heads the numbers of a lane's row i and group are of.
  static __device__ constexpr int head_of(int i, int group) {
    return kHeads == 1 ? 0 : kTurned ? i / 2 : group;
  }

  static __device__ void end(const ProductArguments& of, ProductSums& sums, int first_row,
                             int column, uint32_t lines) {
    const int lane = thread_again() % 32, first = lane % 4 * kTogether;
    const int row = first_row + thread_again() % 128 / 32 * 16 + lane / 4;
    const auto row_of = [&](int i) { return row + i / 2 * 64 + i % 2 * 8; };
    float row_scales[kRows], row_biases[kRows];
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      row_scales[i] = of.row_scale[row_of(i)];
      if constexpr (kTurned) {
        row_biases[i] = __bfloat162float(static_cast<const __nv_bfloat16*>(of.bias)[row_of(i)]);
      }
    }
    float most[kRows][kHeads];
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
#pragma unroll
      for (int head = 0; head < kHeads; ++head) most[i][head] = kLeast;
    }
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
#pragma unroll
      for (int part = 0; part < kTogether / 8; ++part) {
        const uint32_t at = lines + 4 * (group * 4 * kTogether + first + 8 * part);
        float scales[8], biases[8];
        load_eight(scales, at);
        if constexpr (!kTurned) load_eight(biases, at + 4 * kProductSlice);
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
#pragma unroll
          for (int j = 0; j < 8; ++j) {
            float& y = sums[i / 2][group * kTogether / 2 + part * 4 + j / 2][i % 2 * 2 + j % 2];
            const bool token = (kTurned ? scales[j] : row_scales[i]) != 0;
            const float bias = kTurned ? row_biases[i] : biases[j];
            y = fmaf(y * row_scales[i], scales[j], token ? bias : 0);
            float& largest = most[i][head_of(i, group)];
            largest = larger(largest, fabsf(y));
          }
        }
      }
    }
    const bool keys = !kTurned && column >= of.heads.inner;
    if (kTurned || keys) {
      float all[kHeads];
#pragma unroll
      for (int head = 0; head < kHeads; ++head) {
        all[head] = most[0][head];
#pragma unroll
        for (int i = 1; i < kRows; ++i) all[head] = larger(all[head], most[i][head]);
      }
      share_most(all, lines);
      const int tokens = kTurned ? column : first_row;
      const int of_heads = kTurned ? first_row : column - of.heads.inner;
      if (thread_again() % 128 == 0) {
        const int64_t scales = of.heads.padded / kHeadsTokens;
#pragma unroll
        for (int head = 0; head < kHeads; ++head) {
          of.heads.tile_scale[(of_heads / kHead + head) * scales + tokens / kHeadsTokens] =
              count_scale(all[head]);
        }
      }
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
#pragma unroll
        for (int head = 0; head < kHeads; ++head) most[i][head] = all[head];
      }
    } else {
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
#pragma unroll
        for (int head = 0; head < kHeads; ++head) {
          float& largest = most[i][head];
          largest = larger(largest, __shfl_xor_sync(~0u, largest, 1));
          largest = larger(largest, __shfl_xor_sync(~0u, largest, 2));
          if (lane % 4 == 0) {
            of.heads.q_scale[int64_t{column / kHead + head} * of.heads.padded + row_of(i)] =
                count_scale(largest);
          }
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      auto* to = static_cast<uint8_t*>(of.out) + static_cast<int64_t>(row_of(i)) * of.columns +
                 column + first;
#pragma unroll
      for (int group = 0; group < kGroups; ++group) {
        const float inverse = 127 / most[i][head_of(i, group)];
        uint32_t words[4];
#pragma unroll
        for (int word = 0; word < 4; ++word) {
          const int block = group * kTogether / 2 + 2 * word;
          const float(&low)[4] = sums[i / 2][block];
          const float(&high)[4] = sums[i / 2][block + 1];
          words[word] = last_bytes(
              rounded(low[i % 2 * 2], inverse), rounded(low[i % 2 * 2 + 1], inverse),
              rounded(high[i % 2 * 2], inverse), rounded(high[i % 2 * 2 + 1], inverse));
        }
        *reinterpret_cast<uint4*>(to + group * 4 * kTogether) =
            make_uint4(words[0], words[1], words[2], words[3]);
      }
    }
  }
};

}  // namespace snapkernels
