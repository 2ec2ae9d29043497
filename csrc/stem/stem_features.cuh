// The first kernel of the stem's backward: xhat of all tokens, once.
//
// The pass over the gradient needs xhat in every slice of 256 columns, and so does the sum of its
// products with itself. Making it anew each time, pixels to bfloat16, took the warps that fill a
// stage 5,300 cycles where device memory needs 2,500. Here a block makes one stage's matrix, as it
// is to lie in shared memory, and those kernels fetch it with one instruction: 13 KB for 64 tokens,
// 31 MB of a video of the upsampler, which L2 still has when it is read.
#pragma once

#include "patch_grid.cuh"
#include "stem/stem_backward.h"
#include "stem/stem_forward.cuh"
#include "wgmma.cuh"

namespace snapkernels {

constexpr int kBackwardTokens = kStemStage;
constexpr int kBackwardChannels = 3;   // of the video; the other has as many or is not there
constexpr int kBackwardSlots = 6;      // positions that may be incomplete at once
constexpr int kFeatureThreads = 128;   // a warp has a row of every patch, a lane two tokens
constexpr int kFeatureBlocksEach = 5;  // of a multiprocessor: 60 KB of pixels under way

struct StemBackwardMap {
  StemGeometry at;
  int positions, slices;
  float share;                  // 1 / D
  float low_rows, low_columns;  // pixels of the low-resolution video in one of the video
  Divider alike;                // B G: tokens of a position
  PatchGrid grid;
};

// Token k of the backward's order, and where its patch lies.
struct StemPatch {
  uint32_t token, position;
  uint32_t b, t, y, x;  // y, x: of its first pixel

  __device__ StemPatch(const StemBackwardMap& m, uint32_t k) {
    position = m.alike.quotient(k);
    const uint32_t bg = k - position * m.alike.divisor;
    token = bg * m.positions + position;
    const PatchPlace patch(m.grid, bg, position);
    b = patch.b;
    t = patch.t;
    y = patch.row * kStemPatch;
    x = patch.column * kStemPatch;
  }
};

// A row of pixels of token k's patch: under way from here on, and xhat, unrounded, after finish().
template <int kChannels>
struct StemPixels {
  int y, x;  // of its first pixel; y is -1 past the last token and below the last row: zeros there
  float rstd, scale;
  // Of the video the row; of the other the four around its first pixel: above, then below.
  float4 of[kChannels];

  __device__ StemPixels(const StemBackwardMap& m, const StemBackwardArguments& given, uint32_t k,
                        uint32_t last, int row) {
    const StemGeometry& at = m.at;
    const StemPatch patch(m, min(k, last - 1));
    const int64_t channel = static_cast<int64_t>(at.frames) * at.height * at.width;
    const int wanted = patch.y + row, found = min(wanted, at.height - 1);
    y = k < last && wanted == found ? wanted : -1;
    x = patch.x;
    rstd = given.rstd[patch.token];
    scale = given.scale[patch.b];
    const float* pixels = given.video + patch.b * kBackwardChannels * channel +
                          (static_cast<int64_t>(patch.t) * at.height + found) * at.width + x;
#pragma unroll
    for (int c = 0; c < kBackwardChannels; ++c, pixels += channel)
      of[c] = load_once(pixels);
    if constexpr (kChannels > kBackwardChannels) {
      const StemTap down(found, m.low_rows, at.low_height), across(x, m.low_columns, at.low_width);
      const float* frame = low_frame(m, given, patch);
      const float *first = frame + down.first * at.low_width + across.first,
                  *below = frame + down.second * at.low_width + across.first;
      const int next = across.second - across.first;
#pragma unroll
      for (int c = kBackwardChannels; c < kChannels; ++c) {
        of[c] = {first[0], first[next], below[0], below[next]};
        first += low_channel(m);
        below += low_channel(m);
      }
    }
  }

  __device__ void finish(const StemBackwardMap& m, const StemBackwardArguments& given, uint32_t k) {
    if constexpr (kChannels > kBackwardChannels) {
      const StemTap down(y, m.low_rows, m.at.low_height), begin(x, m.low_columns, m.at.low_width),
          second(x + 1, m.low_columns, m.at.low_width), third(x + 2, m.low_columns, m.at.low_width),
          end(x + 3, m.low_columns, m.at.low_width);
#pragma unroll
      for (int c = kBackwardChannels; c < kChannels; ++c) {
        const float left = down.between(of[c].x, of[c].z), right = down.between(of[c].y, of[c].w);
        of[c] = {begin.between(left, right), second.between(left, right),
                 third.between(left, right), end.between(left, right)};
      }
      if (begin.first != end.first && y >= 0)  // never at eight times the size
        read_again(m, low_frame(m, given, StemPatch(m, k)), down);
    }
#pragma unroll
    for (int c = 0; c < kChannels; ++c) {
      const float factor = c < kBackwardChannels ? scale : 1.f;
      float4& v = of[c];
      v = {v.x * factor * rstd, v.y * factor * rstd, v.z * factor * rstd, v.w * factor * rstd};
      if (y < 0) v = {};
    }
  }

 private:
  static __device__ int64_t low_channel(const StemBackwardMap& m) {
    return static_cast<int64_t>(m.at.frames) * m.at.low_height * m.at.low_width;
  }

  static __device__ const float* low_frame(const StemBackwardMap& m,
                                           const StemBackwardArguments& given,
                                           const StemPatch& patch) {
    return given.low_res + patch.b * m.at.low_channels * low_channel(m) +
           static_cast<int64_t>(patch.t) * m.at.low_height * m.at.low_width;
  }

  // The low-resolution video where pixels of the row lie between different columns of it.
  __device__ void read_again(const StemBackwardMap& m, const float* frame, const StemTap& down) {
    const float *const above = frame + down.first * m.at.low_width,
                *const below = frame + down.second * m.at.low_width;
#pragma unroll 1
    for (int i = 0; i < kStemPatch; ++i) {
      const StemTap tap(x + i, m.low_columns, m.at.low_width);
#pragma unroll
      for (int c = kBackwardChannels; c < kChannels; ++c) {
        const int64_t to = (c - kBackwardChannels) * low_channel(m);
        const float left = down.between(above[to + tap.first], below[to + tap.first]);
        const float right = down.between(above[to + tap.second], below[to + tap.second]);
        of[c] = {of[c].y, of[c].z, of[c].w, tap.between(left, right)};
      }
    }
  }
};

// Tokens k of whole positions, in stages of 64.
struct StemRange {
  int range;
  uint32_t position, first, last;  // k from first to last - 1
  int tiles;

  __device__ StemRange(const StemBackwardMap& m, int ranges, int which) : range(which) {
    position = static_cast<int64_t>(range) * m.positions / ranges;
    const uint32_t end = static_cast<int64_t>(range + 1) * m.positions / ranges;
    first = position * m.alike.divisor;
    last = end * m.alike.divisor;
    tiles = (last - first + kBackwardTokens - 1) / kBackwardTokens;
  }
};

// A stage's matrix: a row of 64 tokens for each feature, then rstd as two bfloat16, and for six
// positions in turn which tokens are theirs. Tokens past the last are zeros.
template <int kChannels>
struct StemXhat {
  static constexpr int kFeatures = kChannels * kStemPatch * kStemPatch;
  static constexpr int kColumns = kFeatures + kStemExtra;
  static constexpr int kBlocks = kColumns / 8;
  static constexpr int kMatrix = kColumns * kMatrixRow;  // bytes
  static_assert(kMatrix % 1024 == 0);

  // That of a range's tile, in device memory.
  static __device__ unsigned char* matrix(const StemBackwardArguments& given, int range, int tile) {
    return static_cast<unsigned char*>(given.features) +
           (static_cast<int64_t>(range) * given.tiles + tile) * kMatrix;
  }
};

// xhat of a lane's two tokens k and k + 1, and its share of the rows after the features: a warp
// writes whole rows.
template <int kChannels>
__device__ void write_xhat(const StemBackwardMap& m, const StemRange& of,
                           const StemPixels<kChannels> (&pixels)[2], uint32_t k, int row, int lane,
                           unsigned char* matrix) {
  // Pixel i of channel 0, then 16 features on for each channel, which are as swizzled.
  const auto at = [&](int feature) -> uint32_t* {
    return reinterpret_cast<uint32_t*>(matrix + swizzled(feature, lane / 4) + lane % 4 * 4);
  };
  constexpr int kApart = kStemPatch * kStemPatch * kMatrixRow / 4;  // of channels, in words
  uint32_t* const first[kStemPatch] = {at(row * 4), at(row * 4 + 1), at(row * 4 + 2),
                                       at(row * 4 + 3)};
#pragma unroll
  for (int c = 0; c < kChannels; ++c) {
    const float4 &low = pixels[0].of[c], &high = pixels[1].of[c];
    first[0][c * kApart] = bf16_pair(low.x, high.x);
    first[1][c * kApart] = bf16_pair(low.y, high.y);
    first[2][c * kApart] = bf16_pair(low.z, high.z);
    first[3][c * kApart] = bf16_pair(low.w, high.w);
  }
  float extra[2][2];  // [row][token]
#pragma unroll
  for (int which = 0; which < 2; ++which) {
    const int slot = (m.alike.quotient(k + which) - of.position) % kBackwardSlots;
    const float rstd = pixels[which].rstd, rounded = bf16_rounded(rstd);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float part = i ? rstd - rounded : rounded, mine = slot == 2 * (row - 1) + i ? 1.f : 0.f;
      extra[i][which] = k + which >= of.last ? 0.f : row == 0 ? part : mine;
    }
  }
  *at(kChannels * 16 + 2 * row) = bf16_pair(extra[0][0], extra[0][1]);
  *at(kChannels * 16 + 2 * row + 1) = bf16_pair(extra[1][0], extra[1][1]);
}

// A block a tile, of as many as the longest range has for every range.
template <int kChannels>
__global__ void __launch_bounds__(kFeatureThreads, kFeatureBlocksEach)
    stem_features_kernel(const __grid_constant__ StemBackwardMap m,
                         const __grid_constant__ StemBackwardArguments given) {
  const int range = blockIdx.x / given.tiles, tile = blockIdx.x - range * given.tiles;
  const int lane = threadIdx.x % 32, row = threadIdx.x / 32;
  const StemRange of(m, given.ranges, range);
  // In this order: whoever runs early then knows that all before this kernel is done.
  kernel_before_done();
  next_kernel_may_start();
  if (tile >= of.tiles) return;
  const uint32_t k = of.first + tile * kBackwardTokens + 2 * lane;
  StemPixels<kChannels> pixels[2] = {{m, given, k, of.last, row}, {m, given, k + 1, of.last, row}};
  pixels[0].finish(m, given, k);
  pixels[1].finish(m, given, k + 1);
  write_xhat<kChannels>(m, of, pixels, k, row, lane,
                        StemXhat<kChannels>::matrix(given, range, tile));
}

}  // namespace snapkernels
