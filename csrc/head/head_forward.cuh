// The head: LayerNorm, the product with W, unpatchify, and what an end makes of the pixels.
//
// The tokens are 90 % of the bytes, so they go from device memory to registers, from there to the
// tensor cores, and nowhere else; W stays in shared memory. LayerNorm's moments are known after a
// token's last column, its product wants the first at once. So it gets less of LayerNorm:
//
//   F = rstd (W (norm_weight (x - m)) - (mean - m) W norm_weight) + W norm_bias + bias.
//
// m is the mean of the token's first 64 columns. That is a tenth of a deviation from the mean, if
// columns are alike, and at most sqrt(D / 64 - 1), 3.9, whatever they are. So x - m is as small as
// LayerNorm's output and is rounded as that would be, however large the mean.
//
// A warpgroup has 64 tokens, a warp 16 of them, and goes over their columns 64 at a time: two such
// chunks are under way while one is multiplied. Warps share W and nothing else.
//
// The order of K in a product is free: it is chosen so that the 16 bytes a lane loads are what it
// hands to the tensor cores. Lane 4 r + q has tokens r and r + 8, and of every 32 columns 8 q +
// (0 .. 7): the K of two steps, in pairs (0 1)(2 3) and (4 5)(6 7).
#pragma once

#include "head/head_ends.cuh"
#include "wgmma.cuh"

namespace snapkernels {

constexpr int kHeadChunk = 64;  // columns
constexpr int kHeadChunks = 2;  // on their way to registers: 64 KB of all warps
constexpr int kHeadSteps = kHeadChunk / 16;

// Shared memory of a block.
template <int kWidth, int kFeatures>
struct HeadShared {
  // An odd number of 16 bytes more than a bank's turn: eight tokens' float4 are in eight places.
  static constexpr int kPitch = kFeatures + 4;

  // W by step of the product, eight features, and half of K: matrices of 128 bytes.
  uint4 weight[kWidth / 16][kFeatures / 8][2][8];
  float norm_weight[kWidth];
  float gain[kFeatures], shift[kFeatures];  // W norm_weight, bias + W norm_bias
  float features[kHeadWarps][kHeadTokens][kPitch];
};

// 16 bytes that are read once. Volatile: to be under way from here on, not from their first use.
__device__ inline void load_tokens(uint32_t (&to)[4], const uint4* source) {
  asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "l"(source));
}

// W to shared memory, and its products with norm_weight and norm_bias: a thread has a feature's 32
// columns at a time, four words of each q, and puts them in K's order.
template <int kWidth, int kFeatures>
__device__ void share_weights(const HeadArguments& given, HeadShared<kWidth, kFeatures>& shared) {
  constexpr int kParts = kWidth / 32;
  // The warps' memory is not in use yet.
  float(*const parts)[2][kFeatures] = reinterpret_cast<float(*)[2][kFeatures]>(shared.features);
  for (int i = threadIdx.x; i < kParts * kFeatures; i += kHeadThreads) {
    const int feature = i % kFeatures, part = i / kFeatures;
    const uint4* const rows[3] = {
        static_cast<const uint4*>(given.weight) + feature * (kWidth / 8) + part * 4,
        static_cast<const uint4*>(given.norm_weight) + part * 4,
        static_cast<const uint4*>(given.norm_bias) + part * 4};
    uint32_t words[4][4];
    float gain = 0.f, shift = 0.f;
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      const uint4 w = rows[0][q], of_gain = rows[1][q], of_shift = rows[2][q];
      const uint32_t pairs[3][4] = {{w.x, w.y, w.z, w.w},
                                    {of_gain.x, of_gain.y, of_gain.z, of_gain.w},
                                    {of_shift.x, of_shift.y, of_shift.z, of_shift.w}};
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        words[q][k] = pairs[0][k];
        const float low = bf16_low(pairs[0][k]), high = bf16_high(pairs[0][k]);
        gain += low * bf16_low(pairs[1][k]) + high * bf16_high(pairs[1][k]);
        shift += low * bf16_low(pairs[2][k]) + high * bf16_high(pairs[2][k]);
      }
    }
#pragma unroll
    for (int k = 0; k < 4; ++k)
      shared.weight[part * 2 + k / 2][feature / 8][k % 2][feature % 8] = {words[0][k], words[1][k],
                                                                          words[2][k], words[3][k]};
    parts[part][0][feature] = gain;
    parts[part][1][feature] = shift;
  }
  for (int i = threadIdx.x; i < kWidth; i += kHeadThreads)
    shared.norm_weight[i] = bf16_low(static_cast<const uint16_t*>(given.norm_weight)[i]);
  publish();
  __syncthreads();
  if (threadIdx.x < 2 * kFeatures) {
    const int which = threadIdx.x / kFeatures, feature = threadIdx.x % kFeatures;
    float sum = 0.f;
#pragma unroll 8
    for (int i = 0; i < kParts; ++i) sum += parts[i][which][feature];
    if (which == 0) shared.gain[feature] = sum;
    if (which == 1)
      shared.shift[feature] = sum + bf16_low(static_cast<const uint16_t*>(given.bias)[feature]);
  }
  __syncthreads();
}

// The mean of two tokens' first columns: a lane's, then the quad's.
__device__ inline void first_means(const uint32_t (&x)[2][kHeadChunk / 32][4], float (&means)[2]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < kHeadChunk / 8; ++i)
      sum += bf16_low(x[half][i / 4][i % 4]) + bf16_high(x[half][i / 4][i % 4]);
    sum += __shfl_xor_sync(~0u, sum, 1);
    sum += __shfl_xor_sync(~0u, sum, 2);
    means[half] = sum * (1.f / kHeadChunk);
  }
}

// As many blocks as multiprocessors: W is fetched once for each. Warpgroups take every so many
// tiles. kSaves: a backward will follow.
template <HeadEnd kEnd, bool kSaves, int kWidth, int kFeatures>
__global__ void __launch_bounds__(kHeadThreads, 1)
    head_forward_kernel(const __grid_constant__ HeadMap m,
                        const __grid_constant__ HeadArguments given) {
  using Shared = HeadShared<kWidth, kFeatures>;
  constexpr int kTiles = kFeatures / 8;  // of 8 columns of the product
  constexpr int kStepBytes = kTiles * 256;
  extern __shared__ __align__(128) unsigned char shared_bytes[];
  Shared& shared = *reinterpret_cast<Shared*>(shared_bytes);

  const int lane = threadIdx.x % 32, r = lane / 4, q = lane % 4;
  // Shuffled to be known as a warp's: its addresses of W are in the uniform registers of wgmma.
  const int of_block = __shfl_sync(~0u, static_cast<int>(threadIdx.x / 32), 0);
  const int warp = of_block % 4, warpgroup = of_block / 4;
  // The last, partial round of tiles is spread over all blocks.
  const int warpgroups = gridDim.x * (kHeadWarps / 4);
  const int first_tile = warpgroup * gridDim.x + blockIdx.x;

  // Where the next chunk of this lane's two tokens is. Past the last token a tile repeats it; what
  // comes of that is written nowhere.
  const uint4* source[2];
  const auto turn_to = [&](int tile) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int token = min((tile * 4 + warp) * kHeadTokens + half * 8 + r, m.tokens - 1);
      source[half] = static_cast<const uint4*>(given.tokens) +
                     static_cast<int64_t>(token) * (kWidth / 8) + q;
    }
  };
  uint32_t x[kHeadChunks][2][kHeadChunk / 32][4];  // [chunk][token][32 columns][pair]
  const auto fetch = [&](uint32_t(&to)[2][kHeadChunk / 32][4]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int v = 0; v < kHeadChunk / 32; ++v) load_tokens(to[half][v], source[half] + 4 * v);
      source[half] += kHeadChunk / 8;
    }
  };

  after_kernel_before();
  if (first_tile < m.tiles) {
    turn_to(first_tile);
#pragma unroll
    for (int chunk = 0; chunk < kHeadChunks; ++chunk) fetch(x[chunk]);
  }
  share_weights(given, shared);
  const uint64_t first_matrix = plain_view(shared_address(shared.weight));
  const float4* const first_gains = reinterpret_cast<const float4*>(shared.norm_weight) + 2 * q;
  float(*const features)[Shared::kPitch] = shared.features[of_block];

  float loss = 0.f;  // 26 terms at the upsampler's size: roundings cancel over 67,584 threads
  for (int tile = first_tile; tile < m.tiles; tile += warpgroups) {
    const bool more = tile + warpgroups < m.tiles;
    Accumulators<kTiles> sum = {};
    // Of values less m: to take their mean's square off that of their squares costs 4 bits of 24 at
    // most.
    float m_of[2], total[2] = {}, squares[2] = {};
    first_means(x[0], m_of);
    uint64_t matrix = first_matrix;
    const float4* gains = first_gains;
#pragma unroll 1
    for (int left = kWidth / (kHeadChunk * kHeadChunks); left > 0; --left) {
#pragma unroll
      for (int chunk = 0; chunk < kHeadChunks; ++chunk) {
        uint32_t a[kHeadSteps][4];
#pragma unroll
        for (int v = 0; v < kHeadChunk / 32; ++v) {
          const float4 both[2] = {gains[8 * v], gains[8 * v + 1]};
          const float gain[8] = {both[0].x, both[0].y, both[0].z, both[0].w,
                                 both[1].x, both[1].y, both[1].z, both[1].w};
#pragma unroll
          for (int half = 0; half < 2; ++half) {
#pragma unroll
            for (int k = 0; k < 4; ++k) {
              const uint32_t pair = x[chunk][half][v][k];
              const float low = bf16_low(pair) - m_of[half], high = bf16_high(pair) - m_of[half];
              total[half] += low;
              squares[half] = fmaf(low, low, squares[half]);
              total[half] += high;
              squares[half] = fmaf(high, high, squares[half]);
              a[2 * v + k / 2][half + k % 2 * 2] =
                  bf16_pair(low * gain[2 * k], high * gain[2 * k + 1]);
            }
          }
        }
        gains += kHeadChunk / 4;
        if (chunk == 0 && left == 1 && more) turn_to(tile + warpgroups);
        if (left > 1 || more) fetch(x[chunk]);
        multiply_fence();
#pragma unroll
        for (int step = 0; step < kHeadSteps; ++step) {
          multiply_held(sum, a[step], matrix);
          matrix = further(matrix, kStepBytes);
        }
        multiply_commit();
        multiply_wait<0>();  // other warps calculate meanwhile
      }
    }

    // The moments of a token are the quad's.
    float off[2], rstd[2];  // off: the mean less m
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int other = 1; other < 4; other *= 2) {
        total[half] += __shfl_xor_sync(~0u, total[half], other);
        squares[half] += __shfl_xor_sync(~0u, squares[half], other);
      }
      off[half] = total[half] * (1.f / kWidth);
      const float variance = squares[half] * (1.f / kWidth) - off[half] * off[half];
      rstd[half] = rsqrtf((variance < 0.f ? 0.f : variance) + given.eps);  // fmaxf loses a NaN
    }
    settle<kTiles>(sum);
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
      *reinterpret_cast<float2*>(&features[r][8 * j + 2 * q]) = {sum[j][0], sum[j][1]};
      *reinterpret_cast<float2*>(&features[r + 8][8 * j + 2 * q]) = {sum[j][2], sum[j][3]};
    }
    __syncwarp();
    // Lanes n and n + 16 have token n.
    const int n = lane % kHeadTokens, from = n % 8 * 4;
    const auto of_token = [&](const float(&of)[2]) {
      const float low = __shfl_sync(~0u, of[0], from), high = __shfl_sync(~0u, of[1], from);
      return n < 8 ? low : high;
    };
    const float left_over = of_token(off);
    const HeadToken token{(tile * 4 + warp) * kHeadTokens + n, of_token(m_of) + left_over,
                          of_token(rstd), left_over};
    loss += end_of<kEnd, kSaves, kWidth, kFeatures>(m, given, token, lane / kHeadTokens,
                                                    features[n], shared);
    __syncwarp();
  }

  // The block's sum, always in the same order.
  if constexpr (kEnd == HeadEnd::kLoss) {
#pragma unroll
    for (int other = 16; other > 0; other /= 2) loss += __shfl_xor_sync(~0u, loss, other);
    if (lane == 0) features[0][0] = loss;
    __syncthreads();
    if (threadIdx.x == 0) {
      float all = 0.f;
#pragma unroll
      for (int i = 0; i < kHeadWarps; ++i) all += shared.features[i][0][0];
      given.partial[blockIdx.x] = all;
    }
  }
}

// The mean, from the sums of `count` blocks: one block of kHeadPartials threads.
__global__ void __launch_bounds__(kHeadPartials)
    head_loss_mean_kernel(const float* partial, float* out, int count, float pixels) {
  __shared__ float sums[kHeadPartials / 32];
  after_kernel_before();
  float sum = threadIdx.x < count ? partial[threadIdx.x] : 0.f;
#pragma unroll
  for (int other = 16; other > 0; other /= 2) sum += __shfl_xor_sync(~0u, sum, other);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x >= 32) return;
  sum = threadIdx.x < kHeadPartials / 32 ? sums[threadIdx.x] : 0.f;
#pragma unroll
  for (int other = 16; other > 0; other /= 2) sum += __shfl_xor_sync(~0u, sum, other);
  if (threadIdx.x == 0) *out = sum / pixels;
}

}  // namespace snapkernels
