"""python -m snapkernels: list, explain, check, bench."""

import contextlib
import json
import os
import subprocess
import sys

import pytest
import torch

from snapkernels import __main__ as command
from snapkernels import env
from snapkernels.testing import load, record, stamp
from snapkernels.testing.proofs import Proof


def test_list_names_everything(capsys):
    assert command.main(["list"]) == 0
    out = capsys.readouterr().out
    for name in ("group_write", "op/patchify/up-b1/fwd", "seeded bugs", *env.VARIABLES):
        assert name in out


def test_explain_a_case(capsys):
    assert command.main(["explain", "op/patchify/up-b1/fwd"]) == 0
    assert "fwd in bf16: 0 GFLOP, 28.31 MB" in capsys.readouterr().out
    assert command.main(["explain", "op/patchify/gone/fwd"]) == 2
    assert "no case is called 'op/patchify/gone/fwd'" in capsys.readouterr().err


def test_check_in_a_process_of_its_own_interprets_triton(tmp_path):
    """Without a GPU it starts itself again with the interpreter on, and keeps a stamp."""
    target = tmp_path / "stamp.json"
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "snapkernels",
            "check",
            "--only",
            "ify/tail",
            "--stamp",
            target,
        ],
        capture_output=True,
        text=True,
        cwd=record.ROOT,
        env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 failed" in done.stdout
    written = json.loads(target.read_text())
    assert written["failed"] == written["error"] == 0 < written["passed"]
    if not torch.cuda.is_available():
        assert "not run: this machine lacks an NVIDIA GPU" in done.stdout
        assert written["not_run"]["an NVIDIA GPU"] > 0


def red():
    raise AssertionError("not what the reference says")


def broken():
    raise RuntimeError("illegal memory access")


def test_check_says_what_is_red_and_what_was_not_run(monkeypatch, capsys):
    listed = [
        Proof("op/a fine", None, lambda: None),
        Proof("op/a wrong", None, red),
        Proof("op/a broken", None, broken),
        Proof("op/a mutant eager: bug", None, lambda: None),
        Proof("op/a elsewhere", "a machine from the future", red),
    ]
    monkeypatch.setattr(command.proofs, "proofs", lambda: iter(listed))
    monkeypatch.setattr(env, "INTERPRET", True)
    assert command.main(["check"]) == 1
    out = capsys.readouterr().out
    assert "RED  op/a wrong: not what the reference says" in out
    assert "RED  op/a broken: RuntimeError: illegal memory access" in out
    assert "2 passed, 2 failed; seeded bugs among them: 1" in out
    assert command.main(["check", "--only", "elsewhere"]) == 1  # nothing ran
    assert "1 not run: this machine lacks a machine from the future" in out
    assert command.main(["check", "--only", "nothing like it"]) == 2
    for path in ("no/such/folder/s.json", "tests"):
        with pytest.raises(SystemExit, match="2"):
            command.main(["check", "--stamp", path])
    monkeypatch.setitem(env.BACKENDS, "patchify", "gone")
    assert command.main(["list"]) == 2


def test_bench_writes_a_record(tmp_path, capsys, monkeypatch):
    ceilings = {"copy_tb_s": 0.01, "bf16_tflop_s": 0.1}
    monkeypatch.setattr(command.roofline, "measure_ceilings", lambda device: ceilings)
    target = tmp_path / "record.json"
    arguments = ["bench", "--case", "op/patchify/tail", "--rounds", "2", "--json", str(target)]
    assert command.main(arguments) == 0
    written = json.loads(target.read_text())
    assert record.problems(written) == []
    cases = {row["case"] for row in written["rows"]}
    assert cases == {f"op/patchify/tail/{what}" for what in ("fwd", "bwd", "call")}
    call = next(row for row in written["rows"] if row["case"].endswith("call"))
    assert call["unit"] == "us" and call["host_us"]["call"] > call["host_us"]["backend"]
    assert "% of a copy" in capsys.readouterr().out
    assert command.main(["bench", "--case", "no such case"]) == 2


def test_bench_has_no_figure_of_a_gpu_that_is_shared_or_was_slowed_down(monkeypatch, capsys):
    arguments = ["bench", "--case", "op/patchify/tail", "--rounds", "1"]
    ceilings = {"copy_tb_s": 0.01, "bf16_tflop_s": 0.1}
    monkeypatch.setattr(command.roofline, "measure_ceilings", lambda _: ceilings)
    with monkeypatch.context() as shared:
        shared.setattr(command.Load, "shared", lambda _: "the GPU is shared: it is 97 % busy")
        assert command.main(arguments) == 2
        assert "error: the GPU is shared: it is 97 % busy" in capsys.readouterr().err
    monkeypatch.setattr(command.Load, "watched", lambda _: contextlib.nullcontext(slowed()))
    assert command.main(arguments) == 1
    told = capsys.readouterr().out.splitlines()
    assert told and all("no figure: the GPU was slowed down: hardware" in line for line in told)


def slowed():
    window = load.Window()
    window.slowdowns.add("hardware slowdown")
    return window


def test_a_bench_that_is_cut_off_leaves_what_it_measured(tmp_path, monkeypatch):
    ceilings = {"copy_tb_s": 0.01, "bf16_tflop_s": 0.1}
    monkeypatch.setattr(command.roofline, "measure_ceilings", lambda device: ceilings)
    real = command.bench.bench

    def cut_off(op, case, *others, **options):
        if case.name != "tail":
            raise KeyboardInterrupt
        return real(op, case, *others, **options)

    monkeypatch.setattr(command.bench, "bench", cut_off)
    target = tmp_path / "record.json"
    parts = ["op/patchify/tail", "op/unpatchify/odd"]
    with pytest.raises(KeyboardInterrupt):
        command.main(["bench", "--case", *parts, "--rounds", "1", "--json", str(target)])
    written = json.loads(target.read_text())
    assert record.problems(written) == []
    assert written["command"].endswith(f"bench --case {' '.join(parts)} (so far)")
    assert {row["case"].rpartition("/")[0] for row in written["rows"]} == {"op/patchify/tail"}


def test_bench_times_a_sublayer_forward_backward_and_both(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    ceilings = {"copy_tb_s": 0.01, "bf16_tflop_s": 0.1}
    monkeypatch.setattr(command.roofline, "measure_ceilings", lambda device: ceilings)
    target, case = tmp_path / "record.json", "layer/group_read/one-latent"
    assert command.main(["bench", "--case", case, "--rounds", "1", "--json", str(target)]) == 0
    written = json.loads(target.read_text())
    assert record.problems(written) == []
    timed = dict.fromkeys(row["case"] for row in written["rows"])
    assert list(timed) == [f"{case}/{what}" for what in ("fwd", "bwd", "fwd_bwd", "call")]


def test_bench_times_fp8_forward_alone_and_several_cases_in_one_record(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    ceilings = {"copy_tb_s": 10.0, "bf16_tflop_s": 1e-5, "fp8_tflop_s": 2e-5}
    monkeypatch.setattr(command.roofline, "measure_ceilings", lambda device: ceilings)
    target = tmp_path / "record.json"
    parts = ["layer/feed_forward_fp8/one-token", "/linear_fp8/one"]
    arguments = ["bench", "--case", *parts, "--rounds", "1", "--json", str(target)]
    assert command.main(arguments) == 0
    written = json.loads(target.read_text())
    assert record.problems(written) == []
    assert written["command"] == f"python -m snapkernels bench --case {' '.join(parts)}"
    names = [f"layer/{op}/one-token" for op in ("linear_fp8", "feed_forward_fp8")]
    assert {row["case"] for row in written["rows"]} == {
        f"{name}/{what}" for name in names for what in ("fwd", "call")
    }
    # 4 M D F operations at the rate of e4m3 products.
    floor = 4 * 24 * 96 / 2e7 * 1e3
    eager = next(row for row in written["rows"] if row["case"] == f"{names[1]}/fwd")
    assert eager["variant"] == "eager-bf16" and eager["floor"] == pytest.approx(floor)
    assert eager["pct_of_floor"] == pytest.approx(100 * floor / eager["value"], abs=0.06)


def test_each_part_of_a_case_chooses_what_its_machine_times():
    def chosen(*parts, tier="paper"):
        return {op.spec.case_id(case, "fwd") for op, case in command._chosen([*parts], tier)}

    up, small = "layer/feed_forward_fp8/patch-up/fwd", "layer/linear_fp8/odd/fwd"
    assert chosen("feed_forward_fp8/patch-up", "linear_fp8/odd") == {up, small}
    both = chosen("layer/feed_forward")
    assert {up, "layer/feed_forward/3.9b/fwd"} < both
    assert "layer/feed_forward_fp8/odd/fwd" not in both
    assert chosen("fp8/") <= chosen("") and small in chosen("fp8/", tier="cpu")
    with pytest.raises(ValueError, match="no case has 'gone' in its name"):
        chosen("fp8", "gone")


@pytest.mark.parametrize(("more", "code"), [({"peer": True}, 0), ({}, 1)])
def test_a_red_peer_is_not_our_failure(more, code, monkeypatch, capsys):
    def rows(op, case, direction, *_, **__):
        row = {"case": op.spec.case_id(case, direction), "variant": "x-fp32", "gate": "ok"}
        timed = {"unit": "ms", "value": 1.0, "p20": 1.0, "p80": 1.0}
        return [row | timed, row | {"gate": "TypeError: no"} | more]

    monkeypatch.setattr(command.roofline, "measure_ceilings", lambda device: {})
    monkeypatch.setattr(command.bench, "bench", rows)
    assert command.main(["bench", "--case", "layer/group_write/one-latent"]) == code
    # Nor does it keep the host time of a call from being measured.
    assert ("/call " in capsys.readouterr().out) == (code == 0)


@pytest.fixture
def a_stamp(tmp_path, monkeypatch):
    def write(commit):
        monkeypatch.setattr(record, "commit", lambda: (commit, False))
        stamp.write(tmp_path / "gpu.json", "gpu", {"passed": 3, "failed": 1}, {"a thing": 2})
        return stamp.describe(tmp_path / "gpu.json")

    return write


def test_a_stamp_says_when_the_code_has_changed_since(a_stamp):
    head = subprocess.run(
        ["git", "-C", record.ROOT, "rev-parse", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    if not head:
        pytest.skip("a tree without its git history")
    first = subprocess.run(
        ["git", "-C", record.ROOT, "rev-list", "--max-parents=0", "HEAD"],
        capture_output=True,
        text=True,
    ).stdout.split()[0]
    assert "3 passed, 1 failed" in a_stamp(head)
    assert "STALE: the code has changed since" in a_stamp(first)
    assert "its commit is not in this history" in a_stamp("0" * 40)
