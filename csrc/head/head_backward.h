// The head's gradients of tokens and weights as launches on raw pointers. Knows nothing of torch.
#pragma once

#include <cuda_runtime_api.h>

namespace snapkernels {

constexpr int kHeadSlice = 256;       // columns of D of a block
constexpr int kHeadStageTokens = 64;  // of a stage; counts of tokens leave so much below 2^31

struct HeadBackwardArguments {
  const void *tokens, *feature_grad;  // (tokens, D) and dF: (tokens, F), bfloat16, contiguous
  const float* rows;                  // (tokens, 4): mean, 1 / standard deviation, c1, c2
  const float* scale;                 // of dF, c1 and c2: one number, or null for 1
  const void *norm_weight, *norm_bias, *weight;  // bfloat16, as all gradients
  void* d_tokens;                                // or null
  void *d_norm_weight, *d_norm_bias, *d_weight, *d_bias;

  // Written and read again, float32, or null, and no gradient of a weight is made.
  float* products;  // (ranges, D, F): sum of xhat dF over a range of tokens
  float* sums;      // (ranges, F): sum of dF
};

// D in 256s; F is 16 or 48; at least one range, and 65,535 at most.
cudaError_t head_backward(const HeadBackwardArguments& given, int tokens, int width, int features,
                          int ranges, cudaStream_t stream);

}  // namespace snapkernels
