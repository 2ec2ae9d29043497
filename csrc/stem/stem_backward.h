// The gradients of the stem's weights as launches on raw pointers. Knows nothing of torch.
#pragma once

#include <cuda_runtime_api.h>

#include "stem/stem.h"

namespace snapkernels {

constexpr int kStemSlice = 256;       // columns of D of a block
constexpr int kStemHalf = 128;        // of them a warpgroup's: c1 and c2 are sums over such
constexpr int kStemStage = 64;        // tokens that are multiplied at once
constexpr int kStemExtra = 8;         // columns beside the features in every product
constexpr int kStemLeastAlike = 13;  // tokens of a position: of fewer, 64 may have seven of them

// One table of positions, 3 or 6 channels, D in 256s, at least 13 groups of all videos.
struct StemBackwardArguments {
  const void* grad;  // of the tokens (B, G, N, D), contiguous, bfloat16, as all but rstd and videos
  const float* rstd;
  const float *video, *scale, *low_res;
  const void *weight, *bias, *norm_weight;
  void *d_weight, *d_bias, *d_norm_weight, *d_norm_bias, *d_positions;

  // Written and read again, float32 but for features, with F = features + 8. Tokens are in ranges
  // of whole positions, each in `tiles` tiles of 64, of which the last may be partial or not there.
  void* features;       // (ranges, tiles, F, 64), bfloat16: [xhat, ..], swizzled
  float* products;      // (ranges, D, F): of the gradient and [xhat, ..] over a range
  float* coefficients;  // (ranges, tiles, D / 128, 64, 2): c1 and c2, not yet added over D
  float* moments;       // (ranges D / 256, F, F): of [c2 xhat, ..] and [xhat, ..] over some tiles
  float* means;         // (F): over D, of weight and bias
  float* sums;          // (F, F): moments, added
  int ranges, tiles;    // ranges <= N
};

cudaError_t stem_backward(const StemBackwardArguments& given, const StemGeometry& at,
                          cudaStream_t stream);

}  // namespace snapkernels
