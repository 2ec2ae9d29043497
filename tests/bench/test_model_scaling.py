"""The scaling of whole models at tiny sizes on the CPU: points, gates, memory, fits, records."""

import json
import weakref
from dataclasses import replace

import model_scaling
import pytest
import torch
from gate import LIMITS
from support import CLIP
from workload import build_model

from snapkernels.testing import record
from snapkernels.testing.load import Load
from snapkernels.testing.timing import Timing
from snapvideo_core import FIT, fit
from snapvideo_core.flops import graph_tflop, least_tflop

CPU = torch.device("cpu")
CEILINGS = {"copy_tb_s": 0.01, "fp32_tflop_s": 0.5, "bf16_tflop_s": 0.5}
PLAN = model_scaling.PLANS["cpu"]
GPU_PLAN = model_scaling.PLANS["cuda"]
GRID_TOKENS = (256, 1024, 4096)


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    """The GPU is hidden, nothing is timed: a call takes 6 ms."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(model_scaling, "measure_ceilings", lambda *_: CEILINGS)

    def measure(call, device, *, repeats, warmup):
        call()
        return Timing(6.0, 5.0, 7.0)

    monkeypatch.setattr(model_scaling, "measure", measure)


@pytest.fixture
def written(tmp_path):
    """A function of flags: the record of a run in this process."""

    def run_here(*flags, code=0):
        target = tmp_path / "rows.json"
        assert model_scaling.main([*flags, "--json", str(target)]) == code
        found = json.loads(target.read_text())
        assert record.problems(found) == []
        return found

    return run_here


def run_of(*modes, captured=False, plan=PLAN, dtype=torch.float32):
    return model_scaling.Run(
        device=CPU,
        dtype=dtype,
        capture=captured,
        clip=CLIP,
        framerate=24.0,
        repeats=model_scaling.MOST_REPEATS["cuda"],
        ceilings=CEILINGS,
        load=Load(CPU),
        plan=plan,
        modes=modes,
    )


def model_of(plan=PLAN, dtype=torch.float32):
    return build_model(plan.upsampler, CPU, dtype, None)


def test_every_axis_has_rows_in_a_record(written, capsys):
    found = written()
    rows = found["rows"]
    wanted = [
        (axis, point, f"model/{name}/{mode}", f"{variant}-fp32")
        for axis, name, counts in (
            ("tokens", "tiny-up", GRID_TOKENS),
            ("latents", "tiny-up", PLAN.latents),
            ("batch", "tiny", PLAN.batches),
        )
        for point in counts
        for mode in ("infer", "train")
        for variant in ("ours", "eager")
    ]
    assert [(r["axis"], r["point"], r["case"], r["variant"]) for r in rows] == wanted
    for row in rows:
        assert row["gate"] == "ok" and row["unit"] == "ms"
        assert row["batch"] == (row["point"] if row["axis"] == "batch" else 1)
        assert (row["p20"], row["value"], row["p80"]) == (5.0, 6.0, 7.0)
        assert row["error"]["rms_vs_eager"] < 2e-5
        assert "F of the first video held to eager's in fp32" in row["includes"]
        assert "peak_gib" not in row
    assert set(found["exponents"]) == {
        f"{mode} {axis} {variant}-fp32"
        for mode in ("infer", "train")
        for axis in ("tokens", "latents", "batch")
        for variant in ("ours", "eager")
    }
    assert found["memory_exponents"] == {}  # no CPU says what a call took
    assert found["command"] == "python bench/model_scaling.py"
    out = capsys.readouterr().out
    assert "No NVIDIA GPU here: CPU figures" in out
    assert "infer tokens ours-fp32: time grows with exponent 0.000" in out


def test_figures_are_of_a_whole_call(written):
    rows = {(r["case"], r["batch"]): r for r in written("--axis", "batch")["rows"]}
    config = PLAN.first_stage
    infer, train = rows["model/tiny/infer", 4], rows["model/tiny/train", 4]
    assert infer["tflop"] == pytest.approx(4 * graph_tflop(config), rel=1e-4)
    assert train["tflop"] == pytest.approx(4 * 4 * graph_tflop(config), rel=1e-4)
    assert infer["floor"] == pytest.approx(4e3 * least_tflop(config) / 0.5, rel=1e-4)
    assert train["pct_of_floor"] == pytest.approx(100 * train["floor"] / 6, abs=0.06)


def test_flags_choose_axes_and_modes_and_are_in_the_command(written):
    found = written("--axis", "batch", "latents", "--mode", "infer")
    assert found["command"] == "python bench/model_scaling.py --axis latents batch --mode infer"
    assert {row["axis"] for row in found["rows"]} == {"latents", "batch"}
    assert {row["case"] for row in found["rows"]} == {"model/tiny-up/infer", "model/tiny/infer"}


def test_the_points_of_a_gpu_are_those_named():
    tokens = model_scaling.points("tokens", GPU_PLAN)
    assert [one[0] for one in tokens] == [2560, 10240, 36864, 147456, 589824, 1048576]
    for point, config, batch in tokens:
        frames, height, width = config.grid
        assert frames * height * width == point and frames == 16 and batch == 1
        assert config.padded_height == config.height  # no token is padding
        up = GPU_PLAN.upsampler
        assert config == replace(
            up, height=config.height, width=config.width, group=config.group, low_res=config.low_res
        )
        assert config.num_groups == up.num_groups == 32
        assert (config.height, config.width) == tuple(8 * side for side in config.low_res)
    latents = model_scaling.points("latents", GPU_PLAN)
    assert [(p, c.num_latents, b) for p, c, b in latents] == [
        (count, count, 1) for count in (256, 512, 768, 1024, 1536)
    ]
    assert {config.num_groups * config.group_tokens for _, config, _ in latents} == {147456}
    batches = model_scaling.points("batch", GPU_PLAN)
    assert [(p, c.name, b) for p, c, b in batches] == [(2**k, "3.9b", 2**k) for k in range(7)]


def test_a_grid_that_does_not_split_into_the_groups_is_refused():
    with pytest.raises(ValueError, match=r"3\.9b-up: group must be a divisor of the token grid"):
        model_scaling.on_grid(GPU_PLAN, (8, 22))


@pytest.mark.parametrize("plan", [PLAN, GPU_PLAN], ids=["cpu", "cuda"])
@pytest.mark.parametrize("axis", ["tokens", "latents"])
def test_one_model_takes_every_size_of_the_upsampler(axis, plan):
    with torch.device("meta"):
        model = FIT(plan.upsampler)
    shared = {n: p for n, p in model.named_parameters() if "positions" not in n}
    del shared["self_conditioning.latents"]
    for _, config, _ in model_scaling.points(axis, plan):
        model_scaling.adapt(model, config)
        with torch.device("meta"):
            anew = FIT(config)
        shapes = {name: p.shape for name, p in model.named_parameters()}
        assert shapes == {name: p.shape for name, p in anew.named_parameters()}
        assert model.config == config
        assert [b.num_groups for b in model.blocks] == [b.num_groups for b in anew.blocks]
        now = dict(model.named_parameters())
        assert all(now[name] is parameter for name, parameter in shared.items())


def test_tables_are_drawn_as_a_new_model_has_them():
    model = model_of()
    model_scaling.adapt(model, model_scaling.points("tokens", PLAN)[2][1])
    for table in (model.positions, model.self_conditioning.latents):
        assert table.requires_grad and table.std().item() == pytest.approx(0.02, rel=0.15)


def test_each_variant_runs_by_its_backends_and_in_its_mode(monkeypatch):
    model, seen = model_of(), []

    def measure(call, device, *, repeats, warmup):
        seen.append((model.training, {m.backend for m in model.modules() if hasattr(m, "backend")}))
        return Timing(6.0, 6.0, 6.0)

    monkeypatch.setattr(model_scaling, "measure", measure)
    rows = list(model_scaling.bench_axis("latents", model, run_of("infer", "train")))
    assert {row["gate"] for row in rows} == {"ok"}
    assert seen == 3 * [(False, {None}), (False, {"eager"}), (True, {None}), (True, {"eager"})]


@pytest.mark.parametrize(
    ("floor", "repeats"),
    [(1.0, 30), (20.0, 30), (60.0, 16), (200.0, 5), (501.0, 2), (1900.0, 2), (9000.0, 2)],
)
def test_a_short_call_is_repeated_for_half_a_second_and_a_long_one_less(
    floor, repeats, monkeypatch
):
    asked = []
    monkeypatch.setattr(model_scaling.Run, "floor_ms", lambda *_: floor)
    monkeypatch.setattr(
        model_scaling, "measure", lambda *_, **how: asked.append(how) or Timing(6.0, 6.0, 6.0)
    )
    model_scaling.timed(lambda: None, model_of(), 1, "infer", run_of("infer"))
    assert asked == [{"repeats": repeats, "warmup": 0}]
    assert repeats * floor >= 500 or repeats == model_scaling.MOST_REPEATS["cuda"]


def test_the_peak_of_a_gpu_stands_beside_its_weights(monkeypatch):
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 3 * 2**29)
    model, gpu = model_of(), replace(run_of("infer"), device=torch.device("cuda"))
    measured = model_scaling.timed(lambda: None, model, 1, "infer", gpu)
    assert measured["peak_gib"] == 1.5
    numbers = sum(parameter.numel() for parameter in model.parameters())
    assert measured["weights_gib"] == pytest.approx(4 * numbers / 2**30, rel=1e-4)


def test_a_point_begins_without_what_the_one_before_left(monkeypatch):
    """In `prepared` no gradient and no batch of it takes the memory of eager's evaluation."""
    model, batches, seen = model_of(), [], []
    prepared, evaluated = model_scaling.prepared, model_scaling.evaluated

    def held(*_):
        gradients = any(parameter.grad is not None for parameter in model.parameters())
        seen.append((gradients, any(batch() is not None for batch in batches[:-1])))
        return evaluated(*_)

    def prepare(*_):
        batches.append(lambda: None)  # of this one there is none yet
        given = prepared(*_)
        batches[-1] = weakref.ref(given.data.x_sigma)
        return given

    monkeypatch.setattr(model_scaling, "prepared", prepare)
    monkeypatch.setattr(model_scaling, "evaluated", held)
    rows = list(model_scaling.bench_axis("latents", model, run_of("train")))
    assert {row["gate"] for row in rows} == {"ok"}
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert seen == 3 * (2 + 2) * [(False, False)]


def test_memory_is_given_back_once_the_gradients_are_gone(monkeypatch):
    model, seen = model_of(), []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: seen.append(model.positions.grad))
    model.positions.grad = torch.zeros_like(model.positions)
    model_scaling.clear(model, torch.device("cuda"))
    assert seen == [None]


def test_inference_by_a_graph_is_gated_and_timed_and_says_so(played):
    """With a graph that is played."""
    model = build_model(PLAN.first_stage, CPU, torch.float32, None)
    run = run_of("infer", "train", captured=True)
    rows = list(model_scaling.bench_axis("batch", model, run))
    assert {row["gate"] for row in rows} == {"ok"}
    assert played == [1, 1, 2, 2, 4, 4]
    for row in rows:
        assert ("CUDA graph" in row["includes"]) == row["case"].endswith("infer")
        assert ("by plain calls" in row["includes"]) == row["case"].endswith("train")


def test_running_out_of_memory_stops_one_variant_in_one_mode(written, monkeypatch, capsys):
    honest = model_scaling.training_step

    def training_step(model, data):
        def step():
            if model.backend == "eager" and len(data.video) > 1:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            call()

        call = honest(model, data)
        return step

    monkeypatch.setattr(model_scaling, "training_step", training_step)
    found = written("--axis", "batch")
    gates = {}
    for row in found["rows"]:
        assert ("value" in row) == (row["gate"] == "ok")
        series = f"{row['case'].split('/')[2]} {row['variant']}"
        gates.setdefault(series, []).append(row["gate"])
    assert gates == {
        "infer ours-fp32": ["ok"] * 3,
        "infer eager-fp32": ["ok"] * 3,
        "train ours-fp32": ["ok"] * 3,
        "train eager-fp32": ["ok", "out of memory"],
    }
    assert "train batch eager-fp32" not in found["exponents"]  # of one point
    assert "train batch ours-fp32" in found["exponents"]
    assert "no figure: out of memory" in capsys.readouterr().out


def test_what_eager_has_no_memory_to_check_has_no_figure(written, monkeypatch):
    honest = FIT.forward

    def forward(self, *inputs, **more):
        if self.backend == "eager" and self.config.height > 32:
            raise MemoryError
        return honest(self, *inputs, **more)

    monkeypatch.setattr(FIT, "forward", forward)
    rows = written("--axis", "tokens", "--mode", "infer", code=1)["rows"]
    unchecked = model_scaling.UNCHECKED
    assert unchecked == "not checked: eager ran out of memory in one evaluation of one video"
    assert [(row["point"], row["variant"], row["gate"]) for row in rows] == [
        (256, "ours-fp32", "ok"),
        (256, "eager-fp32", "ok"),
        (1024, "ours-fp32", unchecked),
        (1024, "eager-fp32", "out of memory"),
        (4096, "ours-fp32", unchecked),
    ]
    assert not any("value" in row for row in rows[2:])


def test_an_axis_ends_where_nothing_fits(written, monkeypatch):
    def none(*_):
        raise MemoryError

    monkeypatch.setattr(model_scaling, "evaluated", none)
    rows = written("--axis", "latents", "--mode", "infer", code=1)["rows"]
    assert [row["gate"] for row in rows if row["variant"] == "eager-fp32"] == ["out of memory"]
    monkeypatch.setattr(model_scaling, "examined", none)
    assert len(written("--axis", "latents", "--mode", "infer", code=1)["rows"]) == 2


def test_a_model_that_does_not_fit_is_one_line(monkeypatch, capsys):
    def exhausted(*_):
        raise MemoryError

    monkeypatch.setattr(model_scaling, "build_model", exhausted)
    assert model_scaling.main([]) == 1
    assert capsys.readouterr().err.splitlines()[-1] == "error: out of memory building tiny-up"


@pytest.mark.parametrize("mode", ["infer", "train"])
@pytest.mark.parametrize("bug", ["scale", "groups", "not finite"])
def test_a_wrong_kernel_turns_the_gate_red(bug, mode, written, monkeypatch):
    """One of ours only: eager's figures stay."""
    break_it = {
        "scale": lambda F: F * (1 + 1.3 * LIMITS[torch.float32]),
        "groups": lambda F: F.roll(1, -1),
        "not finite": lambda F: F / (F.max() > F),
    }[bug]
    honest = fit.head

    def head(*inputs, backend, **more):
        F = honest(*inputs, backend=backend, **more)
        return F if backend == "eager" else break_it(F)

    monkeypatch.setattr(fit, "head", head)
    for row in written("--axis", "latents", "--mode", mode, code=1)["rows"]:
        if row["variant"] == "ours-fp32":
            assert row["gate"].startswith("relative rms error") and "vs eager" in row["gate"]
            assert "value" not in row
        else:
            assert row["gate"] == "ok"


@pytest.mark.parametrize(("off", "red"), [(1.1e-2, False), (1.9e-2, True)])
def test_the_mildest_bug_is_red_in_bf16_and_two_roundings_are_not(off, red, monkeypatch):
    """A dropped key of each group is off by 1.9e-2, see `gate.LIMITS`."""
    honest = fit.head

    def head(*inputs, backend, **more):
        F = honest(*inputs, backend=backend, **more)
        return F if backend == "eager" else F * (1 + off)

    monkeypatch.setattr(fit, "head", head)
    plan, dtype = PLAN._replace(latents=(8,)), torch.bfloat16
    run = run_of("infer", plan=plan, dtype=dtype)
    ours, eager = model_scaling.bench_axis("latents", model_of(dtype=dtype), run)
    assert eager["gate"] == "ok"
    verdict = f"relative rms error {off:.2e} vs eager, limit 1.50e-02" if red else "ok"
    assert ours["gate"] == verdict


def test_a_video_wrong_at_one_batch_only_is_seen(written, monkeypatch):
    """What is compared is the batch's own output, and not that of one video."""
    honest = fit.head

    def head(x, *inputs, backend, **more):
        F = honest(x, *inputs, backend=backend, **more)
        return F.roll(1, -1) if backend is None and len(x) == 4 else F

    monkeypatch.setattr(fit, "head", head)
    rows = written("--axis", "batch", "--mode", "infer", code=1)["rows"]
    assert [row["batch"] for row in rows if row["gate"] != "ok"] == [4]


def test_a_gradient_that_is_not_finite_is_a_red_gate(written, monkeypatch):
    honest = fit.head_loss
    monkeypatch.setattr(fit, "head_loss", lambda *a, **o: honest(*a, **o) * float("nan"))
    rows = written("--axis", "latents", "--mode", "train", code=1)["rows"]
    assert [row["gate"] for row in rows] == 3 * ["a gradient is missing or not finite", "ok"]


def test_a_kernel_that_fails_costs_its_own_row_alone(written, monkeypatch):
    honest = fit.head

    def head(*inputs, backend, **more):
        if backend is None:
            raise RuntimeError("no such tile\nand pages more")
        return honest(*inputs, backend=backend, **more)

    monkeypatch.setattr(fit, "head", head)
    rows = written("--axis", "latents", "--mode", "infer", code=1)["rows"]
    assert [row["gate"] for row in rows] == 3 * ["RuntimeError: no such tile", "ok"]


def synthetic(axis, variant, amounts, gate="ok", weights=8.0):
    return [
        {"case": "model/x/infer", "variant": variant, "axis": axis, "point": point, "gate": gate}
        | {"value": amount, "peak_gib": weights + 3 * amount**2, "weights_gib": weights}
        for point, amount in amounts.items()
    ]


def test_exponents_are_the_slopes_of_power_laws():
    points = (2560, 36864, 147456, 589824)
    rows = synthetic(
        "tokens", "ours-bf16", {n: 1e-4 * n**1.25 if n > 2560 else 9.0 for n in points}
    )
    rows += synthetic("tokens", "ours-bf16", {1048576: 1e9}, gate="out of memory")
    rows += synthetic("batch", "eager-bf16", {1: 50.0, 2: 50.0, 4: 8.0, 8: 16.0, 16: 32.0})
    rows += synthetic("latents", "eager-bf16", {256: 1.0, 512: 4.0})
    rows += synthetic("latents", "ours-bf16", {256: 1.0})  # one point has no slope
    assert model_scaling.exponents(rows, GPU_PLAN) == {
        "infer tokens ours-bf16": 1.25,
        "infer batch eager-bf16": 1.0,
        "infer latents eager-bf16": 2.0,
    }
    assert model_scaling.memory_exponents(rows, GPU_PLAN) == {
        "infer tokens ours-bf16": 2.5,
        "infer batch eager-bf16": 2.0,
        "infer latents eager-bf16": 4.0,
    }


def test_a_run_that_is_cut_off_keeps_the_axes_it_has(monkeypatch, tmp_path):
    honest, built = model_scaling.bench_axis, []

    def cut_off(axis, model, run):
        if axis == "batch":
            raise KeyboardInterrupt
        return honest(axis, model, run)

    def build(config, *rest):
        built.append(config.name)
        return build_model(config, *rest)

    monkeypatch.setattr(model_scaling, "bench_axis", cut_off)
    monkeypatch.setattr(model_scaling, "build_model", build)
    target = tmp_path / "rows.json"
    with pytest.raises(KeyboardInterrupt):
        model_scaling.main(["--mode", "infer", "--json", str(target)])
    found = json.loads(target.read_text())
    assert record.problems(found) == []
    assert found["command"] == "python bench/model_scaling.py --mode infer (so far)"
    assert {row["axis"] for row in found["rows"]} == {"tokens", "latents"}
    assert "infer latents ours-fp32" in found["exponents"]
    assert built == ["tiny-up", "tiny"]  # the upsampler once for both


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--axis", "pixels"], "invalid choice: 'pixels'"),
        (["--axis"], "expected at least one argument"),
        (["--mode", "both"], "invalid choice: 'both'"),
        (["--json", "no/such/folder/rows.json"], "it must be a file in a folder that exists"),
        (["--json", "bench"], "it must be a file in a folder that exists"),
    ],
)
def test_bad_input_is_refused_before_anything_is_built(flags, message, monkeypatch, capsys):
    monkeypatch.setattr(model_scaling, "build_model", lambda *_: pytest.fail("it was built"))
    with pytest.raises(SystemExit) as refused:
        model_scaling.main(flags)
    assert refused.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_a_clip_that_cannot_be_read_is_one_line(monkeypatch, capsys):
    def read_clip(*_, **__):
        raise ImportError("reading video needs PyAV")

    monkeypatch.setattr(model_scaling, "read_clip", read_clip)
    assert model_scaling.main([]) == 2
    assert capsys.readouterr().err.splitlines() == ["error: reading video needs PyAV"]
