// The gradients of the stem's weights: one pass over the gradient of the tokens.
//
// With W_c and b_c the weights less their mean over D, g the gradient of token t, x its features
// and xhat = rstd x, LayerNorm's gradient needs two sums over a token's columns,
//
//   c1 = mean_d(g norm_weight),  c2 = (H . xhat + rstd e) / D,
//   H = (g norm_weight) W_c,  e = sum_d(g norm_weight b_c),
//
// before a product with them can begin, and no block has a token's columns. But all that follows
// is linear in c1 and c2. So blocks share nothing: one has a slice of 256 columns of a range of
// tokens, leaves sum_t g xhat^T for it, its share of c1 and c2, and what needs no more than g: the
// gradients of positions and norm_bias. stem_features.cuh makes xhat before, for all slices, and
// the kernels of stem_backward_finish.cuh the rest after.
//
// Tokens come in the order k = position (B G) + video and group: the tokens of a position follow
// one another, and a range has whole positions.
//
// A block is a warpgroup that fills stages, each of 64 tokens, and two that multiply, each with 128
// columns. A stage has g as it lies in memory, [token][d], and xhat as [feature][token] with eight
// more rows: rstd as two bfloat16, and for six positions in turn which tokens are theirs. From it a
// warpgroup makes
// - sum_t g [xhat, rstd, positions]^T: K is tokens. 104 registers for 96 features, for as long as
//   the block lives; the column of a position leaves and is cleared when the position is complete.
// - g [norm_weight W_c, norm_weight b_c, norm_weight, 1]: K is columns. 52 registers, contracted
//   with xhat while the other product runs.
// The tensor cores take 1,700 cycles for 64 tokens, shared memory 1,900, device memory 2,500.
#pragma once

#include "stem/stem_features.cuh"

namespace snapkernels {

constexpr int kBackwardStages = 4;         // of g: three under way are 96 KB, 4 us of device memory
constexpr int kBackwardLate = 2;           // stages under way when an older one is handed on
constexpr int kXhatStages = 3;             // a fourth would not fit, and xhat comes from L2
constexpr int kBackwardThreads = 384;      // 168 registers each, 64,512 in all, shared out anew
constexpr int kBackwardMultipliers = 256;  // threads of them that multiply
constexpr int kFillerRegisters = 40;       // with two of the others 504, three times 168
constexpr int kMultiplierRegisters = 232;  // 104 and 52 accumulators, 26 for what rounding added

// Shared memory of a block, in bytes from its begin.
template <int kChannels>
struct StemBackwardShared {
  using Xhat = StemXhat<kChannels>;
  static constexpr int kFeatures = Xhat::kFeatures, kColumns = Xhat::kColumns;
  static constexpr int kBlocks = Xhat::kBlocks;
  static constexpr int kGradBlock = kBackwardTokens * kMatrixRow;  // 64 columns of a stage
  static constexpr int kGrad = kStemSlice / 64 * kGradBlock;       // a stage of g
  static constexpr int kMatrix = Xhat::kMatrix;  // a stage of xhat, or 64 d of the weights
  static constexpr int kXhat = kBackwardStages * kGrad;
  // [norm_weight W_c, ..], as [64 d][column].
  static constexpr int kScaled = kXhat + kXhatStages * kMatrix;
  static constexpr int kMeans = kScaled + kStemSlice / 64 * kMatrix;  // of W and bias over D
  static constexpr int kLost = kMeans + kColumns * 4;  // mean of 128 d: what rounding added
  static constexpr int kParts = kLost + kStemSlice / kStemHalf * kColumns * 4;
  static constexpr int kBarriers = kParts + kBackwardMultipliers / 32 * kColumns * 4;
  static constexpr int kBytes = kBarriers + 2 * kBackwardStages * 8;
  static_assert(kBackwardStages == kXhatStages + 1 && kBarriers % 8 == 0 && kBytes <= 232448);
};

// What a block does: 256 columns of a range. Its slices run together, and find its xhat in L2.
struct StemShare : StemRange {
  int slice;

  __device__ explicit StemShare(const StemBackwardMap& m, int ranges)
      : StemRange(m, ranges, blockIdx.x / m.slices), slice(blockIdx.x - range * m.slices) {}
};

// Stages

// 64 tokens of the gradient, a warp a row at a time. Tokens past the last are zeros.
__device__ inline void copy_grad(const StemBackwardMap& m, const StemBackwardArguments& given,
                                 const StemShare& of, uint32_t k, int warp, int lane,
                                 uint32_t stage, uint64_t passing) {
  const int64_t width = m.at.token_width * 2, next_video = m.positions * width;  // bytes
  const uint32_t position = m.alike.quotient(k + warp);
  uint32_t video = k + warp - position * m.alike.divisor;
  const char* from = static_cast<const char*>(given.grad) + video * next_video + position * width +
                     of.slice * kStemSlice * 2 + lane * 16;
  const uint32_t to = stage + lane / 8 * (kBackwardTokens * kMatrixRow);
  int left = of.last - k - warp;  // may be none
  uint32_t even = to + swizzled(warp, lane % 8), odd = to + swizzled(warp + 4, lane % 8);
  asm volatile("" : "+r"(left), "+r"(even), "+r"(odd));  // or 16 of each stay in registers
#pragma unroll
  for (int i = 0; i < kBackwardTokens / 4; ++i) {
    copy_to_shared((i % 2 ? odd : even) + i / 2 * (8 * kMatrixRow), from, 4 * i < left, passing);
    from += 4 * next_video;
    video += 4;
    if (video >= m.alike.divisor) {
      video -= m.alike.divisor;
      from += width - m.alike.divisor * next_video;
    }
  }
}

// The filling warpgroup. It publishes what it copied, two stages later: it has time for the fence.
// The gradient is asked for before the features of the kernel before are there.
template <int kChannels>
__device__ void fill_stages(const StemBackwardMap& m, const StemBackwardArguments& given,
                            const StemShare& of, int warp, int lane, uint32_t base) {
  using Shared = StemBackwardShared<kChannels>;
  const uint32_t full = base + Shared::kBarriers, empty = full + kBackwardStages * 8;
  const uint64_t passing = first_to_leave(), shared_by_slices = stays();
  const int early = min(of.tiles, kBackwardLate);
  const unsigned char* matrix = Shared::Xhat::matrix(given, of.range, 0);
  uint32_t k = of.first;
  int stage = 0, parity = 1, xhat_stage = 0;
  const auto fetch_xhat = [&](int of_stage) {
    phase_expect(full + of_stage * 8, Shared::kMatrix);
    copy_bulk(base + Shared::kXhat + xhat_stage * Shared::kMatrix, matrix, Shared::kMatrix,
              full + of_stage * 8, shared_by_slices);
    matrix += Shared::kMatrix;
    if (++xhat_stage == kXhatStages) xhat_stage = 0;
  };
  for (int tile = 0; tile < of.tiles + kBackwardLate; ++tile, k += kBackwardTokens) {
    const int now = stage;
    if (tile < of.tiles) {
      phase_wait(empty + now * 8, parity);
      copy_grad(m, given, of, k, warp, lane, base + now * Shared::kGrad, passing);
    }
    copies_commit();  // of nothing, after the last tile
    if (++stage == kBackwardStages) stage = 0, parity ^= 1;
    if (tile >= kBackwardLate) {
      copies_wait<kBackwardLate>();
      publish();
      phase_arrive(full + (now + kBackwardStages - kBackwardLate) % kBackwardStages * 8);
    }
    if (warp == 0 && lane == 0 && tile + 1 >= early && tile < of.tiles) {
      if (tile + 1 == early) {
        kernel_before_done();
        next_kernel_may_start();
        for (int which = 0; which < now; ++which) fetch_xhat(which);
      }
      // The next stage of g was last used with this one of xhat.
      phase_wait(empty + stage * 8, parity);
      fetch_xhat(now);
    }
    __syncwarp();  // the next row is one request of all lanes
  }
}

// Products

// One of 2 kStep values of this lane's becomes the sum over lanes that differ in bits of kStep and
// below: in v[0], which one as those bits say. So 15 shuffles add 16 values, where one takes four.
template <int kStep>
__device__ inline void add_halving(float* v, int lane) {
  const bool upper = lane & kStep;
#pragma unroll
  for (int i = 0; i < kStep; ++i) {
    const float kept = upper ? v[i + kStep] : v[i], sent = upper ? v[i] : v[i + kStep];
    v[i] = kept + __shfl_xor_sync(~0u, sent, kStep);
  }
  if constexpr (kStep > 1) add_halving<kStep / 2>(v, lane);
}

// The slice's [norm_weight W_c, norm_weight b_c twice, norm_weight, 1, zeros] as [column][d], and
// the mean over 128 d of what rounding it added to each column. A gradient that is far from zero on
// average is nearly cancelled by c1; its mean then goes without that error.
template <int kChannels>
__device__ void share_scaled(const StemBackwardMap& m, const StemBackwardArguments& given,
                             const StemShare& of, int thread, unsigned char* shared) {
  using Shared = StemBackwardShared<kChannels>;
  constexpr int kFeatures = Shared::kFeatures, kColumns = Shared::kColumns;
  constexpr int kVectors = kFeatures / 8, kRows = kBackwardMultipliers / kVectors;
  const int warp = thread / 32, lane = thread % 32, width = m.at.token_width;
  float* const means = reinterpret_cast<float*>(shared + Shared::kMeans);
  float* const lost = reinterpret_cast<float*>(shared + Shared::kLost);
  float* const parts = reinterpret_cast<float*>(shared + Shared::kParts);  // [warp][column]
  float* const rows = reinterpret_cast<float*>(shared + Shared::kScaled);  // [row][feature], now
  const uint4* const weight = static_cast<const uint4*>(given.weight);
  const uint16_t* const bias = static_cast<const uint16_t*>(given.bias);
  const int d = of.slice * kStemSlice + thread;  // its row of W is under way from here on
  uint4 own[kVectors];
#pragma unroll
  for (int i = 0; i < kVectors; ++i) own[i] = weight[d * kVectors + i];

  // The means over all of D: 196 KB of L2's.
  if (thread < kRows * kVectors) {
    float sum[8] = {};
#pragma unroll 16
    for (int row = thread / kVectors; row < width; row += kRows) {
      uint4 some = weight[row * kVectors + thread % kVectors];
#pragma unroll
      for (int p = 0; p < 4; ++p) {
        sum[2 * p] += bf16_low(word(some, p));
        sum[2 * p + 1] += bf16_high(word(some, p));
      }
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) rows[thread * 8 + i] = sum[i];
  }
  float of_bias = 0.f;
#pragma unroll 4
  for (int i = thread; i < width; i += kBackwardMultipliers) of_bias += bf16_low(bias[i]);
#pragma unroll
  for (int other = 1; other < 32; other *= 2) of_bias += __shfl_xor_sync(~0u, of_bias, other);
  if (lane == 0) parts[warp] = of_bias;
  barrier_wait(1, kBackwardMultipliers);
  if (thread <= kFeatures) {
    const int count = thread < kFeatures ? kRows : kBackwardMultipliers / 32;
    const float* const some = thread < kFeatures ? rows + thread : parts;
    const int apart = thread < kFeatures ? kFeatures : 1;
    float sum = 0.f;
    for (int i = 0; i < count; ++i) sum += some[i * apart];
    means[thread] = sum * m.share;
    if (blockIdx.x == 0) given.means[thread] = sum * m.share;
  }
  barrier_wait(1, kBackwardMultipliers);

  // One column of D a thread.
  unsigned char* const block = shared + Shared::kScaled + thread / 64 * Shared::kMatrix;
  const auto at = [&](int column) -> uint16_t& {
    unsigned char* const eight = block + swizzled(column, thread % 64 / 8);
    return reinterpret_cast<uint16_t*>(eight)[thread % 8];
  };
  const uint16_t gain_bits = static_cast<const uint16_t*>(given.norm_weight)[d];
  const float gain = bf16_low(gain_bits);
  const auto round_to = [&](int column, float exact) {
    const uint32_t rounded = bf16_pair(exact, 0.f);
    at(column) = rounded;
    return bf16_low(rounded) - exact;
  };
#pragma unroll
  for (int c = 0; c < kChannels; ++c) {
    float off[16];
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      const uint32_t pair = word(own[c * 2 + i / 8], i % 8 / 2);
      const float value = i % 2 ? bf16_high(pair) : bf16_low(pair);
      off[i] = round_to(c * 16 + i, gain * (value - means[c * 16 + i]));
    }
    add_halving<8>(off, lane);
    off[0] += __shfl_xor_sync(~0u, off[0], 16);
    if (lane < 16) parts[warp * kColumns + c * 16 + lane] = off[0];
  }
  const float exact = gain * (bf16_low(bias[d]) - means[kFeatures]);
  float off = round_to(kFeatures, exact);
  round_to(kFeatures + 1, exact);
  at(kFeatures + 2) = gain_bits;
  at(kFeatures + 3) = 0x3f80;  // 1
#pragma unroll
  for (int i = 4; i < kStemExtra; ++i) at(kFeatures + i) = 0;
#pragma unroll
  for (int other = 1; other < 32; other *= 2) off += __shfl_xor_sync(~0u, off, other);
  if (lane < kStemExtra) parts[warp * kColumns + kFeatures + lane] = lane < 2 ? off : 0.f;
  barrier_wait(1, kBackwardMultipliers);
  if (thread < 2 * kColumns) {
    const int half = thread / kColumns;
    const float* const some = parts + (half * 4 - half) * kColumns + thread;
    lost[thread] = (some[0] + some[kColumns] + some[2 * kColumns] + some[3 * kColumns]) / kStemHalf;
  }
  publish();
  barrier_wait(1, kBackwardMultipliers);
}

// This lane's part of a token's c1 and c2, of 128 columns: H of tokens r and r + 8 and xhat.
template <int kBlocks>
__device__ void contract(const Accumulators<kBlocks>& h, uint32_t matrix,
                         const float2 (&lost)[kBlocks], int warp, int lane,
                         float2 (&coefficients)[2]) {
  const int q = lane % 4;
  float dot[2] = {}, of_lost[2] = {};
  const auto add = [&](int j, const uint32_t* x) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float low = bf16_low(x[half]), high = bf16_high(x[half]);
      dot[half] = fmaf(h[j][2 * half], low, fmaf(h[j][2 * half + 1], high, dot[half]));
      of_lost[half] = fmaf(lost[j].x, low, fmaf(lost[j].y, high, of_lost[half]));
    }
  };
  // Tokens 16 warp + (0 .. 7), then + (8 .. 15), of eight features, and of the next eight.
  const uint32_t from = matrix + swizzled(lane % 8, 2 * warp + lane / 8 % 2);
#pragma unroll
  for (int j = 0; j + 1 < kBlocks; j += 2) {
    uint32_t x[4];
    load_transposed(x, from + (j + lane / 16) * (8 * kMatrixRow));
    add(j, x);
    add(j + 1, x + 2);
  }
  uint32_t x[2];  // rstd: q = 0
  load_transposed(x, from + (kBlocks - 1) * (8 * kMatrixRow));
  if (q != 0) x[0] = x[1] = 0;
  add(kBlocks - 1, x);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int other = 1; other < 4; other *= 2) {
      dot[half] += __shfl_xor_sync(~0u, dot[half], other);
      of_lost[half] += __shfl_xor_sync(~0u, of_lost[half], other);
    }
    // Of q = 1: the sums of g norm_weight and of g.
    const float c1 = h[kBlocks - 1][2 * half], total = h[kBlocks - 1][2 * half + 1];
    coefficients[half] = {c1, dot[half] - total * of_lost[half]};
  }
}

// A multiplying warpgroup.
template <int kChannels>
__device__ void multiply_stages(const StemBackwardMap& m, const StemBackwardArguments& given,
                                const StemShare& of, int warpgroup, int warp, int lane,
                                unsigned char* shared) {
  using Shared = StemBackwardShared<kChannels>;
  constexpr int kBlocks = Shared::kBlocks, kLast = kBlocks - 1;
  const int r = lane / 4, q = lane % 4;
  const uint32_t base = shared_address(shared);
  const uint32_t full = base + Shared::kBarriers, empty = full + kBackwardStages * 8;
  const uint64_t scaled_view =
      matrix_view(base + Shared::kScaled + warpgroup * 2 * Shared::kMatrix);
  float2 lost[kBlocks];  // of the lane's columns of H
#pragma unroll
  for (int j = 0; j < kBlocks; ++j)
    lost[j] = reinterpret_cast<const float2*>(
        shared + Shared::kLost)[(warpgroup * Shared::kColumns + 8 * j) / 2 + q];
  const int row = 16 * warp + r;
  // Of the block's 64 columns i, and half of the lane's two: d + 64 i + 8 half.
  const int d = of.slice * kStemSlice + warpgroup * kStemHalf + row;
  const int parts = 2 * m.slices;
  float2* coefficients = reinterpret_cast<float2*>(given.coefficients) +
                         (static_cast<int64_t>(of.range) * given.tiles * parts + of.slice * 2 +
                          warpgroup) * kBackwardTokens + row;
  uint16_t* d_positions = static_cast<uint16_t*>(given.d_positions) +
                          static_cast<int64_t>(of.position) * m.at.token_width + d;

  Accumulators<kBlocks> product[2] = {};
  float norm_bias[2][2] = {};
  uint32_t complete = 0;
  int slot = 0, stage = 0, parity = 0, xhat_stage = 0;
  for (int tile = 0; tile < of.tiles; ++tile) {
    const uint32_t xhat = base + Shared::kXhat + xhat_stage * Shared::kMatrix;
    const uint64_t grad_view =
        matrix_view(base + stage * Shared::kGrad + warpgroup * 2 * Shared::kGradBlock);
    const uint64_t xhat_view = matrix_view(xhat);
    phase_wait(full + stage * 8, parity);
    Accumulators<kBlocks> h;
    multiply_fence();
#pragma unroll
    for (int step = 0; step < kStemHalf / 16; ++step) {
      const int in_block = step % 4 * 32;
      const uint64_t a = further(grad_view, step / 4 * Shared::kGradBlock + in_block);
      const uint64_t b = further(scaled_view, step / 4 * Shared::kMatrix + in_block);
      if (step == 0)
        multiply<false, false>(h, a, b);
      else
        multiply<false, true>(h, a, b);
    }
    multiply_commit();
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int step = 0; step < kBackwardTokens / 16; ++step)
        multiply<true, true>(product[i],
                             further(grad_view, i * Shared::kGradBlock + step * 16 * kMatrixRow),
                             further(xhat_view, step * 32));
    }
    multiply_commit();

    multiply_wait<1>();
    settle<kBlocks>(h);
    float2 made[2];
    contract<kBlocks>(h, xhat, lost, warp, lane, made);
    if (q == 1) {  // zeros of a token past the last
      coefficients[0] = made[0];
      coefficients[8] = made[1];
    }
    coefficients += parts * kBackwardTokens;
    multiply_wait<0>();
    settle<kBlocks>(product[0]);
    settle<kBlocks>(product[1]);
    __syncwarp();
    if (lane == 0) phase_arrive(empty + stage * 8);
    if (++stage == kBackwardStages) stage = 0, parity ^= 1;
    if (++xhat_stage == kXhatStages) xhat_stage = 0;

    // Positions without a token after this tile.
    const uint32_t done = min((tile + 1) * kBackwardTokens, of.last - of.first);
    for (const uint32_t now = m.alike.quotient(done); complete < now;
         ++complete, d_positions += m.at.token_width) {
      if (q == slot / 2 + 1) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            float &even = product[i][kLast][2 * half], &odd = product[i][kLast][2 * half + 1];
            const float sum = slot % 2 ? odd : even;
            d_positions[64 * i + 8 * half] = bf16_pair(sum, 0.f);
            norm_bias[i][half] += sum;
            even = slot % 2 ? even : 0.f;
            odd = slot % 2 ? 0.f : odd;
          }
        }
      }
      if (++slot == kBackwardSlots) slot = 0;
    }
  }

  // The sums over the range; after rstd's two columns norm_bias'.
#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float sum = norm_bias[i][half];
      sum += __shfl_xor_sync(~0u, sum, 1);
      sum += __shfl_xor_sync(~0u, sum, 2);
      if (q == 1) product[i][kLast][2 * half] = sum;
      const int64_t line =
          static_cast<int64_t>(of.range) * m.at.token_width + d + 64 * i + 8 * half;
      float2* const to = reinterpret_cast<float2*>(given.products + line * Shared::kColumns) + q;
#pragma unroll
      for (int j = 0; j < kBlocks; ++j)
        to[4 * j] = {product[i][j][2 * half], product[i][j][2 * half + 1]};
    }
  }
}

template <int kChannels>
__global__ void __launch_bounds__(kBackwardThreads, 1)
    stem_backward_kernel(const __grid_constant__ StemBackwardMap m,
                         const __grid_constant__ StemBackwardArguments given) {
  using Shared = StemBackwardShared<kChannels>;
  extern __shared__ __align__(1024) unsigned char stages[];
  const int lane = threadIdx.x % 32;
  // Shuffled to be known as a warp's: its addresses are in uniform registers.
  const int of_block = __shfl_sync(~0u, static_cast<int>(threadIdx.x / 32), 0);
  const int warp = of_block % 4, warpgroup = of_block / 4;
  const StemShare of(m, given.ranges);
  if (threadIdx.x == 0) {
    const uint32_t full = shared_address(stages) + Shared::kBarriers;
    for (int stage = 0; stage < kBackwardStages; ++stage) {
      // The filling threads, and the copy of xhat.
      phase_begin(full + stage * 8, kBackwardThreads - kBackwardMultipliers + 1);
      phase_begin(full + (kBackwardStages + stage) * 8, kBackwardMultipliers / 32);
    }
    publish();
  }
  __syncthreads();
  if (warpgroup == 2) {
    registers_shrink<kFillerRegisters>();
    fill_stages<kChannels>(m, given, of, warp, lane, shared_address(stages));
  } else {
    registers_grow<kMultiplierRegisters>();
    share_scaled<kChannels>(m, given, of, threadIdx.x, stages);
    multiply_stages<kChannels>(m, given, of, warpgroup, warp, lane, stages);
  }
}

}  // namespace snapkernels
