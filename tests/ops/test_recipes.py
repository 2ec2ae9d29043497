"""Recipes and quantise: which layers are replaced, what is freed, what is refused."""

import gc
import weakref
from dataclasses import replace

import pytest
import torch
from torch import nn

from snapkernels import (
    RECIPES,
    FeedForward,
    Fp8FeedForward,
    Fp8GroupRead,
    Fp8GroupWrite,
    Fp8LatentAttention,
    GroupRead,
    GroupWrite,
    LatentAttention,
    Recipe,
    quantise,
)
from snapkernels.modules_fp8 import E4M3_BOUND, E4M3_ROWS
from snapkernels.testing.numerics import relative_rms

FP8 = RECIPES["fp8"]


class Halved(FeedForward):
    """Not what `feed_forward` computes, so not to be replaced by it."""

    def forward(self, tokens):
        return super().forward(tokens) / 2


def model():
    return nn.Sequential(
        nn.Linear(16, 16),
        nn.Sequential(LatentAttention(16, 4), FeedForward(16, dropout=0.5)),
        nn.ModuleDict(
            {
                "read": GroupRead(16, 16, 4),
                "write": GroupWrite(16, 16, 4, group=(8, 100)),  # 32 columns for 16
                "absorbed": GroupWrite(16, 16, 4, group=(2, 100)),
                "blocks": nn.ModuleList(
                    nn.ModuleDict({"cond_read": GroupRead(16, 16, 4)}) for _ in "ab"
                ),
                "ff": FeedForward(16),
                "halved": Halved(16),
            }
        ),
    ).eval()


def test_layers_are_replaced_where_they_stand_and_others_stay():
    before = model().bfloat16()
    others = [before[0], before[2]["absorbed"], before[2]["blocks"][0]["cond_read"]]
    others.append(before[2]["halved"])
    after = quantise(before, "fp8")
    assert after is before and after.recipe is FP8
    assert isinstance(after[1][0], Fp8LatentAttention)
    assert isinstance(after[1][1], Fp8FeedForward) and isinstance(after[2]["ff"], Fp8FeedForward)
    assert isinstance(after[2]["read"], Fp8GroupRead)
    assert isinstance(after[2]["write"], Fp8GroupWrite)
    left = [after[0], after[2]["absorbed"], after[2]["blocks"][0]["cond_read"]]
    left.append(after[2]["halved"])
    assert isinstance(after[2]["blocks"][1]["cond_read"], Fp8GroupRead)
    assert all(a is b for a, b in zip(left, others, strict=True))
    assert not any(module.training for module in after.modules())


def test_weights_are_freed_layer_by_layer(monkeypatch):
    """When a layer is quantised no weight of one quantised before is left."""
    given = nn.Sequential(*(FeedForward(8) for _ in range(3))).eval()
    alive = [weakref.ref(layer.fc1.weight) for layer in given]
    seen = []

    def build(self, layer):
        gc.collect()
        seen.append([ref() is not None for ref in alive])
        nn.Module.__init__(self)

    monkeypatch.setattr(Fp8FeedForward, "__init__", build)
    quantise(given, "fp8")
    assert seen == [[True] * 3, [False, True, True], [False, False, True]]


def test_nothing_has_a_gradient_afterwards():
    given = model()
    given[0](torch.ones(1, 16)).sum().backward()
    assert given[0].weight.grad is not None
    quantise(given, "fp8")
    assert not any(p.requires_grad or p.grad is not None for p in given.parameters())


def test_a_layer_alone_is_quantised_and_returned():
    layer = FeedForward(16).eval()
    quantised = quantise(layer, "fp8")
    assert isinstance(quantised, Fp8FeedForward) and quantised.recipe is FP8
    assert isinstance(layer, FeedForward)


def test_a_recipe_without_layers_changes_nothing():
    given = model().train()
    before = dict(given.named_modules())
    assert quantise(given, "bf16") is given
    assert dict(given.named_modules()) == before and given.training


def test_what_a_recipe_keeps_is_kept():
    given = quantise(model(), replace(FP8, kept=("1.*",)))
    assert isinstance(given[1][0], LatentAttention) and isinstance(given[1][1], FeedForward)
    assert isinstance(given[2]["ff"], Fp8FeedForward)
    given = quantise(model(), replace(FP8, layers=("LatentAttention",)))
    assert isinstance(given[1][0], Fp8LatentAttention) and isinstance(given[2]["ff"], FeedForward)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_a_quantised_model_is_near_the_one_it_was(dtype, rng):
    given = nn.Sequential(LatentAttention(64, 16), FeedForward(64)).to(dtype).eval()
    tokens = torch.randn(2, 10, 64, generator=rng).to(dtype)
    expected = given(tokens) - tokens
    error = relative_rms(quantise(given, "fp8")(tokens) - tokens, expected)
    assert 1e-3 < error < 0.06


@pytest.mark.parametrize(
    ("given", "recipe", "message"),
    [
        (model, "fp4", "recipe must be one of 'bf16', 'fp8', or a Recipe, got 'fp4'"),
        (lambda: quantise(model(), "fp8"), "fp8", "the model is quantised already"),
        (lambda: model().train(), "fp8", r"in training mode: call eval\(\)"),
        (lambda: nn.Linear(4, 4).eval(), "fp8", "no FeedForward or .* or GroupWrite that 'fp8'"),
        (model, replace(FP8, kept=("*",)), "no FeedForward or .* or GroupWrite that 'fp8'"),
        (
            lambda: GroupRead(16, 16, 4, group=(2, 100)).eval(),
            replace(FP8, layers=("GroupRead",)),
            "the model has no GroupRead that 'fp8' takes",
        ),
    ],
)
def test_what_cannot_be_quantised_is_refused_by_name(given, recipe, message):
    with pytest.raises(ValueError, match=message):
        quantise(given(), recipe)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": ("Linear",)}, "layers must be of FeedForward, .*, GroupWrite, got 'Linear'"),
        ({"weights": "int8"}, "weights of FeedForward must be 'e4m3, .*', got 'int8'"),
        ({"inputs": E4M3_BOUND}, "inputs of FeedForward must be 'e4m3, a scale a row"),
        ({"hidden": E4M3_ROWS}, "hidden of FeedForward must be 'e4m3, a scale a token"),
    ],
)
def test_a_recipe_that_nothing_computes_is_refused(change, message):
    with pytest.raises(ValueError, match=f"^recipe mine: {message}"):
        replace(FP8, name="mine", **change)


def test_a_recipe_is_of_layers_that_have_a_hidden_form_or_not():
    Recipe(
        name="attention",
        weights=E4M3_ROWS,
        inputs=E4M3_ROWS,
        hidden="none here",
        layers=("LatentAttention",),
    )


def test_what_is_written_into_the_source_does_not_reach_the_quantised_form():
    """The hidden bound is of the biases as they were."""
    for layer in (FeedForward(32), LatentAttention(32, 8), GroupRead(32, 16, 8)):
        form = quantise(layer.eval(), "fp8")
        before = {name: tensor.clone() for name, tensor in form.state_dict().items()}
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.fill_(100)
        for name, tensor in form.state_dict().items():
            assert torch.equal(tensor.float(), before[name].float()), name


def test_a_layer_of_several_names_is_one_form_under_each():
    layer = FeedForward(32)
    form = quantise(nn.Sequential(layer, nn.Identity(), layer).eval(), "fp8")
    assert isinstance(form[0], Fp8FeedForward) and form[2] is form[0]
    whole = nn.Sequential(nn.Sequential(layer), nn.Sequential(layer)).eval()
    quantise(whole, "fp8")
    assert isinstance(whole[0][0], Fp8FeedForward) and whole[1][0] is whole[0][0]


@pytest.mark.parametrize("layer", [LatentAttention(32, 8), GroupRead(32, 32, 8)])
def test_under_autocast_a_quantised_layer_runs_as_the_plain_one_does(layer):
    tokens = torch.randn((2, 3, 32) if isinstance(layer, LatentAttention) else (1, 2, 3, 32))
    calls = (tokens,) if isinstance(layer, LatentAttention) else (tokens, tokens)
    form = quantise(layer.eval(), "fp8")
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert relative_rms(form(*calls) - tokens, layer(*calls).float() - tokens) < 0.1


def test_tokens_that_are_not_the_layers_are_named():
    with pytest.raises(ValueError, match="Fp8LatentAttention: latents must be"):
        quantise(LatentAttention(32, 8).eval(), "fp8")(torch.zeros(3, 32))
    read = quantise(GroupRead(32, 16, 8).eval(), "fp8")
    with pytest.raises(ValueError, match="Fp8GroupRead: the kv side's tokens must be"):
        read(torch.zeros(1, 1, 2, 32), torch.zeros(1, 1, 2, 32))
    with pytest.raises(ValueError, match="Fp8GroupRead: the q side's tokens must be"):
        read(torch.zeros(1, 1, 2, 32).double(), torch.zeros(1, 1, 2, 16))
