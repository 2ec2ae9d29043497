"""The records of linear_fp8 and feed_forward_fp8: inference with e4m3 products."""

from typing import Any

import torch

from snapkernels.ops.feed_forward import bugs, config, eager_fp8, peers, reference
from snapkernels.ops.feed_forward.cases import feed_forward_cases, linear_cases
from snapkernels.ops.feed_forward.quantise import quantise_feed_forward, quantise_rows
from snapkernels.ops.feed_forward.spec import (
    CUDA,
    FEED_FORWARD,
    LINEAR,
    TOKENS,
    TRITON,
    feed_forward_flops,
    linear_flops,
)
from snapkernels.ops.feed_forward.weights import (
    FP8_DIMS,
    FP8_DTYPES,
    FeedForwardWeights,
    Fp8FeedForwardWeights,
)
from snapkernels.spec import Backend, Fields, Made, Mutant, Sizes, Spec, Tensor

# Rounding to e4m3 is off by 2.6 % rms, which the sublayer does twice: eager is off by 2.5 to 4.5 %.
LIMIT = 6e-2
SLACK = 1.02  # where a row's scale lies between two powers of two decides the rest
# bfloat16's last place. In sums of one sign the roundings of e4m3 cancel, and eager is off by half
# of that: its sums are promoted every 128 of K. Those of csrc/linear are every 256, which lose
# 0.2 %; those of a LayerNorm's tokens, which have both signs, are not.
NEGLIGIBLE = 2.0**-8
SASS = {"sm_90": ("QGMMA", "STG.E.128"), "sm_89": ("QMMA", "STG.E.128")}  # sm_80 has no e4m3


def _slack_of_a_bound(sizes: Sizes) -> float:
    """What a bound of a token's F hidden values may cost beside eager's scale by their largest.

    By that the largest is 448, exact, and those next to it are where steps are finest beside them.
    A bound leaves both to chance: over many tokens it costs 3 to 5 / F, measured from F = 24 to
    512, and of a single one the ratio has a spread of 2.3 / sqrt(F), of which here are three.
    """
    return SLACK + 5 / sizes["F"] + 7 / (sizes["F"] * sizes["..."]) ** 0.5


def _quantised_linear(tokens: torch.Tensor, weight: torch.Tensor, *others: Any) -> tuple[Any, ...]:
    return tokens, *quantise_rows(weight), *others


def _quantised_feed_forward(tokens: torch.Tensor, weights: FeedForwardWeights) -> tuple[Any, ...]:
    return tokens, quantise_feed_forward(weights)


_STALE_SCALE = Mutant(
    name="the scale of the token before",
    backend="eager",
    find="quantise_rows(tokens.reshape(-1, tokens.shape[-1]))",
    replace="quantise_rows(tokens.reshape(-1, tokens.shape[-1])); scale = scale.roll(1)",
)
_MISSING_SCALE = Mutant(
    name="the weights' scale left out",
    backend="eager",
    find="weight.to(wide) * weight_scale[:, None]",
    replace="weight.to(wide)",
)
_MISSING_BIAS = Mutant(
    name="bias left out",
    backend="eager",
    find="(rows_MK @ weight_NK.T + bias)",
    replace="(rows_MK @ weight_NK.T)",
)

LINEAR_FP8 = Spec(
    name="linear_fp8",
    kind="layer",
    math="y = [residual +] weight LN(tokens) + bias, LN(tokens) and weight as e4m3 rows",
    legend=TOKENS | {"N": "width of the result"},
    inputs={
        "tokens": Tensor("... D", grad="never"),
        "weight": Tensor("N D", dtype=torch.float8_e4m3fn, grad="never"),
        "weight_scale": Tensor("N", dtype=torch.float32, grad="never"),
        "bias": Tensor("N", grad="never"),
        "norm_weight": Tensor("D", optional=True, grad="never"),
        "norm_bias": Tensor("D", optional=True, grad="never"),
        "residual": Tensor("... N", optional=True, grad="never"),
    },
    options={"eps": "float"},
    together=(("norm_weight", "norm_bias"),),
    made=Made(LINEAR.inputs, _quantised_linear),
    output=Tensor("... N"),
    backends=(
        Backend(
            name="cuda",
            run=f"{CUDA}:linear_fp8",
            refuses=config.cuda_refuses_linear_fp8,
        ),
        Backend(
            name="triton",
            run=f"{TRITON}:linear_fp8",
            refuses=config.triton_refuses_fp8,
        ),
        Backend(name="eager", run=eager_fp8.linear_fp8),
        Backend(name="reference", run=reference.linear_fp8),
    ),
    reference=reference.linear_fp8,
    cases=linear_cases(),
    mutants=(
        _STALE_SCALE,
        _MISSING_SCALE,
        _MISSING_BIAS,
        Mutant(
            name="residual left out",
            backend="eager",
            find="y if residual is None else y + residual",
            replace="y",
        ),
        *bugs.LINEAR_FP8,
    ),
    targets=tuple(SASS),
    sass=SASS,
    flops=linear_flops,
    limit=LIMIT,
    negligible=NEGLIGIBLE,
    slack=lambda sizes: SLACK,
    residual="residual",
    compiled_beside=True,
    peers=peers.LINEAR_FP8,
)

FEED_FORWARD_FP8 = Spec(
    name="feed_forward_fp8",
    kind="layer",
    math="y = tokens + fc2(GELU(fc1(LN(tokens)))), GELU with erf, the operands of both products as"
    " e4m3 rows (section 3.4)",
    legend=TOKENS | {"F": "hidden width", "E": "numbers of the hidden bound"},
    inputs={
        "tokens": Tensor("... D", grad="never"),
        "weights": Fields(Fp8FeedForwardWeights, FP8_DIMS, dtypes=FP8_DTYPES, grad="never"),
    },
    options={"eps": "float"},
    rules=("E = 2",),
    made=Made(FEED_FORWARD.inputs, _quantised_feed_forward),
    output=Tensor("... D"),
    backends=(
        Backend(
            name="cuda",
            run=f"{CUDA}:feed_forward_fp8",
            refuses=config.cuda_refuses_feed_forward_fp8,
        ),
        Backend(
            name="triton",
            run=f"{TRITON}:feed_forward_fp8",
            refuses=config.triton_refuses_fp8,
        ),
        Backend(name="eager", run=eager_fp8.feed_forward_fp8),
        Backend(name="reference", run=reference.feed_forward_fp8),
    ),
    reference=reference.feed_forward_fp8,
    cases=feed_forward_cases(),
    mutants=(
        _STALE_SCALE,
        _MISSING_SCALE,
        _MISSING_BIAS,
        Mutant(
            name="GELU of the quantised numbers",
            backend="eager",
            find="h = F.gelu(product(u, w.fc1_weight, w.fc1_scale, w.fc1_bias))",
            replace="h = product(u, w.fc1_weight, w.fc1_scale, w.fc1_bias);"
            " q, s = quantise_rows(h.reshape(-1, h.shape[-1]));"
            " h = (F.gelu(q.to(h.dtype)) * s.to(h.dtype)[:, None]).reshape(h.shape)",
        ),
        *bugs.FEED_FORWARD_FP8,
    ),
    targets=tuple(SASS),
    sass=SASS,
    flops=feed_forward_flops,
    limit=LIMIT,
    negligible=NEGLIGIBLE,
    slack=_slack_of_a_bound,
    residual="tokens",
    compiled_beside=True,
    peers=peers.FEED_FORWARD_FP8,
)
