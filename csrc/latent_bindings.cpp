// snapkernels_cuda: checks and schemas of self-attention over latents in 8 bits.
#include "latent_attn/latent_attn.h"
#include "linear_call.h"

namespace {

using namespace snapkernels::bindings;
using snapkernels::kHeadsTokens;

// (padded, 2 inner), (inner, padded) and their scales: heads in 8 bits.
snapkernels::LatentCoreArguments core_of(const char* op, const Tensor& qk, const Tensor& v,
                                         const Tensor& q_scale, const Tensor& k_scale,
                                         const Tensor& v_scale, int64_t tokens, int64_t length,
                                         int64_t head) {
  STD_TORCH_CHECK(head == 64 || head == 128, op, ": heads of ", head);
  STD_TORCH_CHECK(v.dim() == 2, op, ": v has ", v.dim(), " dimensions");
  const int64_t inner = v.size(0), padded = v.size(1), heads = inner / head;
  STD_TORCH_CHECK(inner > 0 && inner % snapkernels::kProductColumns == 0 && inner < (1 << 20), op,
                  ": inner width ", inner);
  STD_TORCH_CHECK(length > 0 && length <= padded && tokens % length == 0 &&
                      padded % snapkernels::kProductColumns == 0 &&
                      padded <= snapkernels::kProductMost,
                  op, ": ", tokens, " tokens in ", length, "s, and ", padded, " rows");
  STD_TORCH_CHECK(heads * padded <= INT32_MAX, op, ": ", heads, " heads of ", padded, " rows");
  const int64_t stride = (length + kHeadsTokens - 1) / kHeadsTokens * kHeadsTokens;
  STD_TORCH_CHECK(tokens / length <= padded / stride, op, ": ", padded, " rows are too few");
  const auto scales = [&](const char* name, const Tensor& scale, int64_t each) {
    return data_of<float>(op, name, scale, ScalarType::Float, heads * each, v);
  };
  snapkernels::LatentCoreArguments given{};
  given.qk = data_of<void>(op, "qk", qk, ScalarType::Char, 2 * inner * padded, v);
  given.v = data_of<void>(op, "v", v, ScalarType::Char, inner * padded, v);
  given.q_scale = scales("q_scale", q_scale, padded);
  given.k_scale = scales("k_scale", k_scale, padded / kHeadsTokens);
  given.v_scale = scales("v_scale", v_scale, padded / kHeadsTokens);
  given.batch = static_cast<int>(tokens / length);
  given.length = static_cast<int>(length);
  given.stride = static_cast<int>(stride);
  given.padded = static_cast<int>(padded);
  given.heads = static_cast<int>(heads);
  given.head = static_cast<int>(head);
  return given;
}

void latent_core(Tensor qk, Tensor v, Tensor q_scale, Tensor k_scale, Tensor v_scale, Tensor out,
                 Tensor out_scale, int64_t length, int64_t head) {
  if (out.numel() == 0) return;
  const char* op = "latent_core";
  const torch::stable::accelerator::DeviceGuard guard(v.get_device_index());
  const int64_t tokens = out.size(0);
  auto core = core_of(op, qk, v, q_scale, k_scale, v_scale, tokens, length, head);
  core.out = data_of<void>(op, "out", out, ScalarType::Float8_e4m3fn, tokens * v.size(0), v);
  core.out_scale = data_of<float>(op, "out_scale", out_scale, ScalarType::Float, tokens, v);
  check_launch(op, snapkernels::latent_core(core, current_stream(v)));
}

void latent_attention_fp8(Tensor latents, Tensor norm_weight, Tensor norm_bias, Tensor qkv_weight,
                          Tensor qkv_scale, Tensor qkv_bias, Tensor o_weight, Tensor o_scale,
                          Tensor o_bias, Tensor quantised, Tensor scale, Tensor qk, Tensor v,
                          Tensor q_scale, Tensor k_scale, Tensor v_scale, Tensor context,
                          Tensor context_scale, Tensor out, Tensor parts, Tensor flags,
                          int64_t length, int64_t head, double eps) {
  if (out.numel() == 0) return;
  const LinearCall call("latent_attention_fp8", latents, parts, flags, eps);
  data_of<void>(call.op, "v", v, ScalarType::Char, v.numel(), latents);  // others are held to it
  auto core = core_of(call.op, qk, v, q_scale, k_scale, v_scale, call.rows, length, head);
  const int64_t inner = v.size(0), padded = core.padded, width = call.width;

  auto rows = call.rows_of(norm_weight, norm_bias);
  rows.out = call.fp8("quantised", quantised, padded * width);
  rows.scale = call.fp32("scale", scale, padded);
  rows.padded = core.padded;
  rows.stride = core.stride;
  rows.length = core.length;

  auto first = call.product("qkv_bias", qkv_bias, width, 1);
  first.a = rows.out;
  first.row_scale = rows.scale;
  first.weight = call.fp8("qkv_weight", qkv_weight, 3 * inner * width);
  first.column_scale = call.fp32("qkv_scale", qkv_scale, 3 * inner);
  first.rows = core.padded;
  first.out = qk.data_ptr();
  first.heads = {v.data_ptr(),  core.q_scale, core.k_scale, core.v_scale,
                 static_cast<int>(inner), core.padded};
  STD_TORCH_CHECK(first.columns == 3 * inner, call.op, ": qkv_bias");

  core.out = call.fp8("context", context, call.rows * inner);
  core.out_scale = call.fp32("context_scale", context_scale, call.rows);

  auto last = call.product("o_bias", o_bias, inner, 1);
  last.a = core.out;
  last.row_scale = core.out_scale;
  last.weight = call.fp8("o_weight", o_weight, width * inner);
  last.column_scale = call.fp32("o_scale", o_scale, width);
  last.residual = latents.data_ptr();
  last.out = call.bf16("out", out, latents.numel());
  STD_TORCH_CHECK(last.columns == width, call.op, ": o_bias");
  check_launch(call.op, snapkernels::quantise_rows(rows, call.stream));
  check_launch(call.op, snapkernels::product_heads(first, head, call.stream));
  check_launch(call.op, snapkernels::latent_core(core, call.stream));
  check_launch(call.op, snapkernels::product_fp8(last, call.stream));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(snapkernels_cuda, m) {
  m.def(
      "latent_core(Tensor qk, Tensor v, Tensor q_scale, Tensor k_scale, Tensor v_scale,"
      " Tensor(a!) out, Tensor(b!) out_scale, int length, int head) -> ()");
  m.def(
      "latent_attention_fp8(Tensor latents, Tensor norm_weight, Tensor norm_bias,"
      " Tensor qkv_weight, Tensor qkv_scale, Tensor qkv_bias, Tensor o_weight, Tensor o_scale,"
      " Tensor o_bias, Tensor(a!) quantised, Tensor(b!) scale, Tensor(c!) qk, Tensor(d!) v,"
      " Tensor(e!) q_scale, Tensor(f!) k_scale, Tensor(g!) v_scale, Tensor(h!) context,"
      " Tensor(i!) context_scale, Tensor(j!) out, Tensor(k!) parts, Tensor(l!) flags, int length,"
      " int head, float eps) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(snapkernels_cuda, CUDA, m) {
  m.impl("latent_core", TORCH_BOX(&latent_core));
  m.impl("latent_attention_fp8", TORCH_BOX(&latent_attention_fp8));
}
