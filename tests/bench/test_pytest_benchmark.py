"""bench/test_ops.py under pytest-benchmark, as a user runs it: what is timed, and what is not."""

import json
import os
import subprocess
import sys
import tomllib

import pytest
import test_ops
import torch

from snapkernels.registry import OPS
from snapkernels.testing import bench, cases, record
from snapkernels.testing.bench import directions
from snapkernels.testing.cost import compulsory_bytes

# pytest-benchmark times nothing beside other workers; nothing here may need the interpreter.
LEFT_OUT = ("PYTEST_XDIST_WORKER", "PYTEST_ADDOPTS", "TRITON_INTERPRET")
TAIL = "op/patchify/tail"


def run(*arguments, **variables):
    """On a CPU, whatever the machine."""
    command = [sys.executable, "-m", "pytest", "bench", "-q", "-p", "no:cacheprovider", *arguments]
    kept = {name: value for name, value in os.environ.items() if name not in LEFT_OUT}
    return subprocess.run(
        command,
        cwd=record.ROOT,
        env=kept | {"CUDA_VISIBLE_DEVICES": ""} | variables,
        capture_output=True,
        text=True,
        timeout=300,
    )


def expected(tier):
    """{id: whether it is the forward of a call with a seed, by eager}."""
    return {
        f"{op.spec.case_id(case, direction)}-{who}": (
            direction == "fwd" and who == "eager" and case.options.get("seed") is not None
        )
        for op in OPS.values()
        for case in op.spec.cases
        if case.tier == tier
        for direction in directions(op.spec)
        for who in ("ours", "eager")
    }


def test_a_case_is_timed_in_each_direction_by_ours_and_by_eager(tmp_path):
    target = tmp_path / "times.json"
    done = run("--benchmark-only", "-k", TAIL, f"--benchmark-json={target}")
    assert done.returncode == 0 and "4 passed" in done.stdout, done.stdout + done.stderr
    found = {one["name"]: one for one in json.loads(target.read_text())["benchmarks"]}
    assert set(found) == {
        f"test_op[{TAIL}/{direction}-{who}]"
        for direction in ("fwd", "bwd")
        for who in ("ours", "eager")
    }
    op, case, _ = cases.find(f"{TAIL}/fwd")
    for name, one in found.items():
        direction = name.partition("]")[0].rpartition("/")[2].partition("-")[0]
        assert one["group"] == f"{TAIL}/{direction}"
        assert one["stats"]["rounds"] == 5 and one["stats"]["median"] > 0
        told = one["extra_info"]
        assert told["variant"] == ("eager-bf16" if "eager" in name else "cpu-bf16")
        assert told["bytes"] == compulsory_bytes(op.spec, case, direction, torch.bfloat16)
        assert 0 < told["floor_ms"] < 1 and told["tflop"] == 0  # it only moves


def test_every_case_of_the_tier_is_collected():
    done = run("--collect-only")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line for line in done.stdout.splitlines() if "::" in line]
    ids = [line.partition("[")[2].removesuffix("]") for line in lines]
    assert sorted(ids) == sorted(expected("cpu"))
    assert all(line.startswith("bench/test_ops.py::test_op[") for line in lines)


def test_on_a_gpu_it_is_the_papers_cases_without_noise_counted_in_eager(monkeypatch):
    collected = {}

    class Metafunc:
        def parametrize(self, names, found, ids):
            collected.update(zip(ids, found, strict=True))

    monkeypatch.setattr(test_ops, "DEVICE", torch.device("cuda"))
    monkeypatch.setattr(test_ops, "TIER", "paper")
    test_ops.pytest_generate_tests(Metafunc())
    wanted = expected("paper")
    assert set(collected) == {one for one, counted in wanted.items() if not counted}
    assert any(wanted.values())
    cased = {case.name for op in OPS.values() for case in op.spec.cases if case.tier == "paper"}
    assert {case.name for _, case, _, _ in collected.values()} == cased


def test_the_records_leave_out_the_same(monkeypatch):
    """Both ask one function; here it is made to answer yes."""
    asked = []
    monkeypatch.setattr(bench, "slow_in_eager", lambda *case: asked.append(case) or True)
    op, case, _ = cases.find(f"{TAIL}/fwd")
    ceilings = {"copy_tb_s": 1.0, "bf16_tflop_s": 1.0}
    cpu = torch.device("cpu")
    rows = bench.bench(op, case, "fwd", torch.bfloat16, cpu, ceilings, rounds=1)
    assert asked == [(case, "fwd", cpu)]
    assert [row["variant"] for row in rows] == ["cpu-bf16", "copy-bf16"]
    assert test_ops.slow_in_eager(case, "fwd", torch.device("cuda")) is False  # it has no seed


PLANT = """
from snapkernels.ops.patch.kernels import cpu
from snapkernels.registry import OPS

wrong = lambda *arguments: cpu.{function}(*arguments) * 1.1
object.__setattr__(OPS["{function}"].spec.backend("cpu"), "run", wrong)
"""


@pytest.mark.parametrize(
    ("function", "red"), [("patchify", "fwd-ours"), ("unpatchify", "bwd-ours")]
)
def test_a_wrong_backend_has_no_time(function, red, tmp_path):
    """The backward of patchify is unpatchify."""
    (tmp_path / "plant.py").write_text(PLANT.format(function=function))
    target = tmp_path / "times.json"
    arguments = ["-p", "plant", "--benchmark-only", "-k", TAIL, f"--benchmark-json={target}"]
    done = run(*arguments, PYTHONPATH=str(tmp_path))
    assert done.returncode == 1 and "1 failed, 3 passed" in done.stdout, done.stdout + done.stderr
    assert "not the reference" in done.stdout
    timed = {one["name"] for one in json.loads(target.read_text())["benchmarks"]}
    assert len(timed) == 3 and f"test_op[{TAIL}/{red}]" not in timed


def test_the_proof_is_of_what_is_timed_and_comes_first(monkeypatch):
    seen = []

    class Benchmark:
        def __init__(self):
            self.extra_info = {}

        def pedantic(self, call, **_):
            seen.append("timed")
            call()

    monkeypatch.setattr(test_ops, "DEVICE", torch.device("cpu"))
    monkeypatch.setattr(test_ops, "ceilings", lambda: {"copy_tb_s": 1.0, "bf16_tflop_s": 1.0})
    monkeypatch.setattr(test_ops, "values", lambda *a: seen.append(("values", a[2].name)))
    monkeypatch.setattr(test_ops, "gradients", lambda *a: seen.append(("gradients", a[2].name)))
    op, case, _ = cases.find(f"{TAIL}/fwd")
    for direction, who in (("fwd", "ours"), ("bwd", "ours"), ("bwd", "eager")):
        test_ops.test_op(Benchmark(), op, case, direction, who)
    assert seen == [
        ("values", "cpu"),
        "timed",
        ("gradients", "cpu"),
        "timed",
        ("gradients", "eager"),
        "timed",
    ]


def test_plain_pytest_leaves_the_benches_alone():
    project = tomllib.loads((record.ROOT / "pyproject.toml").read_text())
    assert project["tool"]["pytest"]["ini_options"]["testpaths"] == ["tests"]
