// The head: LayerNorm, the product with W, unpatchify, and what an end makes of the pixels.
//
// The tokens are 90 % of the bytes, so they go from device memory to registers and nowhere else. A
// unit, four warps, has 16 tokens; a warp has a quarter of their D columns, and W stays in shared
// memory. The order of K in a product is free: it is chosen so that the 16 bytes a lane loads are
// what it hands to the tensor cores.
//
// In a warp, lane = 4 r + q has tokens r and r + 8 of the unit's 16. Of vector v it has the columns
// 32 v + 8 q + (0 .. 7) of its warp's quarter: the K of two steps of mma.m16n8k16, in pairs
// (0 1)(2 3) and (4 5)(6 7). The same columns of rows 8 j + r of W are the other operand.
#pragma once

#include "divider.cuh"
#include "head/head.h"
#include "philox.cuh"

namespace snapkernels {

enum class HeadEnd { kF, kMix, kLoss };

// Of a block, which has a multiprocessor: one waits for its tokens while others calculate. They
// share no barrier once W is there.
constexpr int kHeadUnits = 4;
constexpr int kHeadWarps = 4;  // of a unit
constexpr int kHeadUnitThreads = kHeadWarps * 32;

struct HeadMap {
  HeadGeometry at;
  int tokens, tiles;
  int64_t video_pixels;  // of all channels and frames
  Divider group_tokens, groups, groups_h, groups_w, group_h, group_w;
};

// Shared memory of a block.
template <int kWidth, int kFeatures>
struct HeadShared {
  static constexpr int kSteps = kWidth / kHeadWarps / 16;  // of a warp's product
  // An odd number of 16 bytes more than a bank's turn: eight tokens' float4 are in eight places.
  static constexpr int kPitch = kFeatures + 4;

  struct Unit {
    float2 moments[kHeadTokens][kHeadWarps];  // mean and sum of squares around it, a quarter of D
    float features[kHeadWarps][kHeadTokens][kPitch];  // summed over a quarter of D
  };

  uint2 weight[kWidth / 16][kFeatures / 16][32][2];  // by step of the product, j / 2, lane, j % 2
  uint2 norm[kWidth / 4][2];                         // 4 columns of norm_weight, of norm_bias
  float bias[kFeatures];
  Unit units[kHeadUnits];
};

__device__ inline float bf16_low(uint32_t pair) { return __uint_as_float(pair << 16); }
__device__ inline float bf16_high(uint32_t pair) { return __uint_as_float(pair & 0xffff0000u); }

// The same by another instruction. The compiler knows these apart, and so unpacks a value again at
// its second use; it would hold 128 unpacked ones in between, and has registers for their 64 pairs.
__device__ inline float bf16_low_again(uint32_t pair) {
  return __uint_as_float(__byte_perm(pair, 0, 0x1044));
}
__device__ inline float bf16_high_again(uint32_t pair) {
  return __uint_as_float(__byte_perm(pair, 0, 0x3244));
}

__device__ inline uint32_t bf16_pair(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

// 16 bytes that are read once. Volatile: to be under way from here on, not from their first use.
__device__ inline void load_tokens(uint2& low, uint2& high, const uint4* source) {
  asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(low.x), "=r"(low.y), "=r"(high.x), "=r"(high.y)
               : "l"(source));
}

__device__ inline void copy_to_shared(uint2* target, const uint2* source) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"(
                   static_cast<uint32_t>(__cvta_generic_to_shared(target))),
               "l"(source)
               : "memory");
}

__device__ inline void unit_barrier(int unit) {  // barrier 0 is the block's
  asm volatile("bar.sync %0, %1;" ::"r"(unit + 1), "n"(kHeadUnitThreads) : "memory");
}

__device__ inline void multiply_add(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0,
                                    uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Mean, and sum of squares around it. Two sets of `count` values joined (Chan et al., 1979).
struct Moments {
  float mean, squares;

  __device__ static Moments join(Moments a, Moments b, float count) {
    const float apart = b.mean - a.mean;
    return {.5f * (a.mean + b.mean), (a.squares + b.squares) + apart * apart * (.5f * count)};
  }
};

// Moments of a lane's part of a token, in one pass over values less the first. That one is within
// sqrt(4 kSteps) = 8 deviations of the mean, so that the subtraction at the end costs 6 bits of 24
// at most, however large the mean.
template <int kSteps>
__device__ Moments moments_of(const uint2 (&values)[kSteps]) {
  const float first = bf16_low(values[0].x);
  float sum[2] = {}, squares[2] = {};
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    const uint32_t pairs[2] = {values[step].x, values[step].y};
#pragma unroll
    for (int p = 0; p < 2; ++p) {
      const float low = bf16_low(pairs[p]) - first, high = bf16_high(pairs[p]) - first;
      sum[0] += low;
      sum[1] += high;
      squares[0] = fmaf(low, low, squares[0]);
      squares[1] = fmaf(high, high, squares[1]);
    }
  }
  const float all = sum[0] + sum[1], mean = all * (1.f / (4 * kSteps));
  const float around = squares[0] + squares[1] - all * mean;
  return {first + mean, around < 0.f ? 0.f : around};  // fmaxf would lose a NaN
}

// LayerNorm's output for 2 columns of a token, in bfloat16 as a LayerNorm of its own would store.
__device__ inline uint32_t normalised(uint32_t x, float mean, float rstd, uint32_t weight,
                                      uint32_t bias) {
  const float low = (bf16_low_again(x) - mean) * rstd;
  const float high = (bf16_high_again(x) - mean) * rstd;
  return bf16_pair(fmaf(low, bf16_low(weight), bf16_low(bias)),
                   fmaf(high, bf16_high(weight), bf16_high(bias)));
}

__device__ inline float4 operator+(float4 a, float4 b) {
  return {a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w};
}
__device__ inline float4 operator*(float a, float4 b) {
  return {a * b.x, a * b.y, a * b.z, a * b.w};
}

// Where a token's patch lies.
struct PatchPlace {
  uint32_t b, t, y, x;  // y, x: of its first pixel

  __device__ PatchPlace(const HeadMap& m, uint32_t token) {
    const uint32_t bg = m.group_tokens.quotient(token), n = token - bg * m.group_tokens.divisor;
    b = m.groups.quotient(bg);
    const uint32_t g = bg - b * m.groups.divisor;
    const uint32_t g_row = m.groups_w.quotient(g), gw = g - g_row * m.groups_w.divisor;
    const uint32_t gt = m.groups_h.quotient(g_row), gh = g_row - gt * m.groups_h.divisor;
    const uint32_t n_row = m.group_w.quotient(n), nw = n - n_row * m.group_w.divisor;
    const uint32_t nt = m.group_h.quotient(n_row), nh = n_row - nt * m.group_h.divisor;
    t = gt * m.at.group_t + nt;
    y = (gh * m.group_h.divisor + nh) * kHeadPatch;
    x = (gw * m.group_w.divisor + nw) * kHeadPatch;
  }
};

__device__ inline float4 four(const float* pixels, int64_t offset) {
  return *reinterpret_cast<const float4*>(pixels + offset);
}

__device__ inline float4 mixed(const HeadArguments& given, uint32_t b, int64_t offset, float4 F) {
  const float* const mix = given.factors + 3 * b;
  float4 sum = mix[0] * F + mix[1] * four(given.video, offset);
  if (given.other != nullptr) sum = sum + mix[2] * four(given.other, offset);
  return sum;
}

// The loss of four pixels. `within` the video they are, so many pixels from its first.
__device__ inline float squares(const HeadArguments& given, uint32_t b, int64_t offset,
                                int64_t within, float4 F) {
  const float* const terms = given.factors + 3 * b;
  const uint2 key{static_cast<uint32_t>(given.seed), static_cast<uint32_t>(given.seed >> 32)};
  const float4 normals = philox_normals(key, static_cast<uint64_t>(within) / 4, given.sample[b]);
  const float4 target = terms[1] * four(given.video, offset) + terms[2] * normals;
  const float4 off = F + -1.f * target;
  return terms[0] * ((off.x * off.x + off.y * off.y) + (off.z * off.z + off.w * off.w));
}

// As many blocks as multiprocessors: W is fetched once for each. Units take every `units`-th tile.
template <HeadEnd kEnd, int kWidth, int kFeatures>
__global__ void __launch_bounds__(kHeadUnits * kHeadUnitThreads, 1)
    head_forward_kernel(const HeadMap m, const HeadArguments given) {
  using Shared = HeadShared<kWidth, kFeatures>;
  constexpr int kSteps = Shared::kSteps, kLaneValues = 4 * kSteps;
  constexpr int kTiles = kFeatures / 8;          // of 8 columns of the product
  constexpr int kRows = kFeatures / kHeadPatch;  // of pixels of a patch, in all channels
  extern __shared__ __align__(16) char shared_bytes[];
  Shared& shared = *reinterpret_cast<Shared*>(shared_bytes);

  const int lane = threadIdx.x % 32, r = lane / 4, q = lane % 4;
  const int warp = threadIdx.x / 32 % kHeadWarps, unit = threadIdx.x / kHeadUnitThreads;
  const int unit_thread = threadIdx.x % kHeadUnitThreads;
  typename Shared::Unit& own = shared.units[unit];
  // The last, partial round of tiles is spread over all blocks.
  const int units = gridDim.x * kHeadUnits, first_tile = unit * gridDim.x + blockIdx.x;

  // The tokens of a tile, where there is one. Past the last token a tile repeats it; what comes of
  // that is written nowhere.
  uint2 values[2][kSteps];
  auto fetch = [&](int tile) {
    if (tile >= m.tiles) return;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int token = min(tile * kHeadTokens + half * 8 + r, m.tokens - 1);
      const uint4* const source = static_cast<const uint4*>(given.tokens) +
                                  static_cast<int64_t>(token) * (kWidth / 8) +
                                  warp * (kWidth / 32) + q;
#pragma unroll
      for (int v = 0; v < kSteps / 2; ++v)
        load_tokens(values[half][2 * v], values[half][2 * v + 1], source + 4 * v);
    }
  };

  // The launch overlaps the end of the kernel before: nothing was read so far but parameters.
  asm volatile("griddepcontrol.launch_dependents;");
  asm volatile("griddepcontrol.wait;" ::: "memory");

  fetch(first_tile);

  // The weights, once, while the first tokens are under way.
  const int of_r = threadIdx.x / 8 % 8, of_q = threadIdx.x / 2 % 4, of_step = threadIdx.x % 2;
#pragma unroll 4
  for (int i = threadIdx.x / 64; i < kTiles * kWidth / 32; i += kHeadUnits * kHeadWarps / 2) {
    const int j = i % kTiles, v = i / kTiles;  // v: of the whole of D
    const uint2* const source = static_cast<const uint2*>(given.weight) +
                                (8 * j + of_r) * (kWidth / 4) + 8 * v + threadIdx.x % 8;
    copy_to_shared(&shared.weight[2 * v + of_step][j / 2][4 * of_r + of_q][j % 2], source);
  }
  if (threadIdx.x < kWidth / 4) {
    const int i = threadIdx.x;
    copy_to_shared(&shared.norm[i][0], static_cast<const uint2*>(given.norm_weight) + i);
    copy_to_shared(&shared.norm[i][1], static_cast<const uint2*>(given.norm_bias) + i);
  }
  if (threadIdx.x < kFeatures / 2) {
    const uint32_t pair = static_cast<const uint32_t*>(given.bias)[threadIdx.x];
    shared.bias[2 * threadIdx.x] = bf16_low(pair);
    shared.bias[2 * threadIdx.x + 1] = bf16_high(pair);
  }
  asm volatile("cp.async.wait_all;" ::: "memory");
  __syncthreads();

  float loss = 0.f;  // 26 terms at the upsampler's size: roundings cancel over 67,584 threads
  for (int tile = first_tile; tile < m.tiles; tile += units) {
    // Moments of the unit's 16 tokens: a lane's part, a quad's, the four warps'.
    float mean[2], rstd[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      Moments part = moments_of(values[half]);
#pragma unroll
      for (int other = 1; other < 4; other *= 2) {
        const Moments theirs{__shfl_xor_sync(~0u, part.mean, other),
                             __shfl_xor_sync(~0u, part.squares, other)};
        part = Moments::join(part, theirs, kLaneValues * other);
      }
      if (q == 0) own.moments[half * 8 + r][warp] = {part.mean, part.squares};
    }
    unit_barrier(unit);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float4* parts = reinterpret_cast<const float4*>(own.moments[half * 8 + r]);
      const float4 low = parts[0], high = parts[1];
      const Moments all = Moments::join(
          Moments::join({low.x, low.y}, {low.z, low.w}, kWidth / 4),
          Moments::join({high.x, high.y}, {high.z, high.w}, kWidth / 4), kWidth / 2);
      mean[half] = all.mean;
      rstd[half] = rsqrtf(all.squares * (1.f / kWidth) + given.eps);
    }

    // The product over the warp's quarter of D.
    float sum[kTiles][4] = {};
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const int of_D = warp * kSteps + step;
      const uint4 norm =
          *reinterpret_cast<const uint4*>(shared.norm[of_D / 2 * 8 + 2 * q + of_D % 2]);
      // Else the compiler begins steps ahead of time, until it runs out of registers.
      __syncwarp();
      uint32_t a[4];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint2 x = values[half][step];
        a[half] = normalised(x.x, mean[half], rstd[half], norm.x, norm.z);
        a[half + 2] = normalised(x.y, mean[half], rstd[half], norm.y, norm.w);
      }
#pragma unroll
      for (int j = 0; j < kTiles; j += 2) {
        const uint4 w = *reinterpret_cast<const uint4*>(shared.weight[of_D][j / 2][lane]);
        multiply_add(sum[j], a, w.x, w.y);
        multiply_add(sum[j + 1], a, w.z, w.w);
      }
    }
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
      float* const features = &own.features[warp][r][8 * j + 2 * q];
      *reinterpret_cast<float2*>(features) = {sum[j][0], sum[j][1]};
      *reinterpret_cast<float2*>(features + 8 * Shared::kPitch) = {sum[j][2], sum[j][3]};
    }

    // The registers are free for the next tile, which is under way while this one ends.
    fetch(tile + units);

    // A thread's pixels: of one token, every eighth row of its patch. Lanes that follow one
    // another have tokens that do, so that patches of a row of the group are written together.
    // Of 12 rows half the warps have two: in odd units those on the other two schedulers.
    const int first_row = (unit_thread ^ unit % 2 * (kHeadUnitThreads / 2)) / kHeadTokens;
    const int n = unit_thread % kHeadTokens, token = tile * kHeadTokens + n;
    const PatchPlace place(m, token);
    unit_barrier(unit);
#pragma unroll 1
    for (int row = first_row; row < kRows; row += kHeadUnitThreads / kHeadTokens) {
      const int y = place.y + row % kHeadPatch;
      if (token >= m.tokens || y >= m.at.height) continue;
      const int64_t within =
          ((static_cast<int64_t>(row / kHeadPatch) * m.at.frames + place.t) * m.at.height + y) *
              m.at.width +
          place.x;
      const int64_t offset = place.b * m.video_pixels + within;
      auto part = [&](int of_warp) {
        return *reinterpret_cast<const float4*>(&own.features[of_warp][n][row * kHeadPatch]);
      };
      const float4 F = ((part(0) + part(1)) + (part(2) + part(3))) +
                       *reinterpret_cast<const float4*>(&shared.bias[row * kHeadPatch]);
      float4* const pixels = reinterpret_cast<float4*>(given.out + offset);
      if constexpr (kEnd == HeadEnd::kF) *pixels = F;
      if constexpr (kEnd == HeadEnd::kMix) *pixels = mixed(given, place.b, offset, F);
      if constexpr (kEnd == HeadEnd::kLoss) loss += squares(given, place.b, offset, within, F);
    }
  }

  // A unit's sum, always in the same order. Its moments were last read before the last barrier.
  if constexpr (kEnd == HeadEnd::kLoss) {
#pragma unroll
    for (int other = 16; other > 0; other /= 2) loss += __shfl_xor_sync(~0u, loss, other);
    if (lane == 0) own.moments[0][warp].x = loss;
    unit_barrier(unit);
    if (unit_thread == 0) {
      const float2* const sums = own.moments[0];
      given.partial[first_tile] = (sums[0].x + sums[1].x) + (sums[2].x + sums[3].x);
    }
  }
}

// The mean, from the sums of `count` units: one block of kHeadPartials threads.
__global__ void __launch_bounds__(kHeadPartials)
    head_loss_mean_kernel(const float* partial, float* out, int count, float pixels) {
  __shared__ float sums[kHeadPartials / 32];
  asm volatile("griddepcontrol.launch_dependents;");
  asm volatile("griddepcontrol.wait;" ::: "memory");
  float sum = threadIdx.x < count ? partial[threadIdx.x] : 0.f;
#pragma unroll
  for (int other = 16; other > 0; other /= 2) sum += __shfl_xor_sync(~0u, sum, other);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x >= 32) return;
  sum = sums[threadIdx.x];
#pragma unroll
  for (int other = 16; other > 0; other /= 2) sum += __shfl_xor_sync(~0u, sum, other);
  if (threadIdx.x == 0) *out = sum / pixels;
}

}  // namespace snapkernels
