"""The paper's sizes: geometry, parameter counts, counted work."""

import math
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from snapkernels import (
    RECIPES,
    Fp8FeedForward,
    Fp8GroupRead,
    Fp8GroupWrite,
    Fp8LatentAttention,
    GroupRead,
    GroupWrite,
    quantise,
)
from snapkernels.modules_fp8 import Fp8Module
from snapvideo_core import FIT, PRESETS, Conditioning
from snapvideo_core.config import FIT_3_9B, FIT_3_9B_UP, FIT_500M, TINY, TINY_UP
from snapvideo_core.flops import (
    floor_ms,
    forward_flops,
    graph_tflop,
    least_tflop,
    quantised_tflop,
)


def meta_conditioning(config, batch=1):
    with torch.device("meta"):
        return Conditioning(
            framerate=torch.ones(batch),
            resolution=torch.ones(batch, 2),
            text=torch.ones(batch, config.text_length, config.text_dim),
            text_mask=torch.ones(batch, config.text_length, dtype=torch.bool),
            low_res=torch.ones(batch, 3, 16, *config.low_res) if config.low_res else None,
            augmentation=torch.ones(batch) if config.low_res else None,
        )


def parameters_m(config):
    with torch.device("meta"):
        return sum(p.numel() for p in FIT(config).parameters()) / 1e6


@pytest.mark.parametrize(
    ("config", "millions"),
    [
        (FIT_500M, 494.1),
        (FIT_3_9B, 3911.3),
        (FIT_3_9B_UP, 3917.1),
        (replace(FIT_3_9B_UP, positions="token"), 4063.4),
    ],
)
def test_parameter_counts(config, millions):
    assert round(parameters_m(config), 1) == millions


@pytest.mark.parametrize(
    ("config", "grid", "groups", "group_tokens"),
    [
        (FIT_500M, (16, 10, 16), 8, 320),
        (FIT_3_9B, (16, 10, 16), 8, 320),
        (FIT_3_9B_UP, (16, 72, 128), 32, 4608),
    ],
)
def test_table_8_geometry(config, grid, groups, group_tokens):
    assert (config.grid, config.num_groups, config.group_tokens) == (grid, groups, group_tokens)
    assert config.padded_height == {36: 40, 288: 288}[config.height]


@pytest.mark.parametrize("config", [FIT_500M, FIT_3_9B, FIT_3_9B_UP], ids=lambda c: c.name)
def test_table_8_and_section_3_5_constants(config):
    assert (config.frames, config.patch, config.blocks, config.global_layers) == (16, 4, 6, 4)
    assert (config.dropout, config.label_dropout, config.self_conditioning) == (0.1, 0.1, 0.9)
    scale = config.width / 64
    assert config.sigma_in == scale * math.sqrt(config.frames) == {64: 4.0, 512: 32.0}[config.width]
    assert config.low_res == ((36, 64) if scale == 8 else None)


def test_heads_of_table_8():
    for config, patch_heads, latent_heads in [(FIT_500M, 16, 16), (FIT_3_9B_UP, 16, 24)]:
        with torch.device("meta"):
            block = FIT(replace(config, blocks=1)).blocks[0]
        assert block.read.num_heads == block.write.num_heads == patch_heads
        assert block.cond_read.num_heads == patch_heads
        assert block.global_layers[0][0].num_heads == latent_heads


@pytest.mark.parametrize("config", [FIT_500M, FIT_3_9B, FIT_3_9B_UP], ids=lambda c: c.name)
def test_counted_work_is_what_the_model_does(config):
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        video = torch.ones(1, 3, config.frames, config.height, config.width)
        FIT(config)(video, torch.ones(1), meta_conditioning(config))
    assert sum(forward_flops(config).values()) == counter.get_total_flops()


def test_work_in_tflop():
    for config, graph, least in [
        (FIT_500M, 0.703, 0.703),
        (FIT_3_9B, 6.435, 6.435),
        (FIT_3_9B_UP, 28.52, 23.75),
    ]:
        assert graph_tflop(config) == pytest.approx(graph, rel=1e-3)
        assert least_tflop(config) == pytest.approx(least, rel=1e-3)


@pytest.mark.parametrize("config", PRESETS.values(), ids=lambda c: c.name)
def test_presets_are_found_by_name(config):
    assert PRESETS[config.name] is config


@pytest.mark.parametrize(
    ("config", "change", "message"),
    [
        (TINY, {"width": 36}, r"group must be a divisor of the token grid \(4, 5, 9\)"),
        (TINY, {"width": 34}, "width must be divisible by patch = 4, got 34"),
        (TINY, {"frames": 6}, r"group must be a divisor of the token grid \(6, 5, 8\)"),
        (TINY, {"num_latents": 9}, "num_latents must be divisible by the 2 groups, got 9"),
        (TINY, {"cond_dim": 20}, "cond_dim must be divisible by 8, got 20"),
        (TINY, {"positions": "rows"}, "positions must be"),
        (TINY, {"patch": 0}, "patch must be an int of at least 1, got 0"),
        (TINY, {"height": -4}, "height must be an int of at least 1, got -4"),
        (TINY, {"frames": 4.0}, "frames must be an int of at least 1, got 4.0"),
        (TINY, {"blocks": -1}, "blocks must be an int of at least 0, got -1"),
        (TINY, {"group": (4, 5)}, r"group must be 3 positive ints, got \(4, 5\)"),
        (TINY, {"group": (0, 5, 4)}, "group must be 3 positive ints"),
        (TINY, {"patch_head_dim": 7}, "patch_head_dim must be a divisor of the inner width 24"),
        (TINY, {"latent_head_dim": 7}, "latent_head_dim must be a divisor of latent_dim = 32"),
        (TINY, {"dropout": 1.5}, "dropout must be a probability, got 1.5"),
        (TINY, {"self_conditioning": -1}, "self_conditioning must be a probability, got -1"),
        (TINY, {"sigma_in": 0.0}, "sigma_in must be above 0, got 0.0"),
        (TINY_UP, {"low_res": (7, 32)}, r"low_res must be a divisor of \(36, 64\)"),
        (TINY_UP, {"low_res": (0, 32)}, "low_res must be 2 positive ints"),
    ],
)
def test_sizes_that_do_not_fit_are_named(config, change, message):
    with pytest.raises(ValueError, match=f"^tiny.*: {message}"):
        replace(config, **change)


def quantised_on_meta(config, recipe):
    with torch.device("meta"):
        return quantise(FIT(config).eval(), recipe)


@pytest.mark.parametrize("config", PRESETS.values(), ids=lambda c: c.name)
def test_a_read_or_write_is_quantised_where_it_is_not_absorbed(config):
    """16 heads by 24 latents of a group are fewer than 1024 columns; by 64 or 96 they are not."""
    absorbed = config.name not in ("500m", "3.9b")
    assert absorbed == (least_tflop(config) < graph_tflop(config))
    for number, block in enumerate(quantised_on_meta(config, "fp8").blocks):
        assert isinstance(block.read, GroupRead if absorbed else Fp8GroupRead)
        assert isinstance(block.write, GroupWrite if absorbed else Fp8GroupWrite)
        assert isinstance(block.cond_read, Fp8GroupRead if number else GroupRead)
        assert isinstance(block.read_ff, Fp8FeedForward)
        assert isinstance(block.global_layers[0][0], Fp8LatentAttention)


@pytest.mark.parametrize("config", PRESETS.values(), ids=lambda c: c.name)
@pytest.mark.parametrize(
    "change",
    [
        {},
        {"kept": ()},
        {"layers": ("FeedForward",)},
        {"layers": ("LatentAttention",), "kept": ("blocks.1.*",)},
        {"layers": ("FeedForward", "GroupRead"), "kept": ("self*", "blocks.0.cond_*")},
    ],
    ids=str,
)
def test_quantised_work_is_what_the_layers_of_the_recipe_do(config, change):
    """Counted matrix by matrix of the quantised model."""
    recipe = replace(RECIPES["fp8"], **change)
    latents, patches = config.num_latents, config.num_groups * config.group_tokens
    cond = meta_conditioning(config).text.shape[1] + (5 if config.low_res else 4)
    tokens = {"write_ff": (patches,) * 2, "write": (patches, latents)}  # updated, and read
    tokens |= {"read": (latents, patches), "cond_read": (latents, cond)}
    work = 0
    for name, module in quantised_on_meta(config, recipe).named_modules():
        if isinstance(module, Fp8Module):
            updated, read = tokens.get(name.rpartition(".")[2], (latents, latents))
            for buffer, weight in module.named_buffers():
                if weight.dtype == torch.float8_e4m3fn:
                    rows = read if buffer == "kv_weight" else updated
                    work += 2 * rows * weight.numel()
    assert quantised_tflop(config, recipe) == pytest.approx(work / 1e12, rel=1e-12)


def test_the_share_of_the_work_that_is_quantised():
    for config, percent in [(FIT_500M, 94.9), (FIT_3_9B, 96.9), (FIT_3_9B_UP, 86.7)]:
        share = 100 * quantised_tflop(config, RECIPES["fp8"]) / least_tflop(config)
        assert share == pytest.approx(percent, abs=0.05)


def test_the_floor_is_each_product_at_the_rate_of_its_format():
    rates = {"tflop_s": 709.0, "quantised_tflop_s": 1311.0}
    floors = [(FIT_500M, 0.99, 0.559), (FIT_3_9B, 9.08, 5.04), (FIT_3_9B_UP, 33.5, 20.2)]
    for config, bf16, fp8 in floors:
        assert floor_ms(config, RECIPES["bf16"], **rates) == pytest.approx(bf16, rel=1e-2)
        assert floor_ms(config, RECIPES["fp8"], **rates) == pytest.approx(fp8, rel=1e-2)
