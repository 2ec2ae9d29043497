// What becomes of F: the ends of the head. A thread has rows of four pixels of one token's patch.
#pragma once

#include "bf16.cuh"
#include "head/head.h"
#include "patch_grid.cuh"
#include "philox.cuh"

namespace snapkernels {

enum class HeadEnd { kF, kMix, kLoss };

constexpr int kHeadWarps = 16;  // of a block, which has a multiprocessor
constexpr int kHeadThreads = kHeadWarps * 32;

struct HeadMap {
  HeadGeometry at;
  int tokens, tiles;
  int64_t video_pixels;  // of all channels and frames
  PatchGrid grid;
};

// Where a token's patch lies.
struct PatchRows {
  int64_t first;  // its first pixel, in its video
  int b, rows;    // rows of the patch that the video has: 0 past the last token

  __device__ PatchRows(const HeadMap& m, uint32_t wanted) {
    const uint32_t token = min(wanted, m.tokens - 1);
    const uint32_t bg = m.grid.group_tokens.quotient(token);
    const PatchPlace patch(m.grid, bg, token - bg * m.grid.group_tokens.divisor);
    b = patch.b;
    const int t = patch.t, y = patch.row * kHeadPatch, x = patch.column * kHeadPatch;
    first = (static_cast<int64_t>(t) * m.at.height + y) * m.at.width + x;
    rows = token == wanted ? min(m.at.height - y, kHeadPatch) : 0;
  }

  // Row `row` of the patch, counted through its channels: whether there is one, and where.
  __device__ bool has(int row) const { return row % kHeadPatch < rows; }
  __device__ int64_t within(const HeadMap& m, int row) const {
    const int64_t rows_on = static_cast<int64_t>(row / kHeadPatch) * m.at.frames * m.at.height;
    return first + (rows_on + row % kHeadPatch) * m.at.width;
  }
};

__device__ inline float4 operator+(float4 a, float4 b) {
  return {a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w};
}
__device__ inline float4 operator*(float a, float4 b) {
  return {a * b.x, a * b.y, a * b.z, a * b.w};
}

__device__ inline float dot(float4 a, float4 b) {
  return (a.x * b.x + a.y * b.y) + (a.z * b.z + a.w * b.w);
}

__device__ inline uint2 rounded(float4 x) { return {bf16_pair(x.x, x.y), bf16_pair(x.z, x.w)}; }
__device__ inline float4 widened(uint2 x) {
  return {bf16_low(x.x), bf16_high(x.x), bf16_low(x.y), bf16_high(x.y)};
}

__device__ inline float4 four(const float* pixels, int64_t offset) {
  return *reinterpret_cast<const float4*>(pixels + offset);
}

// A token's moments, and what is left of its mean in its product.
struct HeadToken {
  int number;
  float mean, rstd, left;
};

// What becomes of a token's F, and what of it is saved: lanes n and n + 16 of a warp have even and
// odd rows of the patch. `product` is W (norm_weight (x - m)). Returns the loss of its pixels.
template <HeadEnd kEnd, bool kSaves, int kWidth, int kFeatures, typename Shared>
__device__ float end_of(const HeadMap& m, const HeadArguments& given, const HeadToken& token,
                        int first_row, const float* product, const Shared& shared) {
  const bool some = token.number < m.tokens;
  const PatchRows place(m, token.number);
  const uint2 key{static_cast<uint32_t>(given.seed), static_cast<uint32_t>(given.seed >> 32)};
  float factors[3] = {};
  int64_t sample = 0;
  if constexpr (kEnd != HeadEnd::kF) {
#pragma unroll
    for (int i = 0; i < 3; ++i) factors[i] = given.factors[3 * place.b + i];
  }
  if constexpr (kEnd == HeadEnd::kLoss) sample = given.sample[place.b];

  float loss = 0.f;
  float2 sums{};  // c1 and c2 of the lane's rows
  constexpr int kAtOnce = kEnd == HeadEnd::kLoss ? 1 : 2;  // the noise has work enough for one
#pragma unroll kAtOnce
  for (int row = first_row; row < kFeatures / kHeadPatch; row += 2) {
    const bool has = place.has(row);
    if (!kSaves && !has) continue;
    const auto of_row = [&](const float* of) { return four(of, row * kHeadPatch); };
    const float4 centred = token.rstd * (of_row(product) + -token.left * of_row(shared.gain));
    const float4 F = centred + of_row(shared.shift);
    float4 saved = F;
    if constexpr (kEnd == HeadEnd::kLoss) saved = {};
    if (has) {
      const int64_t within = place.within(m, row), offset = place.b * m.video_pixels + within;
      float4* const pixels = reinterpret_cast<float4*>(given.out + offset);
      if constexpr (kEnd == HeadEnd::kF) *pixels = F;
      if constexpr (kEnd == HeadEnd::kMix) {
        float4 mixed = factors[0] * F + factors[1] * four(given.video, offset);
        if (given.other != nullptr) mixed = mixed + factors[2] * four(given.other, offset);
        *pixels = mixed;
      }
      if constexpr (kEnd == HeadEnd::kLoss) {
        const float4 video = four(given.video, offset);
        const float4 normals = philox_normals(key, static_cast<uint64_t>(within) / 4, sample);
        const float4 off = F + -1.f * (factors[1] * video + factors[2] * normals);
        saved = factors[0] * off;
        loss += dot(saved, off);
      }
    }
    if constexpr (kSaves) {
      const uint2 bits = rounded(saved);
      if (some)
        static_cast<uint2*>(given.features)[token.number * int64_t{kFeatures / kHeadPatch} + row] =
            bits;
      if constexpr (kEnd == HeadEnd::kLoss) {
        sums.x += dot(widened(bits), of_row(shared.gain));
        sums.y += dot(widened(bits), centred);
      }
    }
  }
  if constexpr (kSaves && kEnd == HeadEnd::kLoss) {
    sums.x += __shfl_xor_sync(~0u, sums.x, 16);
    sums.y += __shfl_xor_sync(~0u, sums.y, 16);
    if (first_row == 0 && some)
      reinterpret_cast<float4*>(given.rows)[token.number] = {
          token.mean, token.rstd, sums.x * (1.f / kWidth), sums.y * (1.f / kWidth)};
  } else if (kSaves && first_row == 0 && some) {
    reinterpret_cast<float2*>(given.rows)[token.number] = {token.mean, token.rstd};
  }
  return loss;
}

}  // namespace snapkernels
