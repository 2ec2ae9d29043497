// The launch of a product that ends as heads_end.cuh has it.
#include "latent_attn/heads_end.cuh"
#include "linear/product_launch.cuh"

namespace snapkernels {

cudaError_t product_heads(const ProductArguments& given, int head, cudaStream_t stream) {
  return head == 64 ? launch_centred<HeadsEnd<64>>(given, stream)
                    : launch_centred<HeadsEnd<128>>(given, stream);
}

}  // namespace snapkernels
