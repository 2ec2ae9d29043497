// The stem: pixels of two videos, the product with W, LayerNorm and positions, in one pass.
//
// The tokens are 90 % of the bytes, and are written once. LayerNorm wants a token's mean before its
// first column is written, and a block has no registers for 64 tokens of 1024 columns. So a
// warpgroup makes the product twice, 64 columns at a time: for the variance, then for the tokens. W
// stays in shared memory. At the upsampler's size both products take the tensor cores 7,200 cycles
// for 64 tokens, which take device memory 11,000. Fewer tokens, with all columns in a block's
// registers, would need barriers between product, moments and stores, which then add up; here
// warpgroups share nothing but W, and some multiply while others store.
//
// Instructions are scarcer: one for every value takes 512 of those cycles in all four schedulers,
// and waits for it add up. So what can be is left to the tensor cores:
// - the mean over a token's columns is the product with the mean of W over them;
// - another step of K adds the bias and takes the mean off, and accumulators come out centred.
// The variance then takes one instruction for a value, and the token three and a half.
//
// The order of K in a product is free, and so is that of its columns. In a warp, lane = 4 r + q
// - has the pixels of row q of the patches of tokens r and r + 8: a float4 of each channel, which
//   is one step of K. Pixels go from device memory to registers and to the tensor cores.
// - gets columns 32 v + 8 q + (0 .. 7) of 64, v = 0 and 1, of those tokens: 16 bytes of bfloat16,
//   and 64 with its three neighbours.
#pragma once

#include "bf16.cuh"
#include "stem/stem_pixels.cuh"
#include "wgmma.cuh"

namespace snapkernels {

constexpr int kStemTokens = 64;   // of a warpgroup's tile: the rows of a wgmma
constexpr int kStemColumns = 64;  // of a product: 32 accumulators a thread

// Of a block. Where each token of a lane has positions of its own, 128 registers do not suffice.
template <bool kAlike>
constexpr int kStemWarpgroups = kAlike ? 4 : 3;

// Shared memory of a block, in vectors of 16 bytes: matrices of 8 columns and 8 K, 128 bytes each.
// For 64 columns, W as [kSteps][8 times 8 columns][K half][column], then the step that centres as
// [8 times 8 columns][column], with bias, 1, 1, 1 and zeros for K. After all columns, the mean of W
// as [kSteps][K half][column]: three columns that add up to it, and zeros. Then, for 32 columns,
// norm_weight and norm_bias as [2][q], in bfloat16: in float32 they would be half of what is read.
template <int kSteps>
constexpr int kStemMatrices = (2 * kSteps + 1) * kStemColumns;  // vectors of 64 columns

constexpr int kStemMeans = 16;       // vectors of a step
constexpr int kStemParameters = 16;  // vectors of 64 columns

template <int kSteps>
int stem_shared_bytes(int width) {
  const int each = kStemMatrices<kSteps> + kStemParameters;
  return (width / kStemColumns * each + kSteps * kStemMeans) * static_cast<int>(sizeof(uint4));
}

__device__ inline float bf16_rounded(float x) { return bf16_low(bf16_pair(x, 0.f)); }

// Three bfloat16 that add up to x: 24 bits.
struct Bf16Parts {
  float high, middle, low;

  __device__ explicit Bf16Parts(float x)
      : high(bf16_rounded(x)), middle(bf16_rounded(x - high)), low((x - high) - middle) {}
};

__device__ inline uint32_t& word(uint4& vector, int i) {
  return reinterpret_cast<uint32_t*>(&vector)[i];
}

__device__ inline uint4 load_shared(uint32_t address) {
  uint4 loaded;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(loaded.x), "=r"(loaded.y), "=r"(loaded.z), "=r"(loaded.w)
               : "r"(address));
  return loaded;
}

// Volatile: to be under way from here on, not from its first use. The last to leave L1, which the
// other warps of a tile have it from.
__device__ inline uint4 load_ahead(const uint4* source) {
  uint4 loaded;
  asm volatile("ld.global.nc.L1::evict_last.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(loaded.x), "=r"(loaded.y), "=r"(loaded.z), "=r"(loaded.w)
               : "l"(source));
  return loaded;
}

// Past L1, where positions stay.
__device__ inline void store_past(uint4* target, const uint4& x) {
  asm volatile("st.global.L1::no_allocate.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(target), "r"(x.x),
               "r"(x.y), "r"(x.z), "r"(x.w)
               : "memory");
}

// Accumulators of 64 x 64: column 8 j + 2 q + i % 2 of row r + 8 (i / 2) of the warp's 16 tokens.
using StemSum = float[kStemColumns / 8][4];

// Keeps the compiler from moving what it does to `sum` across this.
__device__ inline void hold(StemSum& sum) {
#pragma unroll
  for (int j = 0; j < kStemColumns / 8; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) asm volatile("" : "+f"(sum[j][i]));
  }
}

// 16 of K, added to `sum` or, without kAdd, put there. `b` is the low word of wgmma's view of
// shared memory: matrices of 128 bytes without swizzle, the second half of K 128 bytes on (bits 16
// to 29), the next eight columns kApart vectors (the high word), all in 16s of bytes.
template <int kApart, int kAdd>
__device__ inline void multiply_add(StemSum& sum, const uint32_t (&a)[4], uint32_t b) {
  asm volatile(
      "{\n"
      ".reg .b64 matrices;\n"
      "mov.b64 matrices, {%36, %37};\n"
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
      "{%32, %33, %34, %35}, matrices, %38, 1, 1, 0;\n"
      "}"
      : "+f"(sum[0][0]), "+f"(sum[0][1]), "+f"(sum[0][2]), "+f"(sum[0][3]), "+f"(sum[1][0]),
        "+f"(sum[1][1]), "+f"(sum[1][2]), "+f"(sum[1][3]), "+f"(sum[2][0]), "+f"(sum[2][1]),
        "+f"(sum[2][2]), "+f"(sum[2][3]), "+f"(sum[3][0]), "+f"(sum[3][1]), "+f"(sum[3][2]),
        "+f"(sum[3][3]), "+f"(sum[4][0]), "+f"(sum[4][1]), "+f"(sum[4][2]), "+f"(sum[4][3]),
        "+f"(sum[5][0]), "+f"(sum[5][1]), "+f"(sum[5][2]), "+f"(sum[5][3]), "+f"(sum[6][0]),
        "+f"(sum[6][1]), "+f"(sum[6][2]), "+f"(sum[6][3]), "+f"(sum[7][0]), "+f"(sum[7][1]),
        "+f"(sum[7][2]), "+f"(sum[7][3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b), "n"(kApart), "n"(kAdd));
}

// 16 of K for eight columns.
__device__ inline void multiply_add_means(float (&sum)[4], const uint32_t (&a)[4], uint32_t b) {
  asm volatile(
      "{\n"
      ".reg .b64 matrices;\n"
      "mov.b64 matrices, {%8, 16};\n"
      "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, matrices, 1, 1, 1, 0;\n"
      "}"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b));
}

// 64 columns of W f + bias less their mean, begun: `sum` is not to be touched until finish().
template <int kSteps>
__device__ void begin(const uint32_t (&a)[kSteps][4], const uint32_t (&centre)[4],
                      uint32_t matrices, StemSum& sum) {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
  multiply_add<8, 0>(sum, centre, matrices + kSteps * 2 * kStemColumns);
#pragma unroll
  for (int step = 0; step < kSteps; ++step)
    multiply_add<16, 1>(sum, a[step], matrices + step * 2 * kStemColumns);
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

__device__ inline void finish(StemSum& sum) {
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
  hold(sum);
}

// The step of K that takes the mean over a token's columns off and adds the bias. The mean of W is
// three columns in shared memory, of lanes q = 0 and 1. The mean is three parts of K, so that
// nothing of it is lost; it need not be exact, but near: the variance is of what is left.
template <int kSteps>
__device__ void centre_step(const uint32_t (&a)[kSteps][4], uint32_t means, float mean_bias, int q,
                            uint32_t (&centre)[4]) {
  float sum[4] = {};
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
  for (int step = 0; step < kSteps; ++step)
    multiply_add_means(sum, a[step], means + step * kStemMeans);
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
#pragma unroll
  for (int i = 0; i < 4; ++i) asm volatile("" : "+f"(sum[i]));
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float mean = sum[half * 2] + sum[half * 2 + 1];
    mean += __shfl_xor_sync(~0u, mean, 1);
    mean += __shfl_xor_sync(~0u, mean, 2);
    const Bf16Parts less(-(mean + mean_bias));
    centre[half] = q == 0   ? bf16_pair(1.f, less.high)
                   : q == 1 ? bf16_pair(less.middle, less.low)
                            : 0;
    centre[half + 2] = 0;
  }
}

// W and the parameters to shared memory, by `threads` threads. A thread takes a column's 16
// features of one channel, words 2 q' + half of two pixels each, and puts them in K's order: half,
// then q'. Eight threads that follow one another write the eight columns of a matrix: 128 bytes,
// every bank once.
template <int kSteps>
__device__ void share_weights(const StemArguments& given, int width, int thread, int threads,
                              uint4* matrices) {
  const uint4* const weight = static_cast<const uint4*>(given.weight);
#pragma unroll 8
  for (int i = thread; i < kSteps * width; i += threads) {
    const int e = i % 2, of_q = i / 2 % 4, step = i / 8 % kSteps, rest = i / (8 * kSteps);
    const int pair = rest % 4, v = rest / 4;  // of all 32s of columns
    const uint4* const source = weight + ((32 * v + 8 * of_q + 2 * pair + e) * kSteps + step) * 2;
    const uint4 top = source[0], bottom = source[1];
    uint4* const target = matrices + v / 2 * kStemMatrices<kSteps> +
                          (step * 8 + v % 2 * 4 + pair) * 16 + 2 * of_q + e;
    target[0] = {top.x, top.z, bottom.x, bottom.z};
    target[8] = {top.y, top.w, bottom.y, bottom.w};
  }
  uint4* const parameters =
      matrices + width / kStemColumns * kStemMatrices<kSteps> + kSteps * kStemMeans;
  for (int i = thread; i < width / 8; i += threads) {
    const int of_q = i % 4, v = i / 4;
    uint4 bias = static_cast<const uint4*>(given.bias)[i];
    uint4* const centre = matrices + v / 2 * kStemMatrices<kSteps> + kSteps * 2 * kStemColumns +
                          v % 2 * 32 + 2 * of_q;
    const uint32_t ones = bf16_pair(1.f, 1.f);
#pragma unroll
    for (int pair = 0; pair < 4; ++pair) {
      centre[pair * 8] = {word(bias, pair) & 0xffff | ones << 16, ones, 0, 0};
      centre[pair * 8 + 1] = {word(bias, pair) >> 16 | ones << 16, ones, 0, 0};
    }
    parameters[v * 8 + of_q] = static_cast<const uint4*>(given.norm_weight)[i];
    parameters[v * 8 + 4 + of_q] = static_cast<const uint4*>(given.norm_bias)[i];
  }
}

// The mean of W over all columns, by `warps` warps, from shared memory: eight features each.
template <int kSteps>
__device__ void share_means(int width, float share, int warp, int warps, int lane,
                            uint4* matrices) {
  const int chunks = width / kStemColumns;
  for (int of = warp; of < kSteps * 2; of += warps) {
    const uint4* source =
        matrices + of / 2 * 2 * kStemColumns + lane / 8 * 16 + of % 2 * 8 + lane % 8;
    float mean[8] = {};
#pragma unroll 4
    for (int chunk = 0; chunk < chunks; ++chunk, source += kStemMatrices<kSteps>) {
#pragma unroll
      for (int v = 0; v < 2; ++v) {
        uint4 x = source[v * kStemColumns];
#pragma unroll
        for (int p = 0; p < 4; ++p) {
          mean[2 * p] += bf16_low(word(x, p));
          mean[2 * p + 1] += bf16_high(word(x, p));
        }
      }
    }
    uint4 column;  // of three that add up to the mean, and of zeros
#pragma unroll
    for (int k = 0; k < 8; ++k) {
#pragma unroll
      for (int other = 1; other < 32; other *= 2) mean[k] += __shfl_xor_sync(~0u, mean[k], other);
      const Bf16Parts parts(mean[k] * share);
      mean[k] = lane == 0 ? parts.high : lane == 1 ? parts.middle : lane == 2 ? parts.low : 0.f;
    }
#pragma unroll
    for (int p = 0; p < 4; ++p) word(column, p) = bf16_pair(mean[2 * p], mean[2 * p + 1]);
    if (lane < 8) matrices[chunks * kStemMatrices<kSteps> + of * 8 + lane] = column;
  }
}

// As many blocks as multiprocessors: W is fetched once for each. Warpgroups take every so many
// tiles. kSteps: channels of both videos, and the 16s of K. kAlike: both tokens of a lane have the
// same positions.
template <int kSteps, bool kAlike>
__global__ void __launch_bounds__(kStemWarpgroups<kAlike> * 128, 1)
    stem_forward_kernel(const __grid_constant__ StemMap m,
                        const __grid_constant__ StemArguments given) {
  extern __shared__ __align__(128) uint4 shared[];
  constexpr int kWarpgroups = kStemWarpgroups<kAlike>, kThreads = kWarpgroups * 128;
  const int width = m.at.token_width, chunks = width / kStemColumns;
  const int lane = threadIdx.x % 32, r = lane / 4, q = lane % 4;
  // Shuffled to be known as a warp's: its addresses of W are in the uniform registers of wgmma.
  const int of_block = __shfl_sync(~0u, static_cast<int>(threadIdx.x / 32), 0);
  const int warp = of_block % 4, warpgroup = of_block / 4;
  // The last, partial round of tiles is spread over all blocks.
  const int first_tile = warpgroup * gridDim.x + blockIdx.x;

  after_kernel_before();

  // The weights, once. Warpgroup 0 has its first pixels to wait for meanwhile.
  if (warpgroup > 0) {
    share_weights<kSteps>(given, width, threadIdx.x - 128, kThreads - 128, shared);
    barrier_wait(kWarpgroups, kThreads - 128);
    share_means<kSteps>(width, m.share, of_block - 4, kThreads / 32 - 4, lane, shared);
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");  // wgmma is another proxy
    barrier_arrive(0, kThreads);
  }
  float mean_bias = 0.f;  // every warp for itself
  for (int i = lane; i < width / 8; i += 32) {
    uint4 bias = static_cast<const uint4*>(given.bias)[i];
#pragma unroll
    for (int p = 0; p < 4; ++p) mean_bias += bf16_low(word(bias, p)) + bf16_high(word(bias, p));
  }
#pragma unroll
  for (int other = 1; other < 32; other *= 2)
    mean_bias += __shfl_xor_sync(~0u, mean_bias, other);
  mean_bias *= m.share;

  const uint32_t shared_address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  uint32_t first_matrices = shared_address >> 4 | (128 >> 4) << 16;
  uint32_t first_parameters =
      shared_address + (chunks * kStemMatrices<kSteps> + kSteps * kStemMeans + q) *
                           static_cast<int>(sizeof(uint4));
  asm volatile("" : "+r"(first_matrices), "+r"(first_parameters));  // or it does this every time

  for (int tile = first_tile; tile < m.tiles; tile += kWarpgroups * gridDim.x) {
    // Eight tokens with positions in a row, and up to eight times the same positions. Past the last
    // a tile repeats it; what it makes of that is written nowhere.
    const int eight = 2 * warp, same = (1 << m.alike) - 1;
    const int first = tile * (kStemTokens >> m.alike) + (eight >> m.alike) * 8 + r;
    const int position[2] = {first, kAlike ? first : first + 8};
    const StemPlace places[2] = {{m, min(position[0], m.positions - 1), eight & same},
                                 {m, min(position[1], m.positions - 1), (eight + 1) & same}};
    uint32_t a[kSteps][4];
    load_pixels<kSteps>(m, given, places, q, a);

    // Warpgroup 0 waits for the weights, and the others for their turn at a first tile: a block
    // that began with four tiles' moments would store nothing meanwhile.
    if (tile == first_tile) barrier_wait(warpgroup, warpgroup ? 256 : kThreads);

    // Positions are requested 64 columns ahead of their use, into the registers of the last.
    constexpr int kPositions = kAlike ? 1 : 2;
    const uint4* positions[kPositions];
    uint4 added[kPositions][2];
#pragma unroll
    for (int half = 0; half < kPositions; ++half) {
      positions[half] = static_cast<const uint4*>(given.positions) +
                        static_cast<int64_t>(places[half].position) * (width / 8) + q;
      added[half][0] = load_ahead(positions[half]);
      added[half][1] = load_ahead(positions[half] + 4);
    }

    uint32_t centre[4];
    centre_step<kSteps>(a, first_matrices + chunks * kStemMatrices<kSteps>, mean_bias, q, centre);

    // The variance. A sum for even columns, and one for odd.
    float squares[2][2] = {};
    uint32_t matrices = first_matrices;
#pragma unroll 1
    for (int chunk = 0; chunk < chunks; ++chunk) {
      StemSum sum;
      begin<kSteps>(a, centre, matrices, sum);
      matrices += kStemMatrices<kSteps>;
      finish(sum);
#pragma unroll
      for (int j = 0; j < kStemColumns / 8; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i)
          squares[i / 2][i % 2] = fmaf(sum[j][i], sum[j][i], squares[i / 2][i % 2]);
      }
    }

    const bool next_waits = warpgroup + 1 < kWarpgroups && tile + gridDim.x < m.tiles;
    if (tile == first_tile && next_waits) barrier_arrive(warpgroup + 1, 256);

    // The quad's four parts are the token.
    float rstd[2];
    uint4* targets[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float all = squares[half][0] + squares[half][1];
      all += __shfl_xor_sync(~0u, all, 1);
      all += __shfl_xor_sync(~0u, all, 2);
      rstd[half] = rsqrtf(all * m.share + given.eps);
      if (q == 0 && position[half] < m.positions) given.rstd[places[half].token] = rstd[half];
      targets[half] = static_cast<uint4*>(given.tokens) +
                      static_cast<int64_t>(places[half].token) * (width / 8) + q;
    }

    // The tokens.
    matrices = first_matrices;
    uint32_t parameters = first_parameters;
#pragma unroll 1
    for (int chunk = 0; chunk < chunks; ++chunk) {
      StemSum sum;
      begin<kSteps>(a, centre, matrices, sum);
#pragma unroll
      for (int half = 0; half < kPositions; ++half)
        if (chunk + 1 < chunks) positions[half] += kStemColumns / 8;  // or the last once more
#pragma unroll
      for (int v = 0; v < 2; ++v) {
        uint4 weights = load_shared(parameters + v * 128);
        uint4 biases = load_shared(parameters + v * 128 + 64);
        if (v == 0) finish(sum);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          uint4 made;
#pragma unroll
          for (int p = 0; p < 4; ++p) {
            const float* const x = &sum[v * 4 + p][half * 2];
            const uint32_t added_pair = word(added[half % kPositions][v], p);
            const uint32_t weight = word(weights, p), bias = word(biases, p);
            const float low = fmaf(x[0] * rstd[half], bf16_low(weight),
                                   bf16_low(bias) + bf16_low(added_pair));
            const float high = fmaf(x[1] * rstd[half], bf16_high(weight),
                                    bf16_high(bias) + bf16_high(added_pair));
            word(made, p) = bf16_pair(low, high);
          }
          if (position[half] < m.positions) store_past(targets[half] + v * 4, made);
        }
#pragma unroll
        for (int half = 0; half < kPositions; ++half)
          added[half][v] = load_ahead(positions[half] + v * 4);
      }
      targets[0] += kStemColumns / 8;
      targets[1] += kStemColumns / 8;
      matrices += kStemMatrices<kSteps>;
      parameters += kStemParameters * static_cast<int>(sizeof(uint4));
    }
  }
}

}  // namespace snapkernels
