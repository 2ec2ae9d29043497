// A launch that begins while the kernel before it ends: see after_kernel_before() in wgmma.cuh.
#pragma once

#include <cuda_runtime_api.h>

namespace snapkernels {

// `cluster` blocks that follow each other are a cluster; 1 for a kernel that knows of none.
template <typename... Parameters>
cudaError_t launch_clusters(void (*kernel)(Parameters...), int blocks, int cluster, int threads,
                            int shared, cudaStream_t stream, const Parameters&... parameters) {
  if (shared > 0) {
    const auto most = cudaFuncAttributeMaxDynamicSharedMemorySize;
    const cudaError_t error = cudaFuncSetAttribute(kernel, most, shared);
    if (error != cudaSuccess) return error;
  }
  cudaLaunchAttribute attributes[2];
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim.x = cluster;
  attributes[1].val.clusterDim.y = attributes[1].val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = blocks;
  config.blockDim = threads;
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = cluster > 1 ? 2 : 1;
  return cudaLaunchKernelEx(&config, kernel, parameters...);
}

template <typename... Parameters>
cudaError_t launch(void (*kernel)(Parameters...), int blocks, int threads, int shared,
                   cudaStream_t stream, const Parameters&... parameters) {
  return launch_clusters(kernel, blocks, 1, threads, shared, stream, parameters...);
}

}  // namespace snapkernels
