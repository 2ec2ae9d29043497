"""The record of feed_forward."""

import torch

from snapkernels.ops.feed_forward import eager, reference
from snapkernels.ops.feed_forward.weights import DIMS, FeedForwardWeights
from snapkernels.spec import Backend, Case, Fields, Mutant, Spec, Tensor

BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64
# Dropout draws at random, so no case has it; tests/ops/test_feed_forward.py counts its survivors.
PLAIN = {"dropout": 0.0, "eps": 1e-6}

FEED_FORWARD = Spec(
    name="feed_forward",
    kind="layer",
    math="y = tokens + fc2(dropout(GELU(fc1(LN(tokens))))), GELU with erf (section 3.4)",
    legend={"...": "tokens", "D": "their width", "F": "hidden width"},
    inputs={"tokens": Tensor("... D"), "weights": Fields(FeedForwardWeights, DIMS)},
    options={"dropout": "probability", "eps": "float"},
    output=Tensor("... D"),
    backends=(
        Backend(name="eager", run=eager.feed_forward),
        Backend(name="reference", run=reference.feed_forward),
    ),
    reference=reference.feed_forward,
    cases=(
        Case(
            name="odd",
            tier="cpu",
            sizes={"...": (2, 3, 5), "D": 12, "F": 40},
            options=PLAIN,
            dtypes=(BF16, FP32, FP64),
        ),
        # One past a tile of 128 tokens.
        Case(name="ragged", tier="cpu", sizes={"...": (129,), "D": 36, "F": 72}, options=PLAIN),
        Case(name="one-token", tier="cpu", sizes={"...": (), "D": 24, "F": 96}, options=PLAIN),
        Case(
            name="narrow-hidden", tier="cpu", sizes={"...": (4, 6), "D": 20, "F": 3}, options=PLAIN
        ),
        # Next to the variance of the inputs, 1e-6 is nothing.
        Case(
            name="large-eps",
            tier="cpu",
            sizes={"...": (3, 7), "D": 16, "F": 64},
            options=PLAIN | {"eps": 0.1},
        ),
        Case(
            name="patch-up",
            tier="paper",
            sizes={"...": (1, 32, 4608), "D": 1024, "F": 4096},
            options=PLAIN,
            dtypes=(BF16,),
        ),
        Case(
            name="3.9b",
            tier="paper",
            sizes={"...": (16, 768), "D": 3072, "F": 12288},
            options=PLAIN,
            dtypes=(BF16,),
        ),
        Case(
            name="500m-b64",
            tier="paper",
            sizes={"...": (64, 512), "D": 1024, "F": 4096},
            options=PLAIN,
            dtypes=(BF16,),
        ),
    ),
    mutants=(
        Mutant(
            name="GELU by tanh",
            backend="eager",
            find="gelu(linear(u, w.fc1_weight, w.fc1_bias))",
            replace='gelu(linear(u, w.fc1_weight, w.fc1_bias), approximate="tanh")',
        ),
        Mutant(
            name="eps left at PyTorch's",
            backend="eager",
            find="w.norm_bias, eps)",
            replace="w.norm_bias)",
        ),
        Mutant(
            name="normed tokens as residual",
            backend="eager",
            find="return tokens +",
            replace="return u +",
        ),
        Mutant(
            name="second bias left out",
            backend="eager",
            find="linear(h, w.fc2_weight, w.fc2_bias)",
            replace="linear(h, w.fc2_weight)",
        ),
    ),
    flops=lambda sizes: 4 * sizes["..."] * sizes["D"] * sizes["F"],
    residual="tokens",
    backward_reads=("tokens", "weights"),
)
