"""latent_attention: the equation, gradients, bad input."""

import pytest
import torch

from snapkernels import CrossAttentionWeights, SelfAttentionWeights, group_read, latent_attention
from snapkernels.ops.latent_attn.weights import DIMS
from snapkernels.testing.inputs import random_weights
from snapkernels.testing.numerics import relative_rms

BACKENDS = ["reference", "eager"]
HEADS = 3
SIZES = {"D": 20, "I": 12}


def inputs(rng):
    latents = torch.randn(2, 7, SIZES["D"], generator=rng).double()
    weights = random_weights(SelfAttentionWeights, DIMS, SIZES, dtype=torch.float64, generator=rng)
    return latents, weights


@pytest.mark.parametrize("backend", BACKENDS)
def test_it_is_a_read_of_oneself(backend, rng):
    latents, w = inputs(rng)
    as_read = CrossAttentionWeights(w.norm_weight, w.norm_bias, w.norm_weight, w.norm_bias, *w[2:])
    one_group = latents[:, None]
    expected = group_read(one_group, one_group, as_read, num_heads=HEADS, backend="reference")[:, 0]
    out = latent_attention(latents, w, num_heads=HEADS, backend=backend)
    assert relative_rms(out - latents, expected - latents) < 1e-13
    options = {"num_heads": HEADS, "eps": 0.5}
    expected = group_read(one_group, one_group, as_read, backend="reference", **options)[:, 0]
    out = latent_attention(latents, w, backend=backend, **options)
    assert relative_rms(out - latents, expected - latents) < 1e-13


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients(backend, rng):
    latents, weights = inputs(rng)

    def attend(latents, *weights):
        weights = SelfAttentionWeights(*weights)
        return latent_attention(latents, weights, num_heads=HEADS, backend=backend)

    leaves = [latents[:, :3].clone(), *weights]
    assert torch.autograd.gradcheck(attend, [leaf.requires_grad_() for leaf in leaves])


def test_compiles_without_graph_breaks(rng):
    latents, weights = inputs(rng)
    compiled = torch.compile(latent_attention, fullgraph=True, backend="aot_eager")
    out = latent_attention(latents, weights, num_heads=HEADS)
    torch.testing.assert_close(compiled(latents, weights, num_heads=HEADS), out)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"latents": torch.zeros(7, 20)}, "latents must have 3 dimensions"),
        ({"latents": torch.zeros(2, 7, 21).double()}, "weights.norm_weight has D = 20"),
        ({"latents": torch.zeros(2, 7, 20)}, "weights.norm_weight must be torch.float32"),
        ({"num_heads": 7}, "I = 12 is not divisible by num_heads = 7"),
        ({"weights": None}, "weights must have the fields norm_weight"),
    ],
)
def test_it_names_what_is_wrong(change, message, rng):
    latents, weights = inputs(rng)
    arguments = {"latents": latents, "weights": weights, "num_heads": HEADS} | change
    with pytest.raises(ValueError, match=f"^latent_attention: .*{message}"):
        latent_attention(arguments.pop("latents"), arguments.pop("weights"), **arguments)
