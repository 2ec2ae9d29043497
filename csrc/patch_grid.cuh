// Where the patches of grouped tokens (B, G, N, D) lie in their videos.
#pragma once

#include "divider.cuh"

namespace snapkernels {

struct PatchGrid {
  Divider group_tokens, groups;  // patches of a group, groups of a video
  Divider groups_h, groups_w;    // groups of its rows and columns
  Divider group_h, group_w;      // patches of a group's rows and columns
  uint32_t group_t;              // frames of a group

  // Of patches of `side` pixels. Rows may end within a group; frames and columns do not.
  template <typename Geometry>
  PatchGrid(const Geometry& at, int side)
      : PatchGrid(at, (at.height + side * at.group_h - 1) / (side * at.group_h),
                  at.width / (side * at.group_w)) {}

 private:
  template <typename Geometry>
  PatchGrid(const Geometry& at, int of_rows, int of_columns)
      : group_tokens(at.group_t * at.group_h * at.group_w),
        groups(at.frames / at.group_t * of_rows * of_columns),
        groups_h(of_rows),
        groups_w(of_columns),
        group_h(at.group_h),
        group_w(at.group_w),
        group_t(at.group_t) {}
};

// Of patch n of group bg, groups counted through all videos.
struct PatchPlace {
  uint32_t b, t, row, column;  // row, column: in patches

  __device__ PatchPlace(const PatchGrid& grid, uint32_t bg, uint32_t n) {
    b = grid.groups.quotient(bg);
    const uint32_t g = bg - b * grid.groups.divisor;
    const uint32_t g_row = grid.groups_w.quotient(g), gw = g - g_row * grid.groups_w.divisor;
    const uint32_t gt = grid.groups_h.quotient(g_row), gh = g_row - gt * grid.groups_h.divisor;
    const uint32_t n_row = grid.group_w.quotient(n), nw = n - n_row * grid.group_w.divisor;
    const uint32_t nt = grid.group_h.quotient(n_row), nh = n_row - nt * grid.group_h.divisor;
    t = gt * grid.group_t + nt;
    row = gh * grid.group_h.divisor + nh;
    column = gw * grid.group_w.divisor + nw;
  }
};

}  // namespace snapkernels
