// The one file that knows torch: checks, the current stream, and the schemas of snapkernels_cuda.
//
// Only libtorch's stable ABI is used, so that a build serves every torch from 2.11 on, CPU builds
// included (there the schemas load and a call fails).
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <vector>

#include "patch/cell_transpose.h"

// Weak: a CPU build of torch has no such function.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void**);

namespace {

using torch::stable::Tensor;

cudaStream_t current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

void check_launch(const char* op, cudaError_t error) {
  STD_TORCH_CHECK(error == cudaSuccess, op, ": ", cudaGetErrorString(error));
}

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

// The hash of csrc/ that setup.py compiled, so that a stale library is noticed.
int64_t sources() { return SNAPKERNELS_SOURCES; }

}  // namespace

STABLE_TORCH_LIBRARY(snapkernels_cuda, m) {
  m.def("patchify(Tensor video, Tensor(a!) tokens, int patch, int[] group) -> ()");
  m.def("unpatchify(Tensor tokens, Tensor(a!) video, int patch, int[] group) -> ()");
  m.def("sources() -> int");
}

STABLE_TORCH_LIBRARY_IMPL(snapkernels_cuda, CUDA, m) {
  m.impl("patchify", TORCH_BOX(&patchify));
  m.impl("unpatchify", TORCH_BOX(&unpatchify));
}

STABLE_TORCH_LIBRARY_IMPL(snapkernels_cuda, CompositeExplicitAutograd, m) {
  m.impl("sources", TORCH_BOX(&sources));
}
