// patchify and unpatchify as a launch on raw pointers. Knows nothing of torch.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace snapkernels {

// A video (B, C, T, H, W) and its tokens (B, G, N, C * patch * patch). Strides are in bytes; pixels
// of a row and features of a token are contiguous. Every size divides as the op's spec says.
struct PatchGeometry {
  int batch, channels, frames, patch_rows, columns;  // patch_rows, columns: in patches
  int patch, item_bytes;
  int group_t, group_h, group_w;
  int64_t video_b, video_c, video_t, video_y;
  int64_t tokens_b, tokens_g, tokens_n;
};

cudaError_t patchify(const void* video, void* tokens, const PatchGeometry& geometry,
                     cudaStream_t stream);
cudaError_t unpatchify(const void* tokens, void* video, const PatchGeometry& geometry,
                       cudaStream_t stream);

}  // namespace snapkernels
