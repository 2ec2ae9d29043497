"""Counted work of a FIT: the floor that measured times are held against.

Multiply-adds count as two operations; matrix products and attention only, as in the paper's graph.
"""

from snapkernels import Recipe
from snapvideo_core.config import FITConfig

# Training is the self-conditioning pass, the forward pass, and a backward pass of two forwards.
TRAIN_FORWARDS = 4
# The parts that layers of a class are, all of them; its recipe says which classes are quantised.
PARTS = {
    "FeedForward": ("cond read FF", "read FF", "global: FF", "write FF", "self-conditioning"),
    "LatentAttention": ("global: qkvo",),
}
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
        score_rows = inner // config.patch_head_dim * group_latents  # heads * latents of a group
        patch_side = 2 * linear(patches, score_rows, x)
        patch_side += 2 * linear(latents, inner, x)  # folding the two projections
    else:
        patch_side = 2 * linear(patches, x, inner) + attention(patches, group_latents, inner)
    exchange = patch_side + 2 * linear(latents, z, inner)

    block = {
        "cond read": 2 * linear(latents, z, cond_inner)
        + 2 * linear(cond, c, cond_inner)
        + attention(latents, cond, cond_inner),
        "cond read FF": ff(latents, z),
        "read": exchange,
        "read FF": ff(latents, z),
        "global: qkvo": config.global_layers * 4 * linear(latents, z, z),
        "global: attention": config.global_layers * attention(latents, latents, z),
        "global: FF": config.global_layers * ff(latents, z),
        "write": exchange,
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
    """TFLOP of one evaluation of one video in the layers that `recipe` quantises, keeping none."""
    parts = forward_flops(config)
    return sum(parts[part] for layer in recipe.layers for part in PARTS[layer]) / 1e12


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
