"""The throughput bench's other rows: U-Nets, peers, and figures that are refused."""

import contextlib

import fit_subject
import pytest
import throughput
import torch
import unet_subject
from subject import Variant
from unet_subject import UNetSubject

from snapkernels.testing import load
from snapkernels.testing.load import Load
from snapkernels.testing.timing import Timing


def test_a_unet_has_a_row_of_each_mode_and_eager_stands_for_ours(rows):
    found = rows("--preset", "unet-tiny", "--backend", "ours", "reference")
    cases = [(row["case"], row["variant"], row["gate"]) for row in found]
    modes = ("infer", "train")
    assert cases == [(f"model/unet-tiny/{mode}", "eager-fp32", "ok") for mode in modes]
    infer, train = found
    assert train["floor"] == pytest.approx(3 * infer["floor"], rel=1e-3)
    assert infer["includes"].endswith(("; contiguous", "; channels last"))


def test_the_unets_format_is_the_faster_one(rows, monkeypatch):
    times = iter([Timing(2.0, 2.0, 2.0), Timing(1.0, 1.0, 1.0)])
    monkeypatch.setattr(unet_subject, "measure", lambda *_, **__: next(times))
    seen = []
    whole = UNetSubject.inference
    monkeypatch.setattr(
        UNetSubject, "inference", lambda self, batch: seen.append(self) or whole(self, batch)
    )
    (row,) = rows("--preset", "unet-tiny", "--backend", "eager", "--mode", "infer")
    assert row["includes"].endswith("; channels last")
    weights = [one for one in seen[0].module.parameters() if one.dim() == 4 and one.shape[-1] > 1]
    assert all(one.is_contiguous(memory_format=torch.channels_last) for one in weights)


def test_a_wrong_unet_has_no_figure(rows, monkeypatch):
    monkeypatch.setattr(unet_subject, "unet_reference", lambda model: lambda x, *_: x + 1)
    found = rows("--preset", "unet-tiny", "--backend", "eager", code=1)
    assert all(row["gate"].startswith("relative rms error") for row in found)


def test_an_absent_peer_is_a_row_with_its_reason_and_not_a_red_gate_of_ours(rows):
    found = rows("--recipe", "fp8", "--backend", "ours", "te", "--mode", "infer")
    ours, peer = found
    assert ours["gate"] == "ok" and "peer" not in ours
    assert peer["variant"] == "te-fp8" and peer["peer"] is True and "value" not in peer
    assert peer["gate"].startswith("NotImplementedError: Transformer Engine is absent")


def test_a_peer_that_fails_while_it_is_timed_does_not_lose_the_other_rows(rows, monkeypatch):
    monkeypatch.setattr(fit_subject, "require_peer", lambda name: None)
    monkeypatch.setattr(fit_subject, "by_peer", lambda *_, **__: None)

    def fails(model, data):
        raise RuntimeError("no kernel\nfor it")

    monkeypatch.setattr(fit_subject, "training_step", fails)
    found = rows("--backend", "xformers")
    assert [row["gate"] for row in found] == ["ok", "RuntimeError: no kernel"]
    assert "value" not in found[1]


def test_a_row_of_a_gpu_that_was_slowed_down_has_no_figure(rows, monkeypatch):
    def watched(self):
        window = load.Window()
        window.slowdowns.add("hardware slowdown")
        return contextlib.nullcontext(window)

    monkeypatch.setattr(Load, "watched", watched)
    found = rows(code=1)
    assert {row["gate"] for row in found} == {"the GPU was slowed down: hardware slowdown"}
    assert all("value" not in row for row in found)


def test_the_clock_under_a_fixed_load_and_the_rows_own_are_in_the_row(rows, monkeypatch):
    def watched(self):
        window = load.Window()
        window.samples += [{"sm_clock_mhz": clock, "power_w": 600.0} for clock in (1500, 1510, 99)]
        return contextlib.nullcontext(window)

    monkeypatch.setattr(Load, "watched", watched)
    monkeypatch.setattr(Load, "probe", lambda self: 755.0)
    row, _ = rows()
    assert (row["probe_tflop_s"], row["sm_clock_mhz"], row["power_w"]) == (755.0, 1500, 600.0)


def test_a_shared_gpu_is_refused_before_anything_is_timed(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(Load, "shared", lambda self: "the GPU is shared: others hold 9.0 GiB of it")
    monkeypatch.setattr(throughput, "measure_ceilings", lambda *_: pytest.fail("it was measured"))
    assert throughput.main(["--preset", "tiny"]) == 2
    assert "error: the GPU is shared: others hold 9.0 GiB" in capsys.readouterr().err


def test_a_peer_has_one_recipe_whatever_is_asked_for():
    args = throughput._parse(
        ["--recipe", "bf16", "fp8", "--backend", "ours", "torchao", "xformers"]
    )
    variants = throughput.variants_of("3.9b", args, on_gpu=True)
    names = [variant.name(torch.bfloat16) for variant in variants]
    assert names == ["ours-bf16", "torchao-fp8", "xformers-bf16", "ours-fp8"]


def test_by_default_a_gpu_runs_all_of_table_2_beside_every_peer():
    args = throughput._parse([])
    for name in ("500m", "3.9b", "3.9b-up"):
        variants = throughput.variants_of(name, args, on_gpu=True)
        names = {variant.name(torch.bfloat16) for variant in variants}
        assert {"ours-bf16", "ours-fp8", "eager-bf16", "compile-bf16", "compile-fp8"} <= names
        assert {"torchao-fp8", "flash-attn-bf16", "xformers-bf16", "te-fp8"} <= names
    variants = throughput.variants_of("unet-284m", args, on_gpu=True)
    assert [variant.name(torch.bfloat16) for variant in variants] == ["eager-bf16", "compile-bf16"]
    assert set(throughput.GPU_BATCHES) == {"unet-85m", "unet-284m", "500m", "3.9b", "3.9b-up"}
    by_batch = [throughput.batches_of(Variant(one), [16, 64]) for one in ("ours", "compile")]
    assert by_batch == [[16, 64], [64]]
