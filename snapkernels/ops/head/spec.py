"""The records of head and its ends: head_mix, head_loss, and video_mix without the head."""

from collections.abc import Iterable
from math import prod
from typing import Any

import torch

from snapkernels.ops.head import config, eager, reference
from snapkernels.ops.head.weights import DIMS, HeadWeights
from snapkernels.spec import Backend, Case, Fields, Mutant, Sizes, Spec, Tensor, Tier

KERNELS = "snapkernels.ops.head.kernels"
BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
LEGEND = {
    "B": "videos",
    "G": "groups",
    "N": "patch tokens of one group",
    "D": "width of a token",
    "P": "features of one patch",
    "C": "channels",
    "T": "frames",
    "H": "pixel rows",
    "W": "pixel columns",
    "R": "rows of groups",
    "M": "terms of the mixture",
    "E": "numbers that are saved of a token",
}
WEIGHTS = Fields(HeadWeights, DIMS)
GEOMETRY = {"patch": "int", "group": "int[3]", "eps": "float"}
RULES = (
    "T / group[0]",
    "R = ceil(H / (patch * group[1]))",
    "W / (patch * group[2])",
    "N = group[0] * group[1] * group[2]",
    "G = T * R * W / (group[0] * group[2] * patch)",
)
# Of a token, for the backward: F in token order, of cropped pixels too, and (mean, rstd).
SAVED = {"features": Tensor("B G N P"), "moments": Tensor("B G N E", dtype=FP32)}
FIRST_STAGE, UPSAMPLER = (16, 5, 4), (16, 18, 16)  # groups, table 8
# Of a video (B, C, T, H, W): name, tier, sizes, patch, group, width of a token, eps, dtypes.
_SHAPES: tuple[tuple[str, Tier, Any, int, Any, int, float, Any], ...] = (
    # Every dimension another size; a last row of groups that is half padding.
    ("odd", "cpu", (2, 2, 4, 7, 12), 2, (2, 3, 2), 20, 1e-6, (BF16, FP32, FP64)),
    ("cut-patch", "cpu", (1, 3, 2, 18, 32), 4, (2, 5, 4), 64, 1e-6, (BF16, FP32)),
    ("patch-3", "cpu", (2, 1, 2, 6, 18), 3, (2, 1, 3), 24, 1e-6, (FP16, FP32)),
    ("large-eps", "cpu", (2, 3, 1, 8, 16), 4, (1, 2, 2), 256, 0.5, (BF16, FP32)),
    ("ragged", "cpu", (1, 3, 3, 12, 44), 4, (1, 3, 1), 256, 1e-6, (BF16,)),
    ("up-b1", "paper", (1, 3, 16, 288, 512), 4, UPSAMPLER, 1024, 1e-6, (BF16,)),
    ("up-b4", "paper", (4, 3, 16, 288, 512), 4, UPSAMPLER, 1024, 1e-6, (BF16,)),
    ("3.9b-b16", "paper", (16, 3, 16, 36, 64), 4, FIRST_STAGE, 1024, 1e-6, (BF16,)),
    ("500m-b64", "paper", (64, 3, 16, 36, 64), 4, FIRST_STAGE, 768, 1e-6, (BF16,)),
)


def _cases(*, sized: bool = False, more: Iterable[tuple[str, Any]] = ()) -> tuple[Case, ...]:
    """The shapes as cases of an op that gets the size as an option or, by a video, as sizes."""
    found = []
    for name, tier, video, patch, group, dim, eps, dtypes in _SHAPES:
        b, c, t, h, w = video
        rows = -(-h // (patch * group[1]))
        groups = t // group[0] * rows * (w // (patch * group[2]))
        sizes = {"B": b, "G": groups, "N": prod(group), "D": dim, "P": c * patch**2}
        sizes |= {"C": c, "T": t, "H": h, "W": w, "M": 3}
        options = {"patch": patch, "group": group, "eps": eps, **dict(more)}
        options |= {"size": (t, h, w)} if sized else {}
        found.append(Case(name=name, tier=tier, sizes=sizes, options=options, dtypes=dtypes))
    return tuple(found)


def _backends(name: str, triton: str = "triton_fwd") -> tuple[Backend, ...]:
    """Every backend has its functions of an op by the op's name."""
    return tuple(
        Backend(
            name=kind,
            run=f"{KERNELS}.{forward}:{name}",
            saving=f"{KERNELS}.{forward}:{name}_saving",
            backward=f"{KERNELS}.{backward}:{name}_backward",
            refuses=getattr(config, f"{kind}_refuses_{name}"),
        )
        for kind, forward, backward in (
            ("cuda", "cuda", "cuda"),
            ("triton", triton, "triton_bwd"),
        )
    ) + _plain(name)


def _plain(name: str) -> tuple[Backend, ...]:
    return (
        Backend(name="eager", run=getattr(eager, name)),
        Backend(name="reference", run=getattr(reference, name)),
    )


def _flops(sizes: Sizes) -> int:
    return 2 * sizes["B"] * sizes["G"] * sizes["N"] * sizes["P"] * sizes["D"]


HEAD = Spec(
    name="head",
    kind="op",
    math="F = crop(unpatchify(Linear(LN(tokens)))) (section 3.4, appendix A)",
    legend=LEGEND,
    inputs={"tokens": Tensor("B G N D"), "weights": WEIGHTS},
    options={"size": "int[3]", **GEOMETRY},
    rules=("T = size[0]", "H = size[1]", "W = size[2]", *RULES, "C = P / (patch * patch)", "E = 2"),
    output=Tensor("B C T H W", dtype="wide"),
    saved=SAVED,
    backends=_backends("head"),
    reference=reference.head,
    cases=_cases(sized=True),
    flops=_flops,
    moves=True,
    compiled_beside=True,
    backward_reads=("tokens", "weights"),
    mutants=(
        Mutant(
            name="rows of groups counted as columns",
            backend="triton",
            module="triton_parts",
            find="h_M = group_M // groups_w % groups_h * GROUP_H",
            replace="h_M = group_M % groups_h * GROUP_H",
        ),
        Mutant(
            name="LayerNorm's bias left out",
            backend="triton",
            module="triton_parts",
            find="xhat_MS * gain_S[None, :] + shift_S[None, :]",
            replace="xhat_MS * gain_S[None, :]",
        ),
        Mutant(
            name="eps beside the root",
            backend="triton",
            module="triton_parts",
            find="1.0 / tl.sqrt(squares_M / DIM + EPS)",
            replace="1.0 / (tl.sqrt(squares_M / DIM) + EPS)",
        ),
        Mutant(
            name="last row of pixels left out",
            backend="triton",
            module="triton_parts",
            find="h_M[:, None] * PATCH + i_P[None, :] < height",
            replace="h_M[:, None] * PATCH + i_P[None, :] < height - 1",
        ),
        Mutant(
            name="c2 left out of the tokens' gradient",
            backend="triton",
            backward=True,
            find="c1_T[:, None] + xhat_TS * c2_T[:, None]",
            replace="c1_T[:, None]",
        ),
        Mutant(
            name="last step of a range not in R",
            backend="triton",
            backward=True,
            find="tl.dot(tl.trans(dF_TP), rounded_TS, R_PS",
            replace="tl.dot(tl.trans(dF_TP), tl.where(step + 1 < steps, rounded_TS, 0.0), R_PS",
        ),
        Mutant(
            name="cropped pixels have a gradient",
            backend="triton",
            backward=True,
            module="triton_rows",
            find="load_pixels(p_grad + c * channel, at_MK, m_MK)",
            replace="tl.where(m_MK, load_pixels(p_grad + c * channel, at_MK, m_MK), 1.0)",
        ),
        Mutant(
            name="columns of groups counted as one, compiled",
            backend="cuda",
            file="patch_grid.cuh",
            find="column = gw * grid.group_w.divisor + nw;",
            replace="column = 0 * gw * grid.group_w.divisor + nw;",
        ),
    ),
)

HEAD_MIX = Spec(
    name="head_mix",
    kind="op",
    math="mix[0] F + mix[1] video + mix[2] other, F = head(tokens): D of eq. 2, a step of the"
    " sampler",
    legend=LEGEND,
    inputs={
        "tokens": Tensor("B G N D"),
        "video": Tensor("B C T H W", dtype="free", grad="asked"),
        "other": Tensor("B C T H W", dtype="free", grad="asked", optional=True),
        "mix": Tensor("B M", dtype="free", grad="never"),
        "weights": WEIGHTS,
    },
    options=GEOMETRY,
    rules=(*RULES, "P = C * patch * patch", "M = 3", "E = 2"),
    output=Tensor("B C T H W", dtype="wide"),
    saved=SAVED,
    backends=_backends("head_mix"),
    reference=reference.head_mix,
    cases=_cases(more={"other": True}.items()),
    flops=_flops,
    moves=True,
    backward_reads=("tokens", "weights"),
    mutants=(
        Mutant(
            name="factors of F and the video swapped",
            backend="triton",
            find="of_F * F_MP + of_video * load_pixels(p_video, at_MP, m_MP)",
            replace="of_video * F_MP + of_F * load_pixels(p_video, at_MP, m_MP)",
        ),
        Mutant(
            name="every video has the first one's factors",
            backend="triton",
            module="triton_parts",
            find="p_b = p_terms + b * 3",
            replace="p_b = p_terms + b * 0",
        ),
        Mutant(
            name="the other video left out",
            backend="triton",
            find="mixed_MP += of_other * load_pixels(p_other, at_MP, m_MP)",
            replace="mixed_MP += 0 * load_pixels(p_other, at_MP, m_MP)",
        ),
        Mutant(
            name="columns of groups counted as rows",
            backend="triton",
            module="triton_parts",
            find="w_M = group_M % groups_w * GROUP_W",
            replace="w_M = group_M // groups_h % groups_w * GROUP_W",
        ),
        Mutant(
            name="F's factor left out of its gradient",
            backend="triton",
            backward=True,
            module="triton_rows",
            find="dF_MK *= of_F",
            replace="dF_MK *= 1.0",
        ),
        Mutant(
            name="every video has the first one's factors, compiled",
            backend="cuda",
            file="head/head_ends.cuh",
            find="given.factors[3 * place.b + i]",
            replace="given.factors[i]",
        ),
    ),
)

HEAD_LOSS = Spec(
    name="head_loss",
    kind="op",
    math="mean of terms[0] (F - terms[1] video - terms[2] eps)^2, F = head(tokens), eps standard"
    " normal, of (seed, sample, element) (eq. 3)",
    legend=LEGEND,
    inputs={
        "tokens": Tensor("B G N D"),
        "video": Tensor("B C T H W", dtype="free", grad="never"),
        "sample": Tensor("B", dtype=torch.int64),
        "terms": Tensor("B M", dtype="free", grad="never"),
        "weights": WEIGHTS,
    },
    options={"seed": "seed", **GEOMETRY},
    rules=(*RULES, "P = C * patch * patch", "M = 3", "E = 4"),
    output=Tensor("", dtype="wide"),
    # terms[0] (F - target), in token order, 0 where no pixel is: the gradient at the features but
    # for the mean's 2 / count and the loss's own gradient. And (mean, rstd, c1, c2) of a token: see
    # kernels/triton_rows.py.
    saved={"feature_grad": Tensor("B G N P"), "rows": Tensor("B G N E", dtype=FP32)},
    backends=_backends("head_loss", "triton_loss"),
    reference=reference.head_loss,
    cases=_cases(more={"seed": 2**33 + 7}.items()),
    flops=_flops,
    moves=True,
    backward_reads=("tokens", "weights"),
    mutants=(
        Mutant(
            name="stale noise counter",
            backend="triton",
            find="philox_normals(seed_lo, seed_hi, row_MK, sample)",
            replace="philox_normals(seed_lo, seed_hi, row_MK, sample + 1)",
        ),
        Mutant(
            name="padded rows counted",
            backend="triton",
            find="tl.where(m_MP, weight * error_MP * error_MP, 0.0)",
            replace="weight * error_MP * error_MP",
        ),
        Mutant(
            name="factors of the video and its noise swapped",
            backend="triton",
            find="of_video * video_MP + of_eps * eps_MP",
            replace="of_eps * video_MP + of_video * eps_MP",
        ),
        Mutant(
            name="every video weighs as the first",
            backend="triton",
            module="triton_parts",
            find="p_b = p_terms + b * 3",
            replace="p_b = p_terms + b * 0",
        ),
        Mutant(
            name="sum of dF not scaled",
            backend="triton",
            backward=True,
            module="backward",
            find="R, q = R * scale, q * scale",
            replace="R, q = R * scale, q",
        ),
        Mutant(
            name="LayerNorm's bias left in c2",
            backend="triton",
            backward=True,
            module="triton_rows",
            find="tl.load(p_bias + p).to(tl.float32) + tl.sum(shift_S, axis=0)",
            replace="tl.load(p_bias + p).to(tl.float32)",
        ),
        Mutant(
            name="padded pixels have a gradient",
            backend="triton",
            backward=True,
            module="triton_loss",
            find="tl.where(m_MP, weight * error_MP, 0.0)",
            replace="weight * error_MP",
        ),
        Mutant(
            name="every video weighs as the first, compiled",
            backend="cuda",
            file="head/head_ends.cuh",
            find="given.factors[3 * place.b + i]",
            replace="given.factors[i]",
        ),
        Mutant(
            name="stale noise counter, compiled",
            backend="cuda",
            file="head/head_ends.cuh",
            find="static_cast<uint64_t>(within) / 4, sample",
            replace="static_cast<uint64_t>(within) / 4, sample + 1",
        ),
        Mutant(
            name="LayerNorm's second term lost in the tokens' gradient, compiled",
            backend="cuda",
            backward=True,
            file="head/head_backward.cuh",
            find="fmaf(-token.w, low, fmaf(",
            replace="fmaf(0 * -token.w, low, fmaf(",
        ),
        Mutant(
            name="last stage dropped from the weights' gradient, compiled",
            backend="cuda",
            backward=True,
            file="head/head_backward.cuh",
            find="    if (of_weights) {\n      publish();",
            replace="    if (of_weights && tile + 1 < of.last) {\n      publish();",
        ),
        Mutant(
            name="LayerNorm's bias lost in the gradient of W, compiled",
            backend="cuda",
            backward=True,
            file="head/head_backward.cuh",
            find="q[feature] * bf16(given.norm_bias, d)",
            replace="0 * q[feature] * bf16(given.norm_bias, d)",
        ),
    ),
)


def _pair(
    name: str,
    tier: Tier,
    video: tuple[int, int, int, int, int],
    dtypes: tuple[torch.dtype, ...] = (FP32,),
    *,
    other: bool = True,
) -> Case:
    """Videos (B, C, T, H, W) to be mixed, two or three of them."""
    sizes = dict(zip("BCTHW", video, strict=True)) | {"M": 3}
    return Case(name=name, tier=tier, sizes=sizes, options={"other": other}, dtypes=dtypes)


_VIDEO = Tensor("B C T H W", dtype="free", grad="asked")
VIDEO_MIX = Spec(
    name="video_mix",
    kind="op",
    math="mix[0] F + mix[1] video + mix[2] other: the guided D of both branches' F",
    legend={name: LEGEND[name] for name in "BCTHWM"},
    inputs={
        "F": Tensor("B C T H W"),
        "video": _VIDEO,
        "other": Tensor("B C T H W", dtype="free", grad="asked", optional=True),
        "mix": Tensor("B M", dtype="free", grad="never"),
    },
    options={},
    rules=("M = 3",),
    output=Tensor("B C T H W", dtype="wide"),
    backends=(
        Backend(
            name="triton",
            run=f"{KERNELS}.triton_mix:video_mix",
            backward=f"{KERNELS}.triton_mix:video_mix_backward",
            refuses=config.triton_refuses_video_mix,
        ),
        *_plain("video_mix"),
    ),
    reference=reference.video_mix,
    cases=(
        _pair("odd", "cpu", (3, 2, 3, 5, 7), (BF16, FP32, FP64)),
        _pair("two-terms", "cpu", (2, 1, 1, 3, 343), (FP32, FP16), other=False),
        _pair("two-tiles", "cpu", (2, 3, 2, 16, 32)),
        _pair("up-b1", "paper", (1, 3, 16, 288, 512)),
        _pair("up-b4", "paper", (4, 3, 16, 288, 512)),
        _pair("3.9b-b16", "paper", (16, 3, 16, 36, 64)),
    ),
    moves=True,
    mutants=(
        Mutant(
            name="factors of F and the video swapped",
            backend="triton",
            find="of_F * load_pixels(p_F, at_E, m_E) + of_video * load_pixels(p_video, at_E, m_E)",
            replace="of_video * load_pixels(p_F, at_E, m_E)"
            " + of_F * load_pixels(p_video, at_E, m_E)",
        ),
        Mutant(
            name="every video has the first one's factors",
            backend="triton",
            find="load_terms(p_mix, b)\n    mixed_E",
            replace="load_terms(p_mix, 0)\n    mixed_E",
        ),
        Mutant(
            name="videos one pixel too short",
            backend="triton",
            find="elements = F.numel() // len(F)",
            replace="elements = F.numel() // len(F) - 1",
        ),
        Mutant(
            name="gradients of F and the video swapped",
            backend="triton",
            backward=True,
            find="(of_video * grad_E)",
            replace="(of_F * grad_E)",
        ),
        Mutant(
            name="the other video left out",
            backend="triton",
            find="mixed_E += of_other * load_pixels(p_other, at_E, m_E)",
            replace="mixed_E += 0 * load_pixels(p_other, at_E, m_E)",
        ),
    ),
)
