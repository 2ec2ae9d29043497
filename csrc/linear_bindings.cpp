// snapkernels_cuda: checks and schemas of linears and feed-forwards, each a row of launches.
#include "linear_call.h"

namespace {

using namespace snapkernels::bindings;

void linear_fp8(Tensor tokens, Tensor weight, Tensor weight_scale, Tensor bias,
                std::optional<Tensor> norm_weight, std::optional<Tensor> norm_bias,
                std::optional<Tensor> residual, Tensor quantised, Tensor scale, Tensor out,
                Tensor parts, Tensor flags, double eps) {
  if (out.numel() == 0) return;
  const LinearCall call("linear_fp8", tokens, parts, flags, eps);
  auto rows = call.rows_of(norm_weight, norm_bias);
  rows.out = call.fp8("quantised", quantised, tokens.numel());
  rows.scale = call.fp32("scale", scale, call.rows);
  auto product = call.product("bias", bias, call.width, 1);
  product.a = rows.out;
  product.centred = norm_weight.has_value();
  product.row_scale = rows.scale;
  product.weight = call.fp8("weight", weight, product.columns * call.width);
  product.column_scale = call.fp32("weight_scale", weight_scale, product.columns);
  const int64_t results = call.rows * product.columns;
  product.residual = residual ? call.bf16("residual", *residual, results) : nullptr;
  product.out = call.bf16("out", out, results);
  check_launch(call.op, snapkernels::quantise_rows(rows, call.stream));
  check_launch(call.op, snapkernels::product_fp8(product, call.stream));
}

void linear(Tensor tokens, Tensor weight, Tensor bias, std::optional<Tensor> norm_weight,
            std::optional<Tensor> norm_bias, std::optional<Tensor> residual,
            std::optional<Tensor> normed, Tensor out, std::optional<Tensor> parts,
            std::optional<Tensor> flags, double eps) {
  if (out.numel() == 0) return;
  STD_TORCH_CHECK(!normed == !norm_weight && !normed == !parts && !normed == !flags,
                  "linear: normed, parts and flags are of a LayerNorm");
  const LinearCall call = normed ? LinearCall("linear", tokens, *parts, *flags, eps)
                                 : LinearCall("linear", tokens, eps);
  auto product = call.product("bias", bias, call.width, 2);
  product.a = tokens.data_ptr();
  product.weight = call.bf16("weight", weight, product.columns * call.width);
  const int64_t results = call.rows * product.columns;
  product.residual = residual ? call.bf16("residual", *residual, results) : nullptr;
  product.out = call.bf16("out", out, results);
  if (normed) {
    auto rows = call.rows_of(norm_weight, norm_bias);
    product.a = rows.out = call.bf16("normed", *normed, tokens.numel());
    check_launch(call.op, snapkernels::normalise_rows(rows, call.stream));
  }
  check_launch(call.op, snapkernels::product_bf16(product, call.stream));
}

void feed_forward_fp8(Tensor tokens, Tensor norm_weight, Tensor norm_bias, Tensor fc1_weight,
                      Tensor fc1_scale, Tensor fc1_bias, Tensor hidden_bound, Tensor fc2_weight,
                      Tensor fc2_scale, Tensor fc2_bias, Tensor quantised, Tensor scales,
                      Tensor hidden, Tensor out, Tensor parts, Tensor flags, double eps) {
  if (out.numel() == 0) return;
  const LinearCall call("feed_forward_fp8", tokens, parts, flags, eps);
  auto rows = call.rows_of(norm_weight, norm_bias);
  rows.hidden_bound = call.fp32("hidden_bound", hidden_bound, 2);
  rows.out = call.fp8("quantised", quantised, tokens.numel());
  rows.scale = call.fp32("scales", scales, 2 * call.rows);
  rows.hidden_scale = rows.scale + call.rows;
  auto first = call.product("fc1_bias", fc1_bias, call.width, 1);
  const int64_t numbers = static_cast<int64_t>(first.columns) * call.width;
  first.a = rows.out;
  first.centred = true;
  first.row_scale = rows.scale;
  first.hidden_scale = rows.hidden_scale;
  first.weight = call.fp8("fc1_weight", fc1_weight, numbers);
  first.column_scale = call.fp32("fc1_scale", fc1_scale, first.columns);
  first.out = call.fp8("hidden", hidden, call.rows * first.columns);
  auto second = call.product("fc2_bias", fc2_bias, first.columns, 1);
  second.a = first.out;
  second.row_scale = rows.hidden_scale;
  second.weight = call.fp8("fc2_weight", fc2_weight, numbers);
  second.column_scale = call.fp32("fc2_scale", fc2_scale, call.width);
  second.residual = tokens.data_ptr();
  second.out = call.bf16("out", out, tokens.numel());
  check_launch(call.op, snapkernels::quantise_rows(rows, call.stream));
  check_launch(call.op, snapkernels::product_gelu_fp8(first, call.stream));
  check_launch(call.op, snapkernels::product_fp8(second, call.stream));
}

void feed_forward(Tensor tokens, Tensor norm_weight, Tensor norm_bias, Tensor fc1_weight,
                  Tensor fc1_bias, Tensor fc2_weight, Tensor fc2_bias, Tensor normed,
                  Tensor hidden, Tensor out, Tensor parts, Tensor flags, double eps) {
  if (out.numel() == 0) return;
  const LinearCall call("feed_forward", tokens, parts, flags, eps);
  auto rows = call.rows_of(norm_weight, norm_bias);
  rows.out = call.bf16("normed", normed, tokens.numel());
  auto first = call.product("fc1_bias", fc1_bias, call.width, 2);
  const int64_t numbers = static_cast<int64_t>(first.columns) * call.width;
  first.a = rows.out;
  first.weight = call.bf16("fc1_weight", fc1_weight, numbers);
  first.out = call.bf16("hidden", hidden, call.rows * first.columns);
  auto second = call.product("fc2_bias", fc2_bias, first.columns, 2);
  second.a = first.out;
  second.weight = call.bf16("fc2_weight", fc2_weight, numbers);
  second.residual = tokens.data_ptr();
  second.out = call.bf16("out", out, tokens.numel());
  check_launch(call.op, snapkernels::normalise_rows(rows, call.stream));
  check_launch(call.op, snapkernels::product_gelu_bf16(first, call.stream));
  check_launch(call.op, snapkernels::product_bf16(second, call.stream));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(snapkernels_cuda, m) {
  m.def(
      "linear_fp8(Tensor tokens, Tensor weight, Tensor weight_scale, Tensor bias,"
      " Tensor? norm_weight, Tensor? norm_bias, Tensor? residual, Tensor(a!) quantised,"
      " Tensor(b!) scale, Tensor(c!) out, Tensor(d!) parts, Tensor(e!) flags, float eps) -> ()");
  m.def(
      "linear(Tensor tokens, Tensor weight, Tensor bias, Tensor? norm_weight, Tensor? norm_bias,"
      " Tensor? residual, Tensor(a!)? normed, Tensor(b!) out, Tensor(c!)? parts,"
      " Tensor(d!)? flags, float eps) -> ()");
  m.def(
      "feed_forward_fp8(Tensor tokens, Tensor norm_weight, Tensor norm_bias, Tensor fc1_weight,"
      " Tensor fc1_scale, Tensor fc1_bias, Tensor hidden_bound, Tensor fc2_weight,"
      " Tensor fc2_scale, Tensor fc2_bias, Tensor(a!) quantised, Tensor(b!) scales,"
      " Tensor(c!) hidden, Tensor(d!) out, Tensor(e!) parts, Tensor(f!) flags, float eps) -> ()");
  m.def(
      "feed_forward(Tensor tokens, Tensor norm_weight, Tensor norm_bias, Tensor fc1_weight,"
      " Tensor fc1_bias, Tensor fc2_weight, Tensor fc2_bias, Tensor(a!) normed,"
      " Tensor(b!) hidden, Tensor(c!) out, Tensor(d!) parts, Tensor(e!) flags, float eps) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(snapkernels_cuda, CUDA, m) {
  m.impl("linear_fp8", TORCH_BOX(&linear_fp8));
  m.impl("linear", TORCH_BOX(&linear));
  m.impl("feed_forward_fp8", TORCH_BOX(&feed_forward_fp8));
  m.impl("feed_forward", TORCH_BOX(&feed_forward));
}
