// group_write's backward over the patches, in one pass: dP = W dy^T, dS, dx.
//
// As in group_write.cuh a warpgroup has 64 tokens, and half of the heads at a time. P, which the
// forward kept, goes to registers and becomes dS, the left side of the last products, with A. dS
// also goes to memory for the sum over tokens that the gradient of A is. The last products' tiles
// of x and dy come through the ring as well. The two warps that copy nothing sum dy, for the bias
// of the output.
#pragma once

#include "group_attn/score_grads.cuh"

namespace snapkernels {

constexpr int kSumWarps = 2;
constexpr int kWriteBackwardSums = TokenRings::bytes<float2>();
constexpr int kWriteBackwardMoments = kWriteBackwardSums + LaneSums::kBytes;
constexpr int kWriteBackwardShared = kWriteBackwardMoments + WarpMoments::kBytes;
static_assert(kHeldChannels == 2 * kScoreStep);

// By one of two warps: the sums over the tokens of a tile of 16 channels from chunk `chunk` on. Not
// by the tensor cores, which the products keep busy.
__device__ inline void sum_tokens(uint32_t tile, int chunk, float* sums_of_tile) {
  const uint32_t lane = thread_again() % 32;
  uint32_t place = tile + swizzled(lane % 8 + lane / 16 * 8, chunk + lane / 8 % 2);
  float sums[8] = {};
#pragma unroll 1
  for (const uint32_t end = place + kTileBytes; place < end; place += 16 * kMatrixRow) {
    const uint4 loaded = load_vector(place);
    const uint32_t pairs[4] = {loaded.x, loaded.y, loaded.z, loaded.w};
#pragma unroll
    for (int pair = 0; pair < 4; ++pair) {
      sums[2 * pair] += bf16_low(pairs[pair]);
      sums[2 * pair + 1] += bf16_high(pairs[pair]);
    }
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) {
#pragma unroll
    for (int other : {1, 2, 4, 16}) sums[i] += __shfl_xor_sync(~0u, sums[i], other);
  }
  const uint32_t again = thread_again() % 32;
  if (again % 8 == 0 && again < 16) {
    auto* four = reinterpret_cast<float4*>(sums_of_tile + 8 * chunk + again);
    four[0] = make_float4(sums[0], sums[1], sums[2], sums[3]);
    four[1] = make_float4(sums[4], sums[5], sums[6], sums[7]);
  }
}

// As write_half wrote it; zeros beyond the tokens.
__device__ inline void load_half(HalfWeights& weights, const void* all, int half,
                                 const GroupArguments& of, int group, int tile_token) {
  const int left = of.tokens - tile_token - token_of_lane();
  const auto* from = static_cast<const uint4*>(all) + weights_of_lane(of, group, tile_token) +
                     half * kScoreHalf / 8;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (int v = 0; v < kScoreHalf / 32; ++v) {
      uint4 four = make_uint4(0, 0, 0, 0);
      if (8 * i < left) four = load_ahead(from + i * 8 * (kGroupColumns / 8) + 4 * v);
      weights[2 * v][i] = four.x;
      weights[2 * v][2 + i] = four.y;
      weights[2 * v + 1][i] = four.z;
      weights[2 * v + 1][2 + i] = four.w;
    }
  }
}

// dS of a head of a half, in place of P, from dP; what a lane adds to the sums of its tokens.
template <int kLatents>
__device__ inline void grads_of_head(HalfWeights& weights, const Scores& products, int head,
                                     const WarpMoments& of_warp, const float2* lines,
                                     const LaneSums& sums) {
  constexpr int kBlocks = kLatents / 8;
  float delta[2] = {0, 0}, total[2] = {0, 0};
#pragma unroll
  for (int block = head * kBlocks; block < (head + 1) * kBlocks; ++block) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float* product = products[block] + 2 * i;
      const uint32_t weight = weights[block / 2][2 * (block % 2) + i];
      delta[i] = fmaf(bf16_low(weight), product[0], fmaf(bf16_high(weight), product[1], delta[i]));
      total[i] += bf16_low(weight) + bf16_high(weight);
    }
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {  // by the total of P as it is rounded: so dS adds up to 0
    delta[i] = over_row(delta[i]) * reciprocal_fast(fmaxf(over_row(total[i]), 1e-30f));
  }
  TokenTotals totals = sums.get();
  const Moments moments = of_warp.get();
#pragma unroll
  for (int block = head * kBlocks; block < (head + 1) * kBlocks; ++block) {
    const float4 two = load_line(shared_address(lines + 8 * block + 2 * (thread_again() % 4)));
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float* product = products[block] + 2 * i;
      uint32_t& weight = weights[block / 2][2 * (block % 2) + i];
      const float factor = kLog2 * moments.rstd[i];
      const float low = bf16_low(weight) * (product[0] - delta[i]) * factor;
      const float high = bf16_high(weight) * (product[1] - delta[i]) * factor;
      float& of_product = totals.product[i];
      of_product = fmaf(low, log2_fast(bf16_low(weight)) - two.y, of_product);
      of_product = fmaf(high, log2_fast(bf16_high(weight)) - two.w, of_product);
      weight = bf16_pair(low, high);
      totals.u[i] = fmaf(bf16_low(weight), two.x, fmaf(bf16_high(weight), two.z, totals.u[i]));
    }
  }
  sums.set(totals);
}

// By the warpgroup that copies: what each half of dP takes, then the channels of dx.
__device__ inline void copy_and_sum(TokenRings& rings, const CUtensorMap* patches,
                                    const CUtensorMap* grad, const CUtensorMap* absorbed,
                                    const CUtensorMap* values,
                                    const GroupWriteBackwardArguments& given,
                                    const ScoreWork& work) {
  const int warp = threadIdx.x / 32, width = given.of.width, rank = rank_in_cluster();
  if (threadIdx.x == 0) {
#pragma unroll 1
    for (int item = work.first(); item < work.items; item += work.step()) {
      const int group = work.group(item), token = work.token(item, rank);
#pragma unroll 1
      for (int half = 0; half < 2; ++half) {
#pragma unroll 1
        for (int channel = 0; channel < width; channel += kScoreStep) {
          copy_tile(rings.tiles, grad, channel, token, group);
        }
      }
#pragma unroll 1
      for (int channel = 0; channel < width; channel += kScoreStep) {
        copy_tile(rings.tiles, patches, channel, token, group, first_to_leave());
        copy_tile(rings.tiles, grad, channel, token, group, first_to_leave());
      }
    }
  } else if (threadIdx.x == 32) {
#pragma unroll 1
    for (int item = work.first(); item < work.items; item += work.step()) {
      const int group = work.group(item), row = rank * kScoreHalf / 2;
#pragma unroll 1
      for (int half = 0; half < 2; ++half) {
#pragma unroll 1
        for (int channel = 0; channel < width; channel += kScoreStep) {
          copy_piece(rings.slots, values, rank, channel, half * kScoreHalf + row, group);
        }
      }
#pragma unroll 1
      for (int channel = 0; channel < width; channel += kHeldChannels) {
#pragma unroll 1
        for (int column = 0; column < kGroupColumns; column += kHeldStep) {
          copy_piece(rings.slots, absorbed, rank, channel + rank * 64, column, group);
        }
      }
    }
  } else if (warp >= 4 - kSumWarps) {
    const int tiles = (given.of.tokens + kScoreTokens - 1) / kScoreTokens;
#pragma unroll 1
    for (int item = work.first(); item < work.items; item += work.step()) {
      const int tile = work.token(item, rank) / kScoreTokens;
#pragma unroll 1
      for (int pass = 0; pass < 4; ++pass) {  // dP's two, of which each sums a half, and dx's
#pragma unroll 1
        for (int channel = 0; channel < width; channel += kScoreStep) {
          rings.tiles.wait_full();
          if (pass < 2 && tile < tiles) {
            const int64_t row = static_cast<int64_t>(work.group(item)) * tiles + tile;
            sum_tokens(rings.tiles.place(), 4 * pass + 2 * (warp % 2),
                       given.grad_sums + row * width + channel);
          }
          __syncwarp();
          if (threadIdx.x % 32 == 0) phase_arrive(rings.tiles.free());
          rings.tiles.next();
        }
      }
    }
  }
}

// 128 channels of dx: sum of dS A, with what LayerNorm's backward and the residual add.
__device__ inline void write_patches(const Accumulators<16>& sum, const TokenLines& lines,
                                     TokenRings& rings, const GroupArguments& of, void* all,
                                     int group, int tile_token, int channel) {
  const int lane = thread_again() % 32, row = token_of_lane(), row_vectors = of.width / 8;
  const int64_t token = static_cast<int64_t>(group) * of.tokens + tile_token + row;
  auto* out = static_cast<uint4*>(all) + token * row_vectors + channel / 8 + lane % 4;
#pragma unroll
  for (int part = 0; part < 2; ++part) {
    auto of_grad = rings.tiles;
    of_grad.next();
    rings.tiles.wait_full();
    of_grad.wait_full();
#pragma unroll
    for (int v = 0; v < 2; ++v) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        uint32_t news[4];
#pragma unroll
        for (int b = 0; b < 4; ++b) {
          const uint32_t at = swizzled(row + 8 * i, 4 * v + b) + 4 * (lane % 4);
          const uint32_t dy = load_pair(of_grad.place() + at);
          const float2 two = with_line(sum[4 * (2 * part + v) + b] + 2 * i,
                                       load_pair(rings.tiles.place() + at), lines.constant[i],
                                       lines.slope[i]);
          news[b] = bf16_pair(two.x + bf16_low(dy), two.y + bf16_high(dy));
        }
        const uint4 vector = exchanged(make_uint4(news[0], news[1], news[2], news[3]));
        if (tile_token + row + 8 * i < of.tokens) {
          store_once(out + 8 * i * row_vectors + 4 * (2 * part + v), vector);
        }
      }
    }
    __syncwarp();
    if (lane == 0) {
      phase_arrive(rings.tiles.free());
      phase_arrive(of_grad.free());
    }
    rings.tiles.next();
    rings.tiles.next();
  }
}

template <int kLatents>
__global__ void __launch_bounds__(kScoreThreads, 1)
    group_write_backward_kernel(const __grid_constant__ CUtensorMap patches,
                                const __grid_constant__ CUtensorMap grad,
                                const __grid_constant__ CUtensorMap absorbed,
                                const __grid_constant__ CUtensorMap values,
                                GroupWriteBackwardArguments given) {
  extern __shared__ __align__(1024) uint8_t shared[];
  const uint32_t base = shared_address(shared);
  const ScoreWork work(given.of);
  const int width = given.of.width;
  TokenRings rings(base);
  if (threadIdx.x == 0) {
    rings.tiles.begin(1, 4 * kScoreConsumers + kSumWarps);   // each warp has read it
    rings.slots.begin(1, kScoreConsumers * kClusterBlocks);  // a thread of each warpgroup
    phases_begun();
  }
  __syncthreads();
  cluster_wait();
  after_kernel_before();

  if (threadIdx.x < 128) {
    registers_shrink<kCopierRegisters>();
    copy_and_sum(rings, &patches, &grad, &absorbed, &values, given, work);
  } else {
    registers_grow<kScoreRegisters>();
    const int thread = threadIdx.x % 128;
    const int warpgroup = threadIdx.x / 128 - 1;
    auto* lines = reinterpret_cast<float2*>(shared + TokenRings::kLinesAt) +
                  warpgroup * kGroupColumns;
    const LaneSums sums(base + kWriteBackwardSums);
    const WarpMoments of_warp(base + kWriteBackwardMoments);
    for (int item = work.first(); item < work.items; item += work.step()) {
      const int group = work.group(item), tile_token = work.token(item, rank_in_cluster());
      barrier_wait(1 + warpgroup, 128);  // the lines of the item before are read
#pragma unroll
      for (int column = thread; column < kGroupColumns; column += 128) {
        const int of_all = group * kGroupColumns + column;
        lines[column] = {given.of.absorbed_sum[of_all], given.score_bias[of_all]};
      }
      barrier_wait(1 + warpgroup, 128);
      HalfWeights weights[2];  // which become dS
      of_warp.set(load_moments(given.of, given.grads, group, tile_token));
      sums.set({});
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        load_half(weights[half], given.grads.weights, half, given.of, group, tile_token);
        Scores products[1];
        TokenSums nothing;
        make_scores<false>(products, nothing, rings, width);
#pragma unroll
        for (int head = 0; head < kScoreHalf / kLatents; ++head) {
          grads_of_head<kLatents>(weights[half], products[0], head, of_warp,
                                  lines + half * kScoreHalf, sums);
        }
        write_half(weights[half], given.grads.score_grads, half, given.of, group, tile_token);
        if (tile_token < given.of.tokens) {
          const TokenRows rows(of_warp);
          float* to = sums_of_warp(given.of, given.grads.sums, group, tile_token) +
                      half * kScoreHalf;
#pragma unroll
          for (int v = 0; v < kScoreHalf / 32; ++v) {
            uint32_t grads[2][4];
#pragma unroll
            for (int b = 0; b < 4; ++b) {
#pragma unroll
              for (int i = 0; i < 2; ++i) {
                grads[i][b] = weights[half][2 * v + b / 2][2 * (b % 2) + i];
              }
            }
            rows.write_sums(grads, to + 32 * v);
          }
        }
      }
      const TokenLines of_tokens(sums, of_warp, width);
#pragma unroll 1
      for (int channel = 0; channel < width; channel += kHeldChannels) {
        Accumulators<16> sum;
        clear(sum);
        add_held(sum, weights, rings, thread);
        write_patches(sum, of_tokens, rings, given.of, given.grads.out, group, tile_token,
                      channel);
      }
    }
  }
  cluster_wait();
}

}  // namespace snapkernels
