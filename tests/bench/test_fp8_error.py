"""The error of fp8 by kind of layer: every layer is of one kind, and rows say which dominates."""

from dataclasses import replace
from fnmatch import fnmatchcase

import fp8_error
import pytest
import torch
from fp8_error import FP8, KINDS, RECIPES_OF

from snapkernels import (
    FeedForward,
    Fp8FeedForward,
    Fp8GroupRead,
    GroupRead,
    LatentAttention,
    quantise,
)
from snapkernels.modules_fp8 import Fp8Module
from snapkernels.testing import record
from snapvideo_core import FIT, PRESETS
from snapvideo_core.config import TINY


def test_every_quantised_layer_is_of_one_kind():
    for config in PRESETS.values():
        with torch.device("meta"):
            model = FIT(config).eval()
        found = dict.fromkeys(KINDS, 0)
        for name, module in quantise(model, FP8).named_modules():
            if isinstance(module, Fp8Module):
                (kind,) = (kind for kind, names in KINDS.items() if fnmatchcase(name, names))
                found[kind] += 1
        layers = config.blocks * config.global_layers
        projected = config.blocks * (config.name in ("500m", "3.9b"))
        assert found == {
            "self_conditioning_ff": 1,
            "first_cond_read": 0,
            "cond_read": config.blocks - 1,
            "cond_ff": config.blocks,
            "read": projected,
            "read_ff": config.blocks,
            "latent_attention": layers,
            "global_ff": layers,
            "write": projected,
            "write_ff": config.blocks,
        }


def test_a_kind_is_quantised_alone():
    model = quantise(FIT(TINY).eval(), RECIPES_OF["write_ff"])
    assert isinstance(model.blocks[1].write_ff, Fp8FeedForward)
    assert isinstance(model.blocks[1].read_ff, FeedForward)
    assert isinstance(model.blocks[1].global_layers[0][0], LatentAttention)


def test_what_the_recipe_keeps_is_a_kind_of_its_own_too():
    model = quantise(FIT(TINY).eval(), RECIPES_OF["first_cond_read"])
    assert isinstance(model.blocks[0].cond_read, Fp8GroupRead)
    assert isinstance(model.blocks[1].cond_read, GroupRead)
    assert not any(isinstance(m, Fp8FeedForward) for m in model.modules())


def test_rows_name_each_kinds_share():
    errors = {"none": 1e-2, **dict.fromkeys(KINDS, 2e-2), "write_ff": 4e-2, "all": 5e-2}
    rows = {row["case"].rpartition("/")[2]: row for row in fp8_error.rows_of(TINY, errors)}
    assert list(rows) == list(RECIPES_OF)
    assert rows["write_ff"]["share"] == pytest.approx(15 / 24, rel=1e-3)
    assert rows["read_ff"]["share"] == pytest.approx(3 / 24, rel=1e-3)
    assert "share" not in rows["none"] and "share" not in rows["all"]
    assert (rows["none"]["variant"], rows["all"]["variant"]) == ("ours-bf16", "ours-fp8")
    (bad,) = [
        r for r in fp8_error.rows_of(TINY, errors | {"cond_ff": float("inf")}) if "value" not in r
    ]
    assert bad["gate"] == "the output is not finite"


def test_a_run_gives_a_record(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(fp8_error, "measure_ceilings", lambda *_: {"bf16_tflop_s": 0.5})
    target = tmp_path / "error.json"
    assert fp8_error.main(["--preset", "tiny", "--json", str(target)]) == 0
    written = record.json.loads(target.read_text())
    assert record.problems(written) == []
    assert written["command"] == "python bench/fp8_error.py --preset tiny"
    values = {row["case"]: row["value"] for row in written["rows"]}
    absorbed = {f"model/tiny/fp8_error/{kind}" for kind in ("read", "write")}
    assert values.keys() == {f"model/tiny/fp8_error/{kind}" for kind in RECIPES_OF} - absorbed
    assert values["model/tiny/fp8_error/none"] < values["model/tiny/fp8_error/write_ff"]
    assert values["model/tiny/fp8_error/write_ff"] < values["model/tiny/fp8_error/all"] < 0.1
    assert "model/tiny/fp8_error/write_ff: " in capsys.readouterr().out


def test_what_is_not_quantised_is_off_by_the_dtype_alone():
    """And what is, by more."""
    config = replace(TINY, name="mine")
    errors = dict(fp8_error.measured(config, torch.device("cpu")))
    assert errors["none"] < 1.5e-2 < errors["all"]
