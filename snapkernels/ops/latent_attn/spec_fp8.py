"""The record of latent_attention_fp8: inference with 8-bit products."""

from typing import Any

import torch

from snapkernels.ops.latent_attn import bugs, config, eager_fp8, reference
from snapkernels.ops.latent_attn.cases import fp8_cases
from snapkernels.ops.latent_attn.quantise import quantise_latent_attention
from snapkernels.ops.latent_attn.spec import LATENT_ATTENTION, LEGEND, attention_flops
from snapkernels.ops.latent_attn.weights import (
    FP8_DIMS,
    FP8_DTYPES,
    Fp8SelfAttentionWeights,
    SelfAttentionWeights,
)
from snapkernels.spec import Backend, Fields, Made, Spec, Tensor

# Rounding to e4m3 is off by 2.6 % rms. Two projections do it to their tokens; softmax and product
# average a part of that out, and where a key takes most its score's error counts for more.
LIMIT = 6e-2
SLACK = 1.15  # beside a core in the tokens' dtype; most cases need a third of it
# Products of e4m3 and, in the core, of integers: QGMMA and IGMMA, QMMA and IMMA. Which kernel has
# which, `tests/ops/test_code.py` holds.
SASS = {"sm_90": ("GMMA", "STG.E.128"), "sm_89": ("MMA", "STG.E.128")}  # sm_80 has no e4m3


def _quantised(latents: torch.Tensor, weights: SelfAttentionWeights) -> tuple[Any, ...]:
    return latents, quantise_latent_attention(weights)


LATENT_ATTENTION_FP8 = Spec(
    name="latent_attention_fp8",
    kind="layer",
    math="y = latents + o(softmax(q k^T / sqrt(I / num_heads)) v), q, k and v from LN(latents), the"
    ' operands of the projections as e4m3 rows (section 3.4, figure 3b "SAttn")',
    legend=LEGEND | {"J": "width of q, k and v together"},
    inputs={
        "latents": Tensor("B L D", grad="never"),
        "weights": Fields(Fp8SelfAttentionWeights, FP8_DIMS, dtypes=FP8_DTYPES, grad="never"),
    },
    options={"num_heads": "int", "eps": "float"},
    rules=("J = 3 * I", "I / num_heads"),
    made=Made(LATENT_ATTENTION.inputs, _quantised),
    output=Tensor("B L D"),
    backends=(
        Backend(
            name="cuda",
            run="snapkernels.ops.latent_attn.kernels.cuda:latent_attention_fp8",
            refuses=config.cuda_refuses,
            library=("latent_attention_fp8", "linear_fp8"),
        ),
        Backend(
            name="triton",
            run="snapkernels.ops.latent_attn.kernels.triton_backend:latent_attention_fp8",
            refuses=config.triton_refuses,
        ),
        Backend(name="eager", run=eager_fp8.latent_attention_fp8),
        Backend(name="reference", run=reference.latent_attention_fp8),
    ),
    reference=reference.latent_attention_fp8,
    cases=fp8_cases(),
    mutants=bugs.LATENT_ATTENTION_FP8,
    targets=tuple(SASS),
    sass=SASS,
    flops=attention_flops,
    limit=LIMIT,
    slack=lambda sizes: SLACK,
    residual="latents",
    compiled_beside=True,
)
