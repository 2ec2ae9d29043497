"""The record of stem."""

from math import prod

import torch

from snapkernels.ops.stem import config, eager, reference
from snapkernels.ops.stem.weights import DIMS, StemWeights
from snapkernels.spec import Backend, Case, Fields, Mutant, Sizes, Spec, Tensor, Tier

KERNELS = "snapkernels.ops.stem.kernels"
BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
FIRST_STAGE, UPSAMPLER = (16, 5, 4), (16, 18, 16)  # groups, table 8


def _case(
    name: str,
    tier: Tier,
    video: tuple[int, int, int, int, int],
    low_res: tuple[int, int, int] | None,
    patch: int,
    group: tuple[int, int, int],
    dim: int,
    *,
    tables: int = 1,
    eps: float = 1e-6,
    dtypes: tuple[torch.dtype, ...] = (BF16, FP32),
) -> Case:
    """A video (B, C, T, H, W) and a low-resolution one (channels, h, w), or none."""
    of_low, h_low, w_low = low_res or (0, 0, 0)
    sizes = dict(zip("BCTHW", video, strict=True)) | {"c": of_low, "h": h_low, "w": w_low}
    sizes |= {"D": dim, "P": (video[1] + of_low) * patch**2, "N": prod(group), "S": tables}
    options = {"patch": patch, "group": group, "eps": eps, "low_res": bool(low_res)}
    return Case(name=name, tier=tier, sizes=sizes, options=options, dtypes=dtypes)


def _flops(sizes: Sizes) -> int:
    return 2 * sizes["B"] * sizes["G"] * sizes["N"] * sizes["P"] * sizes["D"]


STEM = Spec(
    name="stem",
    kind="op",
    math="tokens = LN(Linear(patchify([scale video, upsampled low_res]))) + positions"
    " (section 3.4, appendix A)",
    legend={
        "B": "videos",
        "C": "channels of the video",
        "c": "channels of the low-resolution video",
        "T": "frames",
        "H": "pixel rows",
        "W": "pixel columns",
        "h": "pixel rows of the low-resolution video",
        "w": "pixel columns of the low-resolution video",
        "R": "rows of groups",
        "G": "groups",
        "N": "patch tokens of one group",
        "S": "position tables",
        "P": "features of one patch",
        "D": "width of a token",
    },
    inputs={
        "video": Tensor("B C T H W", dtype="free", grad="asked"),
        "scale": Tensor("B", dtype="free", grad="never"),
        "low_res": Tensor("B c T h w", dtype="free", grad="never", optional=True),
        "weights": Fields(StemWeights, DIMS),
    },
    options={"patch": "int", "group": "int[3]", "eps": "float"},
    rules=(
        "T / group[0]",
        "R = ceil(H / (patch * group[1]))",
        "W / (patch * group[2])",
        "N = group[0] * group[1] * group[2]",
        "G = T * R * W / (group[0] * group[2] * patch)",
        "G / S",
        "P = (C + c) * patch * patch",
    ),
    output=Tensor("B G N D"),
    saved={"rstd": Tensor("B G N", dtype=FP32)},
    backends=(
        Backend(
            name="cuda",
            run=f"{KERNELS}.cuda:stem",
            backward=f"{KERNELS}.cuda:stem_backward",
            refuses=config.cuda_refuses,
        ),
        Backend(
            name="triton",
            run=f"{KERNELS}.triton_fwd:stem",
            backward=f"{KERNELS}.triton_bwd:stem_backward",
            refuses=config.triton_refuses,
        ),
        Backend(name="eager", run=eager.stem),
        Backend(name="reference", run=reference.stem),
    ),
    reference=reference.stem,
    cases=(
        # Every dimension another size; a last row of groups that is half padding.
        _case(
            "odd", "cpu", (2, 2, 4, 7, 12), (1, 5, 4), 2, (2, 3, 2), 20, dtypes=(BF16, FP32, FP64)
        ),
        _case("table-each", "cpu", (1, 1, 2, 8, 12), None, 2, (1, 2, 3), 36, tables=8),
        _case("cut-patch", "cpu", (1, 3, 2, 18, 32), (3, 9, 16), 4, (2, 5, 4), 64),
        _case("patch-3", "cpu", (2, 1, 2, 6, 18), (2, 3, 3), 3, (2, 1, 3), 24, dtypes=(FP16, FP32)),
        _case("large-eps", "cpu", (2, 3, 1, 8, 16), None, 4, (1, 2, 2), 128, eps=0.5),
        _case("ragged", "cpu", (1, 3, 3, 12, 44), None, 4, (1, 3, 1), 256, dtypes=(BF16,)),
        _case(
            "many-groups", "cpu", (2, 3, 2, 10, 24), (3, 5, 6), 4, (1, 3, 2), 256, dtypes=(BF16,)
        ),
        _case(
            "up-b1", "paper", (1, 3, 16, 288, 512), (3, 36, 64), 4, UPSAMPLER, 1024, dtypes=(BF16,)
        ),
        _case(
            "up-b4", "paper", (4, 3, 16, 288, 512), (3, 36, 64), 4, UPSAMPLER, 1024, dtypes=(BF16,)
        ),
        _case("3.9b-b16", "paper", (16, 3, 16, 36, 64), None, 4, FIRST_STAGE, 1024, dtypes=(BF16,)),
        _case("500m-b64", "paper", (64, 3, 16, 36, 64), None, 4, FIRST_STAGE, 768, dtypes=(BF16,)),
    ),
    flops=_flops,
    moves=True,
    compiled_beside=True,
    backward_reads=("video", "scale", "low_res", "weights"),
    mutants=(
        Mutant(
            name="rows of groups counted as columns",
            backend="triton",
            find="row_M = group_M // groups_w % groups_h * group_h",
            replace="row_M = group_M % groups_h * group_h",
        ),
        Mutant(
            name="rows below the last one read from the next frame",
            backend="triton",
            find="(f_F < CHANNELS * PATCH * PATCH)[None, :] & (y_MF < height)",
            replace="(f_F < CHANNELS * PATCH * PATCH)[None, :]"
            " & ((y_MF < height) | (t_M < frames - 1)[:, None])",
        ),
        Mutant(
            name="divided by the scale",
            backend="triton",
            find="tl.where(m_MF, pixel_MF * scale_M[:, None], 0.0)",
            replace="tl.where(m_MF, pixel_MF / scale_M[:, None], 0.0)",
        ),
        Mutant(
            name="upsampling without half-pixel centres",
            backend="triton",
            find="tl.maximum((2 * at_MF + 1) * length - full, 0)",
            replace="2 * at_MF * length",
        ),
        Mutant(
            name="one table of positions for every group",
            backend="triton",
            find="row_M = (group_M % tables * per_group + n_M)",
            replace="row_M = (group_M * 0 + n_M)",
        ),
        Mutant(
            name="variance about zero",
            backend="triton",
            find="tl.where(m_D[None, :], y_MD - mean_M[:, None], 0.0)",
            replace="tl.where(m_D[None, :], y_MD - mean_M[:, None] * 0, 0.0)",
        ),
        Mutant(
            name="LayerNorm's second term lost in the gradient",
            backend="triton",
            backward=True,
            find="c2_M = tl.sum(h_MF * x_MF, 1) * rstd_M / DIM",
            replace="c2_M = tl.sum(h_MF * x_MF, 1) * rstd_M * 0",
        ),
        Mutant(
            name="pixels' gradient not scaled",
            backend="triton",
            backward=True,
            find="tl.store(p_pixels + at_MF, scale_M[:, None] * dx_MF, mask=m_MF)",
            replace="tl.store(p_pixels + at_MF, dx_MF, mask=m_MF)",
        ),
        Mutant(
            name="last step of a range of tokens dropped from the weights' gradient",
            backend="triton",
            backward=True,
            find="for m0 in range(first, last, BLOCK_M):",
            replace="for m0 in range(first, last - BLOCK_M, BLOCK_M):",
        ),
        Mutant(
            name="columns of groups counted as one, compiled",
            backend="cuda",
            file="patch_grid.cuh",
            find="column = gw * grid.group_w.divisor + nw;",
            replace="column = 0 * gw * grid.group_w.divisor + nw;",
        ),
        Mutant(
            name="upsampling without half-pixel centres, compiled",
            backend="cuda",
            file="stem/stem_pixels.cuh",
            find="fmaxf((at + .5f) * ratio - .5f, 0.f)",
            replace="at * ratio",
        ),
        Mutant(
            name="the last row repeated where there is none, compiled",
            backend="cuda",
            file="stem/stem_pixels.cuh",
            find="const bool inside = place.y + q < at.height;",
            replace="const bool inside = true;",
        ),
        Mutant(
            name="a position's tokens counted as another's, compiled",
            backend="cuda",
            backward=True,
            file="stem/stem_features.cuh",
            find="slot == 2 * (row - 1) + i ? 1.f : 0.f",
            replace="slot == 2 * row + i ? 1.f : 0.f",
        ),
        Mutant(
            name="half of a token's columns counted twice, compiled",
            backend="cuda",
            backward=True,
            file="stem/stem_backward_finish.cuh",
            find="which * slices * kBackwardTokens",
            replace="0 * slices * kBackwardTokens",
        ),
        Mutant(
            name="mean of the gradient left in that of W, compiled",
            backend="cuda",
            backward=True,
            file="stem/stem_backward_finish.cuh",
            find="bf16(given.norm_weight, d) * product - u;",
            replace="bf16(given.norm_weight, d) * product;",
        ),
        Mutant(
            name="what LayerNorm takes from the gradient left in it, compiled",
            backend="cuda",
            backward=True,
            file="stem/stem_backward_finish.cuh",
            find="gradient[i] -= v[first + i][other] * moment;",
            replace="gradient[i] -= 0 * v[first + i][other] * moment;",
        ),
    ),
)
