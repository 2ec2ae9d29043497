"""run_case.py replays any case anywhere, and says in one line what it ran."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from run_case import main

from snapkernels.testing.bench import sets_needed

SCRIPT = Path(__file__).resolve().parents[2] / "profiling" / "run_case.py"


def run(*arguments, **environment):
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments],
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )


def stub_nvtx(folder, source):
    (folder / "nvtx.py").write_text(source)
    return {"PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])}


RECORDING = """
import contextlib
@contextlib.contextmanager
def annotate(name):
    print("range", name)
    yield
"""


def test_a_case_runs_in_a_range_of_its_name(tmp_path):
    done = run("op/patchify/odd/fwd", "--repeats", "2", **stub_nvtx(tmp_path, RECORDING))
    assert done.returncode == 0, done.stderr
    named, ran = done.stdout.splitlines()
    assert named == "range op/patchify/odd/fwd"
    assert ran.startswith("op/patchify/odd/fwd: ") and "2 profiled calls" in ran
    assert done.stderr == ""


def test_it_goes_on_without_nvtx(tmp_path):
    missing = stub_nvtx(tmp_path, "raise ImportError('no module named nvtx')")
    done = run("op/patchify/odd/fwd", **missing)
    assert done.returncode == 0
    assert len(done.stdout.splitlines()) == 1
    (said,) = done.stderr.splitlines()
    assert "nvtx" in said


@pytest.mark.parametrize("direction", ["fwd", "bwd", "fwd_bwd"])
@pytest.mark.parametrize("dtype", ["bf16", "fp32", "fp64"])
def test_every_direction_and_dtype(capsys, direction, dtype):
    case = f"op/unpatchify/odd/{direction}"
    assert main([case, "--backend", "eager", "--dtype", dtype, "--warmup", "0"]) == 0
    ran = capsys.readouterr().out
    assert f"{case}: eager, {'bfloat16' if dtype == 'bf16' else f'float{dtype[2:]}'}" in ran


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["op/patchify/gone/fwd"], "no case is called 'op/patchify/gone/fwd'"),
        (["op/patchify/odd/fwd", "--backend", "gone"], "backend='gone' is not one of"),
    ],
)
def test_what_does_not_exist_is_named(capsys, arguments, why):
    assert main(arguments) == 2
    said = capsys.readouterr()
    assert said.out == "" and why in said.err and len(said.err.splitlines()) == 1


@pytest.mark.parametrize(
    ("flag", "value"),
    [("--dtype", "int4"), ("--repeats", "0"), ("--repeats", "many"), ("--warmup", "-1")],
)
def test_a_wrong_value_is_named(capsys, flag, value):
    with pytest.raises(SystemExit) as stopped:
        main(["op/patchify/odd/fwd", flag, value])
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert flag in said and value in said


@pytest.mark.parametrize(
    ("device", "moved", "sets"),
    [
        ("cpu", 10, 2),
        ("cuda", 10, 48),
        ("cuda", 64_000_000, 4),
        ("cuda", 200_000_000, 2),
        ("cuda", 9_000_000_000, 2),
    ],
)
def test_sets_leave_the_l2(device, moved, sets):
    assert sets_needed(torch.device(device), moved) == sets


@pytest.mark.gpu
def test_the_profiler_is_on_for_the_repeats_alone(monkeypatch, capsys, gpu):
    done = []
    monkeypatch.setattr(torch.cuda.profiler, "start", lambda: done.append("start"))
    monkeypatch.setattr(torch.cuda.profiler, "stop", lambda: done.append("stop"))
    assert main(["op/patchify/odd/fwd", "--repeats", "60"]) == 0
    assert done == ["start", "stop"]
    assert torch.cuda.get_device_name() in capsys.readouterr().out
