// How a product.cuh is launched, whatever its end.
#pragma once

#include "grid.h"
#include "launch.cuh"
#include "linear/product_resident.cuh"
#include "tensor_map.h"

namespace snapkernels {

// `a_rows`: that a block copies at a time.
template <typename Operand, typename End>
inline cudaError_t make_maps(CUtensorMap* a, CUtensorMap* weight, const ProductArguments& of,
                             int a_rows) {
  const cudaError_t error =
      End::kFours ? make_tensor_map_in_fours(a, of.a, of.rows, of.depth, a_rows / 64,
                                             Operand::kMap, Operand::kBytes)
                  : make_tensor_map(a, of.a, 1, of.rows, of.depth, a_rows, Operand::kMap,
                                    Operand::kBytes);
  if (error != cudaSuccess) return error;
  return make_tensor_map_in_order(weight, of.weight, of.columns, of.depth, End::kColumns,
                                  End::kTogether, Operand::kMap, Operand::kBytes);
}

static_assert(kProductFlags == kProductConsumers && kProductPart % kProductConsumers == 0);
// What it takes to hand sums over, about, and the least that is worth it, in units of a tile. With
// more rounds of whole tiles there is less to win, and clusters that are not in step read a matrix
// from memory that L2 does not hold.
constexpr int kHandOver = 6;
constexpr int kLeastShare = 4;
constexpr int kMostRounds = 4;

// Units of a cluster's share, if tiles are to be split; or 0: that of whole ones takes no longer.
inline int share_of(const ProductWork& work, int clusters) {
  const int64_t units = static_cast<int64_t>(work.items()) * work.units;
  const int64_t rounds = (work.items() + clusters - 1) / clusters;
  const int64_t share = std::max<int64_t>((units + clusters - 1) / clusters, kLeastShare);
  const bool pays = rounds <= kMostRounds && rounds * work.units > share + kHandOver;
  return pays ? static_cast<int>(share) : 0;
}

// Units of the cluster that has most to do.
inline int64_t most_units(const ProductArguments& of, const ProductWork& work, int clusters) {
  const int share = of.parts ? share_of(work, clusters) : 0;
  const int64_t rounds = (work.items() + clusters - 1) / clusters;
  return share ? share + kHandOver : rounds * work.units;
}

// Whether e4m3 takes less in blocks of fewer columns: by a tenth, as they read more for a product.
// Not of shallow tiles, of which the ends are more of the time.
inline bool narrow_pays(const ProductArguments& of, int clusters) {
  if (of.depth <= kResidentDepth || of.columns % (kProductNarrow * kProductBlocks)) return false;
  const ProductWork wide(of, 1, kProductSlice), narrow(of, 1, kProductNarrow);
  return most_units(of, narrow, clusters) * kProductNarrow * 10 <
         most_units(of, wide, clusters) * kProductSlice * 9;
}

template <typename Operand, typename End>
inline cudaError_t launch_product(ProductArguments of, cudaStream_t stream) {
  CUtensorMap a, weight;
  cudaError_t error =
      make_maps<Operand, End>(&a, &weight, of, kProductRows / kProductBlocks);
  if (error != cudaSuccess) return error;
  const ProductWork work(of, Operand::kBytes, End::kColumns);
  int blocks;
  error = product_blocks(&blocks);
  if (error != cudaSuccess) return error;
  int clusters = blocks / kProductBlocks;
  of.share = of.parts ? share_of(work, clusters) : 0;
  clusters = of.share ? (work.items() * work.units + of.share - 1) / of.share
                      : std::min(clusters, work.items());
  return launch_clusters(product_kernel<Operand, End>, clusters * kProductBlocks,
                         kProductBlocks, kProductThreads, kProductShared, stream, a, weight, of);
}

template <typename End>
inline cudaError_t launch_resident(const ProductArguments& of, int blocks, cudaStream_t stream) {
  CUtensorMap a, weight;
  const cudaError_t error = make_maps<Fp8, End>(&a, &weight, of, kResidentRows / kProductBlocks);
  if (error != cudaSuccess) return error;
  return launch_clusters(product_resident_kernel<End>, blocks, kProductBlocks, kProductThreads,
                         kResidentShared, stream, a, weight, of);
}

// Rows of a LayerNorm. Sums that are not promoted lose 0.2 % over 256 numbers of one sign, below
// bfloat16's rounding of the result, 1.5 % over 1024 and some 5 % over 3072; of both signs a
// thousandth of their deviation. A LayerNorm's bias brings one sign only to a row of the weight
// that lies along it.
template <typename End>
inline cudaError_t launch_centred(const ProductArguments& of, cudaStream_t stream) {
  int blocks;
  const cudaError_t error = product_blocks(&blocks);
  if (error != cudaSuccess) return error;
  const int resident = resident_blocks(of, blocks);
  if (of.depth <= kResidentDepth && resident * 10 >= blocks * 9) {
    return launch_resident<End>(of, resident, stream);
  }
  return launch_product<Fp8Unpromoted, End>(of, stream);
}

template <typename End>
inline cudaError_t launch_fp8(const ProductArguments& of, cudaStream_t stream) {
  return of.centred ? launch_centred<End>(of, stream) : launch_product<Fp8, End>(of, stream);
}

}  // namespace snapkernels
