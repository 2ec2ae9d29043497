// The launches of group_read_weights.cuh and group_read_average.cuh.
#include "grid.h"
#include "group_attn/group_read_average.cuh"
#include "group_attn/group_read_weights.cuh"
#include "launch.cuh"
#include "tensor_map.h"

namespace snapkernels {
namespace {

cudaError_t launch_weights(const GroupReadArguments& given, cudaStream_t stream) {
  const GroupArguments& of = given.of;
  CUtensorMap patches, absorbed;
  cudaError_t error = make_tensor_map(&patches, of.patches, of.groups, of.tokens, of.width,
                                      kScoreTokens);
  if (error != cudaSuccess) return error;
  error = make_tensor_map(&absorbed, of.absorbed, of.groups, kGroupColumns, of.width,
                          kPieceBytes / kMatrixRow);
  if (error != cudaSuccess) return error;
  int blocks;
  error = blocks_of_clusters(&blocks, score_items(of), kClusterBlocks);
  if (error != cudaSuccess) return error;
  return launch_clusters(group_read_weights_kernel, blocks, kClusterBlocks, kReadThreads,
                         ReadRings::kBytes, stream, patches, absorbed, given);
}

cudaError_t launch_average(const GroupReadArguments& given, cudaStream_t stream) {
  const GroupArguments& of = given.of;
  CUtensorMap patches, weights;
  const int64_t rows = static_cast<int64_t>(of.groups) * of.tokens;
  cudaError_t error = make_tensor_map_in_order(&patches, of.patches, rows, of.width);
  if (error != cudaSuccess) return error;
  error = make_tensor_map(&weights, given.weights, of.groups, kGroupColumns, of.tokens, 64);
  if (error != cudaSuccess) return error;
  int blocks;
  const int items = of.groups * (of.width / kAverageChannels);
  error = blocks_of_clusters(&blocks, items, kAverageBlocks);
  if (error != cudaSuccess) return error;
  return launch_clusters(group_read_average_kernel<kGroupLatents>, blocks, kAverageBlocks,
                         kAverageThreads, kAverageShared, stream, patches, weights, given);
}

}  // namespace

cudaError_t group_read(const GroupReadArguments& given, cudaStream_t stream) {
  const cudaError_t error = launch_weights(given, stream);
  return error == cudaSuccess ? launch_average(given, stream) : error;
}

}  // namespace snapkernels
