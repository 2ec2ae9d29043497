// What both backwards do with gradients of scores in the registers of a warp: 16 tokens, of which a
// lane 4 r + q has r and r + 8, and columns 2 q and 2 q + 1 of every block of 8.
#pragma once

#include "group_attn/group_backward.h"
#include "group_attn/token_scores.cuh"

namespace snapkernels {

constexpr float kLog2 = 0.6931471805599453f;  // scores are exponents of 2

inline __host__ __device__ int sums_of_group(const GroupArguments& of) {
  return (of.tokens + kScoreTokens - 1) / kScoreTokens * (kScoreTokens / kSumsTokens);
}

// By one thread: 64 channels of a tile, and how L2 is to hold them.
template <typename Tiles>
__device__ inline void copy_tile(Tiles& tiles, const CUtensorMap* patches, int channel, int token,
                                 int group, uint64_t policy) {
  tiles.wait_free();
  phase_expect(tiles.full(), kTileBytes);
  copy_box(tiles.place(), patches, channel, token, group, tiles.full(), policy);
  tiles.next();
}

// An 8 x 8 matrix of which lane 4 r + q has two of row r: now two of column r.
__device__ inline uint32_t transposed(uint32_t pair) {
  uint32_t there;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(there) : "r"(pair));
  return there;
}

// 16 x 8: rows r of `a` are of M (r + 8 are 0), with 2 q and 2 q + 1 of K, then 8 further; pairs of
// K of column r are `b`. Added to `from`.
__device__ inline void multiply_small(float (&sum)[4], const uint32_t (&a)[2],
                                      const uint32_t (&b)[2], const float (&from)[4]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, "
      "{%4, %5, %6, %5}, {%7, %8}, {%9, %10, %11, %12};"
      : "=f"(sum[0]), "=f"(sum[1]), "=f"(sum[2]), "=f"(sum[3])
      : "r"(a[0]), "r"(0), "r"(a[1]), "r"(b[0]), "r"(b[1]), "f"(from[0]), "f"(from[1]),
        "f"(from[2]), "f"(from[3]));
}

// Volatile, or the compiler would load many ahead.
__device__ inline float4 load_line(uint32_t address) {
  float4 line;
  asm volatile("ld.volatile.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(line.x), "=f"(line.y), "=f"(line.z), "=f"(line.w)
               : "r"(address)
               : "memory");
  return line;
}

// Of a lane's tokens; beyond them 0 and 1.
__device__ inline Moments load_moments(const GroupArguments& of, const GroupGradArguments& grads,
                                       int group, int tile_token) {
  const int token = tile_token + token_of_lane();
  const int64_t at = static_cast<int64_t>(group) * of.tokens + token;
  Moments moments;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const bool some = token + 8 * i < of.tokens;
    moments.mean[i] = some ? grads.mean[at + 8 * i] : 0;
    moments.rstd[i] = some ? grads.rstd[at + 8 * i] : 1;
  }
  return moments;
}

// Of a warp's 16 tokens, in shared memory, since registers are short: mean and rstd in turns.
struct WarpMoments {
  static constexpr int kBytes = 128 * 4 * kScoreConsumers;
  uint32_t base;

  __device__ explicit WarpMoments(uint32_t base) : base(base) {}
  __device__ uint32_t place() const { return base + thread_again() / 32 * 128 - 4 * 128; }
  __device__ void set(const Moments& moments) const {
    const uint32_t lane = thread_again() % 32, at = place() + 8 * (lane / 4);
    if (lane % 4 == 0) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        asm volatile("st.volatile.shared.v2.f32 [%0], {%1, %2};" ::"r"(at + 64 * i),
                     "f"(moments.mean[i]), "f"(moments.rstd[i])
                     : "memory");
      }
    }
    __syncwarp();
  }
  __device__ Moments get() const {
    const uint32_t at = place() + thread_again() % 32 / 4 * 8;
    Moments moments;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      asm volatile("ld.volatile.shared.v2.f32 {%0, %1}, [%2];"
                   : "=f"(moments.mean[i]), "=f"(moments.rstd[i])
                   : "r"(at + 64 * i)
                   : "memory");
    }
    return moments;
  }
};

// A warp's means, and 1 / rstd, as rows 0 and 1 of a product with its tokens, in two bfloat16 each.
struct TokenRows {
  uint32_t high[2], low[2];

  __device__ explicit TokenRows(const WarpMoments& moments) {
    const uint32_t lane = thread_again() % 32, row = lane / 4;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float4 two = load_line(moments.place() + 16 * (lane % 4) + 64 * i);
      const float first = (row == 0) * two.x + (row == 1) * reciprocal_fast(two.y);
      const float second = (row == 0) * two.z + (row == 1) * reciprocal_fast(two.w);
      high[i] = bf16_pair(first, second);
      low[i] = bf16_pair(first - bf16_low(high[i]), second - bf16_high(high[i]));
    }
  }

  // The sums over the warp's tokens of 32 columns of dS, of which a lane has pairs of tokens r and
  // r + 8 in each block of 8. What of one block does not wait for another's.
  __device__ void write_sums(const uint32_t (&grads)[2][4], float* to) const {
    uint32_t columns[4][2];
    float sums[4][4];
#pragma unroll
    for (int b = 0; b < 4; ++b) {
#pragma unroll
      for (int i = 0; i < 2; ++i) columns[b][i] = transposed(grads[i][b]);
    }
#pragma unroll
    for (int b = 0; b < 4; ++b) multiply_small(sums[b], low, columns[b], {0, 0, 0, 0});
#pragma unroll
    for (int b = 0; b < 4; ++b) multiply_small(sums[b], high, columns[b], sums[b]);
    const int lane = thread_again() % 32;
    if (lane < 8) {
      to += lane / 4 * kGroupColumns + 2 * (lane % 4);
#pragma unroll
      for (int b = 0; b < 4; ++b) {
        *reinterpret_cast<float2*>(to + 8 * b) = make_float2(sums[b][0], sums[b][1]);
      }
    }
  }
};

// Where the sums over the tokens of a warp, of the tile from `tile_token` on, are.
__device__ inline float* sums_of_warp(const GroupArguments& of, float* sums, int group,
                                      int tile_token) {
  const int64_t warp = tile_token / kSumsTokens + thread_again() / 32 - 4;
  return sums + (static_cast<int64_t>(group) * sums_of_group(of) + warp) * 2 * kGroupColumns;
}

// 16 bytes, under way from here on.
__device__ inline uint4 load_ahead(const uint4* from) {
  uint4 loaded;
  asm volatile("ld.global.nc.L1::no_allocate.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(loaded.x), "=r"(loaded.y), "=r"(loaded.z), "=r"(loaded.w)
               : "l"(from));
  return loaded;
}

// A sum over the four lanes of a token.
__device__ inline float over_row(float value) {
  value += __shfl_xor_sync(~0u, value, 1);
  return value + __shfl_xor_sync(~0u, value, 2);
}

// Of each of a lane's two tokens.
struct TokenTotals {
  float u[2], product[2];  // sums over the channels: of u with rstd in it, of u times xn
};

// In shared memory, since registers are short. Volatile: what is set is made by then, and what
// reads shared memory after it is not before it.
struct LaneSums {
  static constexpr int kBytes = 16 * 128 * kScoreConsumers;
  uint32_t base;

  __device__ explicit LaneSums(uint32_t base) : base(base) {}
  __device__ uint32_t place() const { return base + 16 * (thread_again() - 128); }
  __device__ TokenTotals get() const {
    const float4 all = load_line(place());
    return {{all.x, all.y}, {all.z, all.w}};
  }
  __device__ void set(const TokenTotals& all) const {
    asm volatile("st.volatile.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(place()),
                 "f"(all.u[0]), "f"(all.u[1]), "f"(all.product[0]), "f"(all.product[1])
                 : "memory");
  }
};

// What LayerNorm's backward takes off u: of each token `constant` is added, and x times `slope`
// taken off.
struct TokenLines {
  float constant[2], slope[2];

  __device__ TokenLines(const LaneSums& sums, const WarpMoments& of_warp, int width) {
    const TokenTotals found = sums.get();
    const Moments moments = of_warp.get();
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      slope[i] = moments.rstd[i] * over_row(found.product[i]) / width;
      constant[i] = moments.mean[i] * slope[i] - over_row(found.u[i]) / width;
    }
  }
};

// Two channels of u in accumulators, with their token's line.
__device__ inline float2 with_line(const float* pair, uint32_t x, float constant, float slope) {
  return {fmaf(-slope, bf16_low(x), pair[0] + constant),
          fmaf(-slope, bf16_high(x), pair[1] + constant)};
}

}  // namespace snapkernels
