// A launch that begins while the kernel before it ends: see after_kernel_before() in wgmma.cuh.
#pragma once

#include <cuda_runtime_api.h>

namespace snapkernels {

template <typename... Parameters>
cudaError_t launch(void (*kernel)(Parameters...), int blocks, int threads, int shared,
                   cudaStream_t stream, const Parameters&... parameters) {
  if (shared > 0) {
    const auto most = cudaFuncAttributeMaxDynamicSharedMemorySize;
    const cudaError_t error = cudaFuncSetAttribute(kernel, most, shared);
    if (error != cudaSuccess) return error;
  }
  cudaLaunchAttribute overlap;
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = blocks;
  config.blockDim = threads;
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  config.attrs = &overlap;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, parameters...);
}

}  // namespace snapkernels
