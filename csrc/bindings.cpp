// snapkernels_cuda: checks and schemas of all ops but those over groups (group_bindings.cpp).
#include <optional>
#include <vector>

#include "bindings.h"
#include "head/head.h"
#include "head/head_backward.h"
#include "noise/forward_process.h"
#include "patch/cell_transpose.h"
#include "stem/stem.h"
#include "stem/stem_backward.h"

namespace {

using namespace snapkernels::bindings;

snapkernels::PatchGeometry geometry(const char* op, const Tensor& video, const Tensor& tokens,
                                    int64_t patch, const std::vector<int64_t>& group) {
  STD_TORCH_CHECK(video.dim() == 5 && tokens.dim() == 4 && group.size() == 3, op, ": ranks");
  STD_TORCH_CHECK(patch > 0 && group[0] > 0 && group[1] > 0 && group[2] > 0, op, ": patch, group");
  STD_TORCH_CHECK(video.scalar_type() == tokens.scalar_type() &&
                      video.get_device_index() == tokens.get_device_index(),
                  op, ": video and tokens differ in dtype or device");
  const int64_t patches = group[0] * group[1] * group[2];
  STD_TORCH_CHECK(video.size(2) % group[0] == 0 && video.size(3) % (patch * group[1]) == 0 &&
                      video.size(4) % (patch * group[2]) == 0 && tokens.size(2) == patches &&
                      tokens.size(0) == video.size(0) &&
                      tokens.size(1) * tokens.size(2) * patch * patch ==
                          video.size(2) * video.size(3) * video.size(4) &&
                      tokens.size(3) == video.size(1) * patch * patch,
                  op, ": the tokens do not fit the video");
  const int64_t item = video.element_size();
  STD_TORCH_CHECK(video.stride(4) == 1 && tokens.stride(3) == 1, op, ": strides");
  STD_TORCH_CHECK(video.size(4) * item % 16 == 0 && tokens.size(3) * item % 16 == 0, op,
                  ": rows are not in 16 bytes");
  snapkernels::PatchGeometry at;
  at.batch = video.size(0);
  at.channels = video.size(1);
  at.frames = video.size(2);
  at.patch_rows = video.size(3) / patch;
  at.columns = video.size(4) / patch;
  at.patch = patch;
  at.item_bytes = item;
  at.group_t = group[0];
  at.group_h = group[1];
  at.group_w = group[2];
  at.video_b = video.stride(0) * item;
  at.video_c = video.stride(1) * item;
  at.video_t = video.stride(2) * item;
  at.video_y = video.stride(3) * item;
  at.tokens_b = tokens.stride(0) * item;
  at.tokens_g = tokens.stride(1) * item;
  at.tokens_n = tokens.stride(2) * item;
  return at;
}

void patchify(Tensor video, Tensor tokens, int64_t patch, std::vector<int64_t> group) {
  if (video.numel() == 0) return;
  const auto at = geometry("patchify", video, tokens, patch, group);
  const torch::stable::accelerator::DeviceGuard guard(video.get_device_index());
  check_launch("patchify", snapkernels::patchify(video.data_ptr(), tokens.data_ptr(), at,
                                                 current_stream(video)));
}

void unpatchify(Tensor tokens, Tensor video, int64_t patch, std::vector<int64_t> group) {
  if (video.numel() == 0) return;
  const auto at = geometry("unpatchify", video, tokens, patch, group);
  const torch::stable::accelerator::DeviceGuard guard(video.get_device_index());
  check_launch("unpatchify", snapkernels::unpatchify(tokens.data_ptr(), video.data_ptr(), at,
                                                     current_stream(video)));
}

// What the ends have in common, checked: `video` is any video of theirs, read or written.
snapkernels::HeadArguments head_arguments(const char* op, const Tensor& tokens,
                                          const Tensor& norm_weight, const Tensor& norm_bias,
                                          const Tensor& weight, const Tensor& bias,
                                          const Tensor& video, const std::vector<int64_t>& group,
                                          double eps, snapkernels::HeadGeometry& at) {
  constexpr auto kBfloat16 = torch::headeronly::ScalarType::BFloat16;
  constexpr int64_t kPatch = snapkernels::kHeadPatch;
  STD_TORCH_CHECK(video.dim() == 5 && tokens.dim() == 4 && group.size() == 3, op, ": ranks");
  STD_TORCH_CHECK(group[0] > 0 && group[1] > 0 && group[2] > 0, op, ": group");
  const int64_t group_rows = kPatch * group[1];
  const int64_t groups_h = (video.size(3) + group_rows - 1) / group_rows;
  const int64_t patches = group[0] * group[1] * group[2];
  STD_TORCH_CHECK(video.size(2) % group[0] == 0 && video.size(4) % (kPatch * group[2]) == 0 &&
                      tokens.size(0) == video.size(0) && tokens.size(2) == patches &&
                      tokens.size(1) == video.size(2) / group[0] * groups_h *
                                            (video.size(4) / (kPatch * group[2])),
                  op, ": the tokens do not fit the video");
  const int64_t count = tokens.size(0) * tokens.size(1) * patches, width = tokens.size(3);
  const int64_t features = video.size(1) * kPatch * kPatch;
  STD_TORCH_CHECK(count > 0 && count <= INT32_MAX - snapkernels::kHeadTile + 1, op, ": ", count,
                  " tokens");
  at = {static_cast<int>(video.size(0)), static_cast<int>(video.size(1)),
        static_cast<int>(video.size(2)), static_cast<int>(video.size(3)),
        static_cast<int>(video.size(4)), static_cast<int>(group[0]),
        static_cast<int>(group[1]),      static_cast<int>(group[2]),
        static_cast<int>(width)};
  snapkernels::HeadArguments given{};
  given.tokens = data_of<void>(op, "tokens", tokens, kBfloat16, count * width, tokens);
  given.norm_weight = data_of<void>(op, "norm_weight", norm_weight, kBfloat16, width, tokens);
  given.norm_bias = data_of<void>(op, "norm_bias", norm_bias, kBfloat16, width, tokens);
  given.weight = data_of<void>(op, "weight", weight, kBfloat16, features * width, tokens);
  given.bias = data_of<void>(op, "bias", bias, kBfloat16, features, tokens);
  given.eps = eps;
  return given;
}

constexpr auto kFloat = torch::headeronly::ScalarType::Float;

// What a backward will need, where there are tensors for it: `each` float32 of every token.
void head_saves(const char* op, const std::optional<Tensor>& features,
                const std::optional<Tensor>& rows, int each, const Tensor& tokens,
                const Tensor& bias, snapkernels::HeadArguments& given) {
  constexpr auto kBfloat16 = torch::headeronly::ScalarType::BFloat16;
  STD_TORCH_CHECK(features.has_value() == rows.has_value(), op, ": one of two to save");
  if (!features) return;
  const int64_t count = tokens.numel() / tokens.size(3);
  given.features =
      data_of<void>(op, "features", *features, kBfloat16, count * bias.numel(), tokens);
  given.rows = data_of<float>(op, "rows", *rows, kFloat, count * each, tokens);
}

void head(Tensor tokens, Tensor norm_weight, Tensor norm_bias, Tensor weight, Tensor bias,
          Tensor out, std::optional<Tensor> features, std::optional<Tensor> moments,
          std::vector<int64_t> group, double eps) {
  snapkernels::HeadGeometry at;
  auto given = head_arguments("head", tokens, norm_weight, norm_bias, weight, bias, out, group,
                              eps, at);
  head_saves("head", features, moments, 2, tokens, bias, given);
  given.out = data_of<float>("head", "out", out, kFloat, out.numel(), tokens);
  const torch::stable::accelerator::DeviceGuard guard(tokens.get_device_index());
  check_launch("head", snapkernels::head(given, at, current_stream(tokens)));
}

void head_mix(Tensor tokens, Tensor video, std::optional<Tensor> other, Tensor mix,
              Tensor norm_weight, Tensor norm_bias, Tensor weight, Tensor bias, Tensor out,
              std::optional<Tensor> features, std::optional<Tensor> moments,
              std::vector<int64_t> group, double eps) {
  const char* const op = "head_mix";
  snapkernels::HeadGeometry at;
  auto given =
      head_arguments(op, tokens, norm_weight, norm_bias, weight, bias, video, group, eps, at);
  head_saves(op, features, moments, 2, tokens, bias, given);
  const int64_t pixels = video.numel();
  given.video = data_of<float>(op, "video", video, kFloat, pixels, tokens);
  if (other) given.other = data_of<float>(op, "other", *other, kFloat, pixels, tokens);
  given.factors = data_of<float>(op, "mix", mix, kFloat, 3 * video.size(0), tokens);
  given.out = data_of<float>(op, "out", out, kFloat, pixels, tokens);
  const torch::stable::accelerator::DeviceGuard guard(tokens.get_device_index());
  check_launch(op, snapkernels::head_mix(given, at, current_stream(tokens)));
}

void head_loss(Tensor tokens, Tensor video, Tensor sample, Tensor terms, Tensor norm_weight,
               Tensor norm_bias, Tensor weight, Tensor bias, Tensor partial, Tensor out,
               std::optional<Tensor> feature_grad, std::optional<Tensor> rows, int64_t seed,
               std::vector<int64_t> group, double eps) {
  const char* const op = "head_loss";
  constexpr auto kLong = torch::headeronly::ScalarType::Long;
  snapkernels::HeadGeometry at;
  auto given =
      head_arguments(op, tokens, norm_weight, norm_bias, weight, bias, video, group, eps, at);
  head_saves(op, feature_grad, rows, 4, tokens, bias, given);
  given.video = data_of<float>(op, "video", video, kFloat, video.numel(), tokens);
  given.factors = data_of<float>(op, "terms", terms, kFloat, 3 * video.size(0), tokens);
  given.sample = data_of<int64_t>(op, "sample", sample, kLong, video.size(0), tokens);
  given.partial =
      data_of<float>(op, "partial", partial, kFloat, snapkernels::kHeadPartials, tokens);
  given.out = data_of<float>(op, "out", out, kFloat, 1, tokens);
  given.seed = seed;
  const torch::stable::accelerator::DeviceGuard guard(tokens.get_device_index());
  check_launch(op, snapkernels::head_loss(given, at, current_stream(tokens)));
}

// Gradients of tokens and weights, either of which may be left out.
void head_backward(Tensor tokens, Tensor feature_grad, Tensor rows, std::optional<Tensor> scale,
                   Tensor norm_weight, Tensor norm_bias, Tensor weight,
                   std::optional<Tensor> d_tokens, std::optional<Tensor> d_norm_weight,
                   std::optional<Tensor> d_norm_bias, std::optional<Tensor> d_weight,
                   std::optional<Tensor> d_bias, std::optional<Tensor> products,
                   std::optional<Tensor> sums, int64_t ranges) {
  const char* const op = "head_backward";
  constexpr auto kBfloat16 = torch::headeronly::ScalarType::BFloat16;
  STD_TORCH_CHECK(weight.dim() == 2 && tokens.numel() > 0 && ranges > 0 && ranges <= 65535, op,
                  ": weight, tokens, ranges");
  const int64_t features = weight.size(0), width = weight.size(1), count = tokens.numel() / width;
  STD_TORCH_CHECK(count <= INT32_MAX - snapkernels::kHeadStageTokens, op, ": ", count, " tokens");
  const auto bfloat16s = [&](const char* name, const Tensor& tensor, int64_t numel) {
    return data_of<void>(op, name, tensor, kBfloat16, numel, tokens);
  };
  snapkernels::HeadBackwardArguments given{};
  given.tokens = bfloat16s("tokens", tokens, count * width);
  given.feature_grad = bfloat16s("feature_grad", feature_grad, count * features);
  given.rows = data_of<float>(op, "rows", rows, kFloat, count * 4, tokens);
  if (scale) given.scale = data_of<float>(op, "scale", *scale, kFloat, 1, tokens);
  given.norm_weight = bfloat16s("norm_weight", norm_weight, width);
  given.norm_bias = bfloat16s("norm_bias", norm_bias, width);
  given.weight = bfloat16s("weight", weight, features * width);
  if (d_tokens) given.d_tokens = bfloat16s("d_tokens", *d_tokens, count * width);
  if (products) {
    STD_TORCH_CHECK(d_norm_weight && d_norm_bias && d_weight && d_bias && sums, op,
                    ": gradients of the weights go together");
    given.d_norm_weight = bfloat16s("d_norm_weight", *d_norm_weight, width);
    given.d_norm_bias = bfloat16s("d_norm_bias", *d_norm_bias, width);
    given.d_weight = bfloat16s("d_weight", *d_weight, features * width);
    given.d_bias = bfloat16s("d_bias", *d_bias, features);
    given.products =
        data_of<float>(op, "products", *products, kFloat, ranges * width * features, tokens);
    given.sums = data_of<float>(op, "sums", *sums, kFloat, ranges * features, tokens);
  }
  const torch::stable::accelerator::DeviceGuard guard(tokens.get_device_index());
  check_launch(op, snapkernels::head_backward(given, count, width, features, ranges,
                                              current_stream(tokens)));
}

void forward_process(Tensor video, Tensor sigma, Tensor sample, Tensor x_sigma, double sigma_in,
                     int64_t seed) {
  const char* const op = "forward_process";
  constexpr auto kLong = torch::headeronly::ScalarType::Long;
  if (video.numel() == 0) return;
  const int64_t batch = video.size(0), elements = video.numel() / batch;
  STD_TORCH_CHECK(elements % 4 == 0 && batch <= 65535, op, ": size");
  const auto* pixels = data_of<float>(op, "video", video, kFloat, video.numel(), video);
  const auto* level = data_of<float>(op, "sigma", sigma, kFloat, batch, video);
  const auto* number = data_of<int64_t>(op, "sample", sample, kLong, batch, video);
  auto* noised = data_of<float>(op, "x_sigma", x_sigma, kFloat, video.numel(), video);
  const torch::stable::accelerator::DeviceGuard guard(video.get_device_index());
  check_launch(op, snapkernels::forward_process(pixels, level, number, noised, batch, elements / 4,
                                                sigma_in, seed, current_stream(video)));
}

// What the stem and its gradients have in common, checked. `tokens` are theirs, of any dtype.
snapkernels::StemGeometry stem_geometry(const char* op, const Tensor& video,
                                        const std::optional<Tensor>& low_res, const Tensor& weight,
                                        const Tensor& positions, const Tensor& tokens,
                                        const std::vector<int64_t>& group) {
  constexpr int64_t kPatch = snapkernels::kStemPatch;
  STD_TORCH_CHECK(video.dim() == 5 && weight.dim() == 2 && positions.dim() == 3 &&
                      tokens.dim() == 4 && group.size() == 3 && (!low_res || low_res->dim() == 5),
                  op, ": ranks");
  STD_TORCH_CHECK(group[0] > 0 && group[1] > 0 && group[2] > 0, op, ": group");
  const int64_t batch = video.size(0), channels = video.size(1), frames = video.size(2);
  const int64_t height = video.size(3), columns = video.size(4);
  const int64_t low_channels = low_res ? low_res->size(1) : 0;
  const int64_t low_height = low_res ? low_res->size(3) : 0;
  const int64_t low_width = low_res ? low_res->size(4) : 0;
  STD_TORCH_CHECK(!low_res || (low_res->size(0) == batch && low_res->size(2) == frames &&
                               low_channels > 0 && low_height > 0 && low_width > 0),
                  op, ": low_res does not fit the video");
  STD_TORCH_CHECK(channels + low_channels <= snapkernels::kStemMaxChannels, op, ": ",
                  channels + low_channels, " channels");
  const int64_t features = (channels + low_channels) * kPatch * kPatch, width = weight.size(0);
  STD_TORCH_CHECK(weight.size(1) == features && width % 64 == 0, op, ": weight");

  const int64_t group_rows = kPatch * group[1], group_columns = kPatch * group[2];
  const int64_t groups_h = (height + group_rows - 1) / group_rows;
  const int64_t groups = frames / group[0] * groups_h * (columns / group_columns);
  const int64_t patches = group[0] * group[1] * group[2], tables = positions.size(0);
  STD_TORCH_CHECK(frames % group[0] == 0 && columns % group_columns == 0 &&
                      tokens.size(0) == batch && tokens.size(1) == groups &&
                      tokens.size(2) == patches && tokens.size(3) == width,
                  op, ": the tokens do not fit the video");
  STD_TORCH_CHECK(groups % tables == 0 && positions.size(1) == patches, op, ": positions");
  STD_TORCH_CHECK(batch * groups * patches <= INT32_MAX - 63 && height * columns <= INT32_MAX &&
                      low_height * low_width <= INT32_MAX && tables * patches <= INT32_MAX,
                  op, ": too large");

  snapkernels::StemGeometry at;
  at.batch = batch;
  at.channels = channels;
  at.frames = frames;
  at.height = height;
  at.width = columns;
  at.low_channels = low_channels;
  at.low_height = low_height;
  at.low_width = low_width;
  at.group_t = group[0];
  at.group_h = group[1];
  at.group_w = group[2];
  at.tables = tables;
  at.token_width = width;
  return at;
}

void stem(Tensor video, Tensor scale, std::optional<Tensor> low_res, Tensor weight, Tensor bias,
          Tensor norm_weight, Tensor norm_bias, Tensor positions, Tensor tokens, Tensor rstd,
          std::vector<int64_t> group, double eps) {
  const char* const op = "stem";
  constexpr auto kFloat32 = torch::headeronly::ScalarType::Float;
  constexpr auto kBfloat16 = torch::headeronly::ScalarType::BFloat16;
  if (tokens.numel() == 0) return;
  const auto at = stem_geometry(op, video, low_res, weight, positions, tokens, group);
  const int64_t width = at.token_width, count = tokens.numel() / width;
  snapkernels::StemArguments given;
  given.video = data_of<float>(op, "video", video, kFloat32, video.numel(), tokens);
  given.scale = data_of<float>(op, "scale", scale, kFloat32, at.batch, tokens);
  given.low_res = nullptr;
  if (low_res)
    given.low_res = data_of<float>(op, "low_res", *low_res, kFloat32, low_res->numel(), tokens);
  given.weight = data_of<void>(op, "weight", weight, kBfloat16, weight.numel(), tokens);
  given.bias = data_of<void>(op, "bias", bias, kBfloat16, width, tokens);
  given.norm_weight = data_of<void>(op, "norm_weight", norm_weight, kBfloat16, width, tokens);
  given.norm_bias = data_of<void>(op, "norm_bias", norm_bias, kBfloat16, width, tokens);
  given.positions =
      data_of<void>(op, "positions", positions, kBfloat16, positions.numel(), tokens);
  given.tokens = data_of<void>(op, "tokens", tokens, kBfloat16, count * width, tokens);
  given.rstd = data_of<float>(op, "rstd", rstd, kFloat32, count, tokens);
  given.eps = eps;
  const torch::stable::accelerator::DeviceGuard guard(tokens.get_device_index());
  check_launch(op, snapkernels::stem(given, at, current_stream(tokens)));
}

void stem_backward(Tensor grad, Tensor rstd, Tensor video, Tensor scale,
                   std::optional<Tensor> low_res, Tensor weight, Tensor bias, Tensor norm_weight,
                   Tensor d_weight, Tensor d_bias, Tensor d_norm_weight, Tensor d_norm_bias,
                   Tensor d_positions, Tensor features, Tensor products, Tensor coefficients,
                   Tensor moments, Tensor means, Tensor sums, std::vector<int64_t> group) {
  const char* const op = "stem_backward";
  constexpr auto kFloat32 = torch::headeronly::ScalarType::Float;
  constexpr auto kBfloat16 = torch::headeronly::ScalarType::BFloat16;
  STD_TORCH_CHECK(grad.numel() > 0, op, ": no tokens");
  const auto at = stem_geometry(op, video, low_res, weight, d_positions, grad, group);
  const int64_t width = at.token_width, count = grad.numel() / width, positions = grad.size(2);
  const int64_t columns = weight.size(1) + snapkernels::kStemExtra;
  STD_TORCH_CHECK(at.channels == 3 && (at.low_channels == 0 || at.low_channels == 3), op,
                  ": channels");
  STD_TORCH_CHECK(at.tables == 1 && width % snapkernels::kStemSlice == 0 &&
                      count / positions >= snapkernels::kStemLeastAlike,
                  op, ": positions, width or groups");
  STD_TORCH_CHECK(features.dim() == 4, op, ": ranks");
  const int64_t ranges = features.size(0), tiles = features.size(1);
  const int64_t alike = count / positions, longest = ranges ? (positions + ranges - 1) / ranges : 0;
  constexpr int64_t kStage = snapkernels::kStemStage;
  STD_TORCH_CHECK(ranges > 0 && ranges <= positions &&
                      tiles == (longest * alike + kStage - 1) / kStage,
                  op, ": ranges, tiles");
  snapkernels::StemBackwardArguments given{};
  given.grad = data_of<void>(op, "grad", grad, kBfloat16, grad.numel(), grad);
  given.rstd = data_of<float>(op, "rstd", rstd, kFloat32, count, grad);
  given.video = data_of<float>(op, "video", video, kFloat32, video.numel(), grad);
  given.scale = data_of<float>(op, "scale", scale, kFloat32, at.batch, grad);
  if (low_res)
    given.low_res = data_of<float>(op, "low_res", *low_res, kFloat32, low_res->numel(), grad);
  const auto bfloat16 = [&](const char* name, const Tensor& tensor, int64_t numel) {
    return data_of<void>(op, name, tensor, kBfloat16, numel, grad);
  };
  given.weight = bfloat16("weight", weight, weight.numel());
  given.bias = bfloat16("bias", bias, width);
  given.norm_weight = bfloat16("norm_weight", norm_weight, width);
  given.d_weight = bfloat16("d_weight", d_weight, weight.numel());
  given.d_bias = bfloat16("d_bias", d_bias, width);
  given.d_norm_weight = bfloat16("d_norm_weight", d_norm_weight, width);
  given.d_norm_bias = bfloat16("d_norm_bias", d_norm_bias, width);
  given.d_positions = bfloat16("d_positions", d_positions, positions * width);
  const auto scratch = [&](const char* name, const Tensor& tensor, int64_t numel) {
    return data_of<float>(op, name, tensor, kFloat32, numel, grad);
  };
  const int64_t slices = width / snapkernels::kStemSlice, each = columns * columns;
  given.features = bfloat16("features", features, ranges * tiles * columns * kStage);
  given.products = scratch("products", products, ranges * width * columns);
  given.coefficients =
      scratch("coefficients", coefficients,
              ranges * tiles * (width / snapkernels::kStemHalf) * kStage * 2);
  given.moments = scratch("moments", moments, ranges * slices * each);
  given.means = scratch("means", means, columns);
  given.sums = scratch("sums", sums, each);
  given.ranges = ranges;
  given.tiles = tiles;
  const torch::stable::accelerator::DeviceGuard guard(grad.get_device_index());
  check_launch(op, snapkernels::stem_backward(given, at, current_stream(grad)));
}

// The hash of csrc/ that setup.py compiled, so that a stale library is noticed.
int64_t sources() { return SNAPKERNELS_SOURCES; }

}  // namespace

STABLE_TORCH_LIBRARY(snapkernels_cuda, m) {
  m.def("patchify(Tensor video, Tensor(a!) tokens, int patch, int[] group) -> ()");
  m.def("unpatchify(Tensor tokens, Tensor(a!) video, int patch, int[] group) -> ()");
  m.def(
      "head(Tensor tokens, Tensor norm_weight, Tensor norm_bias, Tensor weight, Tensor bias,"
      " Tensor(a!) out, Tensor(b!)? features, Tensor(c!)? moments, int[] group, float eps)"
      " -> ()");
  m.def(
      "head_mix(Tensor tokens, Tensor video, Tensor? other, Tensor mix, Tensor norm_weight,"
      " Tensor norm_bias, Tensor weight, Tensor bias, Tensor(a!) out, Tensor(b!)? features,"
      " Tensor(c!)? moments, int[] group, float eps) -> ()");
  m.def(
      "head_loss(Tensor tokens, Tensor video, Tensor sample, Tensor terms, Tensor norm_weight,"
      " Tensor norm_bias, Tensor weight, Tensor bias, Tensor(a!) partial, Tensor(b!) out,"
      " Tensor(c!)? feature_grad, Tensor(d!)? rows, int seed, int[] group, float eps) -> ()");
  m.def(
      "head_backward(Tensor tokens, Tensor feature_grad, Tensor rows, Tensor? scale,"
      " Tensor norm_weight, Tensor norm_bias, Tensor weight, Tensor(a!)? d_tokens,"
      " Tensor(b!)? d_norm_weight, Tensor(c!)? d_norm_bias, Tensor(d!)? d_weight,"
      " Tensor(e!)? d_bias, Tensor(f!)? products, Tensor(g!)? sums, int ranges) -> ()");
  m.def(
      "forward_process(Tensor video, Tensor sigma, Tensor sample, Tensor(a!) x_sigma,"
      " float sigma_in, int seed) -> ()");
  m.def(
      "stem(Tensor video, Tensor scale, Tensor? low_res, Tensor weight, Tensor bias,"
      " Tensor norm_weight, Tensor norm_bias, Tensor positions, Tensor(a!) tokens,"
      " Tensor(b!) rstd, int[] group, float eps) -> ()");
  m.def(
      "stem_backward(Tensor grad, Tensor rstd, Tensor video, Tensor scale, Tensor? low_res,"
      " Tensor weight, Tensor bias, Tensor norm_weight, Tensor(a!) d_weight, Tensor(b!) d_bias,"
      " Tensor(c!) d_norm_weight, Tensor(d!) d_norm_bias, Tensor(e!) d_positions,"
      " Tensor(f!) features, Tensor(g!) products, Tensor(h!) coefficients, Tensor(i!) moments,"
      " Tensor(j!) means, Tensor(k!) sums, int[] group) -> ()");
  m.def("sources() -> int");
}

STABLE_TORCH_LIBRARY_IMPL(snapkernels_cuda, CUDA, m) {
  m.impl("patchify", TORCH_BOX(&patchify));
  m.impl("unpatchify", TORCH_BOX(&unpatchify));
  m.impl("head", TORCH_BOX(&head));
  m.impl("head_mix", TORCH_BOX(&head_mix));
  m.impl("head_loss", TORCH_BOX(&head_loss));
  m.impl("head_backward", TORCH_BOX(&head_backward));
  m.impl("forward_process", TORCH_BOX(&forward_process));
  m.impl("stem", TORCH_BOX(&stem));
  m.impl("stem_backward", TORCH_BOX(&stem_backward));
}

STABLE_TORCH_LIBRARY_IMPL(snapkernels_cuda, CompositeExplicitAutograd, m) {
  m.impl("sources", TORCH_BOX(&sources));
}
