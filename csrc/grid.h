// How many blocks a kernel starts whose clusters share items out.
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>

namespace snapkernels {

// One block a multiprocessor, in clusters; fewer where there are fewer items.
inline cudaError_t blocks_of_clusters(int* blocks, int items, int cluster) {
  int device, multiprocessors;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  *blocks = std::min(items, multiprocessors / cluster) * cluster;
  return error;
}

}  // namespace snapkernels
