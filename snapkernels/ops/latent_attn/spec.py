"""The record of latent_attention."""

from snapkernels.ops.latent_attn import eager, reference
from snapkernels.ops.latent_attn.cases import sublayer_cases
from snapkernels.ops.latent_attn.weights import DIMS, SelfAttentionWeights
from snapkernels.spec import Backend, Fields, Mutant, Probe, Sizes, Spec, Tensor

LEGEND = {
    "B": "videos",
    "L": "latent tokens",
    "D": "their width",
    "I": "inner width, of all heads",
}


def attention_flops(sizes: Sizes) -> int:
    """Of the four projections, the scores and the weighted values."""
    per_token = 4 * sizes["I"] * (2 * sizes["D"] + sizes["L"])
    return sizes["B"] * sizes["L"] * per_token


LATENT_ATTENTION = Spec(
    name="latent_attention",
    kind="layer",
    math="y = latents + o(softmax(q k^T / sqrt(I / num_heads)) v), q, k and v from LN(latents)"
    ' (section 3.4, figure 3b "SAttn")',
    legend=LEGEND,
    inputs={"latents": Tensor("B L D"), "weights": Fields(SelfAttentionWeights, DIMS)},
    options={"num_heads": "int", "eps": "float"},
    rules=("I / num_heads",),
    output=Tensor("B L D"),
    backends=(
        Backend(name="eager", run=eager.latent_attention),
        Backend(name="reference", run=reference.latent_attention),
    ),
    reference=reference.latent_attention,
    cases=sublayer_cases(),
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
    flops=attention_flops,
    residual="latents",
    backward_reads=("latents", "weights"),
)
