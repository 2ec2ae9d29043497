"""feed_forward: the equation, dropout's place, gradients, bad input."""

import pytest
import torch
from torch import nn

from snapkernels import FeedForwardWeights, feed_forward
from snapkernels.ops.feed_forward.weights import DIMS
from snapkernels.testing.inputs import random_weights
from snapkernels.testing.numerics import relative_rms

BACKENDS = ["reference", "eager"]
SIZES = {"D": 12, "F": 40}


def inputs(rng):
    tokens = torch.randn(2, 3, 5, SIZES["D"], generator=rng).double()
    weights = random_weights(FeedForwardWeights, DIMS, SIZES, dtype=torch.float64, generator=rng)
    return tokens, weights


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("eps", [1e-6, 0.5])
def test_it_is_layer_norm_linear_exact_gelu_linear(backend, eps, rng):
    tokens, w = inputs(rng)
    stack = nn.Sequential(
        nn.LayerNorm(12, eps=eps), nn.Linear(12, 40), nn.GELU(), nn.Linear(40, 12)
    ).double()
    values = [w.norm_weight, w.norm_bias, w.fc1_weight, w.fc1_bias, w.fc2_weight, w.fc2_bias]
    with torch.no_grad():
        for parameter, value in zip(stack.parameters(), values, strict=True):
            parameter.copy_(value)
        out = feed_forward(tokens, w, eps=eps, backend=backend)
        assert relative_rms(out - tokens, stack(tokens)) < 1e-13


@pytest.mark.parametrize("backend", BACKENDS)
def test_dropout_zeroes_hidden_values_and_keeps_their_mean(backend, rng):
    """With fc2 a sum and h constant, the branch counts the survivors of each token."""
    hidden, p = 4000, 0.25
    sizes = {"D": 2, "F": hidden}
    shapes = {field: [sizes[d] for d in dims] for field, dims in DIMS.items()}
    weights = FeedForwardWeights(**{f: torch.zeros(s).double() for f, s in shapes.items()})
    weights.fc1_bias.fill_(100.0)  # GELU(100) = 100
    weights.fc2_weight.fill_(1.0)
    tokens = torch.zeros(50, 2).double()
    torch.manual_seed(0)
    branch = feed_forward(tokens, weights, dropout=p, backend=backend)
    survivors = branch * (1 - p) / 100
    torch.testing.assert_close(survivors, survivors.round())
    assert (survivors / hidden - (1 - p)).abs().max() < 0.03
    assert survivors[:, 0].std() > 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients(backend, rng):
    tokens, weights = inputs(rng)

    def ff(tokens, *weights):
        return feed_forward(tokens, FeedForwardWeights(*weights), backend=backend)

    leaves = [tokens[0, 0].clone(), *weights]
    assert torch.autograd.gradcheck(ff, [leaf.requires_grad_() for leaf in leaves])


def test_compiles_without_graph_breaks(rng):
    tokens, weights = inputs(rng)
    compiled = torch.compile(feed_forward, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(tokens, weights), feed_forward(tokens, weights))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": torch.zeros(4, 13).double()}, "weights.norm_weight has D = 12"),
        ({"tokens": torch.zeros((), dtype=torch.float64)}, "must have at least 1 dimensions"),
        ({"tokens": "tokens"}, "tokens must be a tensor, got str"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ({"dropout": -0.1}, r"dropout must be in \[0, 1\), got -0.1"),
        ({"fc2_weight": torch.zeros(12, 41).double()}, "weights.fc2_weight has F = 41"),
    ],
)
def test_it_names_what_is_wrong(change, message, rng):
    tokens, weights = inputs(rng)
    fields = {name: change.pop(name) for name in DIMS if name in change}
    arguments = {"tokens": tokens, "weights": weights._replace(**fields)} | change
    with pytest.raises(ValueError, match=f"^feed_forward: .*{message}"):
        feed_forward(arguments.pop("tokens"), arguments.pop("weights"), **arguments)
