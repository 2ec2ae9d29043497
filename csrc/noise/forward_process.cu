// forward_process: every thread makes four normals from their counter and adds them to four pixels.
#include <cmath>

#include "noise/forward_process.h"
#include "philox.cuh"

namespace snapkernels {
namespace {

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads)
    forward_process_kernel(const float4* __restrict__ video, const float* __restrict__ sigma,
                           const int64_t* __restrict__ sample, float4* __restrict__ x_sigma,
                           int64_t blocks, float data_scale, uint2 key) {
  const int64_t block = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (block >= blocks) return;
  const int64_t at = blockIdx.y * blocks + block;
  const float4 pixels = video[at];  // under way while the noise is made
  const float level = sigma[blockIdx.y] > 0 ? sigma[blockIdx.y] : NAN;
  const float4 eps = philox_normals(key, block, sample[blockIdx.y]);
  x_sigma[at] = {pixels.x * data_scale + level * eps.x, pixels.y * data_scale + level * eps.y,
                 pixels.z * data_scale + level * eps.z, pixels.w * data_scale + level * eps.w};
}

}  // namespace

cudaError_t forward_process(const float* video, const float* sigma, const int64_t* sample,
                            float* x_sigma, int64_t batch, int64_t blocks, float sigma_in,
                            uint64_t seed, cudaStream_t stream) {
  const dim3 grid((blocks + kThreads - 1) / kThreads, batch);
  const uint2 key{static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)};
  forward_process_kernel<<<grid, kThreads, 0, stream>>>(
      reinterpret_cast<const float4*>(video), sigma, sample, reinterpret_cast<float4*>(x_sigma),
      blocks, 1 / sigma_in, key);
  return cudaGetLastError();
}

}  // namespace snapkernels
