// The stem as a launch on raw pointers. Knows nothing of torch.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace snapkernels {

constexpr int kStemPatch = 4;        // pixels of a side: a row of a patch is one float4
constexpr int kStemMaxChannels = 6;  // of both videos

// A video (B, C, T, H, W), a low-resolution one (B, c, T, h, w) and their tokens (B, G, N, D), all
// contiguous. The token grid has whole groups of rows: those from `height` on are zeros.
struct StemGeometry {
  int batch, channels, frames, height, width;  // of the video, in pixels
  int low_channels, low_height, low_width;     // low_channels is 0 where there is none
  int group_t, group_h, group_w;
  int tables;       // of positions: group g has table g % tables
  int token_width;  // D: a multiple of 64
};

struct StemArguments {
  const float *video, *scale, *low_res;
  const void *weight, *bias, *norm_weight, *norm_bias, *positions;  // bfloat16
  void* tokens;                                                     // bfloat16
  float* rstd;
  float eps;
};

// tokens = LN(W f + bias) norm_weight + norm_bias + positions, and the rstd of every token.
cudaError_t stem(const StemArguments& given, const StemGeometry& at, cudaStream_t stream);

}  // namespace snapkernels
