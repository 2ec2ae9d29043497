// softmax(q k^T / sqrt(head)) v of 8-bit integers, with exact sums and a softmax in float32.
//
// An item is a head and 64 queries for each of a block's three warpgroups of consumers; a fourth
// copies. Keys and values come 128 tokens at a time, as scales have them: k in the order in which a
// lane's scores are four tokens that follow each other, as a product wants its rows from registers,
// and rows of v in that in which a lane's accumulators are 16 columns that do. A warpgroup has no
// registers to begin a product before the last has ended: the other two multiply meanwhile.
//
// P = exp2(score - the row's largest of this tile) is rounded to kWhole steps, and its sum is that
// of what it was rounded to. By the largest so far the many keys beside one that outweighs them
// would be lost in all tiles; in its own they are rounded up or down by a pattern (kDither), so
// that they are not lost together. A tile's products with v are added in float32.
#pragma once

#include "bf16.cuh"
#include "latent_attn/integers.cuh"
#include "latent_attn/latent_attn.h"
#include "linear/products.cuh"
#include "tensor_copy.cuh"

namespace snapkernels {

constexpr int kCoreConsumers = 3;  // warpgroups
constexpr int kCoreThreads = 128 * (1 + kCoreConsumers);
constexpr int kCoreQueries = 64 * kCoreConsumers;
static_assert(kCoreQueries <= 256);  // rows of a box
constexpr int kCoreStages = 4;
constexpr int kCoreKeysBytes = kHeadsTokens * kMatrixRow;
constexpr int kCoreStageBytes = 2 * kCoreKeysBytes;  // with values, which may be fewer
constexpr int kCoreQueriesBytes = kCoreQueries * kMatrixRow;
constexpr int kCoreAsked = kCoreStages * kCoreStageBytes;  // two places of queries
constexpr int kCoreBarriers = kCoreAsked + 2 * kCoreQueriesBytes;
constexpr int kCoreMail = kCoreBarriers + 16 * kCoreStages + 16 * 2;
// Of an item: what it is, v's last counts and the result's scale, and its queries' scales.
constexpr int kCoreItemCounts = 16;
constexpr int kCoreItemScale = 20;
constexpr int kCoreItemQueries = 32;
constexpr int kCoreItemBytes = kCoreItemQueries + 4 * kCoreQueries;
constexpr int kCoreTileMail = kCoreMail + 2 * kCoreItemBytes;
constexpr int kCoreRows = kCoreTileMail + 8 * kCoreStages;
constexpr int kCoreRowsBytes = 2 * 8;  // of a consumer's lane: it has no registers for them
constexpr int kCoreShared = kCoreRows + kCoreRowsBytes * 128 * kCoreConsumers;

// Of the 128 registers a thread that a block of 512 starts with.
constexpr int kCoreCopier = 32;
constexpr int kCoreRegisters = 160;

// The largest P: 255 is the last that 8 bits hold, and a score may be rounded up.
constexpr float kWhole = 240;
constexpr float kWholeLog = 7.906890595608519f;  // log2
constexpr float kMostCount = 127;                // of q, k and v
constexpr int kNoScore = 1 << 31;
// What of a tile adds nothing to be seen: a count of v beside the largest so far, and a score below
// the largest so far, in base 2. It is counted as if it were no less, which the result's scale, of
// all values of a video, is far above. Scores have to be below 2^30, for kFar to be something.
constexpr float kLeastCount = 1e-15f;
constexpr float kFar = 40;

// What blocks compute, every so many-th item each: those of the same keys and values are together.
struct CoreWork {
  const LatentCoreArguments& of;
  int some;  // items of a head

  __host__ __device__ explicit CoreWork(const LatentCoreArguments& of)
      : of(of), some((of.length + kCoreQueries - 1) / kCoreQueries) {}
  __host__ __device__ int items() const { return of.batch * of.heads * some; }
  __device__ int head(int item) const { return item / some % of.heads; }
  __device__ int video(int item) const { return item / some / of.heads; }
  __device__ int first_query(int item) const { return item % some * kCoreQueries; }
  __device__ int tiles() const { return of.stride / kHeadsTokens; }  // of a video
};

using CoreRing = Ring<kCoreStages, kCoreStageBytes>;
using CoreQueries = Ring<2, kCoreQueriesBytes>;

// The rings as a block has them at its tile or item `turn`: consumers have no registers for rings.
__device__ inline CoreRing core_ring(uint32_t base, uint32_t turn) {
  return {base, base + kCoreBarriers, int(turn % kCoreStages), int(turn / kCoreStages % 2)};
}
__device__ inline CoreQueries core_queries(uint32_t base, uint32_t turn) {
  return {base + kCoreAsked, base + kCoreBarriers + 16 * kCoreStages, int(turn % 2),
          int(turn / 2 % 2)};
}

// A box has 128 columns, of one head or two.
template <int kHead>
__device__ inline void copy_core(const CoreWork& work, const CUtensorMap* q, const CUtensorMap* k,
                                 const CUtensorMap* v, CoreRing ring, CoreQueries queries) {
  for (int item = blockIdx.x; item < work.items(); item += gridDim.x) {
    const int video = work.video(item), head = work.head(item), column = head * kHead / 128 * 128;
    queries.wait_free();
    phase_expect(queries.full(), kCoreQueriesBytes);
    copy_box(queries.place(), q, column, video * work.of.stride + work.first_query(item), 0,
             queries.full());
    queries.next();
#pragma unroll 1
    for (int i = 0; i < work.tiles(); ++i) {
      const int tile = video * work.tiles() + i;
      ring.wait_free();
      phase_expect(ring.full(), kCoreKeysBytes + kHead * kMatrixRow);
      copy_box_in_order(ring.place(), k, work.of.heads * kHead + column, tile * 8, ring.full());
      copy_box_in_order(ring.place() + kCoreKeysBytes, v, tile * kHeadsTokens, head * kHead / 64,
                        ring.full());
      ring.next();
    }
  }
}

// What the consumers are told of an item, with its queries, by a warp: this, their scales, and with
// the last tile of the item its result's.
struct CoreItem {
  int video, head, query;
  int some;  // 0: there is no more
};

__device__ inline uint32_t core_mail(uint32_t base, uint32_t turn) {
  return base + kCoreMail + kCoreItemBytes * (turn % 2);
}

__device__ inline CoreItem read_item(uint32_t from) {
  const uint4 four = load_vector(from);
  return {int(four.x), int(four.y), int(four.z), int(four.w)};
}

__device__ inline void write_item(uint32_t to, const CoreItem& of) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(of.video), "r"(of.head),
               "r"(of.query), "r"(of.some)
               : "memory");
}

// The scale that no weighted mean of a video's values passes, with every head's: by a warp.
__device__ inline float values_scale(const LatentCoreArguments& of, int video) {
  const int tiles = of.stride / kHeadsTokens, scales = of.padded / kHeadsTokens;
  float most = 0;
#pragma unroll 1
  for (int head = thread_again() % 32; head < of.heads; head += 32) {
#pragma unroll 4
    for (int tile = video * tiles; tile < (video + 1) * tiles; ++tile) {
      most = larger(most, of.v_scale[head * scales + tile]);
    }
  }
#pragma unroll
  for (int step = 16; step > 0; step /= 2) {
    most = larger(most, __shfl_xor_sync(~0u, most, step));
  }
  return most * (kMostCount / 448);
}

// By a warp: items and tiles as their consumers are told of them, which come with what is copied.
template <int kHead>
__device__ inline void announce(const CoreWork& work, CoreRing ring, CoreQueries queries,
                                uint32_t base) {
  const auto& of = work.of;
  const auto lane = [] { return thread_again() % 32; };
  const int tiles = work.tiles();
  for (int item = blockIdx.x; item < work.items(); item += gridDim.x) {
    const int video = work.video(item), head = work.head(item), first = work.first_query(item);
    const int row = head * of.padded + video * of.stride, tile = row / kHeadsTokens;
    const uint32_t mail = core_mail(base, queries.at);
    queries.wait_free();
#pragma unroll 1
    for (int i = lane(); i < kCoreQueries; i += 32) {
      const float q_scale = of.q_scale[row + min(first + i, of.length - 1)];
      store_float(mail + kCoreItemQueries + 4 * i, q_scale * (1.4426950408889634f * rsqrtf(kHead)));
    }
    if (lane() == 0) write_item(mail, {video, head, first, 1});
    __syncwarp();
    if (lane() == 0) phase_arrive(queries.full());
    queries.next();

    // v of tile after tile in counts of the last one's, if they are not too small beside others.
    float most = 0, count = 0;
#pragma unroll 1
    for (int i = 0; i < tiles; ++i) {
      const float k_scale = of.k_scale[tile + i], v_scale = of.v_scale[tile + i];
      most = larger(most, v_scale);
      const float now = larger(v_scale, most * kLeastCount);
      const float less = count / now;
      count = now;
      if (i == tiles - 1) {
        const float scale = values_scale(of, video);
        if (lane() == 0) {
          store_float(mail + kCoreItemCounts, count / scale);
          store_float(mail + kCoreItemScale, scale);
        }
      }
      ring.wait_free();
      if (lane() == 0) {
        store_float(base + kCoreTileMail + 8 * ring.at, k_scale);
        store_float(base + kCoreTileMail + 8 * ring.at + 4, less);
        phase_arrive(ring.full());
      }
      ring.next();
    }
  }
  queries.wait_free();
  if (lane() < 2) {
    write_item(core_mail(base, queries.at), {});
    phase_arrive(queries.full());  // for what is not copied, too
  }
}

// Of a lane's rows r and r + 8, in shared memory: the largest score so far and the total of its own
// P. This and sums are in counts of the last tile's P, which is kWhole at that tile's largest score
// and counts as if that were `unit`: the same, or kFar below the largest so far, if that is more.
__device__ inline uint32_t core_most(uint32_t rows, int i) { return rows + 8 * i; }
__device__ inline uint32_t core_total(uint32_t rows, int i) { return rows + 8 * i + 4; }

// The scores of a tile, in counts of `count`, become P, beside which what is so far has `grown`.
// `some`: tokens from the tile's first on that are of the video.
__device__ inline void weigh(uint32_t (&weights)[16], uint32_t rows, float (&unit)[2],
                             float (&grown)[2], Counts<16>& scores, const float (&count)[2],
                             int some) {
  // Sixteenths that are added before rounding, by a lane's scores in turn: a P of 0 stays 0.
  constexpr int kDither[8] = {-7, 1, -3, 5, -5, 3, -1, 7};
  const int lane_token = thread_again() % 4 * 4;
  // Row i of the first or second 16 bytes of 32 tokens.
  const auto place = [](int word, int i) { return word / 2 * 4 + word % 2 * 2 + i; };
  if (some < kHeadsTokens) {
#pragma unroll
    for (int j = 0; j < 16; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int token = lane_token + 16 * (j / 2) + 2 * (j % 2) + e % 2;
        if (token >= some) scores[j][e] = kNoScore;
      }
    }
  }
  float of_tile[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    int tops[2] = {kNoScore, kNoScore};
#pragma unroll
    for (int j = 0; j < 16; ++j) {
      tops[j % 2] = __vimax3_s32(tops[j % 2], scores[j][2 * i], scores[j][2 * i + 1]);
    }
    int highest = max(tops[0], tops[1]);
    highest = max(highest, __shfl_xor_sync(~0u, highest, 1));
    highest = max(highest, __shfl_xor_sync(~0u, highest, 2));
    of_tile[i] = static_cast<float>(highest) * count[i];
    const float most = larger(load_float(core_most(rows, i)), of_tile[i]);
    store_float(core_most(rows, i), most);
    const float now = larger(of_tile[i], most - kFar);
    grown[i] = exp2_fast(unit[i] - now);
    unit[i] = now;
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float shift = kWholeLog - of_tile[i];
#pragma unroll
    for (int word = 0; word < 8; ++word) {
      float weight[4];
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float score = static_cast<float>(scores[2 * word + e / 2][2 * i + e % 2]);
        weight[e] = exp2_fast(fmaf(score, count[i], shift)) + kDither[(4 * word + e) % 8] / 16.f;
      }
      weights[place(word, i)] = bytes(weight);
    }
  }
  // Values of what is no token are 0.
  uint32_t sum[2] = {0, 0};
  if (some < kHeadsTokens) {
#pragma unroll
    for (int word = 0; word < 8; ++word) {
      const uint32_t ones = 0x01010101u & first_bytes(some - lane_token - 16 * word);
#pragma unroll
      for (int i = 0; i < 2; ++i) sum[i] = __dp4a(weights[place(word, i)], ones, sum[i]);
    }
  } else {
#pragma unroll
    for (int word = 0; word < 8; ++word) {
#pragma unroll
      for (int i = 0; i < 2; ++i) sum[i] = __dp4a(weights[place(word, i)], 0x01010101u, sum[i]);
    }
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float before = load_float(core_total(rows, i)) * grown[i];
    store_float(core_total(rows, i), before + static_cast<float>(sum[i]));
  }
}

// By a warp, which has read the place.
__device__ inline void free_core(uint32_t barrier) {
  __syncwarp();
  if (thread_again() % 32 == 0) phase_arrive(barrier);
}

// A lane's first row of a warpgroup's queries from `first` on.
__device__ inline int core_row(int first) {
  const int thread = thread_again();
  return first + (thread / 128 - 1) * 64 + thread % 128 / 32 * 16 + thread % 32 / 4;
}

template <int kHead>
__device__ inline void attend(const LatentCoreArguments& of, uint32_t base, int turn) {
  static_assert(kHead == 64 || kHead == 128);
  constexpr int kBlocks = kHead / 8;
  const int tiles = of.stride / kHeadsTokens, warpgroup = thread_again() / 128 - 1;
  const auto mail = [&] { return core_mail(base, again(turn)); };
  if (read_item(mail()).query + 64 * warpgroup >= of.length) {
#pragma unroll 1
    for (int tile = 0; tile < tiles; ++tile) {
      const auto ring = core_ring(base, static_cast<uint32_t>(again(turn)) * tiles + tile);
      ring.wait_full();
      free_core(ring.free());
    }
    return;
  }
  float sums[kBlocks][4];
#pragma unroll
  for (int j = 0; j < kBlocks; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) sums[j][i] = 0;
  }
  const float least = -__int_as_float(0x7f800000);
  float unit[2] = {least, least};
  const auto rows = [&] { return base + kCoreRows + kCoreRowsBytes * (thread_again() - 128); };
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    store_float(core_most(rows(), i), least);
    store_float(core_total(rows(), i), 0);
  }
#pragma unroll 1
  for (int left = of.length; left > 0; left -= kHeadsTokens) {
    const auto ring_now = [&] {
      const uint32_t first = static_cast<uint32_t>(again(turn)) * tiles;
      return core_ring(base, first + (of.length - left) / kHeadsTokens);
    };
    const auto ring = ring_now();
    ring.wait_full();
    Counts<16> scores;
    const uint32_t in_row = kHead < 128 ? read_item(mail()).head % 2 * kHead : 0;
    const uint32_t own_queries = core_queries(base, again(turn)).place() +
                                 64 * kMatrixRow * (thread_again() / 128 - 1);
    const uint64_t query_view = matrix_view(own_queries + in_row);
    const uint64_t keys = matrix_view(ring.place() + in_row);
    multiply_fence();
    multiply_first(scores, query_view, keys);
#pragma unroll
    for (int at = 32; at < kHead; at += 32) {
      multiply_add(scores, further(query_view, at), further(keys, at));
    }
    multiply_commit();
    const float k_scale = load_float(base + kCoreTileMail + 8 * ring.at);
    const uint32_t q_scales = mail() + kCoreItemQueries + 4 * core_row(0);
    const float count[2] = {load_float(q_scales) * k_scale, load_float(q_scales + 32) * k_scale};
    multiply_wait<0>();
    settle(scores);
    uint32_t weights[16];
    float grown[2];
    weigh(weights, rows(), unit, grown, scores, count, left);

    Counts<kBlocks> part;
    const auto read = ring_now();
    const uint64_t values = matrix_view(read.place() + kCoreKeysBytes);
    multiply_fence();
#pragma unroll
    for (int step = 0; step < 4; ++step) {
      const uint32_t(&held)[4] = *reinterpret_cast<const uint32_t(*)[4]>(&weights[4 * step]);
      if (step == 0) {
        multiply_held_first(part, held, values);
      } else {
        multiply_held(part, held, further(values, 32 * step));
      }
    }
    multiply_commit();
    const float less = load_float(base + kCoreTileMail + 8 * read.at + 4);
#pragma unroll
    for (int i = 0; i < 2; ++i) grown[i] *= less;
    multiply_wait<0>();
#pragma unroll
    for (int i = 0; i < 16; ++i) asm volatile("" ::"r"(weights[i]));  // tensor cores' until here
    settle(part);
    free_core(read.free());
#pragma unroll
    for (int j = 0; j < kBlocks; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        sums[j][i] = fmaf(sums[j][i], grown[i / 2], static_cast<float>(part[j][i]));
      }
    }
  }
  float total[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    total[i] = load_float(core_total(rows(), i));
    total[i] += __shfl_xor_sync(~0u, total[i], 1);
    total[i] += __shfl_xor_sync(~0u, total[i], 2);
  }

  const CoreItem ended = read_item(mail());
  const int inner = of.heads * kHead;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = core_row(ended.query) + 8 * i;
    if (row >= of.length) continue;
    const int64_t at = static_cast<int64_t>(ended.video) * of.length + row;
    if (ended.head == 0 && thread_again() % 4 == 0) {
      of.out_scale[at] = load_float(mail() + kCoreItemScale);
    }
    const float factor = load_float(mail() + kCoreItemCounts) / total[i];
    auto* to = static_cast<uint8_t*>(of.out) + at * inner + ended.head * kHead;
#pragma unroll
    for (int group = 0; group < kHead / 64; ++group) {
      uint32_t words[4];
#pragma unroll
      for (int word = 0; word < 4; ++word) {
        const int j = group * 8 + 2 * word;
        words[word] = e4m3_four(sums[j][2 * i] * factor, sums[j][2 * i + 1] * factor,
                                sums[j + 1][2 * i] * factor, sums[j + 1][2 * i + 1] * factor);
      }
      *reinterpret_cast<uint4*>(to + group * 64 + thread_again() % 4 * 16) =
          make_uint4(words[0], words[1], words[2], words[3]);
    }
  }
}

template <int kHead>
__global__ void __launch_bounds__(kCoreThreads, 1)
    latent_core_kernel(const __grid_constant__ CUtensorMap q, const __grid_constant__ CUtensorMap k,
                       const __grid_constant__ CUtensorMap v, LatentCoreArguments of) {
  extern __shared__ __align__(1024) uint8_t shared[];
  const uint32_t base = shared_address(shared);
  const auto ring = core_ring(base, 0);
  const auto queries = core_queries(base, 0);
  if (threadIdx.x == 0) {
    ring.begin(2, 4 * kCoreConsumers);  // the copies and what is told of them; each warp
    queries.begin(2, 4 * kCoreConsumers);
    phases_begun();
  }
  __syncthreads();
  after_kernel_before();

  const CoreWork work(of);
  if (threadIdx.x < 128) {
    registers_shrink<kCoreCopier>();
    if (threadIdx.x == 0) copy_core<kHead>(work, &q, &k, &v, ring, queries);
    if (threadIdx.x / 32 == 1) announce<kHead>(work, ring, queries, base);
  } else {
    registers_grow<kCoreRegisters>();
    for (int turn = 0;; ++turn) {
      core_queries(base, turn).wait_full();
      if (!read_item(core_mail(base, turn)).some) break;
      attend<kHead>(of, base, turn);
      free_core(core_queries(base, again(turn)).free());
    }
  }
}

}  // namespace snapkernels
