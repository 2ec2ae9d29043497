"""forward_process in Triton: noise from the counter, used where it is made.

A program takes BLOCKS blocks of four consecutive elements of one video: one counter each.
"""

import torch
import triton
import triton.language as tl

from snapkernels.ops.noise.config import TRITON_BLOCKS, TRITON_WARPS
from snapkernels.philox_triton import philox_normals


@triton.jit
def forward_process_kernel(
    p_video,
    p_sigma,
    p_sample,
    p_x_sigma,
    elements,
    data_scale,
    seed_lo,
    seed_hi,
    BLOCKS: tl.constexpr,
):
    # A word's width depends on its value otherwise, and a 1 would be a constant.
    seed_lo, seed_hi = tl.cast(seed_lo, tl.uint32), tl.cast(seed_hi, tl.uint32)
    tiles = tl.cdiv(elements, 4 * BLOCKS)
    b = (tl.program_id(0) // tiles).to(tl.int64)
    block_K = (tl.program_id(0) % tiles).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    sigma = tl.load(p_sigma + b).to(tl.float32)
    sigma = tl.where(sigma > 0, sigma, float("nan"))
    z0, z1, z2, z3 = philox_normals(seed_lo, seed_hi, block_K, tl.load(p_sample + b))
    # Four neighbours of a block as one row: (K, 2, 2) of [[z0, z1], [z2, z3]].
    eps_K4 = tl.reshape(tl.join(tl.join(z0, z2), tl.join(z1, z3)), (BLOCKS, 4))

    at_K4 = block_K[:, None] * 4 + tl.arange(0, 4)[None, :]
    m_K4 = at_K4 < elements
    pixels_K4 = tl.load(p_video + b * elements + at_K4, mask=m_K4).to(tl.float32)
    tl.store(p_x_sigma + b * elements + at_K4, pixels_K4 * data_scale + sigma * eps_K4, mask=m_K4)


def forward_process(
    video: torch.Tensor, sigma: torch.Tensor, sample: torch.Tensor, sigma_in: float, seed: int
) -> torch.Tensor:
    video = video.contiguous()
    x_sigma = torch.empty_like(video, dtype=torch.float32)
    if not video.numel():
        return x_sigma
    elements = video.numel() // len(video)
    grid = (triton.cdiv(elements, 4 * TRITON_BLOCKS) * len(video),)
    with torch.cuda.device_of(video):  # Triton launches on the current device
        forward_process_kernel[grid](
            video,
            sigma.contiguous(),
            sample.contiguous(),
            x_sigma,
            elements,
            1 / sigma_in,
            seed & 0xFFFFFFFF,
            seed >> 32,
            TRITON_BLOCKS,
            num_warps=TRITON_WARPS,
        )
    return x_sigma
