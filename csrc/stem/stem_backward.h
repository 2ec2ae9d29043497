// The gradients of the stem's weights as launches on raw pointers. Knows nothing of torch.
#pragma once

#include <cuda_runtime_api.h>

#include "stem/stem.h"

namespace snapkernels {

constexpr int kStemSlice = 256;       // columns of D of a block
constexpr int kStemHalf = 128;        // of them a warpgroup's: c1 and c2 are sums over such
constexpr int kStemExtra = 8;         // columns beside the features in every product
constexpr int kStemLeastAlike = 13;  // tokens of a position: of fewer, 64 may have seven of them

// One table of positions, 3 or 6 channels, D in 256s, at least 13 groups of all videos.
struct StemBackwardArguments {
  const void* grad;  // of the tokens (B, G, N, D), contiguous, bfloat16, as all but rstd and videos
  const float* rstd;
  const float *video, *scale, *low_res;
  const void *weight, *bias, *norm_weight;
  void *d_weight, *d_bias, *d_norm_weight, *d_norm_bias, *d_positions;

  // Written and read again, float32, with F = features + 8:
  float* products;      // (ranges, D, F): of the gradient and [xhat, ..] over a range of tokens
  float* coefficients;  // (D / 128, tokens, 2): c1 and c2, not yet added over D
  float* moments;       // (blocks, F, F): of [c2 xhat, ..] and [xhat, ..] over some tokens
  float* means;         // (F): over D, of weight and bias
  float* sums;          // (D + F, F): products, then moments, added
  int ranges, blocks;   // ranges <= N
};

cudaError_t stem_backward(const StemBackwardArguments& given, const StemGeometry& at,
                          cudaStream_t stream);

}  // namespace snapkernels
