// Self-attention over all latents in 8 bits, from LayerNorm to residual: what its kernels are told.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "linear/linear.h"

namespace snapkernels {

constexpr int kHeadsTokens = 128;  // that k and v of a head have one scale for, from token 0 on

// The core: softmax(q k^T / sqrt(head)) v for every head of every video. Scales of v are above 0,
// and values of rows that are no token are 0.
struct LatentCoreArguments {
  const void* qk;        // (padded, 2 inner), int8: q, then k
  const void* v;         // (inner, padded), int8
  float* q_scale;        // (heads, padded)
  float* k_scale;        // (heads, padded / kHeadsTokens)
  float* v_scale;        // likewise
  void* out;             // (batch length, inner), e4m3
  float* out_scale;      // (batch length)
  int batch, length;     // length: tokens of a video
  int stride;            // rows from one video to the next: length, to a multiple of kHeadsTokens
  int padded;            // rows of them all, to a multiple of 256
  int heads, head;       // head: its width, 64 or 128; heads have a multiple of 128 together
};

// q, k and v of the tokens.
cudaError_t product_heads(const ProductArguments& given, int head, cudaStream_t stream);
cudaError_t latent_core(const LatentCoreArguments& given, cudaStream_t stream);

}  // namespace snapkernels
