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
constexpr int kReadGradsMoments = kReadGradsSums + LaneSums::kBytes;
constexpr int kReadGradsShared = kReadGradsMoments + WarpMoments::kBytes;

// P and dS of 16 columns from block `first` on, of both tokens, and their parts of the sums: since
// dP is dS / (ln(2) P) + delta, P dP + dS S is P delta + dS (S + 1 / ln(2)), S here less log_sum.
__device__ inline void make_grads(uint32_t (&weights)[2][4], uint32_t (&grads)[2][4],
                                  const Scores& scores, const Scores& products, int first,
                                  const WarpMoments& of_warp, uint32_t lines,
                                  const LaneSums& sums) {
  const uint32_t thread = thread_again();
  lines += sizeof(ReadLine) * ((thread / 128 - 1) * kGroupColumns + 2 * (thread % 4));
  TokenTotals totals = sums.get();
  const Moments moments = of_warp.get();
#pragma unroll
  for (int block = first; block < first + 2; ++block) {
    float weight[2][2], grad[2][2];
    float2 sums_of[2];  // of A, of W
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const float4 line = load_line(lines + sizeof(ReadLine) * (8 * block + e));
      const float delta = kLog2 * line.w, log_sum = line.z + 1 / kLog2;
      sums_of[e] = {line.x, line.y};
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float rstd = moments.rstd[i], slope = -moments.mean[i] * rstd;
        const float score = fmaf(scores[block][2 * i + e], rstd, fmaf(slope, line.x, -line.z));
        weight[i][e] = exp2_fast(score) * rstd;
        grad[i][e] = weight[i][e] * fmaf(products[block][2 * i + e], kLog2 * rstd,
                                         fmaf(kLog2 * slope, line.y, -delta));
        float& total = totals.product[i];
        total = fmaf(weight[i][e], line.w, total);
        total = fmaf(grad[i][e], score, fmaf(grad[i][e], log_sum, total));
      }
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      uint32_t &two = weights[i][block % 4], &two_grads = grads[i][block % 4];
      two = bf16_pair(weight[i][0], weight[i][1]);
      two_grads = bf16_pair(grad[i][0], grad[i][1]);
      float& total = totals.u[i];
      total = fmaf(bf16_low(two), sums_of[0].y, fmaf(bf16_low(two_grads), sums_of[0].x, total));
      total = fmaf(bf16_high(two), sums_of[1].y, fmaf(bf16_high(two_grads), sums_of[1].x, total));
    }
  }
  sums.set(totals);  // nothing of the next columns starts before
}

// 32 columns of both tokens.
__device__ inline void write_vectors(uint4* to, const uint32_t (&two)[2][4]) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    store_once(to + 8 * i * (kGroupColumns / 8),
               make_uint4(two[i][0], two[i][1], two[i][2], two[i][3]));
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
    rings.tiles.begin(1, 4 * kScoreConsumers);               // each warp
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
    const WarpMoments of_warp(base + kReadGradsMoments);
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
      of_warp.set(load_moments(given.of, given.grads, group, tile_token));
      sums.set({});
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        Scores both[2];  // with A, with W
        TokenSums nothing;
        make_scores<false>(both, nothing, rings, width);
        if (tile_token >= given.of.tokens) continue;
#pragma unroll
        for (int v = 0; v < kScoreHalf / 32; ++v) {
          uint32_t weights[2][4], grads[2][4];
#pragma unroll
          for (int first = 4 * v; first < 4 * v + 4; first += 2) {
            make_grads(weights, grads, both[0], both[1], first, of_warp,
                       base + TokenRings::kLinesAt + half * kScoreHalf * sizeof(ReadLine), sums);
          }
          const int64_t at = weights_of_lane(given.of, group, tile_token) +
                             half * kScoreHalf / 8 + 4 * v;
          write_vectors(static_cast<uint4*>(given.grads.weights) + at, weights);
          write_vectors(static_cast<uint4*>(given.grads.score_grads) + at, grads);
          const TokenRows token_rows(of_warp);  // again for every 32: registers are short
          token_rows.write_sums(grads, sums_of_warp(given.of, given.grads.sums, group, tile_token) +
                                           half * kScoreHalf + 32 * v);
        }
      }
      const TokenLines of_tokens(sums, of_warp, width);
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
