// The launch of latent_core.cuh.
#include "grid.h"
#include "latent_attn/latent_core.cuh"
#include "launch.cuh"
#include "tensor_map.h"

namespace snapkernels {
namespace {

constexpr auto kBytes = CU_TENSOR_MAP_DATA_TYPE_UINT8;

template <int kHead>
cudaError_t launch_core(const LatentCoreArguments& of, cudaStream_t stream) {
  CUtensorMap q, k, v;
  const int inner = of.heads * kHead;
  cudaError_t error =
      make_tensor_map(&q, of.qk, 1, of.padded, 2 * inner, kCoreQueries, kBytes, 1);
  if (error != cudaSuccess) return error;
  error = make_tensor_map_in_order(&k, of.qk, of.padded, 2 * inner, kHeadsTokens, 4, kBytes, 1);
  if (error != cudaSuccess) return error;
  error = make_tensor_map_in_order(&v, of.v, inner, of.padded, kHead, 16, kBytes, 1);
  if (error != cudaSuccess) return error;
  int blocks;
  error = blocks_of_clusters(&blocks, CoreWork(of).items(), 1);
  if (error != cudaSuccess) return error;
  return launch(latent_core_kernel<kHead>, blocks, kCoreThreads, kCoreShared, stream, q, k, v, of);
}

}  // namespace

cudaError_t latent_core(const LatentCoreArguments& given, cudaStream_t stream) {
  return given.head == 64 ? launch_core<64>(given, stream) : launch_core<128>(given, stream);
}

}  // namespace snapkernels
