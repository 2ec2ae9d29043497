// The launches of the stem's backward, each beginning while the one before it ends.
#include "launch.cuh"
#include "stem/stem_backward_finish.cuh"

namespace snapkernels {
namespace {

template <int kChannels>
cudaError_t launch_all(const StemBackwardArguments& given, const StemBackwardMap& map,
                       cudaStream_t stream) {
  using Moments = StemMomentShared<kChannels>;
  constexpr int kColumns = StemXhat<kChannels>::kColumns;
  constexpr int kVectors = kColumns * kColumns / 4;
  const int width = map.at.token_width, blocks = map.slices * given.ranges;
  cudaError_t error = launch(stem_features_kernel<kChannels>, given.ranges * given.tiles,
                             kFeatureThreads, 0, stream, map, given);
  if (error != cudaSuccess) return error;
  error = launch(stem_backward_kernel<kChannels>, blocks, kBackwardThreads,
                 StemBackwardShared<kChannels>::kBytes, stream, map, given);
  if (error != cudaSuccess) return error;
  error = launch(stem_moments_kernel<kChannels>, blocks, Moments::kThreads,
                 Moments::bytes(map.slices), stream, map, given);
  if (error != cudaSuccess) return error;
  static_assert(kVectors % kSumVectors == 0);
  error = launch(stem_sums_kernel, kVectors / kSumVectors, kSumParts * kSumVectors, 0, stream,
                 given, kVectors, blocks);
  if (error != cudaSuccess) return error;
  return launch(stem_combine_kernel<kChannels>, width / kCombineRows, kCombineThreads, 0, stream,
                given, width);
}

}  // namespace

cudaError_t stem_backward(const StemBackwardArguments& given, const StemGeometry& at,
                          cudaStream_t stream) {
  const PatchGrid grid(at, kStemPatch);
  const StemBackwardMap map{at,
                            static_cast<int>(grid.group_tokens.divisor),
                            at.token_width / kStemSlice,
                            1.f / at.token_width,
                            static_cast<float>(at.low_height) / at.height,
                            static_cast<float>(at.low_width) / at.width,
                            Divider(at.batch * grid.groups.divisor),
                            grid};
  switch (at.channels + at.low_channels) {
    case 3:
      return launch_all<3>(given, map, stream);
    case 6:
      return launch_all<6>(given, map, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace snapkernels
