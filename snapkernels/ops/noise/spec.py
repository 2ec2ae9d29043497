"""The record of forward_process."""

import torch

from snapkernels.ops.noise import config, eager, reference
from snapkernels.spec import Backend, Case, Mutant, Spec, Tensor, Tier

KERNELS = "snapkernels.ops.noise.kernels"
BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


def _case(
    name: str,
    tier: Tier,
    video: tuple[int, int, int, int, int],
    *,
    sigma_in: float = 4.0,
    seed: int = 0,
    dtypes: tuple[torch.dtype, ...] = (FP32,),
) -> Case:
    sizes = dict(zip("BCTHW", video, strict=True))
    options = {"sigma_in": sigma_in, "seed": seed}
    return Case(name=name, tier=tier, sizes=sizes, options=options, dtypes=dtypes)


FORWARD_PROCESS = Spec(
    name="forward_process",
    kind="op",
    math="x_sigma = video / sigma_in + sigma eps, eps standard normal, of (seed, sample, element)"
    " (section 3.2)",
    legend={"B": "videos", "C": "channels", "T": "frames", "H": "pixel rows", "W": "pixel columns"},
    inputs={
        "video": Tensor("B C T H W"),
        "sigma": Tensor("B", dtype="free", grad="never", positive=True),
        "sample": Tensor("B", dtype=torch.int64),
    },
    options={"sigma_in": "positive", "seed": "seed"},
    output=Tensor("B C T H W", dtype="wide"),
    backends=(
        Backend(name="cuda", run=f"{KERNELS}.cuda:forward_process", refuses=config.cuda_refuses),
        Backend(
            name="triton",
            run=f"{KERNELS}.triton_kernels:forward_process",
            refuses=config.triton_refuses,
        ),
        Backend(name="eager", run=eager.forward_process),
        Backend(name="reference", run=reference.forward_process),
    ),
    reference=reference.forward_process,
    cases=(
        _case("odd", "cpu", (3, 2, 3, 5, 7), seed=2**40 + 5, dtypes=(BF16, FP32, FP64)),
        _case("tail", "cpu", (2, 1, 1, 3, 343), sigma_in=1.0, dtypes=(FP32, FP16)),
        _case("two-tiles", "cpu", (2, 3, 2, 16, 32), sigma_in=32.0),
        _case("up-b1", "paper", (1, 3, 16, 288, 512), sigma_in=32.0),
        _case("up-b4", "paper", (4, 3, 16, 288, 512), sigma_in=32.0),
        _case("3.9b-b16", "paper", (16, 3, 16, 36, 64)),
    ),
    moves=True,
    mutants=(
        Mutant(
            name="every video has the first one's noise",
            backend="triton",
            find="tl.load(p_sample + b)",
            replace="tl.load(p_sample)",
        ),
        Mutant(
            name="every video at the first one's level",
            backend="triton",
            find="tl.load(p_sigma + b)",
            replace="tl.load(p_sigma)",
        ),
        Mutant(
            name="the normals of a block in another order",
            backend="triton",
            find="tl.join(tl.join(z0, z2), tl.join(z1, z3))",
            replace="tl.join(tl.join(z0, z1), tl.join(z2, z3))",
        ),
        Mutant(
            name="every tile has the first one's noise",
            backend="triton",
            find="philox_normals(seed_lo, seed_hi, block_K,",
            replace="philox_normals(seed_lo, seed_hi, block_K % BLOCKS,",
        ),
        Mutant(
            name="the upper half of the seed lost",
            backend="triton",
            find="seed >> 32",
            replace="0",
        ),
        Mutant(
            name="every video has the first one's noise, compiled",
            backend="cuda",
            file="noise/forward_process.cu",
            find="philox_normals(key, block, sample[blockIdx.y])",
            replace="philox_normals(key, block, sample[0])",
        ),
    ),
)
