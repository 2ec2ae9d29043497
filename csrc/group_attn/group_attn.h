// Absorbed cross-attention inside groups as launches on raw pointers. Knows nothing of torch.
//
// The weights of the heads are folded into the latents, so that of patch tokens only x is read:
// scores are rstd (x - mean) . A[j] in base 2, of kGroupColumns columns
// j = head * kGroupLatents + latent.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace snapkernels {

constexpr int kGroupColumns = 384;  // of scores, of a group: heads times latents
constexpr int kGroupLatents = 24;
constexpr int kGroupBlock = 128;    // tokens whose sums the first pass of read writes
constexpr int kGroupWidths = 256;   // what channels come in

// Contiguous, bfloat16 where not said otherwise. "In order" means that of 32 the one at
// 8 q + 2 b + e, q and b 0 to 3, e 0 or 1, is 8 b + 2 q + e: accumulators have those together.
struct GroupArguments {
  const void* patches;        // (groups, tokens, width)
  const void* absorbed;       // A: (groups, kGroupColumns, width)
  const float* absorbed_sum;  // (groups, kGroupColumns): A summed over the width
  int groups, tokens, width;
};

// patches + P values + bias, P the softmax of scores + score_bias over the columns of a head.
struct GroupWriteArguments {
  GroupArguments of;
  const float* score_bias;  // (groups, kGroupColumns)
  const void* values;       // (groups, kGroupColumns, width), channels in the inverse order
  const void* bias;         // (width,)
  void* out;                // (groups, tokens, width)
  // What a backward wants, or null: P (groups, tokens, kGroupColumns), columns in order; and of the
  // tokens (groups, tokens).
  void* weights;
  float *mean, *rstd;
  float eps;
};

cudaError_t group_write(const GroupWriteArguments& given, cudaStream_t stream);

// LayerNorm's tokens, averaged with the softmax of the scores over all tokens of a group; they come
// in kGroupBlock.
struct GroupReadArguments {
  GroupArguments of;
  const void *norm_weight, *norm_bias;  // (width,)
  // Scratch: 2^(score - m) rstd, tokens in order; of every kGroupBlock tokens m, and the sums of
  // 2^(score - m) and of what was rounded times the tokens' means.
  void* weights;               // (groups, kGroupColumns, tokens)
  float *most, *sums, *means;  // (groups, tokens / kGroupBlock, kGroupColumns)
  void* context;               // (heads, groups, kGroupLatents, width)
  void* average;               // likewise, without norm_weight and norm_bias; or null
  float* log_sum;              // (groups, kGroupColumns): log2 of the sum of 2^score; or null
  float *mean, *rstd;          // of the patches: (groups, tokens); or null
  float eps;
};

cudaError_t group_read(const GroupReadArguments& given, cudaStream_t stream);

}  // namespace snapkernels
