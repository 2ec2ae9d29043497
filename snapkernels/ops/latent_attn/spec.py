"""The record of latent_attention."""

import torch

from snapkernels.ops.latent_attn import eager, reference
from snapkernels.ops.latent_attn.weights import DIMS, SelfAttentionWeights
from snapkernels.spec import Backend, Case, Fields, Mutant, Probe, Sizes, Spec, Tensor

BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64


def _sizes(batch: int, latents: int, dim: int, inner: int) -> Sizes:
    return {"B": batch, "L": latents, "D": dim, "I": inner}


def _options(num_heads: int, eps: float = 1e-6) -> dict[str, float]:
    return {"num_heads": num_heads, "eps": eps}


def _flops(sizes: Sizes) -> int:
    """Of the four projections, the scores and the weighted values."""
    per_token = 4 * sizes["I"] * (2 * sizes["D"] + sizes["L"])
    return sizes["B"] * sizes["L"] * per_token


LATENT_ATTENTION = Spec(
    name="latent_attention",
    kind="layer",
    math="y = latents + o(softmax(q k^T / sqrt(I / num_heads)) v), q, k and v from LN(latents)"
    ' (section 3.4, figure 3b "SAttn")',
    legend={
        "B": "videos",
        "L": "latent tokens",
        "D": "their width",
        "I": "inner width, of all heads",
    },
    inputs={"latents": Tensor("B L D"), "weights": Fields(SelfAttentionWeights, DIMS)},
    options={"num_heads": "int", "eps": "float"},
    rules=("I / num_heads",),
    output=Tensor("B L D"),
    backends=(
        Backend(name="eager", run=eager.latent_attention),
        Backend(name="reference", run=reference.latent_attention),
    ),
    reference=reference.latent_attention,
    cases=(
        Case(
            name="odd",
            tier="cpu",
            sizes=_sizes(2, 7, 20, 12),
            options=_options(3),
            dtypes=(BF16, FP32, FP64),
        ),
        # One past a tile of 128 latents, heads of 20.
        Case(name="ragged", tier="cpu", sizes=_sizes(2, 129, 28, 40), options=_options(2)),
        Case(name="one-latent", tier="cpu", sizes=_sizes(3, 1, 16, 8), options=_options(2)),
        Case(name="one-head", tier="cpu", sizes=_sizes(1, 5, 64, 48), options=_options(1)),
        Case(name="heads-of-one", tier="cpu", sizes=_sizes(2, 6, 10, 6), options=_options(6)),
        # Next to the variance of the inputs, 1e-6 is nothing.
        Case(name="large-eps", tier="cpu", sizes=_sizes(2, 5, 12, 12), options=_options(2, 0.1)),
        Case(
            name="3.9b",
            tier="paper",
            sizes=_sizes(16, 768, 3072, 3072),
            options=_options(24),
            dtypes=(BF16,),
        ),
        Case(
            name="up",
            tier="paper",
            sizes=_sizes(1, 768, 3072, 3072),
            options=_options(24),
            dtypes=(BF16,),
        ),
        Case(
            name="500m-b64",
            tier="paper",
            sizes=_sizes(64, 512, 1024, 1024),
            options=_options(16),
            dtypes=(BF16,),
        ),
    ),
    mutants=(
        Mutant(
            name="keys from the video before",
            backend="eager",
            find="heads(w.k_weight, w.k_bias)",
            replace="heads(w.k_weight, w.k_bias).roll(1, 0)",
        ),
        Mutant(
            name="first key dropped",
            backend="eager",
            find="heads(w.v_weight, w.v_bias)",
            replace="heads(w.v_weight, w.v_bias), latents_BLD.new_ones(1, latents_BLD.shape[1])"
            ".cumsum(-1) > 1",
        ),
        Mutant(
            name="scale 1 % high",
            backend="eager",
            find="heads(w.v_weight, w.v_bias)",
            replace="heads(w.v_weight, w.v_bias), scale=1.01 * (len(w.q_bias) / num_heads) ** -0.5",
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
            find="w.norm_bias, eps)",
            replace="w.norm_bias)",
        ),
    ),
    probe=Probe(
        tokens="latents",
        zeros=tuple(
            f"weights.{field}" for field in ("q_weight", "q_bias", "norm_bias", "v_bias", "o_bias")
        ),
    ),
    flops=_flops,
    residual="latents",
    backward_reads=("latents", "weights"),
)
