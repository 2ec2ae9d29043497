"""The throughput bench's other rows: U-Nets, peers, and figures that are refused."""

import contextlib
import gc
import weakref

import fit_subject
import pytest
import throughput
import torch
import unet_subject
from subject import CAPTURED, Variant
from unet import UNETS
from unet_subject import UNetSubject
from workload import build_model

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


def are_last(model):
    weights = [one for one in model.parameters() if one.dim() == 4 and one.shape[-1] > 1]
    return {one.is_contiguous(memory_format=torch.channels_last) for one in weights}


def test_the_unets_format_is_the_faster_one_of_each_mode(rows, monkeypatch):
    """Of four trials, two a mode: inference is faster contiguous, training channels-last."""
    tried, timed = [], []

    def measure(call, *_, **__):
        call()
        model = call.args[0]
        tried.append((model.training, are_last(model)))
        ms = 1.0 if tried[-1] in ((False, {False}), (True, {True})) else 2.0
        return Timing(ms, ms, ms)

    def time_case(subject, batch, mode, options):
        (subject.training_step if mode == "train" else subject.inference)(batch)()
        timed.append((mode, are_last(subject.module)))
        return {"gate": "seen", "includes": subject.includes(mode)}

    monkeypatch.setattr(unet_subject, "measure", measure)
    monkeypatch.setattr(throughput, "time_case", time_case)
    found = rows("--preset", "unet-tiny", "--backend", "eager", code=1)
    assert tried == [(t, {last}) for t in (False, True) for last in (False, True)]
    assert timed == [("infer", {False}), ("train", {True})]
    assert [row["includes"].rsplit("; ", 1)[1] for row in found] == ["contiguous", "channels last"]


def test_what_is_not_timed_is_not_tried(rows, monkeypatch):
    """A step of training may not fit where an evaluation does."""
    monkeypatch.setattr(unet_subject, "step", lambda *_: pytest.fail("it was trained"))
    (row,) = rows("--preset", "unet-tiny", "--backend", "eager", "--mode", "infer")
    assert row["gate"] == "ok"


def test_a_peak_has_nothing_of_the_trials(monkeypatch, cpu_options):
    order = []
    for name in ("empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda name=name: order.append(name))
    monkeypatch.setattr(
        unet_subject, "measure", lambda *_, **__: order.append("trial") or Timing(1.0, 1.0, 1.0)
    )
    monkeypatch.setattr(UNetSubject, "_batch", lambda self, videos: None)
    subject = UNetSubject(UNETS["unet-tiny"], Variant("eager"), cpu_options(), 1)
    subject.options = cpu_options(device=torch.device("cuda"))
    subject.training_step(1)
    assert order == ["trial", "trial", "empty_cache", "reset_peak_memory_stats"]


def test_a_captured_unet_keeps_what_its_graph_reads_and_is_gated(monkeypatch, cpu_options):
    """With a graph that is played: it holds nothing itself, as a graph does."""
    held = []

    def recorded(evaluate, device, name):
        outputs, known = evaluate(), weakref.ref(evaluate)
        held.append((known, [weakref.ref(one) for one in outputs]))
        return lambda: known()(), outputs

    monkeypatch.setattr(unet_subject, "recorded", recorded)
    options = cpu_options(capture=True)
    subject = UNetSubject(UNETS["unet-tiny"], Variant("eager"), options, 2)
    assert subject.gated()[0] == "ok" and len(held) == 1
    call = subject.inference(2)
    gc.collect()
    evaluate, outputs = held[-1]
    assert evaluate() is not None and all(one() is not None for one in outputs)
    assert call()[0] is outputs[0]()
    assert subject.includes("infer").endswith(CAPTURED)


def test_a_wrong_unet_has_no_figure(rows, monkeypatch):
    monkeypatch.setattr(unet_subject, "unet_reference", lambda model: lambda x, *_: x + 1)
    found = rows("--preset", "unet-tiny", "--backend", "eager", code=1)
    assert all(row["gate"].startswith("relative rms error") for row in found)


def test_an_absent_peer_is_a_row_with_its_reason_and_not_a_red_gate_of_ours(rows):
    found = rows("--recipe", "fp8", "--backend", "ours", "te", "--mode", "infer")
    ours, peer = found
    assert ours["gate"] == "ok" and "peer" not in ours
    assert peer["variant"] == "te-fp8" and peer["peer"] is peer["absent"] is True
    assert "value" not in peer
    assert peer["gate"].startswith("NotImplementedError: Transformer Engine is absent")


def test_a_peer_that_fails_while_it_is_timed_does_not_lose_the_other_rows(rows, monkeypatch):
    monkeypatch.setattr(fit_subject, "require_peer", lambda name: None)
    monkeypatch.setattr(fit_subject, "by_peer", lambda *_, **__: None)

    def fails(model, data):
        raise RuntimeError("no kernel\nfor it")

    monkeypatch.setattr(fit_subject, "training_step", fails)
    found = rows("--backend", "xformers")
    assert [row["gate"] for row in found] == ["ok", "RuntimeError: no kernel"]
    assert "value" not in found[1] and "absent" not in found[1]


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


def test_a_baseline_that_fails_is_a_red_row_and_ours_an_error(rows, monkeypatch):
    def fails(*_):
        raise RuntimeError("Inductor has a bug")

    with monkeypatch.context() as compiling:
        compiling.setattr(fit_subject, "compile_by_block", fails)
        found = rows("--backend", "compile", "ours", "--mode", "infer", code=1)
    assert [row["gate"] for row in found] == ["RuntimeError: Inductor has a bug", "ok"]
    assert "peer" not in found[0] and "absent" not in found[0]
    monkeypatch.setattr(fit_subject, "judged", fails)
    with pytest.raises(RuntimeError, match="Inductor"):
        rows("--backend", "ours")


def test_nothing_of_a_model_is_left_when_the_next_is_built(rows, monkeypatch):
    """What is compiled refers to itself, and would wait for the collector."""
    alive, models = [], []

    def build(*arguments):
        alive.append([one() is not None for one in models])
        model = build_model(*arguments)
        models.append(weakref.ref(model))
        model.itself = lambda: model
        return model

    monkeypatch.setattr(fit_subject, "build_model", build)
    gc.disable()
    try:
        rows("--backend", "ours", "eager", "reference", "--mode", "infer")
    finally:
        gc.enable()
    assert alive == [[], [False], [False, False]]


def test_the_peak_of_a_case_has_all_that_it_holds(monkeypatch, cpu_options):
    """The graph of the gate goes before the peak is reset, and is made anew after it."""
    order = []

    class Subject:
        config, module = UNETS["unet-tiny"], torch.nn.Linear(1, 1)

        def release(self):
            order.append("release")

        def inference(self, batch):
            order.append("capture")
            return lambda: None

        def includes(self, mode):
            return "nothing"

        def floor_ms(self, mode):
            return 1.0

        def tflop(self, mode):
            return 1.0

    for name in ("empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda name=name: order.append(name))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 2**30)
    monkeypatch.setattr(throughput, "measure", lambda *_, **__: Timing(1.0, 1.0, 1.0))
    options = cpu_options(device=torch.device("cuda"), capture=True)
    row = throughput.time_case(Subject(), 1, "infer", options)
    assert order == ["release", "empty_cache", "reset_peak_memory_stats", "capture"]
    assert row["peak_gib"] == 1.0


@pytest.mark.parametrize(
    ("device", "floor", "repeats"),
    [("cuda", 10.0, 50), ("cuda", 40.0, 25), ("cuda", 500.0, 10), ("cpu", 10.0, 10)],
)
def test_a_short_call_of_a_gpu_is_timed_for_a_second(device, floor, repeats, cpu_options):
    options = cpu_options(device=torch.device(device), repeats=10)
    assert throughput.repeats_of(floor, options) == repeats
