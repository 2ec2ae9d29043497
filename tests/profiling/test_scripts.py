"""ncu.sh and nsys.sh with and without their tools, which fakes on PATH stand for here."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

PROFILING = Path(__file__).resolve().parents[2] / "profiling"
CASE = "op/patchify/odd/fwd"
NCU = "--profile-from-start off --clock-control none --set full --nvtx -f -o"
NSYS = "profile -c cudaProfilerApi --capture-range-end stop -t cuda,nvtx -f true -o"
# The fakes write a report where -o says, and leave their arguments beside themselves.
RECORDS = """
printf '%s\\n' "$@" >"$(dirname "$0")/arguments"
while [ "$1" != -o ]; do shift; done
echo report >"$2.$(basename "$0")-rep"
echo profiled
"""
REFUSED = """
while [ "$1" != -o ]; do shift; done
echo half >"$2.ncu-rep"
echo '==PROF== Connected to process 1'
echo '==ERROR== ERR_NVGPUCTRPERM - The user does not have permission to access counters'
exit 1
"""


@pytest.fixture
def place(tmp_path):
    """A copy of the scripts, and a PATH with nothing but the commands that they need."""
    (tmp_path / "bin").mkdir()
    for name in ("sh", "dirname", "basename", "tr", "mkdir", "rm", "cat", "grep"):
        (tmp_path / "bin" / name).symlink_to(shutil.which(name))
    for tool in ("ncu", "nsys"):
        shutil.copy(PROFILING / f"{tool}.sh", tmp_path)
    return tmp_path


def fake(place, tool, source):
    path = place / "bin" / tool
    path.write_text(f"#!/bin/sh\n{source}")
    path.chmod(0o755)


def run(place, tool, *arguments, **environment):
    return subprocess.run(
        ["/bin/sh", str(place / f"{tool}.sh"), *arguments],
        env={"PATH": str(place / "bin"), **environment},
        capture_output=True,
        text=True,
    )


def left(place):
    return [path.name for path in (place / "out").glob("*")]


@pytest.mark.parametrize("tool", ["ncu", "nsys"])
def test_a_missing_tool_is_named(place, tool):
    done = run(place, tool, CASE)
    assert done.returncode == 3 and done.stdout == ""
    (said,) = done.stderr.splitlines()
    assert said.startswith(f"{tool}.sh: {tool} is not on PATH") and "package nsight-" in said
    assert not (place / "out").exists()


@pytest.mark.parametrize("arguments", [[], ["--help"], ["--repeats", "3"]])
@pytest.mark.parametrize("tool", ["ncu", "nsys"])
def test_a_case_comes_first(place, tool, arguments):
    done = run(place, tool, *arguments)
    assert done.returncode == 2 and "usage: " in done.stderr


def test_the_arguments_of_ncu(place):
    fake(place, "ncu", RECORDS)
    done = run(place, "ncu", CASE, "--repeats", "2", PYTHON="a python")
    out = f"{place}/out/op_patchify_odd_fwd"
    assert (place / "bin" / "arguments").read_text().splitlines() == [
        *NCU.split(),
        *[out, "a python", f"{place}/run_case.py", CASE, "--repeats", "2"],
    ]
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout.splitlines() == ["profiled", f"{out}.ncu-rep"]
    assert left(place) == ["op_patchify_odd_fwd.ncu-rep"]


def test_the_arguments_of_nsys(place):
    fake(place, "nsys", RECORDS)
    done = run(place, "nsys", CASE, "--warmup", "1")
    out = f"{place}/out/op_patchify_odd_fwd"
    assert (place / "bin" / "arguments").read_text().splitlines() == [
        *NSYS.split(),
        *[out, "python3", f"{place}/run_case.py", CASE, "--warmup", "1"],
    ]
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == f"{out}.nsys-rep"


def test_refused_counters_leave_one_line(place):
    fake(place, "ncu", REFUSED)
    done = run(place, "ncu", CASE)
    assert done.returncode == 4 and done.stdout == ""
    (said,) = done.stderr.splitlines()
    assert "ERR_NVGPUCTRPERM" in said
    assert left(place) == []


@pytest.mark.parametrize("tool", ["ncu", "nsys"])
def test_a_failure_is_passed_on_and_leaves_no_earlier_report(place, tool):
    fake(place, tool, RECORDS)
    assert run(place, tool, CASE).returncode == 0
    fake(place, tool, "echo 'it broke'; exit 7")
    done = run(place, tool, CASE)
    assert done.returncode == 7 and "it broke" in done.stdout
    assert left(place) == []


@pytest.mark.parametrize("tool", ["ncu", "nsys"])
def test_a_tool_that_writes_no_report_has_failed(place, tool):
    fake(place, tool, "echo 'nothing to see'")
    done = run(place, tool, CASE)
    assert done.returncode == 1 and "wrote no report" in done.stderr


def test_git_ignores_the_reports():
    assert (PROFILING / ".gitignore").read_text().split() == ["out/"]


@pytest.mark.parametrize("tool", ["ncu", "nsys"])
def test_the_scripts_can_be_run(tool):
    assert os.access(PROFILING / f"{tool}.sh", os.X_OK)
