// group_read's backward, first pass over the patches: P again, dP = W xn^T and dS, to memory.
//
// The softmax is over tokens, and the forward kept what it divided by: so a score alone says its P.
// As in group_write.cuh tokens are rows, 64 of a warpgroup, and half of the columns are made at a
// time; here both products, with A and with W, are of the same tile of x.
#pragma once

#include "group_attn/score_grads.cuh"

namespace snapkernels {

// Of a column: the sums of A and of W, log2 of the sum of 2^score, and the sum of P dP.
using ReadLine = float4;

constexpr int kReadGradsSums = TokenRings::bytes<ReadLine>();
constexpr int kReadGradsShared = kReadGradsSums + LaneSums::kBytes;

// P and dS of 32 columns from block `first` on of a lane's token i; their parts of its sums.
__device__ inline void make_grads(uint32_t (&weights)[4], uint32_t (&grads)[4],
                                  const Scores& scores, const Scores& products, int first, int i,
                                  const Moments& moments, uint32_t lines, const LaneSums& sums) {
  const float rstd = moments.rstd[i], slope = -moments.mean[i] * rstd;
  const uint32_t thread = thread_again();
  lines += sizeof(ReadLine) * ((thread / 128 - 1) * kGroupColumns + 2 * (thread % 4));
  float2 sum = sums.get(i);
#pragma unroll
  for (int b = 0; b < 4; ++b) {
    const int block = first + b;
    float weight[2], grad[2];
    float2 totals[2];
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const float4 line = load_line(lines + sizeof(ReadLine) * (8 * block + e));
      const float score = fmaf(scores[block][2 * i + e], rstd, slope * line.x);
      const float product = fmaf(products[block][2 * i + e], rstd, slope * line.y);
      weight[e] = exp2_fast(score - line.z) * rstd;
      grad[e] = kLog2 * weight[e] * (product - line.w);
      sum.y = fmaf(weight[e], product, fmaf(grad[e], score, sum.y));
      totals[e] = {line.x, line.y};
    }
    weights[b] = bf16_pair(weight[0], weight[1]);
    grads[b] = bf16_pair(grad[0], grad[1]);
    sum.x += fmaf(bf16_low(weights[b]), totals[0].y, bf16_low(grads[b]) * totals[0].x) +
             fmaf(bf16_high(weights[b]), totals[1].y, bf16_high(grads[b]) * totals[1].x);
    sums.set(i, sum);  // nothing of the next columns starts before
  }
}

__global__ void __launch_bounds__(kScoreThreads, 1)
    group_read_grads_kernel(const __grid_constant__ CUtensorMap patches,
                            const __grid_constant__ CUtensorMap absorbed,
                            const __grid_constant__ CUtensorMap rows,
                            GroupReadBackwardArguments given) {
  extern __shared__ __align__(1024) uint8_t shared[];
  const uint32_t base = shared_address(shared);
  const ScoreWork work(given.of);
  const int width = given.of.width, rank = rank_in_cluster();
  TokenRings rings(base);
  if (threadIdx.x == 0) {
    rings.tiles.begin(1, 4 * kScoreConsumers);               // each warp has read it for moments
    rings.slots.begin(1, kScoreConsumers * kClusterBlocks);  // a thread of each warpgroup
    phases_begun();
  }
  __syncthreads();
  cluster_wait();
  after_kernel_before();

  if (threadIdx.x < 128) {
    registers_shrink<kCopierRegisters>();
    if (threadIdx.x == 0) {
      for (int item = work.first(); item < work.items; item += work.step()) {
        for (int half = 0; half < 2; ++half) {
          for (int channel = 0; channel < width; channel += kScoreStep) {
            copy_tile(rings.tiles, &patches, channel, work.token(item, rank), work.group(item),
                      half ? first_to_leave() : stays());
          }
        }
      }
    } else if (threadIdx.x == 32) {
      for (int item = work.first(); item < work.items; item += work.step()) {
        for (int half = 0; half < 2; ++half) {
          const int row = half * kScoreHalf + rank * kScoreHalf / 2;
          for (int channel = 0; channel < width; channel += kScoreStep) {
            copy_piece(rings.slots, &absorbed, rank, channel, row, work.group(item));
            copy_piece(rings.slots, &rows, rank, channel, row, work.group(item));
          }
        }
      }
    }
  } else {
    registers_grow<kScoreRegisters>();
    const int thread = threadIdx.x % 128, warpgroup = threadIdx.x / 128 - 1;
    const LaneSums sums(base + kReadGradsSums);
    for (int item = work.first(); item < work.items; item += work.step()) {
      const int group = work.group(item), tile_token = work.token(item, rank);
      barrier_wait(1 + warpgroup, 128);  // the lines of the item before are read
      auto* lines = reinterpret_cast<ReadLine*>(shared + TokenRings::kLinesAt) +
                    warpgroup * kGroupColumns;
#pragma unroll
      for (int column = thread; column < kGroupColumns; column += 128) {
        const int at = group * kGroupColumns + column;
        lines[column] = {given.of.absorbed_sum[at], given.rows_sum[at], given.log_sum[at],
                         given.delta[at]};
      }
      barrier_wait(1 + warpgroup, 128);
      sums.clear();
      Moments moments;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        Scores both[2];  // with A, with W
        TokenSums of_tokens;
        if (half == 0) {
          make_scores<true>(both, of_tokens, rings, width);
          moments = moments_of_rows(of_tokens, width, given.of.eps);
        } else {
          make_scores<false>(both, of_tokens, rings, width);
        }
        if (tile_token >= given.of.tokens) continue;
#pragma unroll
        for (int v = 0; v < kScoreHalf / 32; ++v) {
          uint32_t grads[2][4];
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            uint32_t weights[4];
            make_grads(weights, grads[i], both[0], both[1], 4 * v, i, moments,
                       base + TokenRings::kLinesAt + half * kScoreHalf * sizeof(ReadLine), sums);
            const int64_t at = weights_of_lane(given.of, group, tile_token) +
                               half * kScoreHalf / 8 + i * 8 * (kGroupColumns / 8) + 4 * v;
            store_once(static_cast<uint4*>(given.grads.weights) + at,
                       make_uint4(weights[0], weights[1], weights[2], weights[3]));
            store_once(static_cast<uint4*>(given.grads.score_grads) + at,
                       make_uint4(grads[i][0], grads[i][1], grads[i][2], grads[i][3]));
          }
          const TokenRows token_rows(moments);  // again for every 32: registers are short
          float* to = sums_of_warp(given.of, given.grads.sums, group, tile_token) +
                      half * kScoreHalf + 32 * v;
#pragma unroll
          for (int b = 0; b < 4; ++b) {
            token_rows.write_sums(grads[0][b], grads[1][b], to + 8 * b);
          }
        }
      }
      const TokenLines of_tokens(sums, moments, width);
      if (tile_token < given.of.tokens && thread_again() % 4 == 0) {
        float2* to = given.lines + static_cast<int64_t>(group) * given.of.tokens + tile_token +
                     token_of_lane();
        to[0] = {of_tokens.constant[0], of_tokens.slope[0]};
        to[8] = {of_tokens.constant[1], of_tokens.slope[1]};
      }
    }
  }
  cluster_wait();
}

}  // namespace snapkernels
