// The launches of products that end as heads_end.cuh has it.
#include "latent_attn/heads_end.cuh"
#include "linear/product_launch.cuh"

namespace snapkernels {

cudaError_t product_queries_keys(const ProductArguments& given, int head, cudaStream_t stream) {
  return head == 64 ? launch_product<Fp8, HeadsEnd<64, false>>(given, stream)
                    : launch_product<Fp8, HeadsEnd<128, false>>(given, stream);
}

cudaError_t product_values(const ProductArguments& given, int head, cudaStream_t stream) {
  return head == 64 ? launch_product<Fp8, HeadsEnd<64, true>>(given, stream)
                    : launch_product<Fp8, HeadsEnd<128, true>>(given, stream);
}

}  // namespace snapkernels
