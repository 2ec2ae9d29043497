// The launches of product.cuh and product_resident.cuh.
#include <climits>

#include "linear/product_launch.cuh"
#include "linear/product_resident.cuh"

namespace snapkernels {
namespace {

template <bool kGelu>
cudaError_t launch_resident(const ProductArguments& of, int blocks, cudaStream_t stream) {
  CUtensorMap a, weight;
  const cudaError_t error =
      make_maps<Fp8, ProductEnd<Fp8, kGelu>>(&a, &weight, of, kResidentRows / kProductBlocks);
  if (error != cudaSuccess) return error;
  return launch_clusters(product_resident_kernel<kGelu>, blocks, kProductBlocks, kProductThreads,
                         kResidentShared, stream, a, weight, of);
}

// Sums that are not promoted lose 0.2 % over 256 numbers of one sign, below bfloat16's rounding of
// the result, and 1.5 % over 1024. Those of a LayerNorm have both signs: they may be resident.
template <bool kGelu>
cudaError_t launch_fp8(const ProductArguments& of, cudaStream_t stream) {
  int blocks;
  const cudaError_t error = product_blocks(&blocks);
  if (error != cudaSuccess) return error;
  const int resident = resident_blocks(of, blocks);
  if (of.centred && of.depth <= kResidentDepth && resident * 10 >= blocks * 9) {
    return launch_resident<kGelu>(of, resident, stream);
  }
  return launch_product<Fp8, ProductEnd<Fp8, kGelu>>(of, stream);
}

}  // namespace

cudaError_t product_blocks(int* blocks) {
  return blocks_of_clusters(blocks, INT_MAX / kProductBlocks, kProductBlocks);
}

cudaError_t product_fp8(const ProductArguments& given, cudaStream_t stream) {
  return launch_fp8<false>(given, stream);
}

cudaError_t product_gelu_fp8(const ProductArguments& given, cudaStream_t stream) {
  return launch_fp8<true>(given, stream);
}

cudaError_t product_bf16(const ProductArguments& given, cudaStream_t stream) {
  return launch_product<Bf16, ProductEnd<Bf16, false>>(given, stream);
}

cudaError_t product_gelu_bf16(const ProductArguments& given, cudaStream_t stream) {
  return launch_product<Bf16, ProductEnd<Bf16, true>>(given, stream);
}

}  // namespace snapkernels
