// snapkernels_cuda: checks and schemas of the ops over groups.
#include <optional>

#include "bindings.h"
#include "group_attn/group_attn.h"
#include "group_attn/group_backward.h"

namespace {

using namespace snapkernels::bindings;

// What both kernels over groups have in common, checked.
snapkernels::GroupArguments group_arguments(const char* op, const Tensor& patches,
                                            const Tensor& absorbed,
                                            const Tensor& absorbed_sum) {
  using torch::headeronly::ScalarType;
  constexpr int64_t kColumns = snapkernels::kGroupColumns;
  STD_TORCH_CHECK(patches.dim() == 3, op, ": ranks");
  const int64_t groups = patches.size(0), tokens = patches.size(1), width = patches.size(2);
  STD_TORCH_CHECK(width % snapkernels::kGroupWidths == 0 && tokens > 0 &&
                      tokens < INT32_MAX - 256 && groups * kColumns < INT32_MAX,
                  op, ": sizes");
  snapkernels::GroupArguments of{};
  of.patches = data_of<void>(op, "patches", patches, ScalarType::BFloat16,
                               groups * tokens * width, patches);
  of.absorbed = data_of<void>(op, "absorbed", absorbed, ScalarType::BFloat16,
                                groups * kColumns * width, patches);
  of.absorbed_sum = data_of<float>(op, "absorbed_sum", absorbed_sum, ScalarType::Float,
                                     groups * kColumns, patches);
  of.groups = static_cast<int>(groups);
  of.tokens = static_cast<int>(tokens);
  of.width = static_cast<int>(width);
  return of;
}

void group_write(Tensor patches, Tensor absorbed, Tensor absorbed_sum, Tensor score_bias,
                 Tensor values, Tensor bias, Tensor out, std::optional<Tensor> weights,
                 std::optional<Tensor> mean, std::optional<Tensor> rstd, double eps) {
  using torch::headeronly::ScalarType;
  if (patches.numel() == 0) return;
  constexpr const char* op = "group_write";
  snapkernels::GroupWriteArguments given{group_arguments(op, patches, absorbed, absorbed_sum)};
  given.eps = static_cast<float>(eps);
  const int64_t width = given.of.width, columns = absorbed_sum.numel();
  given.score_bias =
      data_of<float>(op, "score_bias", score_bias, ScalarType::Float, columns, patches);
  given.values =
      data_of<void>(op, "values", values, ScalarType::BFloat16, columns * width, patches);
  given.bias = data_of<void>(op, "bias", bias, ScalarType::BFloat16, width, patches);
  given.out = data_of<void>(op, "out", out, ScalarType::BFloat16, patches.numel(), patches);
  if (weights) {
    STD_TORCH_CHECK(mean && rstd, op, ": weights without mean and rstd");
    const int64_t tokens = static_cast<int64_t>(given.of.groups) * given.of.tokens;
    given.weights = data_of<void>(op, "weights", *weights, ScalarType::BFloat16,
                                  tokens * snapkernels::kGroupColumns, patches);
    given.mean = data_of<float>(op, "mean", *mean, ScalarType::Float, tokens, patches);
    given.rstd = data_of<float>(op, "rstd", *rstd, ScalarType::Float, tokens, patches);
  }
  const torch::stable::accelerator::DeviceGuard guard(patches.get_device_index());
  check_launch(op, snapkernels::group_write(given, current_stream(patches)));
}

void group_read(Tensor patches, Tensor absorbed, Tensor absorbed_sum, Tensor norm_weight,
                Tensor norm_bias, Tensor weights, Tensor most, Tensor sums, Tensor means,
                Tensor context, std::optional<Tensor> average, std::optional<Tensor> log_sum,
                std::optional<Tensor> mean, std::optional<Tensor> rstd, double eps) {
  using torch::headeronly::ScalarType;
  if (context.numel() == 0) return;
  constexpr const char* op = "group_read";
  snapkernels::GroupReadArguments given{group_arguments(op, patches, absorbed, absorbed_sum)};
  given.eps = static_cast<float>(eps);
  const int64_t width = given.of.width, columns = absorbed_sum.numel();
  const auto bfloat16 = [&](const char* name, const Tensor& tensor, int64_t numel) {
    return data_of<void>(op, name, tensor, ScalarType::BFloat16, numel, patches);
  };
  given.norm_weight = bfloat16("norm_weight", norm_weight, width);
  given.norm_bias = bfloat16("norm_bias", norm_bias, width);
  given.weights = bfloat16("weights", weights, columns * given.of.tokens);
  given.context = bfloat16("context", context, columns * width);
  given.average = average ? bfloat16("average", *average, columns * width) : nullptr;
  const auto optional = [&](const char* name, const std::optional<Tensor>& tensor, int64_t numel) {
    return tensor ? data_of<float>(op, name, *tensor, ScalarType::Float, numel, patches) : nullptr;
  };
  const int64_t tokens = static_cast<int64_t>(given.of.groups) * given.of.tokens;
  given.log_sum = optional("log_sum", log_sum, columns);
  given.mean = optional("mean", mean, tokens);
  given.rstd = optional("rstd", rstd, tokens);
  STD_TORCH_CHECK(!given.mean == !given.rstd, op, ": one of mean and rstd");
  STD_TORCH_CHECK(given.of.tokens % snapkernels::kGroupBlock == 0, op, ": tokens");
  const int64_t blocks = given.of.tokens / snapkernels::kGroupBlock;
  STD_TORCH_CHECK(columns * blocks < INT32_MAX, op, ": sizes");
  const auto scratch = [&](const char* name, const Tensor& tensor) {
    return data_of<float>(op, name, tensor, ScalarType::Float, columns * blocks, patches);
  };
  given.most = scratch("most", most);
  given.sums = scratch("sums", sums);
  given.means = scratch("means", means);
  const torch::stable::accelerator::DeviceGuard guard(patches.get_device_index());
  check_launch(op, snapkernels::group_read(given, current_stream(patches)));
}

// What both backwards have in common, checked; `of` is.
snapkernels::GroupGradArguments grad_arguments(const char* op, const Tensor& patches,
                                               const snapkernels::GroupArguments& of,
                                               const Tensor& rows, const Tensor& weights,
                                               const Tensor& mean, const Tensor& rstd,
                                               const Tensor& score_grads, const Tensor& sums,
                                               const std::optional<Tensor>& out) {
  using torch::headeronly::ScalarType;
  const int64_t columns = static_cast<int64_t>(of.groups) * snapkernels::kGroupColumns;
  const int64_t tiles = (of.tokens + snapkernels::kGroupBlock - 1) / snapkernels::kGroupBlock;
  constexpr int64_t kOfTile = 2 * snapkernels::kGroupBlock / snapkernels::kSumsTokens;
  const auto bfloat16 = [&](const char* name, const Tensor& tensor, int64_t numel) {
    return data_of<void>(op, name, tensor, ScalarType::BFloat16, numel, patches);
  };
  snapkernels::GroupGradArguments grads{};
  grads.rows = bfloat16("rows", rows, columns * of.width);
  grads.weights = bfloat16("weights", weights, columns * of.tokens);
  const int64_t tokens = static_cast<int64_t>(of.groups) * of.tokens;
  grads.mean = data_of<float>(op, "mean", mean, ScalarType::Float, tokens, patches);
  grads.rstd = data_of<float>(op, "rstd", rstd, ScalarType::Float, tokens, patches);
  grads.score_grads = bfloat16("score_grads", score_grads, columns * of.tokens);
  grads.sums = data_of<float>(op, "sums", sums, ScalarType::Float, columns * tiles * kOfTile,
                              patches);
  grads.out = out ? bfloat16("out", *out, patches.numel()) : nullptr;
  return grads;
}

void group_write_backward(Tensor patches, Tensor grad, Tensor absorbed, Tensor absorbed_sum,
                          Tensor score_bias, Tensor values, Tensor weights, Tensor mean,
                          Tensor rstd, Tensor score_grads, Tensor sums, Tensor grad_sums,
                          Tensor out) {
  using torch::headeronly::ScalarType;
  if (patches.numel() == 0) return;
  constexpr const char* op = "group_write_backward";
  const auto of = group_arguments(op, patches, absorbed, absorbed_sum);
  snapkernels::GroupWriteBackwardArguments given{
      of, grad_arguments(op, patches, of, values, weights, mean, rstd, score_grads, sums, out)};
  const int64_t tiles = (of.tokens + snapkernels::kGroupBlock - 1) / snapkernels::kGroupBlock;
  given.score_bias = data_of<float>(op, "score_bias", score_bias, ScalarType::Float,
                                    absorbed_sum.numel(), patches);
  given.grad =
      data_of<void>(op, "grad", grad, ScalarType::BFloat16, patches.numel(), patches);
  given.grad_sums = data_of<float>(op, "grad_sums", grad_sums, ScalarType::Float,
                                   of.groups * tiles * of.width, patches);
  const torch::stable::accelerator::DeviceGuard guard(patches.get_device_index());
  check_launch(op, snapkernels::group_write_backward(given, current_stream(patches)));
}

void group_read_backward(Tensor patches, Tensor absorbed, Tensor absorbed_sum, Tensor rows,
                         Tensor rows_sum, Tensor log_sum, Tensor delta, Tensor mean, Tensor rstd,
                         Tensor weights, Tensor score_grads, Tensor sums, Tensor lines,
                         std::optional<Tensor> out) {
  using torch::headeronly::ScalarType;
  if (patches.numel() == 0) return;
  constexpr const char* op = "group_read_backward";
  const auto of = group_arguments(op, patches, absorbed, absorbed_sum);
  snapkernels::GroupReadBackwardArguments given{
      of, grad_arguments(op, patches, of, rows, weights, mean, rstd, score_grads, sums, out)};
  STD_TORCH_CHECK(of.tokens % snapkernels::kGroupBlock == 0, op, ": tokens");
  const auto of_columns = [&](const char* name, const Tensor& tensor) {
    return data_of<float>(op, name, tensor, ScalarType::Float, absorbed_sum.numel(), patches);
  };
  given.rows_sum = of_columns("rows_sum", rows_sum);
  given.log_sum = of_columns("log_sum", log_sum);
  given.delta = of_columns("delta", delta);
  given.lines = reinterpret_cast<float2*>(
      data_of<float>(op, "lines", lines, ScalarType::Float,
                     static_cast<int64_t>(of.groups) * of.tokens * 2, patches));
  const torch::stable::accelerator::DeviceGuard guard(patches.get_device_index());
  check_launch(op, snapkernels::group_read_backward(given, current_stream(patches)));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(snapkernels_cuda, m) {
  m.def(
      "group_write(Tensor patches, Tensor absorbed, Tensor absorbed_sum, Tensor score_bias,"
      " Tensor values, Tensor bias, Tensor(a!) out, Tensor(b!)? weights, Tensor(c!)? mean,"
      " Tensor(d!)? rstd, float eps) -> ()");
  m.def(
      "group_read(Tensor patches, Tensor absorbed, Tensor absorbed_sum, Tensor norm_weight,"
      " Tensor norm_bias, Tensor(a!) weights, Tensor(b!) most, Tensor(c!) sums,"
      " Tensor(d!) means, Tensor(e!) context, Tensor(f!)? average, Tensor(g!)? log_sum,"
      " Tensor(h!)? mean, Tensor(i!)? rstd, float eps) -> ()");
  m.def(
      "group_write_backward(Tensor patches, Tensor grad, Tensor absorbed, Tensor absorbed_sum,"
      " Tensor score_bias, Tensor values, Tensor weights, Tensor mean, Tensor rstd,"
      " Tensor(a!) score_grads, Tensor(b!) sums, Tensor(c!) grad_sums, Tensor(d!) out) -> ()");
  m.def(
      "group_read_backward(Tensor patches, Tensor absorbed, Tensor absorbed_sum, Tensor rows,"
      " Tensor rows_sum, Tensor log_sum, Tensor delta, Tensor mean, Tensor rstd,"
      " Tensor(a!) weights, Tensor(b!) score_grads, Tensor(c!) sums, Tensor(d!) lines,"
      " Tensor(e!)? out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(snapkernels_cuda, CUDA, m) {
  m.impl("group_write", TORCH_BOX(&group_write));
  m.impl("group_read", TORCH_BOX(&group_read));
  m.impl("group_write_backward", TORCH_BOX(&group_write_backward));
  m.impl("group_read_backward", TORCH_BOX(&group_read_backward));
}
