// The launches of head_forward.cuh: one instance for each end, width of a token and of a patch.
#include "head/head_forward.cuh"
#include "launch.cuh"

#include <algorithm>

namespace snapkernels {
namespace {

// One block a multiprocessor; where there are fewer tiles, one for each before any block has two.
template <HeadEnd kEnd, bool kSaves, int kWidth, int kFeatures>
cudaError_t launch_end(const HeadArguments& given, const HeadMap& map, cudaStream_t stream) {
  int device, multiprocessors;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return error;
  const int blocks = std::min({multiprocessors, map.tiles, kHeadPartials});

  error = launch(head_forward_kernel<kEnd, kSaves, kWidth, kFeatures>, blocks, kHeadThreads,
                 sizeof(HeadShared<kWidth, kFeatures>), stream, map, given);
  if (kEnd != HeadEnd::kLoss || error != cudaSuccess) return error;
  const float pixels = static_cast<float>(map.at.batch * map.video_pixels);
  return launch(head_loss_mean_kernel, 1, kHeadPartials, 0, stream,
                static_cast<const float*>(given.partial), given.out, blocks, pixels);
}

template <HeadEnd kEnd, int kWidth>
cudaError_t launch_for_features(const HeadArguments& given, const HeadMap& map,
                                cudaStream_t stream) {
  const bool saves = given.features != nullptr;
  switch (map.at.channels) {
    case 1:
      return saves ? launch_end<kEnd, true, kWidth, 16>(given, map, stream)
                   : launch_end<kEnd, false, kWidth, 16>(given, map, stream);
    case 3:
      return saves ? launch_end<kEnd, true, kWidth, 48>(given, map, stream)
                   : launch_end<kEnd, false, kWidth, 48>(given, map, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

template <HeadEnd kEnd>
cudaError_t launch_for_width(const HeadArguments& given, const HeadGeometry& at,
                             cudaStream_t stream) {
  const PatchGrid grid(at, kHeadPatch);
  const int tokens = at.batch * grid.groups.divisor * grid.group_tokens.divisor;
  const HeadMap map{at,
                    tokens,
                    (tokens + kHeadTile - 1) / kHeadTile,
                    static_cast<int64_t>(at.channels) * at.frames * at.height * at.width,
                    grid};
  switch (at.token_width) {
    case 256:
      return launch_for_features<kEnd, 256>(given, map, stream);
    case 512:
      return launch_for_features<kEnd, 512>(given, map, stream);
    case 768:
      return launch_for_features<kEnd, 768>(given, map, stream);
    case 1024:
      return launch_for_features<kEnd, 1024>(given, map, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace

cudaError_t head(const HeadArguments& given, const HeadGeometry& at, cudaStream_t stream) {
  return launch_for_width<HeadEnd::kF>(given, at, stream);
}

cudaError_t head_mix(const HeadArguments& given, const HeadGeometry& at, cudaStream_t stream) {
  return launch_for_width<HeadEnd::kMix>(given, at, stream);
}

cudaError_t head_loss(const HeadArguments& given, const HeadGeometry& at, cudaStream_t stream) {
  return launch_for_width<HeadEnd::kLoss>(given, at, stream);
}

}  // namespace snapkernels
