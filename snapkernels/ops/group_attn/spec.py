"""The records of group_read and group_write: one equation, with the roles changed."""

from collections.abc import Callable
from typing import Literal

import torch

from snapkernels.ops.group_attn import bugs, config, cost, eager, peers, reference
from snapkernels.ops.group_attn.weights import DIMS, CrossAttentionWeights
from snapkernels.spec import Backend, Case, Fields, Mutant, Probe, Sizes, Spec, Tensor

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
LEGEND = {
    "B": "videos",
    "G": "groups",
    "L": "latent tokens of one group",
    "N": "patch tokens of one group",
    "D": "width of the side that is updated",
    "C": "width of the side that is read",
    "I": "inner width, of all heads",
}
MATH = (
    "y = {0} + o(softmax(q k^T / sqrt(I / num_heads)) v) in each group, "
    "q from LN({0}), k and v from LN({1}) (section 3.4, figure 3b)"
)
WEIGHTS = Fields(CrossAttentionWeights, DIMS)
OPTIONS = {"num_heads": "int", "eps": "float"}
_ZEROS = tuple(
    f"weights.{field}" for field in ("q_weight", "q_bias", "kv_norm_bias", "v_bias", "o_bias")
)


def _in_all(of_a_group: Callable[[Sizes], int]) -> Callable[[Sizes], int]:
    """Operations of a call, from those of a group."""
    return lambda sizes: sizes["B"] * sizes["G"] * of_a_group(sizes)


def _shapes(
    name: str,
    tier: Literal["cpu", "gpu", "paper"],
    latents: tuple[int, int, int, int],
    patches: tuple[int, int],
    inner: int,
    num_heads: int,
    *,
    eps: float = 1e-6,
    mask: bool = False,
    dtypes: tuple[torch.dtype, ...] = (BF16, FP32),
) -> tuple[Case, Case]:
    """Latents (B, G, L, width) and patches (N, width) as a case of each op; write has no mask."""
    batch, groups, num_latents, latent_dim = latents
    num_patches, patch_dim = patches
    counts = {"B": batch, "G": groups, "L": num_latents, "N": num_patches, "I": inner}
    options = {"num_heads": num_heads, "eps": eps}

    def case(updated: int, read: int, **more: bool) -> Case:
        sizes = counts | {"D": updated, "C": read}
        return Case(name=name, tier=tier, sizes=sizes, options=options | more, dtypes=dtypes)

    return case(latent_dim, patch_dim, mask=mask), case(patch_dim, latent_dim)


_CASES = (
    # Every dimension has another size.
    _shapes("odd", "cpu", (2, 3, 5, 20), (7, 14), 12, 3, dtypes=(BF16, FP32, FP64)),
    # One past a tile of 16 latents and of 128 patches, heads of 20.
    _shapes("ragged", "cpu", (1, 2, 17, 36), (129, 28), 40, 2),
    # Latents of a head in two pieces, one past a tile of 128 patches; 16-bit tokens, whose mean is
    # taken off after the product, have kernels of their own.
    _shapes("sixteen-bit", "cpu", (1, 2, 24, 24), (129, 20), 24, 3, dtypes=(BF16, FP16)),
    _shapes("one-latent", "cpu", (2, 2, 1, 16), (9, 24), 16, 4),
    _shapes("many-groups", "cpu", (2, 40, 3, 16), (5, 8), 8, 2),
    _shapes("one-head", "cpu", (1, 2, 4, 48), (6, 64), 48, 1),
    _shapes("heads-of-one", "cpu", (1, 3, 4, 10), (5, 12), 6, 6),
    # Next to the variance of the inputs, 1e-6 is nothing.
    _shapes("large-eps", "cpu", (2, 2, 3, 12), (5, 20), 12, 2, eps=0.1),
)
_MASKED = (
    # Half the patches are masked, so of two in a group a quarter of the groups has none to read.
    _shapes("masked", "cpu", (3, 8, 3, 12), (2, 20), 12, 2, mask=True),
    _shapes("masked-conditioning", "cpu", (3, 1, 9, 20), (37, 16), 16, 2, mask=True),
)
_LARGE = (
    # What the CUDA kernels take, too much to be interpreted: an odd number of tiles; of write, a
    # ragged last one; of read, a group with two slices of the channels.
    _shapes("three-tiles", "gpu", (1, 2, 24, 40), (384, 256), 128, 16, dtypes=(BF16,)),
    _shapes("ragged-tiles", "gpu", (2, 1, 24, 40), (200, 256), 128, 16, dtypes=(BF16,)),
    _shapes("two-slices", "gpu", (1, 3, 24, 40), (256, 512), 128, 16, dtypes=(BF16,)),
    _shapes("up", "paper", (1, 32, 24, 3072), (4608, 1024), 1024, 16, dtypes=(BF16,)),
    _shapes("3.9b-b16", "paper", (16, 8, 96, 3072), (320, 1024), 1024, 16, dtypes=(BF16,)),
    _shapes("500m-b64", "paper", (64, 8, 64, 1024), (320, 768), 768, 16, dtypes=(BF16,)),
)

_KERNELS = "snapkernels.ops.group_attn.kernels"
_SASS = {"sm_90": ("HGMMA",), "sm_80": ("HMMA",)}


_DROPPED_KEY = Mutant(
    name="first key of each group dropped",
    backend="eager",
    find="attn_mask = readable = None",
    replace="""attn_mask, readable = torch.ones(
        1, k_BGKI.shape[2], dtype=torch.bool, device=k_BGKI.device
    ).cumsum(-1) > 1, None""",
)

GROUP_READ = Spec(
    name="group_read",
    kind="layer",
    math=MATH.format("latents", "patches"),
    legend=LEGEND,
    inputs={
        "latents": Tensor("B G L D"),
        "patches": Tensor("B G N C"),
        "weights": WEIGHTS,
        "mask": Tensor("B G N", dtype=torch.bool, optional=True),
    },
    options=OPTIONS,
    rules=("I / num_heads",),
    output=Tensor("B G L D"),
    saved={
        "average": Tensor("num_heads B G L C"),
        "heads": Tensor("B G L I"),
        "rest": Tensor("B G L I"),
        "log_sum": Tensor("B G num_heads L", dtype=FP32),
        "mean": Tensor("B G N", dtype=FP32),
        "rstd": Tensor("B G N", dtype=FP32),
    },
    keeps=cost.read_keeps,
    backends=(
        Backend(
            name="cuda",
            run=f"{_KERNELS}.cuda:group_read",
            saving=f"{_KERNELS}.cuda:group_read_saving",
            backward=f"{_KERNELS}.cuda_backward:group_read_backward",
            refuses=config.cuda_refuses_read,
            declines=cost.absorbed_declines_read,
        ),
        Backend(
            name="triton",
            run=f"{_KERNELS}.triton_kernels:group_read",
            saving=f"{_KERNELS}.triton_kernels:group_read_saving",
            backward=f"{_KERNELS}.triton_backward:group_read_backward",
            refuses=config.triton_refuses_read,
            declines=cost.absorbed_declines_read,
        ),
        Backend(name="eager", run=eager.cross_attention),
        Backend(name="reference", run=reference.cross_attention),
    ),
    reference=reference.cross_attention,
    cases=tuple(read for read, _ in _CASES + _MASKED + _LARGE),
    mutants=(
        Mutant(
            name="groups and videos swapped",
            backend="eager",
            find="unflatten(0, q_BGQI.shape[:2])",
            replace="unflatten(0, q_BGQI.shape[1::-1]).transpose(0, 1)",
        ),
        _DROPPED_KEY,
        Mutant(
            name="scale 1 % high",
            backend="eager",
            find="attn_mask=attn_mask,",
            replace="attn_mask=attn_mask, scale=1.01 * (q_BGQI.shape[-1] / num_heads) ** -0.5,",
        ),
        Mutant(
            name="mask ignored",
            backend="eager",
            find="attn_mask=attn_mask,",
            replace="attn_mask=None,",
        ),
        Mutant(
            name="group with nothing to read reads all",
            backend="eager",
            find="if readable is None else",
            replace="if True else",
        ),
        *bugs.READ,
    ),
    probe=Probe(tokens="patches", zeros=("latents", *_ZEROS)),
    flops=_in_all(cost.projected_read_flops),
    algorithms={
        "absorbed": _in_all(cost.absorbed_read_flops),
        "projected": _in_all(cost.projected_read_flops),
    },
    residual="latents",
    compiled_beside=True,
    peers=peers.READ,
    sass=_SASS,
    backward_reads=("latents", "patches", "weights", "mask"),
)

GROUP_WRITE = Spec(
    name="group_write",
    kind="layer",
    math=MATH.format("patches", "latents"),
    legend=LEGEND,
    inputs={"patches": Tensor("B G N D"), "latents": Tensor("B G L C"), "weights": WEIGHTS},
    options=OPTIONS,
    rules=("I / num_heads",),
    output=Tensor("B G N D"),
    saved={
        "keys": Tensor("B G L I"),
        "values": Tensor("B G L I"),
        "weights": Tensor("B G N num_heads L"),
        "mean": Tensor("B G N", dtype=FP32),
        "rstd": Tensor("B G N", dtype=FP32),
    },
    keeps=cost.write_keeps,
    backends=(
        Backend(
            name="cuda",
            run=f"{_KERNELS}.cuda:group_write",
            saving=f"{_KERNELS}.cuda:group_write_saving",
            backward=f"{_KERNELS}.cuda_backward:group_write_backward",
            refuses=config.cuda_refuses_write,
            declines=cost.absorbed_declines_write,
        ),
        Backend(
            name="triton",
            run=f"{_KERNELS}.triton_kernels:group_write",
            saving=f"{_KERNELS}.triton_kernels:group_write_saving",
            backward=f"{_KERNELS}.triton_backward:group_write_backward",
            refuses=config.triton_refuses_write,
            declines=cost.absorbed_declines_write,
        ),
        Backend(name="eager", run=eager.group_write),
        Backend(name="reference", run=reference.group_write),
    ),
    reference=reference.group_write,
    cases=tuple(write for _, write in _CASES + _LARGE),
    mutants=(
        _DROPPED_KEY,
        Mutant(
            name="values one row early, the first from the group before",
            backend="eager",
            find="linear(kv_in, w.v_weight, w.v_bias)",
            replace="linear(kv_in.flatten(1, 2).roll(1, 1).view_as(kv_in), w.v_weight, w.v_bias)",
        ),
        Mutant(
            name="heads interleaved",
            backend="eager",
            find="unflatten(-1, (num_heads, -1)).transpose(1, 2)",
            replace="unflatten(-1, (-1, num_heads)).movedim(-1, 1)",
        ),
        Mutant(
            name="eps left at PyTorch's",
            backend="eager",
            find="w.kv_norm_bias, eps)",
            replace="w.kv_norm_bias)",
        ),
        Mutant(
            name="residual left out",
            backend="eager",
            find="w.o_bias) + q_tokens",
            replace="w.o_bias)",
        ),
        *bugs.WRITE,
    ),
    probe=Probe(tokens="latents", zeros=("patches", *_ZEROS)),
    flops=_in_all(cost.projected_write_flops),
    algorithms={
        "absorbed": _in_all(cost.absorbed_write_flops),
        "projected": _in_all(cost.projected_write_flops),
    },
    residual="patches",
    compiled_beside=True,
    peers=peers.WRITE,
    sass=_SASS,
    backward_reads=("patches", "latents", "weights"),
)
