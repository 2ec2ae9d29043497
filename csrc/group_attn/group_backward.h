// The backward of absorbed cross-attention over the patches, as launches on raw pointers.
//
// W are the rows that P multiplies: of read the gradient at the average, of write the values. With
// u of a token P W + dS A (write: dS A), dx = rstd (u - mean(u) - xn mean(u xn)) as LayerNorm's
// backward has it; dS, and P of read, have rstd in them.
#pragma once

#include "group_attn/group_attn.h"

namespace snapkernels {

constexpr int kSumsTokens = 16;  // whose sums are added up outside

struct GroupGradArguments {
  const void* rows;             // W: (groups, kGroupColumns, width)
  void *weights, *score_grads;  // P, dS: (groups, tokens, kGroupColumns), columns in order; the
                                // write reads P, the read makes it
  const float *mean, *rstd;     // of the patches: (groups, tokens)
  // (groups, tokens in kSumsTokens, 2, kGroupColumns): of dS as it is rounded, times the tokens'
  // means, and without their rstd. Tiles count whole: what is beyond the tokens is 0.
  float* sums;
  void* out;  // dx: (groups, tokens, width)
};

struct GroupWriteBackwardArguments {
  GroupArguments of;
  GroupGradArguments grads;
  const float* score_bias;   // (groups, kGroupColumns)
  const void* grad;          // dy: (groups, tokens, width)
  float* grad_sums;          // (groups, tiles, width): of dy, over tiles of kGroupBlock tokens
};

cudaError_t group_write_backward(const GroupWriteBackwardArguments& given, cudaStream_t stream);

struct GroupReadBackwardArguments {
  GroupArguments of;
  GroupGradArguments grads;
  const float* rows_sum;  // (groups, kGroupColumns): W summed over the width
  // Likewise, of every column: log2 of the sum of 2^score, and the sum of P dP over all tokens.
  const float *log_sum, *delta;
  float2* lines;  // scratch: (groups, tokens), what dx has beside u: a constant, less x times one
};

cudaError_t group_read_backward(const GroupReadBackwardArguments& given, cudaStream_t stream);

}  // namespace snapkernels
