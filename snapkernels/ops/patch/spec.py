"""The records of patchify and unpatchify."""

from math import prod

import torch

from snapkernels.ops.patch import config, eager, reference
from snapkernels.ops.patch.kernels import cpu
from snapkernels.spec import Backend, Case, Mutant, Spec, Tensor, Tier

KERNELS = "snapkernels.ops.patch.kernels"
BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
LEGEND = {
    "B": "videos",
    "C": "channels",
    "T": "frames",
    "H": "pixel rows",
    "W": "pixel columns",
    "G": "groups",
    "N": "patch tokens of one group",
    "P": "features of one patch",
}
VIDEO, TOKENS = Tensor("B C T H W"), Tensor("B G N P")
GEOMETRY = (
    "T / group[0]",
    "H / (patch * group[1])",
    "W / (patch * group[2])",
    "N = group[0] * group[1] * group[2]",
    "G = T * H * W / (N * patch * patch)",
)
FIRST_STAGE, UPSAMPLER = (16, 5, 4), (16, 18, 16)  # groups, table 8


def _shapes(
    name: str,
    tier: Tier,
    video: tuple[int, int, int, int, int],
    patch: int,
    group: tuple[int, int, int],
    dtypes: tuple[torch.dtype, ...] = (BF16, FP32),
) -> tuple[Case, Case]:
    """One shape of video as a case of each op."""
    b, c, t, h, w = video
    of_video = dict(zip("BCTHW", video, strict=True))
    groups = t * h * w // (prod(group) * patch**2)
    of_tokens = {"B": b, "G": groups, "N": prod(group), "P": c * patch**2}
    options = {"patch": patch, "group": group}
    back = {"size": (t, h, w), **options}
    return (
        Case(name=name, tier=tier, sizes=of_video, options=options, dtypes=dtypes),
        Case(name=name, tier=tier, sizes=of_tokens, options=back, dtypes=dtypes),
    )


_CASES = (
    # Every axis has another number of groups, patches a group and pixels a patch.
    _shapes("odd", "cpu", (2, 5, 4, 12, 24), 2, (2, 3, 2), (BF16, FP32, FP64)),
    _shapes("tail", "cpu", (1, 3, 2, 8, 24), 4, (1, 1, 3)),
    _shapes("cells-of-4-bytes", "cpu", (1, 4, 2, 8, 32), 2, (1, 2, 4), (BF16, FP16)),
    _shapes("patch-3", "cpu", (1, 2, 2, 6, 9), 3, (2, 1, 3)),
    _shapes("two-tiles", "cpu", (1, 1, 1, 4, 1200), 4, (1, 1, 100)),
    _shapes("one-pixel", "cpu", (2, 1, 1, 2, 4), 1, (1, 2, 2), (FP32,)),
    _shapes("stage1-frames", "cpu", (1, 3, 2, 40, 64), 4, (2, 5, 4)),
    _shapes("past-2-31", "gpu", (76, 4, 16, 640, 720), 4, (16, 32, 60), (BF16,)),
    _shapes("3.9b-b16", "paper", (16, 3, 16, 40, 64), 4, FIRST_STAGE),
    _shapes("up-b1", "paper", (1, 3, 16, 288, 512), 4, UPSAMPLER),
    _shapes("up-b4", "paper", (4, 3, 16, 288, 512), 4, UPSAMPLER),
)
_SASS = dict.fromkeys(("sm_90", "sm_80"), ("LDG.E.128", "STG.E.128"))
_REGISTERS = 72  # a multiprocessor then holds seven blocks of 128 threads

PATCHIFY = Spec(
    name="patchify",
    kind="op",
    math="tokens[b, g, n, (c, i, j)] = video[b, c, t, patch row + i, patch column + j]"
    " (section 3.4, table 8)",
    legend=LEGEND,
    inputs={"video": VIDEO},
    options={"patch": "int", "group": "int[3]"},
    rules=(*GEOMETRY, "P = C * patch * patch"),
    output=TOKENS,
    backends=(
        Backend(name="cuda", run=f"{KERNELS}.cuda:patchify", refuses=config.cuda_refuses_video),
        Backend(
            name="triton",
            run=f"{KERNELS}.triton_kernels:patchify",
            refuses=config.triton_refuses_video,
        ),
        Backend(name="cpu", run=cpu.patchify, refuses=config.cpu_refuses),
        Backend(name="eager", run=eager.patchify),
        Backend(name="reference", run=reference.patchify),
    ),
    reference=reference.patchify,
    cases=tuple(video for video, _ in _CASES),
    exact=True,
    moves=True,
    sass=_SASS,
    most_registers=_REGISTERS,
    mutants=(
        Mutant(
            name="groups counted column first",
            backend="triton",
            find="(t // group_t * groups_h + h // group_h) * groups_w + w_W // GROUP_W",
            replace="(t // group_t * groups_w + w_W // GROUP_W) * groups_h + h // group_h",
        ),
        Mutant(
            name="patches of a group counted column first",
            backend="triton",
            find="(t % group_t * group_h + h % group_h) * GROUP_W + w_W % GROUP_W",
            replace="(t % group_t * GROUP_W + w_W % GROUP_W) * group_h + h % group_h",
        ),
        Mutant(
            name="channel and pixel row of a patch swapped",
            backend="triton",
            find="return k_K // PATCH, k_K % PATCH, k_K",
            replace="return k_K % CHANNELS, k_K // CHANNELS, k_K",
        ),
        Mutant(
            name="last column of patches never written",
            backend="triton",
            find="return g_W, n_W, w_W < columns",
            replace="return g_W, n_W, w_W < columns - 1",
        ),
        Mutant(
            name="second tile of a row written over the first",
            backend="triton",
            find="w_W = w0 + tl.arange(0, BLOCK_W)",
            replace="w_W = tl.arange(0, BLOCK_W)",
        ),
        Mutant(
            name="every video is the first",
            backend="triton",
            find="(b * stride_b + t * stride_t",
            replace="(0 * stride_b + t * stride_t",
        ),
        Mutant(
            name="every column of patches in the first group",
            backend="cuda",
            file="patch/cell_transpose.cuh",
            find="return group * at.tokens_g + (w - group",
            replace="return (w - group",
        ),
        Mutant(
            name="second tile of a row is the first again",
            backend="cuda",
            file="patch/cell_transpose.cuh",
            find="const int w0 = blockIdx.y * m.tile_w;",
            replace="const int w0 = 0;",
        ),
        Mutant(
            name="wide elements of the CPU in the wrong order",
            backend="cpu",
            find="rows.permute(0, 2, 4, 7, 3, 5, 8, 1, 6)",
            replace="rows.permute(0, 2, 4, 7, 3, 5, 8, 6, 1)",
        ),
    ),
)

UNPATCHIFY = Spec(
    name="unpatchify",
    kind="op",
    math="video[b, c, t, patch row + i, patch column + j] = tokens[b, g, n, (c, i, j)]"
    " (section 3.4, table 8)",
    legend=LEGEND,
    inputs={"tokens": TOKENS},
    options={"size": "int[3]", "patch": "int", "group": "int[3]"},
    rules=("T = size[0]", "H = size[1]", "W = size[2]", *GEOMETRY, "C = P / (patch * patch)"),
    output=VIDEO,
    backends=(
        Backend(name="cuda", run=f"{KERNELS}.cuda:unpatchify", refuses=config.cuda_refuses_tokens),
        Backend(
            name="triton",
            run=f"{KERNELS}.triton_kernels:unpatchify",
            refuses=config.triton_refuses_tokens,
        ),
        Backend(name="cpu", run=cpu.unpatchify, refuses=config.cpu_refuses),
        Backend(name="eager", run=eager.unpatchify),
        Backend(name="reference", run=reference.unpatchify),
    ),
    reference=reference.unpatchify,
    cases=tuple(tokens for _, tokens in _CASES),
    exact=True,
    moves=True,
    sass=_SASS,
    most_registers=_REGISTERS,
    mutants=(
        Mutant(
            name="every row of patches the first of its group",
            backend="cuda",
            file="patch/cell_transpose.cuh",
            find="+ h - gh * m.at.group_h) * m.at.group_w",
            replace=") * m.at.group_w",
        ),
        Mutant(
            name="row of patches misplaced in its group",
            backend="triton",
            find="(t % group_t * group_h + h % group_h)",
            replace="(t % group_t * group_h + (h + 1) % group_h)",
        ),
        Mutant(
            name="channels in reverse",
            backend="triton",
            find="(b * CHANNELS + channel_K) * frames + t",
            replace="(b * CHANNELS + CHANNELS - 1 - channel_K) * frames + t",
        ),
        Mutant(
            name="pixel rows of a patch upside down",
            backend="triton",
            find="h * PATCH + row_K",
            replace="h * PATCH + PATCH - 1 - row_K",
        ),
        Mutant(
            name="last channel never written",
            backend="triton",
            find="k_K < CHANNELS * PATCH, x_E",
            replace="k_K < (CHANNELS - 1) * PATCH, x_E",
        ),
        Mutant(
            name="tokens of one group read from the next",
            backend="triton",
            find="(g_W * stride_g + n_W * stride_n)",
            replace="((g_W + 1) % 2 * stride_g + n_W * stride_n)",
        ),
    ),
)
