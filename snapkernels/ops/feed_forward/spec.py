"""The records of linear and feed_forward."""

from snapkernels.ops.feed_forward import bugs, config, eager, reference
from snapkernels.ops.feed_forward.cases import SMALL, feed_forward_cases, linear_cases
from snapkernels.ops.feed_forward.weights import DIMS, FeedForwardWeights
from snapkernels.spec import Backend, Case, Fields, Mutant, Sizes, Spec, Tensor

CUDA = "snapkernels.ops.feed_forward.kernels.cuda"
TRITON = "snapkernels.ops.feed_forward.kernels.triton_backend"
SASS = {"sm_90": ("HGMMA", "STG.E.128"), "sm_80": ("HMMA", "STG.E.128")}
TOKENS = {"...": "tokens", "D": "their width"}


def linear_flops(sizes: Sizes) -> int:
    """Of the product."""
    return 2 * sizes["..."] * sizes["D"] * sizes["N"]


def feed_forward_flops(sizes: Sizes) -> int:
    """Of both products."""
    return 4 * sizes["..."] * sizes["D"] * sizes["F"]


LINEAR = Spec(
    name="linear",
    kind="layer",
    math="y = [residual +] weight LN(tokens) + bias, LN only where its parameters are given",
    legend=TOKENS | {"N": "width of the result"},
    inputs={
        "tokens": Tensor("... D"),
        "weight": Tensor("N D", parameter=True),
        "bias": Tensor("N", parameter=True),
        "norm_weight": Tensor("D", optional=True, parameter=True),
        "norm_bias": Tensor("D", optional=True, parameter=True),
        "residual": Tensor("... N", optional=True),
    },
    options={"eps": "float"},
    together=(("norm_weight", "norm_bias"),),
    output=Tensor("... N"),
    backends=(
        Backend(
            name="cuda",
            run=f"{CUDA}:linear",
            differentiable=False,
            refuses=config.cuda_refuses_linear,
            declines=config.cuda_declines_bf16,
        ),
        Backend(
            name="triton",
            run=f"{TRITON}:linear",
            differentiable=False,
            refuses=config.triton_refuses_linear,
            declines=config.triton_declines_bf16,
        ),
        Backend(name="eager", run=eager.linear),
        Backend(name="reference", run=reference.linear),
    ),
    reference=reference.linear,
    cases=linear_cases(),
    mutants=(
        Mutant(
            name="norm left out",
            backend="eager",
            find="if norm_weight is not None:",
            replace="if norm_weight is None and norm_bias is not None:",
        ),
        Mutant(
            name="eps left at PyTorch's",
            backend="eager",
            find="norm_weight, norm_bias, eps)",
            replace="norm_weight, norm_bias)",
        ),
        Mutant(
            name="normed tokens as residual",
            backend="eager",
            find="y if residual is None else y + residual",
            replace="y if residual is None else y + u[..., :1]",
        ),
        Mutant(
            name="bias left out",
            backend="eager",
            find="F.linear(u, weight, bias)",
            replace="F.linear(u, weight)",
        ),
        *bugs.LINEAR,
    ),
    flops=linear_flops,
    # Backends round the normed tokens and the result as eager does: who is nearer is luck.
    slack=lambda sizes: 1.01,
    residual="residual",
    compiled_beside=True,
    sass=SASS,
    backward_reads=("tokens", "weight", "norm_weight"),
)

FEED_FORWARD = Spec(
    name="feed_forward",
    kind="layer",
    math="y = tokens + fc2(dropout(GELU(fc1(LN(tokens))))), GELU with erf (section 3.4)",
    legend=TOKENS | {"F": "hidden width"},
    inputs={"tokens": Tensor("... D"), "weights": Fields(FeedForwardWeights, DIMS)},
    options={"dropout": "probability", "seed": "seed?", "eps": "float"},
    output=Tensor("... D"),
    backends=(
        Backend(
            name="cuda",
            run=f"{CUDA}:feed_forward",
            differentiable=False,
            refuses=config.cuda_refuses_feed_forward,
            declines=config.cuda_declines_bf16,
        ),
        Backend(
            name="triton",
            run=f"{TRITON}:feed_forward",
            differentiable=False,
            refuses=config.triton_refuses_feed_forward,
            declines=config.triton_declines_bf16,
        ),
        Backend(name="eager", run=eager.feed_forward),
        Backend(name="reference", run=reference.feed_forward),
    ),
    reference=reference.feed_forward,
    cases=(
        *feed_forward_cases(dropout=0.0, seed=None),
        # Without a seed dropout draws at random, which tests/ops/test_feed_forward.py counts.
        Case(
            name="dropout",
            tier="cpu",
            sizes={"...": (3, 7), "D": 20, "F": 37},
            options={"dropout": 0.25, "seed": 2**40 + 5, "eps": 1e-6},
            dtypes=SMALL,
        ),
        # Rows that begin with a block of Philox, which Triton's kernels ask for.
        Case(
            name="dropout-blocks",
            tier="cpu",
            sizes={"...": (2, 65), "D": 20, "F": 132},
            options={"dropout": 0.25, "seed": 2**40 + 5, "eps": 1e-6},
            dtypes=SMALL,
        ),
    ),
    mutants=(
        Mutant(
            name="GELU by tanh",
            backend="eager",
            find="F.gelu(F.linear(u, w.fc1_weight, w.fc1_bias))",
            replace='F.gelu(F.linear(u, w.fc1_weight, w.fc1_bias), approximate="tanh")',
        ),
        Mutant(
            name="eps left at PyTorch's",
            backend="eager",
            find="w.norm_weight, w.norm_bias, eps)",
            replace="w.norm_weight, w.norm_bias)",
        ),
        Mutant(
            name="normed tokens as residual",
            backend="eager",
            find="w.fc2_bias) + tokens",
            replace="w.fc2_bias) + u",
        ),
        Mutant(
            name="second bias left out",
            backend="eager",
            find="F.linear(h, w.fc2_weight, w.fc2_bias)",
            replace="F.linear(h, w.fc2_weight)",
        ),
        Mutant(
            name="another seed's dropout",
            backend="eager",
            find="kept(seed, tuple(h.shape)",
            replace="kept(seed + 1, tuple(h.shape)",
        ),
        Mutant(
            name="every token's dropout that of the first",
            backend="eager",
            find="kept(seed, tuple(h.shape)",
            replace="kept(seed, (h.shape[-1],)",
        ),
        *bugs.FEED_FORWARD,
    ),
    flops=feed_forward_flops,
    residual="tokens",
    compiled_beside=True,
    sass=SASS,
    backward_reads=("tokens", "weights"),
)
