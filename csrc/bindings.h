// What the files that know torch share: the current stream, and checks.
//
// Only libtorch's stable ABI is used, so that a build serves every torch from 2.11 on, CPU builds
// included (there the schemas load and a call fails).
#pragma once

#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

// Weak: a CPU build of torch has no such function.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void**);

namespace snapkernels::bindings {

using torch::stable::Tensor;

inline cudaStream_t current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

inline void check_launch(const char* op, cudaError_t error) {
  STD_TORCH_CHECK(error == cudaSuccess, op, ": ", cudaGetErrorString(error));
}

// The data of `tensor`, contiguous, of this dtype and size, and on the device of `other`.
template <typename T>
T* data_of(const char* op, const char* name, const Tensor& tensor,
             torch::headeronly::ScalarType dtype, int64_t numel, const Tensor& other) {
  STD_TORCH_CHECK(tensor.scalar_type() == dtype && tensor.numel() == numel &&
                      tensor.is_contiguous() &&
                      tensor.get_device_index() == other.get_device_index(),
                  op, ": ", name, " has another dtype, size, layout or device");
  return static_cast<T*>(tensor.data_ptr());
}

}  // namespace snapkernels::bindings
