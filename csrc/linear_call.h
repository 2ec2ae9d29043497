// What the calls that end in products have in common: checks, and what their kernels are told.
#pragma once

#include <optional>

#include "bindings.h"
#include "linear/linear.h"

namespace snapkernels::bindings {

using torch::headeronly::ScalarType;

// The pieces of one call, whose tensors are held against the tokens.
struct LinearCall {
  const char* op;
  const Tensor& tokens;  // (rows, width)
  double eps;
  torch::stable::accelerator::DeviceGuard guard{tokens.get_device_index()};
  int64_t rows = tokens.size(0), width = tokens.size(1);
  cudaStream_t stream = current_stream(tokens);
  float4* parts = nullptr;  // see ProductArguments; the flags become 0 with the rows
  int* flags = nullptr;
  int64_t num_flags = 0;

  LinearCall(const char* op, const Tensor& tokens, double eps)
      : op(op), tokens(tokens), eps(eps) {
    STD_TORCH_CHECK(tokens.dim() == 2 && rows <= kRowsCount, op, ": ", rows, " tokens");
    bf16("tokens", tokens, rows * width);
  }
  LinearCall(const char* op, const Tensor& tokens, const Tensor& parts, const Tensor& flags,
             double eps)
      : LinearCall(op, tokens, eps) {
    int blocks;
    check_launch(op, product_blocks(&blocks));
    num_flags = int64_t{kProductFlags} * blocks;
    this->parts =
        reinterpret_cast<float4*>(fp32("parts", parts, int64_t{4} * kProductPart * blocks));
    this->flags = data_of<int>(op, "flags", flags, ScalarType::Int, num_flags, tokens);
  }

  void* bf16(const char* name, const Tensor& tensor, int64_t numel) const {
    return data_of<void>(op, name, tensor, ScalarType::BFloat16, numel, tokens);
  }
  void* fp8(const char* name, const Tensor& tensor, int64_t numel) const {
    return data_of<void>(op, name, tensor, ScalarType::Float8_e4m3fn, numel, tokens);
  }
  float* fp32(const char* name, const Tensor& tensor, int64_t numel) const {
    return data_of<float>(op, name, tensor, ScalarType::Float, numel, tokens);
  }

  // The tokens, normalised if there are weights of it.
  RowsArguments rows_of(const std::optional<Tensor>& norm_weight,
                        const std::optional<Tensor>& norm_bias) const {
    STD_TORCH_CHECK(width % kRowsWidths == 0 && width <= kRowsMost, op, ": width ", width);
    STD_TORCH_CHECK(!norm_weight == !norm_bias, op, ": one of norm_weight and norm_bias");
    RowsArguments given{};
    given.tokens = tokens.data_ptr();
    if (norm_weight) {
      given.norm_weight = bf16("norm_weight", *norm_weight, width);
      given.norm_bias = bf16("norm_bias", *norm_bias, width);
    }
    given.flags = flags;
    given.num_flags = static_cast<int>(num_flags);
    given.rows = rows;
    given.width = static_cast<int>(width);
    given.eps = static_cast<float>(eps);
    return given;
  }

  // Of `depth` columns, or what fits it: the sizes of a product with `bias`.
  ProductArguments product(const char* name, const Tensor& bias, int64_t depth, int bytes) const {
    const int64_t columns = bias.numel();
    STD_TORCH_CHECK(columns > 0 && columns % kProductColumns == 0 && columns <= kProductMost &&
                        depth > 0 && depth * bytes % kProductDepth == 0 && depth < INT32_MAX,
                    op, ": ", columns, " columns, depth ", depth);
    ProductArguments given{};
    given.bias = bf16(name, bias, columns);
    given.parts = parts;
    given.flags = flags;
    given.rows = static_cast<int>(rows);
    given.columns = static_cast<int>(columns);
    given.depth = static_cast<int>(depth);
    return given;
  }
};

}  // namespace snapkernels::bindings
