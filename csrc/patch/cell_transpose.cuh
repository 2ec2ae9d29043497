// patchify and unpatchify: the transposition of a matrix of cells.
//
// A cell is the `patch` pixels that a patch has in one of its rows. The patches of one row of a
// frame are a matrix of cells: k = (channel, pixel row in the patch) down, w = column of patches
// across. The video has it row by row, the tokens column by column. A tile of the matrix goes
// through shared memory, so that both sides of device memory see 16-byte accesses in order.
#pragma once

#include "divider.cuh"
#include "patch/cell_transpose.h"

namespace snapkernels {

constexpr int kTileBytes = 12288;  // several blocks a multiprocessor hide each other's barrier
constexpr int kThreads = 256;

struct CellMatrix {
  PatchGeometry at;
  int rows;               // of patches, in all frames of all videos
  int cells_k;            // C * patch
  int tile_w;             // columns of a tile
  int pitch;              // cells between rows of the tile in shared memory
  Divider row_vectors;    // 16-byte vectors in a tile's row of pixels
  Divider token_vectors;  // 16-byte vectors in a token
  Divider patch_rows, frames, group_t, group_h, group_w;

  // Byte offset of the pixel row of cells k in the video, from the row's first patch.
  __device__ int64_t pixel_row(uint32_t k) const {
    const uint32_t channel = k / at.patch, row = k - channel * at.patch;
    return channel * at.video_c + row * at.video_y;
  }

  // Byte offset of the token of column w, from the first token of this row in its first group.
  __device__ int64_t token(uint32_t w) const {
    const uint32_t group = group_w.quotient(w);
    return group * at.tokens_g + (w - group * at.group_w) * at.tokens_n;
  }
};

// A block: columns blockIdx.y * tile_w on, and for each threadIdx.y one row of patches.
// A thread has kInFlight 16-byte loads under way before it uses one. Where a tile needs but one of
// each, kInFlight = 1 leaves registers for twice the blocks: 10 to 20 % at the first stage's size,
// and 8 % slower at the upsampler's.
template <typename Cell, bool kToTokens, int kInFlight>
__global__ void __launch_bounds__(kThreads, kInFlight == 1 ? 8 : 1)
    cell_transpose_kernel(const CellMatrix m, char* __restrict__ video, char* __restrict__ tokens) {
  constexpr int kCells = 16 / sizeof(Cell);  // of a vector
  extern __shared__ __align__(16) char shared[];
  Cell* tile = reinterpret_cast<Cell*>(shared) + threadIdx.y * m.cells_k * m.pitch;

  // Where this row of patches begins on either side.
  const uint32_t row = blockIdx.x * blockDim.y + threadIdx.y;
  const uint32_t frame = m.patch_rows.quotient(row), h = row - frame * m.at.patch_rows;
  const uint32_t b = m.frames.quotient(frame), t = frame - b * m.at.frames;
  const uint32_t gt = m.group_t.quotient(t), gh = m.group_h.quotient(h);
  const uint32_t groups_h = m.group_h.quotient(m.at.patch_rows);
  const uint32_t groups_w = m.group_w.quotient(m.at.columns);
  const uint32_t g = (gt * groups_h + gh) * groups_w;
  const uint32_t n = ((t - gt * m.at.group_t) * m.at.group_h + h - gh * m.at.group_h) * m.at.group_w;
  video += b * m.at.video_b + t * m.at.video_t + static_cast<int64_t>(h) * m.at.patch * m.at.video_y;
  tokens += b * m.at.tokens_b + g * m.at.tokens_g + n * m.at.tokens_n;

  const int w0 = blockIdx.y * m.tile_w;
  const int columns_left = m.at.columns - w0;
  const uint32_t vectors = row < m.rows ? m.cells_k * m.row_vectors.divisor : 0;

  // Vector v of the video's side: where it lies, and its first cell in the tile.
  auto pixels = [&](uint32_t v, int& cell) -> uint4* {
    const uint32_t k = m.row_vectors.quotient(v);
    const uint32_t x = v - k * m.row_vectors.divisor;
    cell = k * m.pitch + x * kCells;
    if (static_cast<int>(x * kCells) >= columns_left) return nullptr;
    return reinterpret_cast<uint4*>(video + m.pixel_row(k) +
                                    (w0 + static_cast<int64_t>(x) * kCells) * sizeof(Cell));
  };
  // The same of the tokens' side, whose vectors hold cells k, k + 1, ... of one column.
  auto features = [&](uint32_t v, int& cell) -> uint4* {
    const uint32_t w = m.token_vectors.quotient(v);
    const uint32_t x = v - w * m.token_vectors.divisor;
    cell = x * kCells * m.pitch + w;
    if (static_cast<int>(w) >= columns_left) return nullptr;
    return reinterpret_cast<uint4*>(tokens + m.token(w0 + w)) + x;
  };

  // The launch overlaps the end of the kernel before, which saves 0.8 us of 5.5 at the first stage's
  // size: up to here only parameters were read. The kernel after may now be launched to do the same.
  asm volatile("griddepcontrol.launch_dependents;");
  asm volatile("griddepcontrol.wait;" ::: "memory");

  // Read one side into the tile, kInFlight vectors at a time.
  const int read_step = kToTokens ? 1 : m.pitch, write_step = kToTokens ? m.pitch : 1;
  for (uint32_t first = threadIdx.x; first < vectors; first += kInFlight * blockDim.x) {
    uint4 loaded[kInFlight];
    int cell[kInFlight];
    bool inside[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const uint32_t v = first + i * blockDim.x;
      const uint4* source = nullptr;
      if (v < vectors) source = kToTokens ? pixels(v, cell[i]) : features(v, cell[i]);
      inside[i] = source != nullptr;
      if (inside[i]) loaded[i] = *source;
    }
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      if (!inside[i]) continue;
      const Cell* cells = reinterpret_cast<const Cell*>(&loaded[i]);
#pragma unroll
      for (int c = 0; c < kCells; ++c) tile[cell[i] + c * read_step] = cells[c];
    }
  }
  __syncthreads();

  // Write the tile to the other side.
  for (uint32_t v = threadIdx.x; v < vectors; v += blockDim.x) {
    int cell;
    uint4* target = kToTokens ? features(v, cell) : pixels(v, cell);
    if (target == nullptr) continue;
    uint4 stored;
    Cell* cells = reinterpret_cast<Cell*>(&stored);
#pragma unroll
    for (int c = 0; c < kCells; ++c) cells[c] = tile[cell + c * write_step];
    *target = stored;
  }
}

}  // namespace snapkernels
