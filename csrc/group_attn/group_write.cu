// The launch of group_write.cuh.
#include "group_attn/group_write.cuh"
#include "grid.h"
#include "launch.cuh"
#include "tensor_map.h"

namespace snapkernels {

cudaError_t group_write(const GroupWriteArguments& given, cudaStream_t stream) {
  const GroupArguments& of = given.of;
  constexpr int kPieceRows = kPieceBytes / kMatrixRow;
  CUtensorMap patches, absorbed, values;
  cudaError_t error = make_tensor_map(&patches, of.patches, of.groups, of.tokens, of.width,
                                      kScoreTokens);
  if (error != cudaSuccess) return error;
  error = make_tensor_map(&absorbed, of.absorbed, of.groups, kGroupColumns, of.width, kPieceRows);
  if (error != cudaSuccess) return error;
  error = make_tensor_map(&values, given.values, of.groups, kGroupColumns, of.width, kPieceRows);
  if (error != cudaSuccess) return error;
  int blocks;
  error = blocks_of_clusters(&blocks, score_items(of), kClusterBlocks);
  if (error != cudaSuccess) return error;
  return launch_clusters(group_write_kernel<kGroupLatents>, blocks, kClusterBlocks, kScoreThreads,
                         TokenRings::bytes<float2>(), stream, patches, absorbed, values, given);
}

}  // namespace snapkernels
