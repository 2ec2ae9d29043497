// The launches of cell_transpose.cuh: tile sizes, and one instance for each size of a cell.
#include "patch/cell_transpose.cuh"

#include <algorithm>

namespace snapkernels {
namespace {

template <typename Cell, bool kToTokens>
cudaError_t launch(const PatchGeometry& at, const void* video, const void* tokens,
                   cudaStream_t stream) {
  constexpr int kCells = 16 / sizeof(Cell);
  const int cells_k = at.channels * at.patch;
  // Whole vectors across; odd pitches spread a token's cells over the banks of shared memory.
  const int most = std::max<int>(kTileBytes / (cells_k * sizeof(Cell)) / kCells, 1) * kCells;
  const int tile_w = std::min(most, at.columns);
  const int pitch = tile_w | 1;
  const int vectors = cells_k * tile_w / kCells;
  const int threads = std::min(kThreads, (vectors + 31) / 32 * 32);
  const CellMatrix matrix{at,
                          at.batch * at.frames * at.patch_rows,
                          cells_k,
                          tile_w,
                          pitch,
                          Divider(tile_w / kCells),
                          Divider(cells_k / kCells),
                          Divider(at.patch_rows),
                          Divider(at.frames),
                          Divider(at.group_t),
                          Divider(at.group_h),
                          Divider(at.group_w)};
  const int row_bytes = cells_k * pitch * sizeof(Cell);
  const int block_rows = std::min<int>(kThreads / threads, std::max(kTileBytes / row_bytes, 1));
  const int shared = block_rows * row_bytes;
  const auto kernel = vectors <= threads ? cell_transpose_kernel<Cell, kToTokens, 1>
                                         : cell_transpose_kernel<Cell, kToTokens, 3>;
  if (shared > 48 * 1024) {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
    if (error != cudaSuccess) return error;
  }
  const dim3 grid((matrix.rows + block_rows - 1) / block_rows,
                  (at.columns + tile_w - 1) / tile_w);
  const dim3 block(threads, block_rows);
  cudaLaunchAttribute overlap;
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  config.attrs = &overlap;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, matrix, static_cast<char*>(const_cast<void*>(video)),
                            static_cast<char*>(const_cast<void*>(tokens)));
}

template <bool kToTokens>
cudaError_t launch_for_cell(const PatchGeometry& at, const void* video, const void* tokens,
                            cudaStream_t stream) {
  switch (at.patch * at.item_bytes) {
    case 4:
      return launch<uint32_t, kToTokens>(at, video, tokens, stream);
    case 8:
      return launch<uint2, kToTokens>(at, video, tokens, stream);
    case 16:
      return launch<uint4, kToTokens>(at, video, tokens, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace

cudaError_t patchify(const void* video, void* tokens, const PatchGeometry& geometry,
                     cudaStream_t stream) {
  return launch_for_cell<true>(geometry, video, tokens, stream);
}

cudaError_t unpatchify(const void* tokens, void* video, const PatchGeometry& geometry,
                       cudaStream_t stream) {
  return launch_for_cell<false>(geometry, video, tokens, stream);
}

}  // namespace snapkernels
