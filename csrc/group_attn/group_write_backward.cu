// The launch of group_write_backward.cuh.
#include "group_attn/group_write_backward.cuh"
#include "grid.h"
#include "launch.cuh"
#include "tensor_map.h"

namespace snapkernels {

cudaError_t group_write_backward(const GroupWriteBackwardArguments& given, cudaStream_t stream) {
  const GroupArguments& of = given.of;
  constexpr int kPieceRows = kPieceBytes / kMatrixRow;
  CUtensorMap patches, grad, absorbed, values;
  const struct {
    CUtensorMap* map;
    const void* data;
    int rows, box_rows;
  } maps[] = {{&patches, of.patches, of.tokens, kScoreTokens},
              {&grad, given.grad, of.tokens, kScoreTokens},
              {&absorbed, of.absorbed, kGroupColumns, kPieceRows},
              {&values, given.grads.rows, kGroupColumns, kPieceRows}};
  for (const auto& one : maps) {
    const cudaError_t error =
        make_tensor_map(one.map, one.data, of.groups, one.rows, of.width, one.box_rows);
    if (error != cudaSuccess) return error;
  }
  int blocks;
  const cudaError_t error = blocks_of_clusters(&blocks, score_items(of), kClusterBlocks);
  if (error != cudaSuccess) return error;
  return launch_clusters(group_write_backward_kernel<kGroupLatents>, blocks, kClusterBlocks,
                         kScoreThreads, kWriteBackwardShared, stream, patches, grad,
                         absorbed, values, given);
}

}  // namespace snapkernels
