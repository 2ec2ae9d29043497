"""feed_forward and linear: the equation, dropout's place and its seeds, gradients, bad input."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from snapkernels import FeedForwardWeights, feed_forward, linear
from snapkernels.ops.feed_forward.weights import DIMS
from snapkernels.philox import kept
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


def counting(tokens, hidden):
    """Zero tokens of width 2, and weights with which the branch counts survivors: 100 of each."""
    sizes = {"D": 2, "F": hidden}
    shapes = {field: [sizes[d] for d in dims] for field, dims in DIMS.items()}
    weights = FeedForwardWeights(**{f: torch.zeros(s).double() for f, s in shapes.items()})
    weights.fc1_bias.fill_(100.0)  # GELU(100) = 100
    weights.fc2_weight.fill_(1.0)
    return torch.zeros(tokens, 2).double(), weights


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("seed", [None, 3])
def test_dropout_zeroes_hidden_values_and_keeps_their_mean(backend, seed):
    """With fc2 a sum and h constant, the branch counts the survivors of each token."""
    hidden, p = 4000, 0.25
    tokens, weights = counting(50, hidden)
    torch.manual_seed(0)
    branch = feed_forward(tokens, weights, dropout=p, seed=seed, backend=backend)
    survivors = branch * (1 - p) / 100
    torch.testing.assert_close(survivors, survivors.round())
    assert (survivors / hidden - (1 - p)).abs().max() < 0.03
    assert survivors[:, 0].std() > 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_seed_zeroes_the_same_hidden_values_by_every_backend(backend, rng):
    """They are those of `kept`, by their place in the call: all of a call's tokens count on."""
    tokens, weights = inputs(rng)

    def run(tokens, seed):
        return feed_forward(tokens, weights, dropout=0.4, seed=seed, backend=backend)

    whole = run(tokens, 7)
    survivors = kept(7, (2, 3, 5, SIZES["F"]), 0.4, "cpu") / 0.6
    h = nn.functional.gelu(
        nn.functional.layer_norm(tokens, (12,), weights.norm_weight, weights.norm_bias, 1e-6)
        @ weights.fc1_weight.T
        + weights.fc1_bias
    )
    by_hand = (h * survivors) @ weights.fc2_weight.T + weights.fc2_bias + tokens
    torch.testing.assert_close(whole, by_hand)
    torch.testing.assert_close(run(tokens.flatten(0, 2), 7), whole.flatten(0, 2))
    torch.testing.assert_close(run(tokens[:1], 7), whole[:1])
    assert not torch.allclose(run(tokens[1:], 7), whole[1:])
    assert not torch.allclose(run(tokens, 8), whole)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    run(tokens, 7)
    assert torch.get_rng_state().equal(state)


def compiled(function):
    torch.compiler.reset()
    return torch.compile(function, fullgraph=True, backend="aot_eager")


def watched(function):
    def run(*args, **keywords):
        with FlopCounterMode(display=False):
            return function(*args, **keywords)

    return run


@pytest.mark.parametrize("seed", [None, 3])
@pytest.mark.parametrize("how", [lambda function: function, compiled, watched])
def test_the_gradient_is_of_the_values_that_were_kept(how, seed):
    """d branch / d fc2, summed over tokens, is what each hidden value gave: the branch's sum."""
    tokens, weights = counting(20, 64)
    weights.fc2_weight.requires_grad_()
    branch = how(feed_forward)(tokens, weights, dropout=0.5, seed=seed)
    (grad,) = torch.autograd.grad(branch.sum(), weights.fc2_weight)
    torch.testing.assert_close(grad.sum(), branch.sum())
    if seed is not None:
        survivors = kept(seed, (20, 64), 0.5, "cpu").double() * 200
        torch.testing.assert_close(grad, survivors.sum(0).expand(2, 64))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("residual", [False, True])
def test_linear_is_layer_norm_linear_residual(backend, norm, residual, rng):
    tokens, weight, bias, gain, shift, rest = (
        torch.randn(*shape, generator=rng).double()
        for shape in ((2, 5, 12), (7, 12), (7,), (12,), (12,), (2, 5, 7))
    )
    given = {"norm_weight": gain, "norm_bias": shift} if norm else {}
    given |= {"residual": rest} if residual else {}
    found = linear(tokens, weight, bias, **given, eps=0.5, backend=backend)
    u = nn.functional.layer_norm(tokens, (12,), gain, shift, 0.5) if norm else tokens
    expected = nn.functional.linear(u, weight, bias) + (rest if residual else 0)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm_bias": None}, "norm_weight and norm_bias go together, but norm_bias is left out"),
        ({"norm_weight": None}, "norm_weight and norm_bias go together, but norm_weight is"),
        ({"weight": torch.zeros(7, 13)}, "weight has D = 13"),
        ({"bias": torch.zeros(7).double()}, "bias must be torch.float32 like tokens"),
        ({"residual": torch.zeros(10, 7)}, r"residual has leading dimensions \(10,\), but tokens"),
        ({"residual": torch.zeros(2, 5, 12)}, "residual has N = 12"),
    ],
)
def test_linear_names_what_is_wrong(change, message):
    given = {
        "tokens": torch.zeros(2, 5, 12),
        "weight": torch.zeros(7, 12),
        "bias": torch.zeros(7),
        "norm_weight": torch.zeros(12),
        "norm_bias": torch.zeros(12),
        "residual": torch.zeros(2, 5, 7),
    }
    with pytest.raises(ValueError, match=f"^linear: {message}"):
        linear(**given | change)


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
        ({"seed": -1}, r"seed must be an int from 0 to 2\^63 - 1, got -1"),
        ({"dropout": 0.5, "seed": 0.5}, r"seed must be an int from 0 to 2\^63 - 1, got 0.5"),
        ({"fc2_weight": torch.zeros(12, 41).double()}, "weights.fc2_weight has F = 41"),
    ],
)
def test_it_names_what_is_wrong(change, message, rng):
    tokens, weights = inputs(rng)
    fields = {name: change.pop(name) for name in DIMS if name in change}
    arguments = {"tokens": tokens, "weights": weights._replace(**fields)} | change
    with pytest.raises(ValueError, match=f"^feed_forward: .*{message}"):
        feed_forward(arguments.pop("tokens"), arguments.pop("weights"), **arguments)
