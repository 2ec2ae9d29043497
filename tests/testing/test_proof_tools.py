"""The tools that proofs are made of: poisoned memory, planted bugs, cost, cases, machine code."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from snapkernels import dispatch, env, extension
from snapkernels.dispatch import choose, explain
from snapkernels.registry import OPS, Op, op
from snapkernels.spec import Mutant
from snapkernels.testing import aot, bench, contract, cost, mutants, proofs
from snapkernels.testing.cases import all_ids, find, make_values
from snapkernels.testing.memory import nan_filled
from snapkernels.testing.mutants import planted
from snapkernels.testing.numerics import relative_rms, widened
from snapkernels.testing.proofs import NearError, judge

PATCHIFY = OPS["patchify"].spec
CASES = {case.name: case for case in PATCHIFY.cases}
CPU = torch.device("cpu")


def test_new_memory_is_nan_inside_only():
    with nan_filled():
        assert torch.empty(1000).isnan().all()
        assert torch.zeros(3).new_empty(7, 9, dtype=torch.bfloat16).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()


def test_values_see_what_was_never_written_and_what_changes_between_runs():
    whole = PATCHIFY.backend("eager")

    def torn(*call):
        tokens = whole.run(*call)
        out = torch.empty_like(tokens)
        out[:, :-1] = tokens[:, :-1]
        return out

    for run in (torn, lambda *call: whole.run(*call) + torch.rand(())):
        with pytest.raises(AssertionError):
            broken = replace(whole, run=run)
            proofs.values(PATCHIFY, CASES["odd"], broken, torch.float32)


@pytest.mark.parametrize(("typical", "right"), [(0.9, True), (1.1, False)])
def test_a_small_case_that_is_near_its_limit_is_judged_by_more_draws(typical, right, monkeypatch):
    """A backend 10 % less exact than eager on the first draw, and `typical` times it on others."""
    monkeypatch.setitem(proofs.AS_GOOD, torch.float32, 1)
    write = OPS["group_write"].spec
    case = next(case for case in write.cases if case.name == "odd")
    eager, first = write.backend("eager"), make_values(write, case, torch.float32, "cpu")

    def run(*call):
        exact = write.reference(*widened(call))
        times = 1.1 if torch.equal(call[0], first[0]) else typical
        return (exact + times * (eager.run(*call) - exact)).float()

    judged = partial(proofs.values, write, case, replace(eager, name="other", run=run))
    if right:
        judged(torch.float32)
    else:
        with pytest.raises(proofs.NearError):
            judged(torch.float32)


@pytest.mark.parametrize(("typical", "right"), [(0.9, True), (2, False)])
def test_a_gradient_that_is_near_its_limit_is_judged_by_more_draws(typical, right, monkeypatch):
    """Gradients half as exact as eager's on the first draw, and `typical` times it on others."""
    monkeypatch.setitem(proofs.AS_GOOD, torch.float32, 1)
    write = OPS["group_write"]
    case = next(case for case in write.spec.cases if case.name == "odd")
    first = make_values(write.spec, case, torch.float32, "cpu")

    def gradients_of(call):
        exact = contract.gradients_of(write, widened(call), "reference")
        times = 2 if torch.equal(call[0], first[0]) else typical
        return tuple(
            (wide + times * (one - wide)).float()
            for one, wide in zip(contract.gradients_of(write, call, "eager"), exact, strict=True)
        )

    other = replace(write.spec.backend("eager"), name="other")
    judged = partial(proofs.judge_gradients, write.spec, case, other, torch.float32, gradients_of)
    if right:
        judged()
    else:
        with pytest.raises(proofs.NearError):
            judged()


def test_a_backend_may_refuse_a_large_case_only_if_it_would_decline_it():
    large = replace(CASES["odd"], tier="gpu")
    unfit = replace(PATCHIFY.backend("eager"), refuses=lambda *_: "no")
    with pytest.raises(AssertionError, match="it cannot run: no"):
        proofs.values(PATCHIFY, large, unfit, torch.float32)
    declining = replace(unfit, declines=lambda *_: "another is cheaper")
    spec = replace(PATCHIFY, backends=(declining, *PATCHIFY.backends[-1:]))
    proofs.values(spec, large, declining, torch.float32)


def test_a_mutant_that_no_case_sees_is_an_error():
    harmless = Mutant(name="none", backend="eager", find="one view", replace="a view")
    with pytest.raises(AssertionError, match="no case of patchify sees the bug: none"):
        proofs.mutant_is_seen(OPS["patchify"], harmless)
    gone = replace(harmless, find="no such line")
    with pytest.raises(ValueError, match="'no such line' 0 times, not once"):
        proofs.mutant_is_seen(OPS["patchify"], gone)
    with planted(PATCHIFY, harmless) as backend:
        call = make_values(PATCHIFY, CASES["odd"], torch.float32, "cpu")
        assert torch.equal(backend.run(*call), PATCHIFY.reference(*call))


def test_every_compiled_mutant_is_built_ahead(monkeypatch, capsys):
    built = []
    monkeypatch.setattr(mutants, "compiled", lambda spec, mutant: built.append((spec, mutant)))
    mutants.build_all()
    assert {spec.name for spec, _ in built} >= {"patchify", "stem", "group_read", "group_write"}
    assert all(mutant in spec.mutants and mutant.file for spec, mutant in built)
    assert capsys.readouterr().out.count("\n") == len(built)


def test_compulsory_bytes_are_counted_by_hand():
    pixels = 3 * 16 * 288 * 512
    for direction, times in (("fwd", 2), ("bwd", 2), ("fwd_bwd", 4)):
        got = cost.compulsory_bytes(PATCHIFY, CASES["up-b1"], direction, torch.bfloat16)
        assert got == times * pixels * 2
    ceilings = {"copy_tb_s": 3.0, "bf16_tflop_s": 700.0}
    floor = cost.floor_ms(PATCHIFY, CASES["up-b1"], "fwd", torch.bfloat16, ceilings)
    assert floor == pytest.approx(4 * pixels / 3e12 * 1e3)
    ff = OPS["feed_forward"].spec
    case = next(case for case in ff.cases if case.name == "patch-up")
    tokens, weights = 147456 * 1024, 2 * 1024 * 4096 + 4096 + 3 * 1024
    moved = cost.compulsory_bytes(ff, case, "fwd", torch.bfloat16)
    assert moved == 2 * (2 * tokens + weights)
    assert cost.flops(ff, case, "fwd") == 4 * tokens * 4096
    assert cost.floor_ms(ff, case, "fwd", torch.bfloat16, ceilings) == pytest.approx(
        4 * tokens * 4096 / 700e9
    )


def test_fp8_is_held_against_its_own_products_and_bytes():
    linear, fp8 = (OPS[name].spec for name in ("linear", "linear_fp8"))
    case = next(case for case in fp8.cases if case.name == "out-3.9b")
    rows, width = 16 * 768, 3072
    tokens, bias = 3 * 2 * rows * width, 2 * width
    for spec, weight in ((linear, 2 * width**2), (fp8, width**2 + 4 * width)):
        moved = cost.compulsory_bytes(spec, case, "fwd", torch.bfloat16)
        assert moved == tokens + bias + weight
    ceilings = {"copy_tb_s": 3.0, "bf16_tflop_s": 700.0, "fp8_tflop_s": 1400.0}
    work = 2 * rows * width**2 / 1e9
    for spec, rate in ((linear, 700.0), (fp8, 1400.0)):
        floor = cost.floor_ms(spec, case, "fwd", torch.bfloat16, ceilings)
        assert floor == pytest.approx(work / rate)
    del ceilings["fp8_tflop_s"]
    assert cost.floor_ms(fp8, case, "fwd", torch.bfloat16, ceilings) == pytest.approx(work / 700)
    assert bench.directions(linear) == ("fwd", "bwd", "fwd_bwd")
    assert bench.directions(fp8) == ("fwd",)


def test_inputs_that_are_made_of_random_ones_fit_each_other():
    spec = OPS["linear_fp8"].spec
    cases = {case.name: case for case in spec.cases}
    tokens, weight, scale, bias, *rest = make_values(spec, cases["odd"], torch.bfloat16, "cpu")
    drawn = make_values(OPS["linear"].spec, cases["odd"], torch.bfloat16, "cpu")
    assert tokens.equal(drawn[0]) and bias.equal(drawn[2]) and rest[2].equal(drawn[5])
    assert relative_rms(weight.float() * scale[:, None], drawn[1]) < 0.04
    tokens, *_ = make_values(spec, cases["zero-rows"], torch.bfloat16, "cpu")
    assert tokens[:, ::2].eq(0).all() and tokens[:, 1::2].ne(0).any()


@pytest.mark.parametrize(("factor", "right"), [(1.0, True), (1.015, True), (1.05, False)])
def test_another_backend_may_be_the_slack_above_eager(factor, right):
    """Its error is eager's times a factor, exactly: eager's result, moved away from the truth."""
    spec = OPS["linear_fp8"].spec
    case = next(case for case in spec.cases if case.name == "tiles")
    call = make_values(spec, case, torch.float32, "cpu")
    exact = spec.reference(*widened(call))
    result = exact + factor * (spec.backend("eager").run(*call).double() - exact)
    other = replace(spec.backend("eager"), name="another")
    if right:
        judge(spec, case, other, torch.float32, call, result)
    else:
        with pytest.raises(NearError):
            judge(spec, case, other, torch.float32, call, result)


def test_cases_are_found_by_their_ids():
    found = [find(one)[0].spec.name for one in all_ids()]
    assert set(found) == set(OPS)
    assert find("op/patchify/up-b1/bwd")[1:] == (CASES["up-b1"], "bwd")
    with pytest.raises(
        ValueError, match="no case is called 'op/patchify/up-b9/fwd'; there are op/"
    ):
        find("op/patchify/up-b9/fwd")
    with pytest.raises(ValueError, match="'patchfy' is not an op; there are feed_forward, "):
        op("patchfy")


def test_a_named_backend_never_falls_back(monkeypatch):
    call = make_values(PATCHIFY, CASES["odd"], torch.float32, "cpu")
    assert choose(PATCHIFY, None, call).name == "cpu"
    with pytest.raises(ValueError, match="backend='cuda' cannot run this call: CUDA kernels need"):
        choose(PATCHIFY, "cuda", call)
    monkeypatch.setitem(env.BACKENDS, "patchify", "eager")
    assert choose(PATCHIFY, None, call).name == "eager"
    assert choose(PATCHIFY, "reference", call).name == "reference"
    assert "eager      runs (SNAPKERNELS_BACKEND)" in explain(PATCHIFY, *call)
    monkeypatch.setitem(env.BACKENDS, "patchify", "cuda")
    with pytest.raises(ValueError, match="backend='cuda' cannot run"):
        choose(PATCHIFY, None, call)


def test_a_backend_that_declines_runs_where_it_is_named_only(monkeypatch):
    call = make_values(PATCHIFY, CASES["odd"], torch.float32, "cpu")
    first, *rest = (one for one in PATCHIFY.backends if one.name not in ("cuda", "triton"))
    declining = replace(first, declines=lambda *values: f"{len(values)} values are too few")
    spec = replace(PATCHIFY, backends=(declining, *rest))
    assert choose(spec, None, call).name == rest[0].name
    assert choose(spec, first.name, call) is declining
    assert next(dispatch.candidates(spec, call)).name == first.name
    assert f"{first.name:<10} can, but declines: 3 values are too few" in explain(spec, *call)
    monkeypatch.setitem(env.BACKENDS, "patchify", first.name)
    assert choose(spec, None, call) is declining
    assert f"{first.name:<10} runs (SNAPKERNELS_BACKEND)" in explain(spec, *call)


def test_explain_has_every_backend_its_reason_and_the_sizes(monkeypatch):
    monkeypatch.setattr(env, "INTERPRET", False)
    text = explain(PATCHIFY, *make_values(PATCHIFY, CASES["odd"], torch.float32, "cpu"))
    assert all(backend.name in text for backend in PATCHIFY.backends)
    assert "cpu        runs" in text and "G = 24" in text
    assert "triton     cannot: Triton kernels need a CUDA tensor" in text
    monkeypatch.setattr(dispatch, "has_triton", lambda: False)
    monkeypatch.setattr(env, "INTERPRET", True)
    text = explain(PATCHIFY, *make_values(PATCHIFY, CASES["odd"], torch.float32, "cpu"))
    assert "triton     cannot: the package triton is not installed" in text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", {}),
        ("patchify=cpu, unpatchify=eager,", {"patchify": "cpu", "unpatchify": "eager"}),
    ],
)
def test_backends_are_read_from_the_environment(text, expected):
    assert env.read_backends(text) == expected


@pytest.mark.parametrize("text", ["patchify", "=eager", "patchify=", "a=b=c"])
def test_another_form_is_refused(text):
    with pytest.raises(ValueError, match=r"SNAPKERNELS_BACKEND: .* is not op=backend"):
        env.read_backends(text)


def test_machine_code_faults_are_named():
    good = aot.Report("k", 40, 0, 8192, True, ["LDG.E.128", "STG.E.128"])
    assert aot.faults([good], "sm_90", ("LDG.E.128",), 40) == []
    spills = aot.faults([good._replace(stack=8)], "sm_90", (), 40)
    assert spills == ["k spills 8 bytes"]
    shared = aot.faults([good._replace(shared=200_000)], "sm_80", (), 40)
    assert shared == ["k needs 200000 bytes of shared memory"]
    assert aot.faults([good], "sm_90", (), 39) == ["k has 40 registers, more than 39"]
    assert aot.faults([good], "sm_90", ("HGMMA",), 40) == ["k has no HGMMA"]
    no_products = good._replace(products=False)
    assert aot.faults([no_products], "sm_90", ("HGMMA",), 40) == []
    assert aot.faults([no_products], "sm_90", ("LDG.E.64",), 40) == ["k has no LDG.E.64"]
    assert aot.faults([], "sm_90", (), 40) == ["nothing was launched"]


def test_what_has_no_backward_has_no_gradients_to_prove_or_time():
    forward_only = replace(PATCHIFY.backend("eager"), differentiable=False)
    found = proofs._of_a_case(OPS["patchify"], CASES["odd"], forward_only, torch.float32)
    assert [proof.id for proof in found] == ["op/patchify/odd/fwd eager fp32"]
    spec = replace(PATCHIFY, backends=(forward_only, PATCHIFY.backend("reference")))
    ceilings = {"copy_tb_s": 0.01, "bf16_tflop_s": 0.1}
    op = Op(spec, OPS["patchify"].function)
    rows = bench.bench(op, CASES["tail"], "bwd", torch.float32, CPU, ceilings, rounds=2)
    assert [row["variant"] for row in rows] == ["copy-fp32"]


def test_bench_rows_are_gated_and_in_form():
    ceilings = {"copy_tb_s": 0.01, "bf16_tflop_s": 0.1}
    rows = bench.bench(
        OPS["patchify"], CASES["tail"], "fwd", torch.float32, CPU, ceilings, rounds=3
    )
    assert [row["variant"] for row in rows] == ["cpu-fp32", "eager-fp32", "copy-fp32"]
    for row in rows:
        assert row["gate"] == "ok" and 0 < row["p20"] <= row["value"] <= row["p80"]
        assert row["bytes"] == 2 * 4 * 3 * 2 * 8 * 24
    assert rows[-1]["pct_of_copy"] == 100


def test_forward_and_backward_of_a_sublayer_are_timed_together():
    op = OPS["group_write"]
    case = next(case for case in op.spec.cases if case.name == "one-latent")
    ceilings = {"copy_tb_s": 0.01, "bf16_tflop_s": 0.1}
    assert bench.directions(PATCHIFY) == ("fwd", "bwd")
    assert bench.directions(op.spec) == ("fwd", "bwd", "fwd_bwd")
    rows = {
        direction: bench.bench(op, case, direction, torch.float32, CPU, ceilings, rounds=3)
        for direction in bench.directions(op.spec)
    }
    (forward,), (backward,), (both,) = rows.values()
    assert both["case"] == "layer/group_write/one-latent/fwd_bwd" and both["gate"] == "ok"
    for field in ("floor", "bytes", "tflop"):
        assert both[field] == pytest.approx(forward[field] + backward[field])
    assert "saved_gib" not in both  # that is measured on a GPU


def test_a_row_says_what_its_forward_keeps(monkeypatch):
    kept = bench.Variant("eager", [lambda: None], "ok", saved_gib=0.0312341)
    monkeypatch.setattr(bench, "_variants", lambda *_: iter([kept]))
    ceilings = {"copy_tb_s": 0.01, "bf16_tflop_s": 0.1}
    op, case = OPS["patchify"], CASES["tail"]
    (row,) = bench.bench(op, case, "fwd_bwd", torch.float32, CPU, ceilings, rounds=2)
    assert row["saved_gib"] == 0.031234


def test_a_wrong_backend_is_not_timed(monkeypatch):
    def red(*_):
        raise AssertionError("wrong on purpose")

    monkeypatch.setattr(bench, "values", red)
    ceilings = {"copy_tb_s": 0.01, "bf16_tflop_s": 0.1}
    rows = bench.bench(
        OPS["patchify"], CASES["tail"], "fwd", torch.float32, CPU, ceilings, rounds=3
    )
    red_gate = "AssertionError: wrong on purpose"
    assert [row["gate"] for row in rows] == [red_gate, red_gate, "ok"]
    assert all("value" not in row for row in rows[:2])


def test_what_is_timed_beside_is_gated_and_what_cannot_be_timed_keeps_its_reason(monkeypatch):
    eager, shifted = PATCHIFY.backend("eager").run, lambda *values: eager(*values) + 1
    peers = {"good": eager, "wrong": shifted, "gone": "no.such.module:function"}
    op = Op(replace(PATCHIFY, peers=peers), OPS["patchify"].function)
    sets = [make_values(PATCHIFY, CASES["tail"], torch.float32, "cpu")]
    found = list(bench.beside(op, CASES["tail"], "fwd", torch.float32, sets))
    assert [variant.gate for variant in found] == [
        "ok",
        "WrongError: not the reference, bit for bit",
        "ModuleNotFoundError: No module named 'no'",
    ]
    assert all(variant.peer for variant in found)

    def once_more():
        assert len(calls) < 1, "not again\nand pages of why"
        calls.append(0)

    calls, good = [0], found[0]
    broken = bench.Variant("broken", [once_more], "ok", peer=True)
    monkeypatch.setattr(bench, "_variants", lambda *_: iter([good, broken]))
    ceilings = {"copy_tb_s": 0.01, "bf16_tflop_s": 0.1}
    rows = bench.bench(op, CASES["tail"], "fwd", torch.float32, CPU, ceilings, rounds=2)
    assert [row["gate"] for row in rows] == ["ok", "AssertionError: not again"]
    assert all(row["peer"] for row in rows) and "value" not in rows[1]


def test_what_a_proof_lacks_is_a_thing_that_the_machine_could_have(monkeypatch):
    triton, cuda = PATCHIFY.backend("triton"), PATCHIFY.backend("cuda")
    monkeypatch.setattr(proofs, "_device", lambda backend: "cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    assert proofs._lacks(cuda, "paper") == "a GPU of compute capability 9.0"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(extension, "LIBRARY", extension.CSRC / "no such library")
    assert "nvcc builds it" in proofs._lacks(cuda, "paper")
    # A library that is there but does not load is no lack: its proofs run, and are red.
    monkeypatch.setattr(extension, "LIBRARY", extension.CSRC / "bindings.cpp")
    assert proofs._lacks(cuda, "paper") is None
    monkeypatch.setattr(proofs, "has_triton", lambda: False)
    assert proofs._lacks(triton, "cpu") == "the package triton"
