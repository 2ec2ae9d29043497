"""Recipes: which layers of a model multiply in which number format, as data; and `quantise`.

"fp8" takes the feed-forwards and the projections of latent attention, read and write: 95 % of the
operations of the 500M model and 97 % of the 3.9B; of the upsampler 87 %, as its read and write are
absorbed. The rest keeps the weights' dtype:

- stem, head and conditioning are under 1 % of the work, and no later layer mends what they round:
  pixels pass through the first two, sigma and the text through the third;
- the first block's conditioning read makes nearly all that is then in the latents: quantised too,
  it would add a third to the squared error that fp8 adds to the 500M model, the others of its
  kind add 0.4 % (`bench/fp8_error.py`);
- LayerNorms, biases, positions and the initial latents are vectors, each read once;
- the projections of read and write are folded into their attention where that is less work
  (`snapkernels/ops/group_attn`), in kernels of the weights' dtype;
- the cores of read and write multiply no weights. Nor does that of latent attention, which Triton
  computes in 8-bit integers (`snapkernels/ops/latent_attn`).
"""

from collections import Counter
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from snapkernels.modules import FeedForward, GroupRead, GroupWrite, LatentAttention
from snapkernels.modules_fp8 import (
    E4M3_BOUND,
    E4M3_ROWS,
    Fp8FeedForward,
    Fp8GroupRead,
    Fp8GroupWrite,
    Fp8LatentAttention,
    Fp8Module,
)

# {name in a recipe: (the class replaced, by which)}
QUANTISED: dict[str, tuple[type[nn.Module], type[Fp8Module]]] = {
    "FeedForward": (FeedForward, Fp8FeedForward),
    "LatentAttention": (LatentAttention, Fp8LatentAttention),
    "GroupRead": (GroupRead, Fp8GroupRead),
    "GroupWrite": (GroupWrite, Fp8GroupWrite),
}
AS_IT_IS = "the weights' dtype"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The number formats of a model's products, and the layers whose products have them.

    Attributes:
        name: what `quantise`, a checkpoint and the bench call it.
        weights: of the matrices of these layers.
        inputs: of what they multiply: tokens, after LayerNorm where there is one.
        hidden: of the hidden values of a feed-forward.
        layers: classes of modules, by name; every other module keeps the weights' dtype, and of
            these a read or write that absorbs.
        kept: patterns, as of `fnmatch`, of the names of such modules that keep it too.

    Raises:
        ValueError: a layer that has no quantised form, or has none of these formats.
    """

    name: str
    weights: str
    inputs: str
    hidden: str
    layers: tuple[str, ...]
    kept: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for layer in self.layers:
            if layer not in QUANTISED:
                known = ", ".join(QUANTISED)
                raise ValueError(f"recipe {self.name}: layers must be of {known}, got {layer!r}")
            for field, allowed in QUANTISED[layer][1].formats.items():
                if (got := getattr(self, field)) != allowed:
                    raise ValueError(
                        f"recipe {self.name}: {field} of {layer} must be {allowed!r}, got {got!r}"
                    )


RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe(name="bf16", weights=AS_IT_IS, inputs=AS_IT_IS, hidden=AS_IT_IS, layers=()),
        Recipe(
            name="fp8",
            weights=E4M3_ROWS,
            inputs=E4M3_ROWS,
            hidden=E4M3_BOUND,
            layers=("FeedForward", "LatentAttention", "GroupRead", "GroupWrite"),
            kept=("*blocks.0.cond_read",),
        ),
    )
}


def recipe_called(recipe: str | Recipe) -> Recipe:
    """`recipe`, or that of `RECIPES` with this name.

    Raises:
        ValueError: there is none.
    """
    if isinstance(recipe, Recipe):
        return recipe
    if recipe not in RECIPES:
        names = ", ".join(map(repr, RECIPES))
        raise ValueError(f"recipe must be one of {names}, or a Recipe, got {recipe!r}")
    return RECIPES[recipe]


def layers_taken(model: nn.Module, recipe: Recipe) -> list[str]:
    """Names of the layers of `model` that `recipe` quantises, "" for the model itself.

    A layer that has several names is there by each of them.

    Of its classes, a subclass is none of them, and not kept by a pattern. Not a `GroupRead` or
    `GroupWrite` of whose groups it knows that folding its projections is less work (`absorbs`):
    that is done in the weights' dtype.
    """
    replaced = {QUANTISED[layer][0] for layer in recipe.layers}
    return [
        name
        for name, module in model.named_modules(remove_duplicate=False)
        if type(module) in replaced
        and not getattr(module, "absorbs", False)
        and not any(fnmatchcase(name, kept) for kept in recipe.kept)
    ]


def quantise(model: nn.Module, recipe: str | Recipe) -> nn.Module:
    """Replace the layers of `model` that `recipe` names by their quantised forms, for inference.

    One layer at a time, each weight freed once its quantised form is there: a model that fills the
    memory need not fit twice. Scales are computed in float32. Nothing of the model has a gradient
    afterwards, and it cannot be trained: keep what it was made of. A recipe without layers leaves
    everything as it is. Hooks of a layer that is replaced go with it, and what torch.compile made
    of one keeps the weights that it had: quantise first.

    Args:
        model: in evaluation mode, on any device; weights of any floating dtype. Which layers are
            replaced, `layers_taken` says.
        recipe: "fp8", "bf16" or a `Recipe`, which the model, if it has layers, has as `recipe`.

    Returns:
        The model, or the quantised form of a model that is itself such a layer.

    Raises:
        ValueError: the recipe is unknown, or the model is quantised already, in training mode, or
            without such a layer.
    """
    recipe = recipe_called(recipe)
    if not recipe.layers:
        return model
    if any(isinstance(module, Fp8Module) for module in model.modules()):
        raise ValueError(f"quantise: the model is quantised already, to {recipe.name!r} or another")
    if any(module.training for module in model.modules()):
        raise ValueError("quantise: the model is in training mode: call eval() on it first")
    forms = dict(QUANTISED[layer] for layer in recipe.layers)
    names = layers_taken(model, recipe)
    if not names:
        raise ValueError(
            f"quantise: the model has no {' or '.join(recipe.layers)} that {recipe.name!r} takes"
        )
    if names[0] == "":
        model = forms[type(model)](model)
    else:
        times = Counter(model.get_submodule(name) for name in names)
        shared = {layer: forms[type(layer)](layer).eval() for layer in times if times[layer] > 1}
        del times
        for name in names:
            layer = model.get_submodule(name)
            model.set_submodule(name, shared.get(layer) or forms[type(layer)](layer).eval())
            del layer  # and with it its weights, before the next is quantised
    model.requires_grad_(False)
    for parameter in model.parameters():
        parameter.grad = None
    model.recipe = recipe  # type: ignore[assignment]
    return model.eval()
