// The launches of group_read_grads.cuh and patch_grads.cuh.
#include "grid.h"
#include "group_attn/group_read_grads.cuh"
#include "group_attn/patch_grads.cuh"
#include "launch.cuh"
#include "tensor_map.h"

namespace snapkernels {
namespace {

cudaError_t launch_grads(const GroupReadBackwardArguments& given, cudaStream_t stream) {
  const GroupArguments& of = given.of;
  constexpr int kPieceRows = kPieceBytes / kMatrixRow;
  CUtensorMap patches, absorbed, rows;
  cudaError_t error = make_tensor_map(&patches, of.patches, of.groups, of.tokens, of.width,
                                      kScoreTokens);
  if (error != cudaSuccess) return error;
  error = make_tensor_map(&absorbed, of.absorbed, of.groups, kGroupColumns, of.width, kPieceRows);
  if (error != cudaSuccess) return error;
  error = make_tensor_map(&rows, given.grads.rows, of.groups, kGroupColumns, of.width, kPieceRows);
  if (error != cudaSuccess) return error;
  int blocks;
  error = blocks_of_clusters(&blocks, score_items(of), kClusterBlocks);
  if (error != cudaSuccess) return error;
  return launch_clusters(group_read_grads_kernel, blocks, kClusterBlocks, kScoreThreads,
                         kReadGradsShared, stream, patches, absorbed, rows, given);
}

cudaError_t launch_patches(const GroupReadBackwardArguments& given, cudaStream_t stream) {
  const GroupArguments& of = given.of;
  CUtensorMap weights, score_grads, rows, absorbed, patches, out;
  cudaError_t error = make_tensor_map(&weights, given.grads.weights, of.groups, of.tokens,
                                      kGroupColumns, kScoreTokens);
  if (error != cudaSuccess) return error;
  error = make_tensor_map(&score_grads, given.grads.score_grads, of.groups, of.tokens,
                          kGroupColumns, kScoreTokens);
  if (error != cudaSuccess) return error;
  const int64_t columns = static_cast<int64_t>(of.groups) * kGroupColumns;
  error = make_tensor_map_in_order(&rows, given.grads.rows, columns, of.width);
  if (error != cudaSuccess) return error;
  error = make_tensor_map_in_order(&absorbed, of.absorbed, columns, of.width);
  if (error != cudaSuccess) return error;
  constexpr int kWarpgroupTokens = kScoreTokens / kScoreConsumers;
  error = make_tensor_map(&patches, of.patches, of.groups, of.tokens, of.width, kWarpgroupTokens);
  if (error != cudaSuccess) return error;
  error = make_tensor_map(&out, given.grads.out, of.groups, of.tokens, of.width, kWarpgroupTokens);
  if (error != cudaSuccess) return error;
  int blocks;
  const int items = score_items(of) * (of.width / kPatchSlice);
  error = blocks_of_clusters(&blocks, items, kClusterBlocks);
  if (error != cudaSuccess) return error;
  return launch_clusters(group_patch_grads_kernel, blocks, kClusterBlocks, kScoreThreads,
                         kPatchShared, stream, weights, score_grads, rows, absorbed, patches, out,
                         given);
}

}  // namespace

cudaError_t group_read_backward(const GroupReadBackwardArguments& given, cudaStream_t stream) {
  const cudaError_t error = launch_grads(given, stream);
  return error == cudaSuccess && given.grads.out ? launch_patches(given, stream) : error;
}

}  // namespace snapkernels
