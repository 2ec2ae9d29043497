// forward_process as a launch on raw pointers. Knows nothing of torch.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace snapkernels {

// x_sigma = video / sigma_in + sigma eps. Videos of `blocks` blocks of four elements each.
cudaError_t forward_process(const float* video, const float* sigma, const int64_t* sample,
                            float* x_sigma, int64_t batch, int64_t blocks, float sigma_in,
                            uint64_t seed, cudaStream_t stream);

}  // namespace snapkernels
