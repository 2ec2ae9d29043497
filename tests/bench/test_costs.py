"""The cost model: what is counted, what is timed, and that both add up."""

import json
from collections import Counter
from dataclasses import replace

import costs
import fit_subject
import op_costs
import pytest
import torch
from fit_subject import inference
from gate import ENDS
from op_costs import Measured, OpCost, Place, Rates, counted, sublayers, timed, traced, watched
from support import CLIP
from workload import build_model, load_batch

from snapkernels import RECIPES, quantise
from snapkernels.testing import record
from snapkernels.testing.load import Load, Window
from snapkernels.testing.timing import Timing
from snapvideo_core import fit
from snapvideo_core.config import TINY, TINY_UP
from snapvideo_core.flops import forward_flops

CPU = torch.device("cpu")
# With so many latents a group that read and write are not absorbed: in fp8 linears around SDPA.
PROJECTED = replace(TINY, name="projected", num_latents=128)
RATES = Rates(copy=2.0, matrix=500.0, fp8=1000.0)
CEILINGS = {"copy_tb_s": 0.01, "fp32_tflop_s": 0.1}
IN_GROUPS = {"read", "write"}  # of two exact algorithms the cheaper counts
# {our part: those of `forward_flops`}
PARTS = {
    "stem": ("stem",),
    "self-conditioning": ("self-conditioning",),
    "conditioning": ("conditioning",),
    "cond read": ("cond read: qkvo", "cond read: attention"),
    "cond read FF": ("cond read FF",),
    "read": ("read: qkvo", "read: attention"),
    "read FF": ("read FF",),
    "global attention": ("global: qkvo", "global: attention"),
    "global FF": ("global: FF",),
    "write": ("write: qkvo", "write: attention"),
    "write FF": ("write FF",),
    "head": ("head",),
}


def model_of(config, recipe="bf16"):
    return quantise(build_model(config, CPU, torch.float32, None).eval(), recipe)


def evaluated(config, recipe="bf16", batch=1):
    """A model and an evaluation of it."""
    model = model_of(config, recipe)
    data = load_batch(CLIP, config, batch, 24.0, CPU)
    return model, inference(model, model, data)


def ticks(model, evaluate):
    """Segments by a clock that ticks at every op, and the time of all."""
    clock = op_costs.Counter()
    with clock:
        trace = traced(model, evaluate, lambda: len(clock.ops))
    return trace.segments(lambda start, end: end - start), len(clock.ops)


def told_of(model, evaluate, *, gaps=0, batch=1):
    """What is said of an evaluation that takes such ticks, and `gaps` more."""
    segments, total = ticks(model, evaluate)
    whole = Timing(total + gaps, total, total)
    return costs.explained(counted(model, evaluate), Measured(whole, segments), RATES, batch)


@pytest.mark.parametrize("recipe", ["bf16", "fp8"])
@pytest.mark.parametrize("config", [TINY, TINY_UP, PROJECTED], ids=lambda config: config.name)
def test_operations_are_those_of_the_equations(config, recipe):
    ops = counted(*evaluated(config, recipe, batch=2))
    found = Counter()
    for op in ops:
        found[op.place and op.place.part] += op.flops
    assert found.pop(None) == 0
    assert found.keys() == PARTS.keys()
    ways = [forward_flops(config, absorbed=absorbed) for absorbed in (False, True)]
    for part, names in PARTS.items():
        sums = [2 * sum(way[name] for name in names) for way in ways]
        assert found[part] == (min(sums) if part in IN_GROUPS else sums[0]), part


def test_the_cheaper_of_two_algorithms_depends_on_the_model():
    """Else the test above would hold for one that never looks."""
    for config, absorbed in ((TINY_UP, True), (PROJECTED, False)):
        sums = [
            sum(forward_flops(config, absorbed=way)[name] for name in PARTS["read"])
            for way in (False, True)
        ]
        assert (sums[1] < sums[0]) == absorbed


def test_an_op_of_ours_moves_its_inputs_and_its_output_once():
    """Not what it keeps for a backward, nor anything inside."""
    for recipe, name in (("bf16", "feed_forward"), ("fp8", "feed_forward_fp8")):
        model, evaluate = evaluated(TINY, recipe, batch=2)
        layer = model.blocks[1].write_ff
        (op,) = [op for op in counted(model, evaluate) if op.place == Place("write FF", 1)]
        tokens = 2 * TINY.num_groups * TINY.group_tokens
        weights = sum(one.nbytes for one in layer.state_dict().values())
        assert op.name == name and op.in_fp8 == (recipe == "fp8")
        assert op.moved == 2 * tokens * TINY.patch_dim * 4 + weights
        assert op.flops == 4 * tokens * TINY.patch_dim * 4 * TINY.patch_dim
    (stem,) = [op for op in counted(model, evaluate) if op.place == Place("stem")]
    own = [*model.stem.parameters(), *model.stem_norm.parameters(), model.positions]
    weights = sum(one.nbytes for one in own)
    pixels = 2 * 3 * TINY.frames * TINY.height * TINY.width
    assert stem.moved == 4 * (pixels + 2 + tokens * TINY.patch_dim) + weights  # and 2 scales


def test_a_quantised_read_is_all_its_ops():
    model, evaluate = evaluated(PROJECTED, "fp8")
    ops = [op for op in counted(model, evaluate) if op.place == Place("read", 0)]
    names = Counter(op.name for op in ops if op.flops)
    sdpa = "_scaled_dot_product_flash_attention_for_cpu"
    assert names == {"linear_fp8": 3, sdpa: 1}
    assert [op.in_fp8 for op in ops if op.flops] == [True, True, False, True]


def test_views_cost_nothing_and_writing_in_place_does():
    counter, x = op_costs.Counter(), torch.zeros(4, 6)
    with counter:
        x.view(6, 4).t().unsqueeze(0)[:, 1:3]
        x.to(torch.float32)
        x.t().reshape(24)  # a copy, then a view of it
        x.mul_(2)
    assert [(op.name, op.moved) for op in counter.ops] == [("clone", 2 * 96), ("mul_", 96)]


def test_a_tensor_that_is_named_twice_moves_once():
    """The target of an op in place is given and made; two halves of one memory are two."""
    counter, x, y = op_costs.Counter(), torch.zeros(4, 6), torch.ones(4, 6)
    with counter:
        x.copy_(y)
        x.add_(y)
        torch.mul(x, y, out=y)
        torch.cat([x, x])
        x[2:].copy_(x[:2])
    assert [(op.name, op.moved) for op in counter.ops] == [
        ("copy_", 2 * 96),
        ("add_", 2 * 96),
        ("mul", 2 * 96),
        ("cat", 3 * 96),
        ("copy_", 96),
    ]


def test_every_weight_is_in_one_part():
    for recipe in ("bf16", "fp8"):
        model = model_of(TINY_UP, recipe)
        named = {module: name for name, module in model.named_modules()}
        parts = [f"{named[module]}." for module, _ in sublayers(model)]
        parts += [f"{name}." for name in ENDS] + ["positions"]
        for weight in model.state_dict():
            assert sum(weight.startswith(part) for part in parts) == 1, weight
    assert {place.part for _, place in sublayers(model)} | {"stem", "head"} == set(PARTS)


def test_an_op_takes_the_longer_of_its_products_and_its_bytes():
    products = OpCost("op", None, flops=4 * 10**12, moved=10**9, in_fp8=False)
    assert products.predicted_ms(RATES) == pytest.approx(8.0)
    assert products._replace(in_fp8=True).predicted_ms(RATES) == pytest.approx(4.0)
    moves = products._replace(moved=2 * 10**10)
    assert moves.predicted_ms(RATES) == pytest.approx(10.0)


def test_e4m3_is_held_to_the_rate_that_was_measured_of_it():
    ceilings = {"copy_tb_s": 2.0, "bf16_tflop_s": 500.0, "fp8_tflop_s": 1000.0}
    assert Rates.of(ceilings, torch.bfloat16) == RATES
    without = {"copy_tb_s": 2.0, "bf16_tflop_s": 500.0}
    assert Rates.of(without, torch.bfloat16).fp8 == 500.0
    compute = Rates(copy=1e9, matrix=1.0, fp8=2.0)
    for recipe, quantised in (("bf16", False), ("fp8", True)):
        ops = counted(*evaluated(TINY, recipe))
        for op in ops:
            rate = 2.0 if op.in_fp8 else 1.0
            assert op.predicted_ms(compute) == pytest.approx(op.flops / rate / 1e9, abs=1e-12)
        in_fp8 = {op.place.part for op in ops if op.in_fp8}
        wanted = {"self-conditioning", "cond read", "cond read FF", "read FF", "write FF"}
        assert in_fp8 == (wanted | {"global attention", "global FF"} if quantised else set())


def test_time_and_operations_are_of_the_same_parts():
    """Every op of an evaluation is in one segment, in the order of the model."""
    model, evaluate = evaluated(TINY_UP)
    segments, total = ticks(model, evaluate)
    order = [place for place, _ in segments if place]
    block = ("cond read", "cond read FF", "read", "read FF")
    block += ("global attention", "global FF", "write", "write FF")
    assert order == [
        Place("stem"),
        Place("self-conditioning"),
        Place("conditioning"),
        *(Place(part, index) for index in range(TINY_UP.blocks) for part in block),
        Place("head"),
    ]
    assert [place for place, _ in segments[::2]] == [None] * (len(order) + 1)
    counts = Counter(op.place for op in counted(model, evaluate))
    assert {place: ms for place, ms in segments if place} == {
        place: count for place, count in counts.items() if place
    }
    assert sum(ms for _, ms in segments) == total


def test_parts_and_rest_are_the_whole():
    model, evaluate = evaluated(TINY)
    segments, total = ticks(model, evaluate)
    for gaps in (10, -10):
        found = told_of(model, evaluate, gaps=gaps, batch=4)
        in_parts = sum(part["ms"] for part in found["parts"])
        assert in_parts + sum(found["rest"].values()) == pytest.approx((total + gaps) / 4)
        assert found["rest"] == {
            "before the stem: the scales of sigma": segments[0][1] / 4,
            "between the parts": 0.0,
            "after the head": 0.0,
            "launch gaps and events": gaps / 4,
        }
        assert segments[0][1] > 0
        share = 100 * 4 * in_parts / (total + gaps)
        assert found["explained_pct"] == pytest.approx(share, abs=0.05)


def test_blocks_are_the_parts_that_they_have():
    found = told_of(*evaluated(TINY))
    assert [one["block"] for one in found["blocks"]] == list(range(TINY.blocks))
    alone = {"stem", "conditioning", "self-conditioning", "head"}
    for what in ("ms", "predicted_ms", "tflop", "gb"):
        of_parts = sum(one[what] for one in found["parts"] if one["part"] not in alone)
        assert sum(one[what] for one in found["blocks"]) == pytest.approx(of_parts, rel=1e-4)
    reads = next(one for one in found["parts"] if one["part"] == "cond read")
    assert reads["calls"] == TINY.blocks and reads["ops"]["group_read"] == TINY.blocks


def test_a_figure_is_a_videos_share_of_a_batch():
    whole, half = (told_of(*evaluated(TINY, batch=2), batch=batch) for batch in (1, 2))
    for kind in ("parts", "blocks"):
        for one, other in zip(whole[kind], half[kind], strict=True):
            for what in ("ms", "predicted_ms", "tflop", "gb"):
                assert one[what] == pytest.approx(2 * other[what], rel=1e-4)
    assert [one["ops"] for one in whole["parts"]] == [one["ops"] for one in half["parts"]]


@pytest.mark.parametrize(
    ("table", "name"),
    [(op_costs.ROLES, "write_ff"), (op_costs.ENDS, "head_mix"), (op_costs.ROLES, "cond_read")],
)
def test_a_part_that_is_left_out_is_not_explained(table, name, monkeypatch):
    model, evaluate = evaluated(TINY)
    before = told_of(model, evaluate)
    monkeypatch.delitem(table, name)
    after = told_of(model, evaluate)
    assert after["explained_pct"] < before["explained_pct"]
    rest = sum(after["rest"].values()) - sum(before["rest"].values())
    lost = {one["part"]: one["ms"] for one in before["parts"]}
    for one in after["parts"]:
        lost[one["part"]] -= one["ms"]
    assert rest == pytest.approx(sum(lost.values())) and rest > 0


def test_what_was_watched_is_as_it_was_even_after_an_exception():
    model, evaluate = evaluated(TINY)
    names = {name: getattr(fit, name) for name in op_costs.ENDS}

    def enter(place):
        if place.part == "read":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), watched(model, enter, lambda: None):
        assert all(getattr(fit, name) is not names[name] for name in names)
        evaluate()
    assert all(getattr(fit, name) is names[name] for name in names)
    for module in model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks
    evaluate()


def test_what_is_timed_is_not_what_is_counted():
    """Under a dispatch mode kernels keep more; and the whole is without marks."""
    model, evaluate = evaluated(TINY)
    seen = []

    def watched_evaluate():
        seen.append(bool(model.conditioning._forward_hooks))
        assert torch._C._len_torch_dispatch_stack() == 0
        return evaluate()

    found = timed(*op_costs.in_calls(model, watched_evaluate), CPU, rounds=3)
    assert seen == [False, True] * 3
    assert all(ms > 0 for place, ms in found.segments if place)
    assert 0 < found.whole.p20 <= found.whole.median <= found.whole.p80


def test_a_segment_is_the_median_of_its_rounds():
    rounds = iter([1.0, 5.0, 2.0])
    place = Place("stem")

    def sample():
        return [(None, 0.5), (place, next(rounds)), (None, 0.5)]

    found = timed(lambda: None, sample, CPU, rounds=3)
    assert found.segments == [(None, 0.5), (place, 2.0), (None, 0.5)]


class FakeEvent:
    """An event of a GPU that is a counter."""

    now, made = 0.0, None

    def __init__(self, *, enable_timing, external):
        assert enable_timing and external  # else it is no node of a graph, or has no time
        self.made.append(self)

    def record(self):
        FakeEvent.now += 1
        self.at = FakeEvent.now

    def elapsed_time(self, other):
        return other.at - self.at


def test_in_a_graph_the_events_of_the_capture_are_read_after_each_replay(monkeypatch):
    """Not those of the warm-ups, which no replay records again; and the whole has no events."""
    model, evaluate = evaluated(TINY)
    graphs, done = [], []

    def recorded(evaluate, device, name):
        FakeEvent.made = []
        for _ in range(3):
            evaluate()
        FakeEvent.made = []
        outputs = evaluate()
        events = list(FakeEvent.made)

        def replay():
            done.append(len(events))
            for number, event in enumerate(events):
                event.at = 1000 * len(done) + number**2

        graphs.append(outputs)
        return replay, outputs

    monkeypatch.setattr(op_costs, "recorded", recorded)
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: done.append("synchronized"))
    monkeypatch.setattr(
        op_costs, "measure", lambda call, *_, **how: call() or Timing(how["warmup"], 0, 0)
    )
    found = timed(*op_costs.in_graphs(model, evaluate), torch.device("cuda"), rounds=10)
    marks = 2 * (4 + 8 * TINY.blocks) + 2  # two a part, and both ends
    assert done == [0, marks, "synchronized"] * 10
    assert [ms for _, ms in found.segments] == [2 * n + 1 for n in range(marks - 1)]
    assert found.whole.median == 1  # a replay ahead of each that is timed
    assert torch.equal(graphs[0][0], graphs[1][0])


@pytest.fixture
def run(monkeypatch, tmp_path):
    """A function of flags: the code of a run in this process, and the rows of its record."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(costs, "measure_ceilings", lambda *_: CEILINGS)

    def run_here(*flags):
        target = tmp_path / "costs.json"
        code = costs.main(["--preset", "tiny", *flags, "--json", str(target)])
        written = json.loads(target.read_text())
        assert record.problems(written) == []
        return code, written

    return run_here


def test_a_run_is_a_table_and_a_record(run, capsys):
    code, written = run("--recipe", "bf16", "fp8", "--batch", "2")
    assert code == 0
    assert written["command"] == ("python bench/costs.py --preset tiny --recipe bf16 fp8 --batch 2")
    told = capsys.readouterr().out
    for row, variant in zip(written["rows"], ("ours-fp32", "ours-fp8"), strict=True):
        assert (row["case"], row["variant"], row["batch"]) == ("model/tiny/infer", variant, 2)
        assert row["gate"] == "ok" and row["error"]["rms_vs_fp64"] > 0
        assert {part["part"] for part in row["parts"]} == set(PARTS)
        in_parts = sum(part["ms"] for part in row["parts"])
        assert in_parts + sum(row["rest"].values()) == pytest.approx(row["value"], rel=1e-3)
        assert row["explained_pct"] == pytest.approx(100 * in_parts / row["value"], abs=0.1)
        assert row["pct_of_floor"] == pytest.approx(100 * row["floor"] / row["value"], abs=0.1)
        assert f"model/tiny/infer {variant}, batch 2: {row['value']:.4g} ms/video" in told
    assert "CPU figures" in told and "launch gaps and events" in told


def test_a_table_has_every_part_and_says_what_is_not_explained():
    model, evaluate = evaluated(TINY)
    row = {"case": "model/tiny/infer", "variant": "ours-fp32", "batch": 1, "gate": "ok"}
    row |= {"value": 100.0, "floor": 1.0}

    def told(gaps):
        return costs.told(row | told_of(model, evaluate, gaps=gaps))

    lines = told(0).splitlines()
    (line,) = [line.split() for line in lines if line.startswith("write FF ")]
    (part,) = [one for one in told_of(model, evaluate)["parts"] if one["part"] == "write FF"]
    assert line[2:5] == ["2", f"{part['ms']:.4g}", f"{part['ms']:.1f}"]
    assert float(line[5]) == pytest.approx(part["predicted_ms"], rel=1e-3)
    assert float(line[6]) == pytest.approx(part["ms"] / part["predicted_ms"], rel=1e-2)
    assert float(line[7]) == pytest.approx(1e3 * part["tflop"] / part["ms"], rel=1e-2)
    assert float(line[8]) == pytest.approx(part["gb"] / part["ms"], rel=1e-2)
    assert sum(line.startswith(f"{part} ") for part in PARTS for line in lines) >= len(PARTS)
    assert "short of 95 %" in told(1000) and "longer than without" not in told(1000)
    assert "longer than without" in told(-100) and "short" not in told(-100)


def test_no_figure_of_a_model_that_is_wrong(run, monkeypatch, capsys):
    monkeypatch.setattr(fit_subject, "judged", lambda *_: ("wrong", {"rms_vs_fp64": 1.0}))
    monkeypatch.setattr(costs, "timed", lambda *_, **__: pytest.fail("it was timed"))
    code, written = run()
    (row,) = written["rows"]
    assert code == 1 and row["gate"] == "wrong" and "value" not in row and "parts" not in row
    assert "no figure: wrong" in capsys.readouterr().out


def test_running_out_of_memory_is_a_red_row_and_the_rest_goes_on(run, monkeypatch):
    whole, failures = costs.timed, iter([MemoryError()])

    def fails_once(*arguments, **how):
        for failure in failures:
            raise failure
        return whole(*arguments, **how)

    monkeypatch.setattr(costs, "timed", fails_once)
    code, written = run("--recipe", "bf16", "fp8")
    assert code == 1 and [row["gate"] for row in written["rows"]] == ["out of memory", "ok"]
    assert "value" not in written["rows"][0]


def test_no_figure_of_a_gpu_that_was_slowed_down(run, monkeypatch):
    seen = {"samples": [], "slowdowns": {"hardware slowdown"}}
    monkeypatch.setattr(Window, "__init__", lambda window: vars(window).update(seen))
    code, written = run()
    assert code == 1
    assert written["rows"][0]["gate"] == "the GPU was slowed down: hardware slowdown"
    assert "value" not in written["rows"][0]


def test_a_run_that_is_cut_off_leaves_what_it_measured(monkeypatch, run, tmp_path):
    whole = costs.row_of

    def cut_off(config, recipe, *others):
        if recipe is RECIPES["fp8"]:
            raise KeyboardInterrupt
        return whole(config, recipe, *others)

    monkeypatch.setattr(costs, "row_of", cut_off)
    with pytest.raises(KeyboardInterrupt):
        run("--recipe", "bf16", "fp8")
    written = json.loads((tmp_path / "costs.json").read_text())
    assert written["command"].endswith("(so far)") and len(written["rows"]) == 1


def test_a_shared_gpu_is_refused_before_anything_is_measured(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(Load, "shared", lambda _: "the GPU is shared: others hold 9.0 GiB of it")
    monkeypatch.setattr(costs, "measure_ceilings", lambda *_: pytest.fail("it was measured"))
    assert costs.main(["--preset", "tiny"]) == 2
    assert capsys.readouterr().err.startswith("error: the GPU is shared")


def test_the_evaluation_is_self_conditioned():
    model, evaluate = evaluated(TINY)
    seen = []
    model.self_conditioning.register_forward_hook(lambda _, given, __: seen.append(given[0]))
    _, latents = evaluate()
    assert seen[0].any() and not torch.equal(seen[0], latents)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "4b"], "invalid choice: '4b'"),
        (["--recipe", "fp4"], "invalid choice: 'fp4'"),
        (["--batch", "0"], "must be a whole number above 0, got '0'"),
        (["--json", "no/such/folder/costs.json"], "a folder that exists and can be written to"),
    ],
)
def test_bad_input_is_one_clear_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        costs.main(arguments)
    told = capsys.readouterr()
    assert stopped.value.code == 2 and not told.out
    assert message in told.err.splitlines()[-1]
