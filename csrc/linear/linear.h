// Linears and feed-forwards, from LayerNorm to residual: what their kernels are told.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace snapkernels {

// Rows of bfloat16 that become rows to multiply.
struct RowsArguments {
  const void* tokens;          // (rows, width), bfloat16
  const void* norm_weight;     // (width), bfloat16, or null: no LayerNorm
  const void* norm_bias;       // (width), with it
  const float* hidden_bound;   // (2): see hidden_scale
  void* out;                   // (rows, width), e4m3 or bfloat16
  float* scale;                // (rows), of e4m3
  float* hidden_scale;         // (rows), or null: that of the GELU of a product with these rows
  int* flags;                  // those of the products that follow, which begin at 0; or null
  int num_flags;
  int64_t rows;
  // Of e4m3, where videos are to begin at multiples of `stride`: rows of `out` and `scale`, and of
  // a video those that are tokens; the others become zeros with scale 0. Else 0.
  int padded, stride, length;
  int width;
  float eps;
};

constexpr int kRowsWidths = 256;    // widths are multiples of it, and at most
constexpr int kRowsMost = 16 * 256;
constexpr int64_t kRowsCount = 1 << 26;  // at most

cudaError_t quantise_rows(const RowsArguments& given, cudaStream_t stream);
cudaError_t normalise_rows(const RowsArguments& given, cudaStream_t stream);

// Of a product whose columns are heads in 8 bits, those of q and k its result: heads_end.cuh in
// latent_attn.
struct HeadsArguments {
  void* v;         // (inner, padded), int8
  float* q_scale;  // (heads, padded), of a token
  float* k_scale;  // (heads, padded / 128), of 128 tokens
  float* v_scale;  // likewise
  int inner;       // columns of q, of k and of v
  int padded;      // tokens, to a multiple of 256
};

// out = residual + (rows x weight^T) * scales + bias, or GELU of that without the residual.
struct ProductArguments {
  const void* a;              // (rows, depth), e4m3 or bfloat16
  const void* weight;         // (columns, depth), likewise
  const float* row_scale;     // (rows), of e4m3
  const float* column_scale;  // (columns), of e4m3
  const void* bias;           // (columns), bfloat16
  const void* residual;       // (rows, columns), bfloat16, or null
  const float* hidden_scale;  // (rows), of what GELU is quantised by
  void* out;                  // (rows, columns): bfloat16, or e4m3 after GELU of e4m3
  float4* parts;              // (blocks, kProductPart): where tiles may be split by their depth,
  int* flags;                 // (blocks, 2), zeros before and after; or null
  int rows, columns, depth;
  int share;     // of a cluster, in units of a tile, where tiles are split
  bool centred;  // `a` is of a LayerNorm
  HeadsArguments heads;
};

constexpr int kProductPart = 256 * 128 / 4;  // sums of a block, in fours
constexpr int kProductFlags = 2;             // of a block

// Blocks of a product at most: what parts and flags are for.
cudaError_t product_blocks(int* blocks);

constexpr int kProductColumns = 256;  // columns are multiples of it
constexpr int kProductDepth = 256;    // and so is what is summed over, in bytes
constexpr int kProductMost = 1 << 24;  // columns at most: an int counts 72 rows of them

cudaError_t product_fp8(const ProductArguments& given, cudaStream_t stream);
cudaError_t product_gelu_fp8(const ProductArguments& given, cudaStream_t stream);
cudaError_t product_bf16(const ProductArguments& given, cudaStream_t stream);
cudaError_t product_gelu_bf16(const ProductArguments& given, cudaStream_t stream);

}  // namespace snapkernels
