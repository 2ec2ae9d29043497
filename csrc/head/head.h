// The head and its ends as launches on raw pointers. Knows nothing of torch.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace snapkernels {

constexpr int kHeadPatch = 4;        // pixels of a side: a row of a patch is one float4
constexpr int kHeadTokens = 16;      // of a warp
constexpr int kHeadTile = 64;        // of a warpgroup; counts of tokens leave so much below 2^31
constexpr int kHeadPartials = 1024;  // float32 that head_loss may write to `partial`

// A video (B, C, T, H, W) and its tokens (B, G, N, D), both contiguous. The token grid has whole
// groups of rows: those from `height` on are read and written nowhere.
struct HeadGeometry {
  int batch, channels, frames, height, width;  // of the video, in pixels
  int group_t, group_h, group_w;
  int token_width;  // D
};

// Null where an end has no use for it.
struct HeadArguments {
  const void *tokens, *norm_weight, *norm_bias, *weight, *bias;  // bfloat16
  const float *video, *other;                                    // (B, C, T, H, W)
  const float* factors;                                          // (B, 3): mix or terms
  const int64_t* sample;                                         // (B,)
  float *out, *partial;
  uint64_t seed;
  float eps;

  // What a backward needs, of every token; both null where there will be none. Of head and head_mix
  // F in bfloat16, and mean and 1 / standard deviation. Of head_loss factors[b, 0] (F - target) in
  // bfloat16, zeros where there is no pixel, and four numbers: the same two, then with dF what was
  // written, c1 = dF . (W norm_weight) / D and c2 = dF . (F - bias - W norm_bias) / D.
  void* features;  // (tokens, features of a patch)
  float* rows;     // (tokens, 2 or 4)
};

// out = F = crop(unpatchify(W LN(tokens) + bias)).
cudaError_t head(const HeadArguments& given, const HeadGeometry& at, cudaStream_t stream);
// out = factors[b, 0] F + factors[b, 1] video + factors[b, 2] other.
cudaError_t head_mix(const HeadArguments& given, const HeadGeometry& at, cudaStream_t stream);
// out = mean(factors[b, 0] (F - (factors[b, 1] video + factors[b, 2] normals))^2), one number.
cudaError_t head_loss(const HeadArguments& given, const HeadGeometry& at, cudaStream_t stream);

}  // namespace snapkernels
