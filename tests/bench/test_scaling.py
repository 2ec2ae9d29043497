"""The scaling bench at small sizes on the CPU: rows, gates, the fit, the record, the figure."""

import json
import sys
import types

import pytest
import scaling
import torch

from snapkernels.registry import OPS
from snapkernels.testing import record

CPU = torch.device("cpu")
SMALL = scaling.Widths(latent_dim=24, patch_dim=16, num_heads=2, group=12, latents=3)
CEILINGS = {"copy_tb_s": 0.01, "fp32_tflop_s": 0.1}


def rows_of(name, tokens):
    return scaling.bench_tokens(OPS[name], tokens, SMALL, CPU, torch.float32, CEILINGS)


@pytest.mark.parametrize(
    ("tokens", "groups", "name"),
    [
        (1024, 1, "tokens-1k"),
        (4608, 1, "tokens-5k"),
        (9216, 2, "tokens-9k"),
        (147456, 32, "tokens-147k"),
        (1048576, 256, "tokens-1m"),
    ],
)
def test_tokens_lie_in_equal_groups_no_larger_than_the_upsamplers(tokens, groups, name):
    read, write = (
        scaling.case_of(OPS[layer], tokens, scaling.UPSAMPLER) for layer in scaling.LAYERS
    )
    assert read.name == write.name == name
    assert read.sizes == {
        "B": 1,
        "G": groups,
        "L": 24,
        "N": tokens // groups,
        "D": 3072,
        "C": 1024,
        "I": 1024,
    }
    assert write.sizes == read.sizes | {"D": 1024, "C": 3072}
    assert len({scaling.case_of(OPS["group_read"], t, SMALL).name for t in scaling.TOKENS}) == 11


def test_a_shared_gpu_is_refused_before_anything_is_measured(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(scaling.Load, "shared", lambda _: "the GPU is shared")
    monkeypatch.setattr(scaling, "measure_ceilings", lambda *_: pytest.fail("it was measured"))
    assert scaling.main([]) == 2
    assert capsys.readouterr().err.startswith("error: the GPU is shared")


def test_a_row_is_gated_timed_and_named(monkeypatch):
    (row,) = rows_of("group_write", 1200)  # here eager is chosen
    assert row["case"] == "layer/group_write/tokens-1k/fwd" and row["variant"] == "eager-fp32"
    assert row["gate"] == "ok" and row["chosen"] and row["tokens"] == 1200
    assert 0 < row["p20"] <= row["value"] <= row["p80"] and "peak_gib" not in row
    assert "of floor" in scaling.line(row)
    reference = OPS["group_read"].spec.backend("reference")
    monkeypatch.setattr(scaling, "choose", lambda *_: reference)
    rows = rows_of("group_read", 24)
    assert [row["variant"] for row in rows] == ["reference-fp32", "eager-fp32"]
    assert [row["chosen"] for row in rows] == [True, False]


@pytest.mark.parametrize("wrong_group", [0, 2, 3])
def test_a_wrong_group_is_seen(wrong_group, monkeypatch):
    def call(op, values, backend):
        result = honest(op, values, backend)
        result[:, wrong_group] *= 1.01
        return result

    honest = scaling.call
    monkeypatch.setattr(scaling, "call", call)
    (row,) = rows_of("group_read", 48)
    assert row["gate"].startswith("WrongError: relative rms error") and "value" not in row
    assert "no figure: WrongError: relative rms error" in scaling.line(row)


@pytest.mark.parametrize("where", ["make_values", "call", "interleaved"])
def test_out_of_memory_is_a_row_without_a_value(where, monkeypatch):
    def exhausted(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    if where == "interleaved":
        reason = "OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB"
        monkeypatch.setattr(scaling, where, lambda *_: ({}, {"eager": reason}))
    else:
        monkeypatch.setattr(scaling, where, exhausted)
    (row,) = rows_of("group_read", 24)
    assert row["gate"] == "out of memory" and "value" not in row
    assert row["variant"] == "eager-fp32"


def points(variant, chosen, times, **more):
    return [
        {"case": "layer/group_write/x/fwd", "variant": variant, "chosen": chosen, "gate": "ok"}
        | {"tokens": tokens, "value": value}
        | more
        for tokens, value in times.items()
    ]


def test_the_exponent_is_of_the_large_counts_of_each_series():
    rows = points("cuda-bf16", True, {1024: 5.0, 147456: 1.0, 589824: 4.0})
    rows += points("eager-bf16", False, {147456: 1.0, 294912: 4.0})
    rows += points("triton-bf16", True, {1048576: 9.0}, gate="out of memory")
    assert scaling.exponents(rows) == {"group_write chosen": 1.0, "group_write eager-bf16": 2.0}
    assert scaling.exponents(points("eager-bf16", False, {147456: 1.0})) == {}


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(scaling, "TOKENS", (12, 1200, 9000))
    monkeypatch.setattr(scaling, "UPSAMPLER", SMALL)
    monkeypatch.setattr(scaling, "FITTED_FROM", 12)
    monkeypatch.setattr(scaling, "measure_ceilings", lambda *_: CEILINGS)


def test_the_command_writes_a_record(small, tmp_path, capsys):
    target = tmp_path / "rows.json"
    assert scaling.main(["--json", str(target)]) == 0
    written = json.loads(target.read_text())
    assert record.problems(written) == []
    assert [row["case"] for row in written["rows"]] == [
        f"layer/{layer}/tokens-{count}/fwd" for layer in scaling.LAYERS for count in ("0k", "1k")
    ]
    assert set(written["exponents"]) == {"group_read chosen", "group_write chosen"}
    assert "group_read chosen: time grows as tokens^" in capsys.readouterr().out


@pytest.mark.parametrize("flag", ["--json", "--figure"])
def test_a_folder_that_is_not_there_is_refused_before_anything_is_timed(flag, capsys):
    with pytest.raises(SystemExit):
        scaling.main([flag, "no/such/folder/file"])
    assert "it must be a file in a folder that exists" in capsys.readouterr().err


def test_a_figure_needs_matplotlib(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(scaling, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        scaling.main(["--figure", str(tmp_path / "rows.png")])
    assert "--figure needs the package matplotlib: pip install" in capsys.readouterr().err


def test_a_figure_has_a_line_a_series(tmp_path, monkeypatch):
    """matplotlib need not be here: what is asked of it is kept."""
    plotted, saved = [], []
    axis = types.SimpleNamespace(
        plot=lambda x, y, marker, label: plotted.append((label, x, y)),
        set=lambda **_: None,
        grid=lambda *_, **__: None,
        legend=lambda: None,
    )
    figure = types.SimpleNamespace(
        tight_layout=lambda: None, savefig=lambda path, dpi: saved.append(path)
    )
    pyplot = types.SimpleNamespace(
        subplots=lambda rows, columns, **_: (figure, [[axis] * columns]), close=lambda figure: None
    )
    fake = types.ModuleType("matplotlib")
    fake.use, fake.pyplot = lambda name: None, pyplot
    monkeypatch.setitem(sys.modules, "matplotlib", fake)
    rows = points("cuda-bf16", True, {1024: 1.0, 4608: 2.0}, peak_gib=0.5)
    rows += points("eager-bf16", False, {1024: 3.0}, peak_gib=0.7)
    scaling.draw(rows, tmp_path / "rows.png")
    assert plotted == [
        ("group_write chosen", [1024, 4608], [1.0, 2.0]),
        ("group_write eager-bf16", [1024], [3.0]),
        ("group_write chosen", [1024, 4608], [0.5, 0.5]),
        ("group_write eager-bf16", [1024], [0.7]),
    ]
    assert saved == [tmp_path / "rows.png"]
