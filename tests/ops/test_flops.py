"""The paper-tier cases have the model's sizes, and their specs count its work."""

import pytest
import torch

import snapkernels  # noqa: F401  (enters the ops)
from snapkernels.registry import op
from snapkernels.testing.cases import make_values
from snapvideo_core.config import PRESETS
from snapvideo_core.flops import forward_flops

READ, WRITE = (
    tuple(f"{way}: {part}" for part in ("qkvo", "attention")) for way in ("read", "write")
)
READ_FF, WRITE_FF = ("read FF",), ("write FF",)
GLOBAL = ("global: qkvo", "global: attention")


@pytest.mark.parametrize(
    ("name", "case", "preset", "batch", "parts"),
    [
        ("group_read", "up", "3.9b-up", 1, READ),
        ("group_read", "3.9b-b16", "3.9b", 16, READ),
        ("group_read", "500m-b64", "500m", 64, READ),
        ("group_write", "up", "3.9b-up", 1, WRITE),
        ("group_write", "3.9b-b16", "3.9b", 16, WRITE),
        ("group_write", "500m-b64", "500m", 64, WRITE),
        *(
            (name, *case)
            for name in ("latent_attention", "latent_attention_fp8")
            for case in (
                ("3.9b", "3.9b", 16, GLOBAL),
                ("up", "3.9b-up", 1, GLOBAL),
                ("500m-b64", "500m", 64, GLOBAL),
            )
        ),
        *(
            (name, *case)
            for name in ("feed_forward", "feed_forward_fp8")
            for case in (
                ("patch-up", "3.9b-up", 1, WRITE_FF),
                ("3.9b", "3.9b", 16, READ_FF),
                ("3.9b-b1", "3.9b", 1, READ_FF),
                ("500m-b64", "500m", 64, READ_FF),
                ("500m-patch-b64", "500m", 64, WRITE_FF),
            )
        ),
    ],
)
def test_a_case_is_that_part_of_the_model(name, case, preset, batch, parts):
    spec, config = op(name).spec, PRESETS[preset]
    (found,) = [one for one in spec.cases if one.name == case]
    sizes = spec.check(*make_values(spec, found, torch.bfloat16, "meta"))
    layers = config.blocks * (config.global_layers if parts is GLOBAL else 1)
    counted = forward_flops(config)
    assert layers * spec.flops(sizes) == batch * sum(counted[part] for part in parts)
    if heads := found.options.get("num_heads"):
        head_dim = config.latent_head_dim if parts is GLOBAL else config.patch_head_dim
        assert sizes["I"] == heads * head_dim


@pytest.mark.parametrize("name", ["linear", "linear_fp8"])
@pytest.mark.parametrize(
    ("case", "preset", "batch"),
    [("3.9b", "3.9b", 16), ("3.9b-b1", "3.9b", 1), ("500m-b64", "500m", 64)],
)
def test_linear_cases_are_the_projections_of_a_global_layer(name, case, preset, batch):
    spec, config = op(name).spec, PRESETS[preset]
    found = {one.name: one for one in spec.cases}
    work = 0
    for part in ("qkv", "out"):
        values = make_values(spec, found[f"{part}-{case}"], torch.bfloat16, "meta")
        work += spec.flops(spec.check(*values))
    layers = config.blocks * config.global_layers
    assert layers * work == batch * forward_flops(config)["global: qkvo"]
