"""Counted work of a FIT: the floor that measured times are held against.

Multiply-adds count as two operations; matrix products and attention only, as in the paper's graph.
"""

from fnmatch import fnmatchcase

from snapkernels import Recipe
from snapvideo_core.config import FITConfig

# Training is the self-conditioning pass, the forward pass, and a backward pass of two forwards.
TRAIN_FORWARDS = 4
# {part: the class of its layers and their names}, by which a recipe says what is quantised.
LAYERS = {
    "cond read: qkvo": ("GroupRead", "blocks.{block}.cond_read"),
    "cond read FF": ("FeedForward", "blocks.{block}.cond_ff"),
    "read: qkvo": ("GroupRead", "blocks.{block}.read"),
    "read FF": ("FeedForward", "blocks.{block}.read_ff"),
    "global: qkvo": ("LatentAttention", "blocks.{block}.global_layers.{layer}.0"),
    "global: FF": ("FeedForward", "blocks.{block}.global_layers.{layer}.1"),
    "write: qkvo": ("GroupWrite", "blocks.{block}.write"),
    "write FF": ("FeedForward", "blocks.{block}.write_ff"),
    "self-conditioning": ("FeedForward", "self_conditioning.ff"),
}
ABSORBED = ("read: qkvo", "write: qkvo")  # where that is less work, and then in no recipe
SCALAR_TOKENS = 4  # sigma, framerate, height, width; an upsampler has the augmentation level too


def forward_flops(config: FITConfig, *, absorbed: bool = False) -> dict[str, int]:
    """Operations of one network evaluation of one video, by part.

    Args:
        config: the model; `config.text_length` text tokens are counted.
        absorbed: fold the patch side's projections of read and write into the latents, which is
            exact: with heads * latents of a group below the patch width it is less work.
    """
    patches = config.num_groups * config.group_tokens
    group_latents = config.num_latents // config.num_groups
    scalars = SCALAR_TOKENS + bool(config.low_res)
    cond = scalars + config.text_length
    x, z, c = config.patch_dim, config.latent_dim, config.cond_dim
    latents, ratio = config.num_latents, config.ff_ratio
    pixels = config.patch**2
    inner = min(x, z)
    cond_inner = min(c, z)

    def linear(rows: int, n_in: int, n_out: int) -> int:
        return 2 * rows * n_in * n_out

    def attention(queries: int, keys: int, width: int) -> int:
        return 2 * linear(queries, keys, width)

    def ff(rows: int, width: int) -> int:
        return 2 * linear(rows, width, ratio * width)

    if absorbed:
        projected = latents  # the two projections of the patch side are folded into them
        score_rows = inner // config.patch_head_dim * group_latents  # heads * latents of a group
        exchange = 2 * linear(patches, score_rows, x)
    else:
        projected = patches
        exchange = attention(patches, group_latents, inner)
    qkvo = 2 * linear(projected, x, inner) + 2 * linear(latents, z, inner)

    block = {
        "cond read: qkvo": 2 * linear(latents, z, cond_inner) + 2 * linear(cond, c, cond_inner),
        "cond read: attention": attention(latents, cond, cond_inner),
        "cond read FF": ff(latents, z),
        "read: qkvo": qkvo,
        "read: attention": exchange,
        "read FF": ff(latents, z),
        "global: qkvo": config.global_layers * 4 * linear(latents, z, z),
        "global: attention": config.global_layers * attention(latents, latents, z),
        "global: FF": config.global_layers * ff(latents, z),
        "write: qkvo": qkvo,
        "write: attention": exchange,
        "write FF": ff(patches, x),
    }
    parts = {name: config.blocks * flops for name, flops in block.items()}
    parts["stem"] = linear(patches, config.in_channels * pixels, x)
    parts["head"] = linear(patches, x, 3 * pixels)
    parts["self-conditioning"] = ff(latents, z)
    parts["conditioning"] = linear(config.text_length, config.text_dim, c) + scalars * (
        linear(1, c // 4, c) + linear(1, c, c)
    )
    return parts


def graph_tflop(config: FITConfig) -> float:
    """TFLOP of one evaluation of one video, as the paper's graph has it."""
    return sum(forward_flops(config).values()) / 1e12


def least_tflop(config: FITConfig) -> float:
    """TFLOP of one evaluation of one video by the cheaper of the two exact algorithms."""
    return min(sum(forward_flops(config, absorbed=a).values()) for a in (False, True)) / 1e12


def quantised_tflop(config: FITConfig, recipe: Recipe) -> float:
    """TFLOP of one evaluation of one video in the layers that `recipe` quantises."""
    parts, absorbed = forward_flops(config), least_tflop(config) < graph_tflop(config)
    blocks, layers = range(max(config.blocks, 1)), range(max(config.global_layers, 1))
    flops = 0.0
    for part, (kind, name) in LAYERS.items():
        if kind in recipe.layers and not (absorbed and part in ABSORBED):
            names = {name.format(block=block, layer=layer) for block in blocks for layer in layers}
            taken = [n for n in names if not any(fnmatchcase(n, kept) for kept in recipe.kept)]
            flops += parts[part] * len(taken) / len(names)
    return flops / 1e12


def floor_ms(
    config: FITConfig, recipe: Recipe, *, tflop_s: float, quantised_tflop_s: float
) -> float:
    """The least time of one evaluation of one video: each product at the rate of its format.

    Args:
        config, recipe: the model.
        tflop_s: rate of products in the weights' dtype.
        quantised_tflop_s: rate of those of the recipe's layers.
    """
    quantised = quantised_tflop(config, recipe)
    rest = least_tflop(config) - quantised
    return 1e3 * (quantised / quantised_tflop_s + rest / tflop_s)
