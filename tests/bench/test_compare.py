"""Two trees compared: verdicts of figures made up here, and runs of small trees and of this one."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import compare
import pytest

from snapkernels.testing import record

FWD = "op/patchify/tail/fwd"


def row(value, variant="cuda-bf16", case=FWD, gate="ok", **more):
    """A row of a record; one that is red has no value."""
    figures = {"value": value} if gate == "ok" else {}
    return {"case": case, "variant": variant, "unit": "ms", "gate": gate} | figures | more


def runs(*values, **others):
    """A run a value: ours takes so long, eager one millisecond."""
    return [[row(value, **others), row(1.0, "eager-bf16")] for value in values]


def verdict_of(base, head, tolerance=0.01, key=(FWD, "cuda-bf16")):
    found = compare.verdicts(base, head, tolerance)
    return next(one for one in found if (one["case"], one["variant"]) == key)


@pytest.mark.parametrize(
    ("head", "verdict"),
    [(2.0, "same"), (2.03, "same"), (2.05, "slower"), (1.95, "faster"), (1.97, "same")],
)
def test_a_difference_is_called_one_beyond_the_tolerance(head, verdict):
    found = verdict_of(runs(2.0, 2.0), runs(head, head), tolerance=0.02)
    assert found["verdict"] == verdict and found["noise"] == 0
    assert found["ratio"] == pytest.approx(head / 2)
    assert (found["base"], found["head"]) == (2.0, head)
    assert compare.is_worse(found) == (verdict == "slower")


def test_less_than_a_percent_is_never_a_difference():
    for head in (2.019, 1.981):
        assert verdict_of(runs(2.0), runs(head), tolerance=0)["verdict"] == "same"
    assert verdict_of(runs(2.0), runs(2.021), tolerance=0)["verdict"] == "slower"


def test_the_spread_over_the_rounds_is_noise():
    """A median of 1.1 is a regression where every round says so, and not where they disagree."""
    steady = verdict_of(runs(1.0, 1.0, 1.0), runs(1.09, 1.1, 1.11))
    assert steady["verdict"] == "slower" and steady["noise"] == pytest.approx(0.01)
    torn = verdict_of(runs(1.0, 1.0, 1.0), runs(0.95, 1.1, 1.2))
    assert torn["verdict"] == "same" and torn["noise"] == pytest.approx(0.125)
    assert torn["ratios"] == pytest.approx([0.95, 1.1, 1.2])


def test_one_odd_round_does_not_decide():
    found = verdict_of(runs(1.0, 1.0, 1.0, 1.0, 1.0), runs(1.0, 1.0, 1.9, 1.0, 1.0))
    assert found["ratio"] == 1 and found["verdict"] == "same"


def test_a_gpu_that_slows_down_from_round_to_round_is_not_a_regression():
    clocks = (1.0, 1.3, 1.6, 2.0)
    drifting = [[row(2 * c), row(c, "eager-bf16")] for c in clocks]
    found = verdict_of(drifting, drifting)
    assert (found["ratio"], found["noise"], found["verdict"]) == (1, 0, "same")


def test_a_control_that_strays_is_noise():
    base = [[row(1.0), row(1.0, "eager-bf16")]] * 3
    head = [[row(1.2), row(1.25, "eager-bf16")]] * 3
    found = verdict_of(base, head)
    assert found["verdict"] == "same" and found["noise"] == pytest.approx(0.25)
    assert verdict_of(base, head, key=(FWD, "eager-bf16"))["verdict"] == "control"
    elsewhere = [[row(1.2), row(1.25, "eager-fp32"), row(1.25, "eager-bf16", "op/other/fwd")]] * 3
    before = [[row(1.0), row(1.0, "eager-fp32"), row(1.0, "eager-bf16", "op/other/fwd")]] * 3
    assert verdict_of(before, elsewhere)["verdict"] == "slower"  # of another dtype, another case


def test_without_eager_the_copy_is_the_control():
    base, head = ([[row(one), row(one, "copy-bf16")]] for one in (1.0, 1.1))
    assert verdict_of(base, head)["verdict"] == "same"
    for run in (*base, *head):
        run.append(row(1.0, "eager-bf16"))
    assert verdict_of(base, head)["verdict"] == "slower"  # eager's word comes first


def test_host_time_is_that_of_the_whole_call_beside_pytorchs_own():
    """Beyond the backend's own a call may take no time at all: the row's value is no measure."""

    def run(call, torch):
        host = {"call": call, "backend": 9.0, "torch": torch}
        return [row(call - 9.0, "eager-bf16", "op/patchify/tail/call", host_us=host)]

    key = ("op/patchify/tail/call", "call-bf16")
    found = verdict_of([run(9.0, 1.0)], [run(10.0, 1.0)], key=key)
    assert found["verdict"] == "slower" and found["ratio"] == pytest.approx(10 / 9)
    assert verdict_of([run(9.0, 1.0)], [run(10.0, 1.2)], key=key)["verdict"] == "same"


@pytest.mark.parametrize(
    ("base", "head", "verdict", "worse"),
    [
        ("ok", "WrongError: 1e-1", "red gate", True),
        ("WrongError: 1e-1", "WrongError: 1e-1", "red gate", False),
        ("WrongError: 1e-1", "ok", "red gate", False),
        (None, "WrongError: 1e-1", "red gate", True),
        (None, "ok", "only in head", False),
        ("ok", None, "only in base", False),
    ],
)
def test_red_gates_and_missing_rows_have_no_ratio(base, head, verdict, worse):
    sides = [
        [[row(1.0, gate=gate)] if gate else [], [row(1.0, gate=gate)] if gate else []]
        for gate in (base, head)
    ]
    (found,) = compare.verdicts(*sides, 0.01)
    assert found["verdict"] == verdict and compare.is_worse(found) == worse
    assert found["gates"] == {"base": base, "head": head} and "ratio" not in found
    assert ("1e-1" in compare.line(found)) == (verdict == "red gate")


def test_a_gate_that_is_red_in_one_round_is_red():
    flaky = [[row(1.0)], [row(1.0, gate="WrongError: two runs differ")], [row(1.0)]]
    (found,) = compare.verdicts([[row(1.0)]] * 3, flaky, 0.01)
    assert found["verdict"] == "red gate" and compare.is_worse(found)
    lost = [[row(1.0)], [], [row(1.0)]]
    (found,) = compare.verdicts([[row(1.0)]] * 3, lost, 0.01)
    assert found["verdict"] == "red gate" and found["gates"]["head"] == compare.NOT_ALWAYS


def test_peers_and_compiled_eager_are_not_ours():
    base = [[row(1.0, "flash-attn-bf16", peer=True), row(1.0, "compile-bf16"), row(1.0)]]
    head = [[row(9.0, "flash-attn-bf16", peer=True), row(9.0, "compile-bf16"), row(1.0)]]
    assert [one["variant"] for one in compare.verdicts(base, head, 0.01)] == ["cuda-bf16"]


FAKE = """
import json, os, sys
from pathlib import Path

here = Path(__file__).resolve().parent
cases = {cases!r}
if sys.argv[1] == "list":
    for case in cases:
        print(f"  {{case:<36}} cpu    bf16")
    sys.exit()
log = here.parent.parent / "log"
with log.open("a") as told:
    print(here.parent.name, os.environ.get("SNAPKERNELS_COMMIT"), *sys.argv[2:-1], file=told)
target = Path(sys.argv[-1])
{act}
commit = os.environ.get("SNAPKERNELS_COMMIT", "unknown")
rows = [
    {{"case": case, "variant": variant, "unit": "ms", "gate": "ok", "value": value}}
    for case in cases
    for variant, value in (("cuda-bf16", {value}), ("eager-bf16", 1.0))
]
taken = {{"commit": commit, "dirty": False, "command": "bench", "taken": "2026-01-01T00:00:00Z"}}
target.write_text(json.dumps(taken | {{"device": {{"name": "a GPU"}}, "rows": rows}}))
{end}
"""


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """Makes a tree whose bench writes down that it was called, and figures made up here."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(compare.tempfile, "tempdir", str(scratch))
    monkeypatch.delenv("SNAPKERNELS_COMMIT", raising=False)

    def make(name, value=1.0, cases=(FWD,), act="", end=""):
        package = tmp_path / name / "snapkernels"
        package.mkdir(parents=True)
        (package / "__init__.py").touch()
        source = FAKE.format(cases=cases, value=value, act=act, end=end)
        (package / "__main__.py").write_text(source)
        return str(tmp_path / name)

    yield make
    assert list(scratch.iterdir()) == []  # nothing is left, whatever happened


def told(tmp_path):
    return [line.split() for line in (tmp_path / "log").read_text().splitlines()]


def test_trees_take_turns_and_swap_their_order_every_round(tree, tmp_path, capsys):
    target = tmp_path / "verdicts.json"
    arguments = [tree("old"), tree("new", 1.5), "--case", "patchify", "--rounds", "3"]
    assert compare.main([*arguments, "--json", str(target)]) == 1
    assert [words[0] for words in told(tmp_path)] == ["old", "new", "new", "old", "old", "new"]
    assert {tuple(words[2:]) for words in told(tmp_path)} == {("--case", "patchify", "--json")}
    out = capsys.readouterr().out
    assert "1 slower, 1 control" in out and "1.500" in out
    written = json.loads(target.read_text())
    assert str(tmp_path) not in target.read_text()
    assert (written["schema"], written["rounds"], written["tolerance_pct"]) == (1, 3, 1.0)
    assert written["device"] == "a GPU" and written["commits"]["base"]["commit"] == "unknown"
    ours = next(one for one in written["rows"] if one["variant"] == "cuda-bf16")
    assert ours["ratios"] == [1.5] * 3 and ours["verdict"] == "slower"


@pytest.mark.parametrize("value", [1.0, 0.5])
def test_what_is_no_slower_ends_well(value, tree):
    assert compare.main([tree("old"), tree("new", value), "--rounds", "1"]) == 0


def test_a_case_of_one_tree_alone_is_timed_there_alone(tree, tmp_path, capsys):
    other = "op/stem/new/fwd"
    old, new = tree("old"), tree("new", cases=(FWD, other))
    assert compare.main([old, new, "--case", "stem", "patchify", "--rounds", "1"]) == 0
    assert [words[2:-1] for words in told(tmp_path)] == [
        ["--case", "patchify"],
        ["--case", "stem", "patchify"],
    ]
    assert compare.main([new, old, "--case", "stem", "--rounds", "2"]) == 0
    assert "only in base" in capsys.readouterr().out
    assert [words[0] for words in told(tmp_path)[2:]] == ["new", "new"]


def error_of(capsys, *arguments):
    assert compare.main([*arguments, "--rounds", "1"]) == 2
    (error,) = (line for line in capsys.readouterr().err.splitlines() if "error: " in line)
    return error


def test_bad_input_is_one_line(tree, tmp_path, capsys):
    old = tree("old")
    wrong = error_of(capsys, old, "no-such-revision")
    assert wrong == "error: no-such-revision is neither a folder nor a revision of this repository"
    (tmp_path / "empty").mkdir()
    assert "empty does not hold this package" in error_of(capsys, str(tmp_path / "empty"), old)
    wrong = error_of(capsys, old, tree("new"), "--case", "patchify", "gone")
    assert wrong == "error: neither tree has a case with 'gone' in its name"
    assert not (tmp_path / "log").exists()  # nothing was timed before
    for flags in (
        ["--rounds", "0"],
        ["--tolerance", "-1"],
        ["--tolerance", "x"],
        ["--json", "no/f"],
    ):
        with pytest.raises(SystemExit, match="2"):
            compare.main([old, *flags])


CUT_OFF = "target.write_text(target.read_text().replace('\"bench\"', '\"bench (so far)\"'))\n"


@pytest.mark.parametrize(
    "failure",
    [
        {"act": "raise RuntimeError('illegal memory access')"},
        {
            "end": "print('x: illegal memory access', file=sys.stderr); os._exit(134)"
        },  # after its record
        {
            "end": f"{CUT_OFF}raise SystemExit('illegal memory access')"
        },  # with a record of its start
    ],
)
def test_a_bench_that_fails_is_told_by_its_last_line(failure, tree, tmp_path, capsys):
    target = tmp_path / "verdicts.json"
    wrong = error_of(capsys, tree("old"), tree("new", **failure), "--json", str(target))
    assert wrong.startswith("error: bench failed in head: ")
    assert wrong.endswith("illegal memory access") and not target.exists()


def test_a_red_bench_is_no_failure_of_the_bench(tree):
    """It ends in 1, as one does that raised, but its record is whole."""
    assert compare.main([tree("old"), tree("new", end="sys.exit(1)"), "--rounds", "1"]) == 0


@pytest.fixture
def history(tree, tmp_path, monkeypatch):
    """A repository of two such trees, the second slower; its root is the working tree."""

    def git(*arguments):
        identity = ("-c", "user.name=x", "-c", "user.email=x@example.org")
        command = ["git", "-C", root, *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    root = tree("repository")
    monkeypatch.setattr(compare, "ROOT", tmp_path / "repository")
    Path(root, ".gitignore").write_text("__pycache__")
    git("init", "-q")
    for name, value in (("first", 1.0), ("second", 2.0)):
        source = Path(tree(name, value), "snapkernels/__main__.py").read_text()
        source = source.replace("here.parent.parent", f"Path({str(tmp_path)!r})")  # of the log
        Path(root, "snapkernels/__main__.py").write_text(source)
        git("add", ".")
        git("commit", "-qm", name)
        git("tag", name)
    return git


def test_a_revision_is_unpacked_timed_under_its_commit_and_leaves_no_trace(
    history, tmp_path, capsys
):
    before = history("status", "--porcelain"), history("worktree", "list")
    assert compare.main(["first", "second", "--rounds", "1"]) == 1
    commits = [history("rev-parse", name) for name in ("first", "second")]
    assert [words[:2] for words in told(tmp_path)] == [
        ["base", commits[0]],
        ["head", commits[1]],
    ]
    assert f"base: {commits[0][:12]}\nhead: {commits[1][:12]}\n" in capsys.readouterr().out
    # This tree, which was the second, is the head where none is named.
    assert compare.main(["second", "--rounds", "1"]) == 0
    assert told(tmp_path)[-1][0] == "repository"
    assert (history("status", "--porcelain"), history("worktree", "list")) == before


def test_the_variable_names_this_tree_and_no_other_folder(tree, tmp_path, monkeypatch):
    old, here = tree("old"), tree("here")
    monkeypatch.setattr(compare, "ROOT", (tmp_path / "here").resolve())
    monkeypatch.setenv("SNAPKERNELS_COMMIT", "0" * 40)
    assert compare.main([old, here, "--rounds", "1"]) == 0
    assert [words[:2] for words in told(tmp_path)] == [["old", "None"], ["here", "0" * 40]]


@pytest.fixture
def library(tree, tmp_path, monkeypatch):
    """Two trees with sources alike, the working one with its library, on a machine with a GPU."""
    for name in ("here", "other"):
        root = tmp_path / name
        tree(name)
        (root / "csrc").mkdir()
        (root / "csrc" / "a.cu").write_text("a")
        (root / "snapkernels" / "extension.py").write_text("hash")
        (root / "setup.py").write_text("from pathlib import Path\nimport os, sys\n")
        with (root / "setup.py").open("a") as script:
            script.write("assert 'SNAPKERNELS_BUILD' not in os.environ, 'told how to build'\n")
            script.write("Path('snapkernels/_cuda.so').write_text(' '.join(sys.argv[1:]))\n")
            script.write("print('snapkernels: built', file=sys.stderr)\n")
    monkeypatch.setenv("SNAPKERNELS_BUILD", "0")
    monkeypatch.setattr(compare, "ROOT", tmp_path / "here")
    monkeypatch.setattr(compare.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(compare.extension, "load", lambda: None)
    monkeypatch.setattr(compare.extension, "LIBRARY", tmp_path / "here/snapkernels/_cuda.so")
    compare.extension.LIBRARY.write_text("of here")
    return tmp_path / "other"


BUILT = "--quiet build_ext --inplace"


@pytest.mark.parametrize(
    ("change", "library_is"),
    [(None, "of here"), ("csrc/a.cu", BUILT), ("snapkernels/extension.py", BUILT)],
)
def test_a_library_is_copied_where_its_sources_are_the_same(change, library_is, library):
    if change:
        (library / change).write_text("changed")
    compare.place_library(compare.Tree(library, "c" * 40))
    assert (library / "snapkernels/_cuda.so").read_text() == library_is


def test_a_library_of_this_tree_that_is_out_of_date_is_not_copied(library, monkeypatch):
    monkeypatch.setattr(compare.extension, "load", lambda: "built from other sources than these")
    compare.place_library(compare.Tree(library, "c" * 40))
    assert (library / "snapkernels/_cuda.so").read_text() == BUILT


def test_a_library_that_does_not_build_is_told_by_its_last_line(library):
    (library / "setup.py").write_text("raise SystemExit('error: the CUDA kernels do not compile')")
    with pytest.raises(compare.CompareError, match="do not build: error: the CUDA kernels do not"):
        compare.place_library(compare.Tree(library, "c" * 40))


def test_without_a_gpu_no_library_is_built(library, monkeypatch):
    monkeypatch.setattr(compare.torch.cuda, "is_available", lambda: False)
    compare.place_library(compare.Tree(library, "c" * 40))
    assert not (library / "snapkernels/_cuda.so").exists()


def compared(*arguments):
    """This tree's bench as a user compares it; five times as slow is within what a test allows."""
    case = ["--case", "op/patchify/tail", "--rounds", "1", "--tolerance", "400"]
    command = [sys.executable, "bench/compare.py", *arguments, *case]
    return subprocess.run(command, cwd=record.ROOT, capture_output=True, text=True, timeout=300)


def test_this_tree_is_no_slower_than_itself(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    target = tmp_path / "verdicts.json"
    done = compared(str(record.ROOT), "--json", str(target))
    assert done.returncode == 0, done.stderr
    written = json.loads(target.read_text())
    assert written["commits"]["base"] == written["commits"]["head"]
    verdicts = {
        (one["case"].rpartition("/")[2], one["variant"]): one["verdict"] for one in written["rows"]
    }
    ours = {("fwd", "cpu-bf16"), ("bwd", "cpu-fp32"), ("call", "call-bf16")}
    assert {verdicts[key] for key in ours} == {"same"}
    assert verdicts["fwd", "eager-bf16"] == verdicts["call", "torch-bf16"] == "control"


def test_a_sleep_in_a_backend_is_a_regression(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    left_out = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(record.ROOT / "snapkernels", tmp_path / "snapkernels", ignore=left_out)
    backend = tmp_path / "snapkernels/ops/patch/kernels/cpu.py"
    entry = "    layout = PatchLayout(size, patch, group)\n"  # of unpatchify, patchify's backward
    source = backend.read_text()
    assert source.count(entry) == 1
    backend.write_text(source.replace(entry, f"    __import__('time').sleep(5e-3)\n{entry}"))
    target = tmp_path / "verdicts.json"
    done = compared(str(record.ROOT), str(tmp_path), "--json", str(target))
    assert done.returncode == 1, done.stderr
    rows = json.loads(target.read_text())["rows"]
    slower = {(one["case"], one["variant"]) for one in rows if one["verdict"] == "slower"}
    assert slower == {("op/patchify/tail/bwd", f"cpu-{dtype}") for dtype in ("bf16", "fp32")}
