// The launches of stem_forward.cuh: two instances for each number of channels.
#include "stem/stem_forward.cuh"

#include <algorithm>

#include "launch.cuh"

namespace snapkernels {
namespace {

// One block a multiprocessor; where there are fewer tiles, one for each before any block has two.
template <int kSteps>
cudaError_t launch_steps(const StemArguments& given, const StemMap& map, cudaStream_t stream) {
  int device, multiprocessors;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return error;

  const auto kernel =
      map.alike ? stem_forward_kernel<kSteps, true> : stem_forward_kernel<kSteps, false>;
  return launch(kernel, std::min(multiprocessors, map.tiles),
                128 * (map.alike ? kStemWarpgroups<true> : kStemWarpgroups<false>),
                stem_shared_bytes<kSteps>(map.at.token_width), stream, map, given);
}

}  // namespace

cudaError_t stem(const StemArguments& given, const StemGeometry& at, cudaStream_t stream) {
  const PatchGrid grid(at, kStemPatch);
  const int groups = at.batch * grid.groups.divisor, tokens = groups * grid.group_tokens.divisor;
  // Every `tables`-th of these groups, of all videos, has the same positions.
  int alike = 0;
  while (alike < 3 && groups / at.tables % (2 << alike) == 0) ++alike;
  const StemMap map{at,
                    tokens,
                    (tokens + kStemTokens - 1) / kStemTokens,
                    alike,
                    tokens >> alike,
                    1.f / at.token_width,
                    static_cast<float>(at.low_height) / at.height,
                    static_cast<float>(at.low_width) / at.width,
                    grid,
                    Divider(at.tables)};
  switch (at.channels + at.low_channels) {
    case 1:
      return launch_steps<1>(given, map, stream);
    case 2:
      return launch_steps<2>(given, map, stream);
    case 3:
      return launch_steps<3>(given, map, stream);
    case 4:
      return launch_steps<4>(given, map, stream);
    case 5:
      return launch_steps<5>(given, map, stream);
    case 6:
      return launch_steps<6>(given, map, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace snapkernels
