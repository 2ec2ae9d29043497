// The launches of head_backward.cuh, each beginning while the one before it ends.
#include "head/head_backward.cuh"
#include "launch.cuh"

namespace snapkernels {
namespace {

template <int kFeatures>
cudaError_t launch_both(const HeadBackwardArguments& given, const HeadBackwardMap& map,
                        cudaStream_t stream) {
  const cudaError_t error =
      launch(head_backward_kernel<kFeatures>, map.slices * map.ranges,
             kHeadCalculators + kHeadFillers, HeadBackwardShared<kFeatures>::kBytes, stream, map,
             given);
  if (error != cudaSuccess || given.products == nullptr) return error;
  return launch(head_finish_kernel<kFeatures>, map.width / kHeadFinishColumns,
                kHeadFinishColumns * kFeatures, 0, stream, map, given);
}

}  // namespace

cudaError_t head_backward(const HeadBackwardArguments& given, int tokens, int width, int features,
                          int ranges, cudaStream_t stream) {
  if (width % kHeadSlice != 0) return cudaErrorInvalidValue;
  const HeadBackwardMap map{tokens, width, width / kHeadSlice, ranges};
  switch (features) {
    case 16:
      return launch_both<16>(given, map, stream);
    case 48:
      return launch_both<48>(given, map, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace snapkernels
