// How the product of normed latents and q's, k's and v's weight ends for latent_core.cuh: as 8-bit
// integers and their scales, v's transposed.
//
// A warpgroup has 128 tokens and 128 columns of heads, two of 64 or one of 128. Of q every token
// has a scale, of k and v every head of the 128 tokens: the largest magnitude / 127. One that is
// not finite makes the scale NaN, which is what all become that it is multiplied with. A row that
// is no token has scale 0 and becomes zeros, without the bias. No rows or columns are beyond the
// last.
#pragma once

#include "latent_attn/integers.cuh"
#include "latent_attn/latent_attn.h"
#include "linear/product_end.cuh"
#include "linear/rows.cuh"

namespace snapkernels {

__device__ inline float count_scale(float most) { return most < INFINITY ? most / 127 : NAN; }

// The largest of a warpgroup, of each of kHeads; in 16 kHeads bytes of `scratch`.
template <int kHeads>
__device__ inline void share_most(float (&most)[kHeads], uint32_t scratch) {
  const int thread = thread_again() % 128;
#pragma unroll
  for (int head = 0; head < kHeads; ++head) most[head] = warp_most(most[head]);
  barrier_wait(thread_again() / 128, 128);
  if (thread % 32 == 0) {
#pragma unroll
    for (int head = 0; head < kHeads; ++head) {
      store_float(scratch + 4 * (thread / 32 * kHeads + head), most[head]);
    }
  }
  barrier_wait(thread_again() / 128, 128);
#pragma unroll
  for (int warp = 0; warp < 4; ++warp) {
#pragma unroll
    for (int head = 0; head < kHeads; ++head) {
      most[head] = larger(most[head], load_float(scratch + 4 * (warp * kHeads + head)));
    }
  }
}

// Rows are tokens, in fours (tensor_map.h); columns those of q, k and v in turn.
template <int kHead>
struct HeadsEnd {
  static constexpr int kColumns = kProductSlice;
  using Sums = ProductSums<kColumns / 8>;
  static constexpr int kTogether = 16;
  static constexpr bool kFours = true;
  static constexpr int kHeads = 128 / kHead;
  static constexpr int kGroups = kColumns / 4 / kTogether;  // of 64 columns
  static constexpr int kRows = 2 * kProductHalves;

  static __device__ void fetch(const ProductArguments& of, int row, int, uint32_t own) {
    copy_row_scales(of, row, thread_again() % 128, own);
  }

  // Which of a warpgroup's heads a group is of.
  static __device__ constexpr int head_of(int group) { return kHeads == 1 ? 0 : group; }

  static __device__ void end(const ProductArguments& of, Sums& sums, int first_row, int column,
                             uint32_t lines, uint32_t own) {
    const int lane = thread_again() % 32, first = lane % 4 * kTogether;
    // And the kRows - 1 that follow.
    const int place = thread_again() % 128 / 4 * kRows, row = first_row + place;
    float row_scales[kRows], most[kRows][kHeads];
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      row_scales[i] = load_float(own + 4 * (place + i));
#pragma unroll
      for (int head = 0; head < kHeads; ++head) most[i][head] = kLeast;
    }
    // Eight columns at a time; what they are scaled by is loaded one eight ahead.
    constexpr int kEights = kGroups * kTogether / 8;
    const auto group_of = [](int eight) { return eight * 8 / kTogether; };
    float scales[2][8], biases[2][8];
    const auto load_ahead = [&](int eight) {
      const int at = group_of(eight) * 4 * kTogether + first + eight * 8 % kTogether;
      load_eight(scales[eight % 2], lines + 4 * at);
      load_eight_bf16(biases[eight % 2], lines + kProductBiases + 2 * at);
    };
    load_ahead(0);
#pragma unroll
    for (int eight = 0; eight < kEights; ++eight) {
      if (eight + 1 < kEights) load_ahead(eight + 1);
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          float& y = sums[i / 2][4 * eight + j / 2][i % 2 * 2 + j % 2];
          y = fmaf(y * row_scales[i], scales[eight % 2][j], biases[eight % 2][j]);
          float& largest = most[i][head_of(group_of(eight))];
          largest = larger(largest, fabsf(y));
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      if (row_scales[i] != 0) continue;  // no token
#pragma unroll
      for (int j = 0; j < kColumns / 8; ++j) {
        sums[i / 2][j][i % 2 * 2] = sums[i / 2][j][i % 2 * 2 + 1] = 0;
      }
#pragma unroll
      for (int head = 0; head < kHeads; ++head) most[i][head] = kLeast;
    }
    const int which = column / of.heads.inner, inner_column = column - which * of.heads.inner;
    if (which == 0) {
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
#pragma unroll
        for (int head = 0; head < kHeads; ++head) {
          float& largest = most[i][head];
          largest = larger(largest, __shfl_xor_sync(~0u, largest, 1));
          largest = larger(largest, __shfl_xor_sync(~0u, largest, 2));
          if (lane % 4 == 0) {
            const int64_t heads = column / kHead + head;
            of.heads.q_scale[heads * of.heads.padded + row + i] = count_scale(largest);
          }
        }
      }
    } else {
      float all[kHeads];
#pragma unroll
      for (int head = 0; head < kHeads; ++head) {
        all[head] = most[0][head];
#pragma unroll
        for (int i = 1; i < kRows; ++i) all[head] = larger(all[head], most[i][head]);
      }
      share_most(all, own + kProductScratch);
      if (thread_again() % 128 == 0) {
        float* scale = which == 1 ? of.heads.k_scale : of.heads.v_scale;
        const int64_t scales = of.heads.padded / kHeadsTokens;
#pragma unroll
        for (int head = 0; head < kHeads; ++head) {
          scale[(inner_column / kHead + head) * scales + first_row / kHeadsTokens] =
              count_scale(all[head]);
        }
      }
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
#pragma unroll
        for (int head = 0; head < kHeads; ++head) most[i][head] = all[head];
      }
    }
    if (which < 2) {
      store_rows(of, sums, most, row, column + first);
    } else {
      store_columns(of, sums, most, row, inner_column + first);
    }
  }

  // Of q or k, 16 columns of a row at a time.
  static __device__ void store_rows(const ProductArguments& of, const Sums& sums,
                                    const float (&most)[kRows][kHeads], int row, int column) {
    const int columns = 2 * of.heads.inner;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      auto* to = static_cast<uint8_t*>(of.out) + static_cast<int64_t>(row + i) * columns + column;
#pragma unroll
      for (int group = 0; group < kGroups; ++group) {
        const float inverse = 127 / most[i][head_of(group)];
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

  // Of v, kRows tokens of a column at a time: with those of a warp's other lanes they are 32.
  static __device__ void store_columns(const ProductArguments& of, const Sums& sums,
                                       const float (&most)[kRows][kHeads], int row, int column) {
    static_assert(kRows == 4);
    const int64_t tokens = of.heads.padded;
    auto* to = static_cast<uint8_t*>(of.heads.v) + column * tokens + row;
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      const float inverse = 127 / most[0][head_of(group)];
#pragma unroll
      for (int j = 0; j < kTogether; ++j) {
        const int block = group * kTogether / 2 + j / 2, e = j % 2;
        const float(&low)[4] = sums[0][block];
        const float(&high)[4] = sums[1][block];
        *reinterpret_cast<uint32_t*>(to + (group * 4 * kTogether + j) * tokens) =
            last_bytes(rounded(low[e], inverse), rounded(low[2 + e], inverse),
                       rounded(high[e], inverse), rounded(high[2 + e], inverse));
      }
    }
  }
};

}  // namespace snapkernels
