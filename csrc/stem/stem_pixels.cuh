// From two videos to a lane's side of the stem's product: where a token's patch lies, and its
// pixels.
#pragma once

#include "bf16.cuh"
#include "patch_grid.cuh"
#include "stem/stem.h"
#include "wgmma.cuh"

namespace snapkernels {

struct StemMap {
  StemGeometry at;
  int tokens, tiles;
  int alike;      // log2 of the tokens with the same positions in a tile: 0 to 3
  int positions;  // tokens >> alike
  float share;    // 1 / D
  float low_rows, low_columns;  // pixels of the low-resolution video in one of the video
  PatchGrid grid;
  Divider tables;
};

// A token, its row in the positions, and where its patch lies. A tile has the same patches of up to
// eight groups with the same positions, which L1 then has from the first: at the upsampler's size
// 38 MB come from L2 and not 302, as many as the tokens that go there.
struct StemPlace {
  uint32_t token, position;
  uint32_t b, t, y, x;  // y, x: of its first pixel

  __device__ StemPlace(const StemMap& m, int common, int which) {
    const uint32_t tables = m.tables.divisor;
    const uint32_t group_tokens = m.grid.group_tokens.divisor;
    const uint32_t sg = m.grid.group_tokens.quotient(common), n = common - sg * group_tokens;
    const uint32_t far = m.tables.quotient(sg), table = sg - far * tables;
    const uint32_t bg = ((far << m.alike) + which) * tables + table;
    token = bg * group_tokens + n;
    position = table * group_tokens + n;
    const PatchPlace patch(m.grid, bg, n);
    b = patch.b;
    t = patch.t;
    y = patch.row * kStemPatch;
    x = patch.column * kStemPatch;
  }
};

// The two pixels of a row or column that pixel `at` of a larger one lies between.
struct StemTap {
  int first, second;
  float right;  // weight of the second

  __device__ StemTap(uint32_t at, float ratio, int size) {
    const float source = fmaxf((at + .5f) * ratio - .5f, 0.f);  // half-pixel centres
    first = static_cast<int>(source);
    second = min(first + 1, size - 1);
    right = source - first;
  }

  __device__ float between(float a, float b) const { return (1.f - right) * a + right * b; }
};

// This lane's A of the product: row q of two tokens' patches, one step of K for each channel.
template <int kSteps>
__device__ void load_pixels(const StemMap& m, const StemArguments& given,
                            const StemPlace (&places)[2], int q, uint32_t (&a)[kSteps][4]) {
  const StemGeometry& at = m.at;
  const int64_t channel = static_cast<int64_t>(at.frames) * at.height * at.width;
  const int64_t low_plane = static_cast<int64_t>(at.low_height) * at.low_width;
  const int64_t low_channel = at.frames * low_plane;
  float scale[2];
  // Of the video a row of pixels; of the other, the four around its first: above, then below. All
  // are under way before one is used.
  float4 read[2][kSteps];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const StemPlace& place = places[half];
    // A row below the last is zeros; the last is read instead.
    const int y = min(place.y + q, at.height - 1);
    scale[half] = given.scale[place.b];
    const float* const row = given.video + place.b * at.channels * channel +
                             (static_cast<int64_t>(place.t) * at.height + y) * at.width + place.x;
    const StemTap down(y, m.low_rows, at.low_height);
    const StemTap across(place.x, m.low_columns, at.low_width);
    const int above = down.first * at.low_width, below = down.second * at.low_width;
    const float* const frames =
        given.low_res + place.b * at.low_channels * low_channel + place.t * low_plane;
#pragma unroll
    for (int c = 0; c < kSteps; ++c) {
      if (c < at.channels) {
        read[half][c] = load_once(row + c * channel);
      } else {
        const float* const frame = frames + (c - at.channels) * low_channel;
        read[half][c] = {frame[above + across.first], frame[above + across.second],
                         frame[below + across.first], frame[below + across.second]};
      }
    }
  }

#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const StemPlace& place = places[half];
    const bool inside = place.y + q < at.height;  // zeros whatever the scale
    const int y = min(place.y + q, at.height - 1);
    const StemTap down(y, m.low_rows, at.low_height);
    const StemTap across[kStemPatch] = {{place.x, m.low_columns, at.low_width},
                                        {place.x + 1, m.low_columns, at.low_width},
                                        {place.x + 2, m.low_columns, at.low_width},
                                        {place.x + 3, m.low_columns, at.low_width}};
    const int above = down.first * at.low_width, below = down.second * at.low_width;
    const float* const frames =
        given.low_res + place.b * at.low_channels * low_channel + place.t * low_plane;
#pragma unroll
    for (int c = 0; c < kSteps; ++c) {
      float4 x = read[half][c];
      if (c < at.channels) {
        x = {x.x * scale[half], x.y * scale[half], x.z * scale[half], x.w * scale[half]};
      } else {
        const float* const frame = frames + (c - at.channels) * low_channel;
        float left = down.between(x.x, x.z), right = down.between(x.y, x.w);
        float made[kStemPatch];
#pragma unroll
        for (int i = 0; i < kStemPatch; ++i) {
          const StemTap& tap = across[i];
          if (i > 0 && tap.first != across[i - 1].first) {  // never at eight times the size
            left = down.between(frame[above + tap.first], frame[below + tap.first]);
            right = down.between(frame[above + tap.second], frame[below + tap.second]);
          }
          made[i] = tap.between(left, right);
        }
        x = {made[0], made[1], made[2], made[3]};
      }
      a[c][half] = inside ? bf16_pair(x.x, x.y) : 0;
      a[c][half + 2] = inside ? bf16_pair(x.z, x.w) : 0;
    }
  }
}

}  // namespace snapkernels
