// The launches of rows.cuh.
#include <algorithm>

#include "launch.cuh"
#include "linear/rows.cuh"

namespace snapkernels {
namespace {

template <bool kQuantised, int kChunks = kRowsMost / kRowsWidths>
cudaError_t launch_rows(const RowsArguments& given, cudaStream_t stream) {
  if (given.width == kChunks * kRowsWidths) {
    const int64_t rows = std::max(given.rows, int64_t{given.padded});
    const int blocks = static_cast<int>((rows + kRowsWarps - 1) / kRowsWarps);
    return launch(rows_kernel<kChunks, kQuantised>, blocks, 32 * kRowsWarps, 0, stream, given);
  }
  if constexpr (kChunks > 1) return launch_rows<kQuantised, kChunks - 1>(given, stream);
  return cudaErrorInvalidValue;
}

}  // namespace

cudaError_t quantise_rows(const RowsArguments& given, cudaStream_t stream) {
  return launch_rows<true>(given, stream);
}

cudaError_t normalise_rows(const RowsArguments& given, cudaStream_t stream) {
  return launch_rows<false>(given, stream);
}

}  // namespace snapkernels
