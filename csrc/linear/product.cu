// The launches of product.cuh and product_resident.cuh.
#include <climits>

#include "linear/product_end.cuh"
#include "linear/product_launch.cuh"

namespace snapkernels {

cudaError_t product_blocks(int* blocks) {
  return blocks_of_clusters(blocks, INT_MAX / kProductBlocks, kProductBlocks);
}

cudaError_t product_fp8(const ProductArguments& given, cudaStream_t stream) {
  int blocks;
  const cudaError_t error = product_blocks(&blocks);
  if (error != cudaSuccess) return error;
  if (narrow_pays(given, blocks / kProductBlocks)) {
    using End = ProductEnd<Fp8, false, kProductNarrow>;
    return given.centred ? launch_product<Fp8Unpromoted, End>(given, stream)
                         : launch_product<Fp8, End>(given, stream);
  }
  return launch_fp8<ProductEnd<Fp8, false>>(given, stream);
}

cudaError_t product_gelu_fp8(const ProductArguments& given, cudaStream_t stream) {
  return launch_fp8<ProductEnd<Fp8, true>>(given, stream);
}

cudaError_t product_bf16(const ProductArguments& given, cudaStream_t stream) {
  return launch_product<Bf16, ProductEnd<Bf16, false>>(given, stream);
}

cudaError_t product_gelu_bf16(const ProductArguments& given, cudaStream_t stream) {
  return launch_product<Bf16, ProductEnd<Bf16, true>>(given, stream);
}

}  // namespace snapkernels
