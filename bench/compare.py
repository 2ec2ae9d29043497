"""Two commits timed in turns on one GPU: what became faster or slower, beyond noise.

python bench/compare.py v0.5 --case patchify/up-b1 stem           # a revision, and this tree
python bench/compare.py main topic --case latent_attention --rounds 9 --json verdicts.json

BASE and HEAD are folders that hold a tree or, where there is no such folder, git revisions; HEAD is
this tree where it is left out. A revision is unpacked into a folder that goes afterwards. Every
round runs `python -m snapkernels bench` in the one and in the other, and the next round in the
other order, so that a GPU that warms up slows down both.

Code 0: nothing is slower; 1: something is, or a gate is red that was not; 2: bad input.
"""

import argparse
import json
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from support import positive_int, say

from snapkernels import extension
from snapkernels.testing.record import ROOT, file_path, is_cut_off, replace_file

SCHEMA = 1
SIDES = ("base", "head")
# The same code in both trees: eager PyTorch, a copy, PyTorch's own `zero_` beside a call.
CONTROLS = ("eager", "copy", "torch")
LEAST = 0.01  # no smaller difference is ever called one
NOT_ALWAYS = "has no row in some of the rounds"
# What a library is built from, and the hash by which it is refused, beside csrc.
BUILD_FILES = ("setup.py", "snapkernels/extension.py")

Rows = list[dict[str, Any]]
Key = tuple[str, str]


class CompareError(Exception):
    """What was asked for cannot be compared; the message is one line for the user."""


class Tree(NamedTuple):
    """What is timed: a folder and, where it was unpacked from the repository, its commit."""

    folder: Path
    commit: str | None


def main(arguments: list[str] | None = None) -> int:
    """Compare two trees; 0, 1 or 2 as at the top of this file."""
    args = _parse(arguments)
    try:
        with tempfile.TemporaryDirectory(prefix="snapkernels-compare-") as scratch:
            named = zip(SIDES, (args.base, args.head), strict=True)
            trees = {side: checked_out(text, Path(scratch, side)) for side, text in named}
            records = measure(trees, args.case, args.rounds, Path(scratch))
    except CompareError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    base, head = ([one["rows"] for one in records[side]] or [[]] * args.rounds for side in SIDES)
    rows = verdicts(base, head, args.tolerance / 100)
    result = as_json(records, rows, args)
    print_table(result)
    if args.json:
        replace_file(args.json, json.dumps(result, indent=1) + "\n")
    return int(any(map(is_worse, rows)))


def verdicts(base: list[Rows], head: list[Rows], tolerance: float) -> Rows:
    """What became of every case and variant.

    Times are compared by the median of their ratios, one a round. The noise of it is the larger of
    half the spread of these ratios, and how far the control's ratio is from 1: that of eager
    PyTorch in the same case and dtype, else of the copy. The host time of a call has `zero_`.

    Args:
        base, head: the rows of a record a round; round i of both ran one after the other.
        tolerance: a fraction that a difference must have above its noise.

    Returns:
        A row each: "case", "variant", "unit", "verdict" ("faster", "slower", "same", "red gate",
        "only in base", "only in head" or, of the controls, "control"), "gates" {side: "ok", the
        reason, or None where there is no row}; where both gates are ok, "base" and "head" (medians
        over the rounds, in "unit"), "ratio" (head to base), "ratios" by round, and "noise".
    """
    sides = {"base": [_compared(rows) for rows in base], "head": [_compared(rows) for rows in head]}
    keys = dict.fromkeys(key for rounds in sides.values() for rows in rounds for key in rows)
    found: dict[Key, dict[str, Any]] = {}
    for key in keys:
        gates = {side: _gate(key, rounds) for side, rounds in sides.items()}
        units = [rows[key]["unit"] for rounds in sides.values() for rows in rounds if key in rows]
        found[key] = {"case": key[0], "variant": key[1], "unit": units[0], "gates": gates}
        if set(gates.values()) == {"ok"}:
            ours, theirs = ([rows[key]["value"] for rows in sides[side]] for side in SIDES)
            ratios = [other / one for one, other in zip(ours, theirs, strict=True)]
            found[key] |= {
                "base": statistics.median(ours),
                "head": statistics.median(theirs),
                "ratio": statistics.median(ratios),
                "ratios": ratios,
            }
    for (case, variant), row in found.items():
        if "ratio" in row:
            controls = [f"{name}-{variant.rpartition('-')[2]}" for name in CONTROLS]
            strays = [
                abs(found[case, control]["ratio"] - 1)
                for control in controls
                if "ratio" in found.get((case, control), {})
            ]
            half_spread = (max(row["ratios"]) - min(row["ratios"])) / 2
            row["noise"] = max(half_spread, *strays[:1], 0.0)
        row["verdict"] = _verdict(row, tolerance)
    return list(found.values())


def is_worse(row: dict[str, Any]) -> bool:
    """Whether a row of `verdicts` is a regression: of time, or a gate that was not red before."""
    was_red, red = (row["gates"][side] not in (None, "ok") for side in SIDES)
    return row["verdict"] == "slower" or (red and not was_red)


def _compared(rows: Rows) -> dict[Key, dict[str, Any]]:
    """The rows of one run that are ours or controls.

    What a call costs the host is compared whole, whichever backend it ends in: what is beyond the
    backend's own is a difference of two times, and may be nothing.
    """
    found: dict[Key, dict[str, Any]] = {}
    for row in rows:
        name, _, dtype = row["variant"].rpartition("-")
        if "host_us" in row:
            for timed in ("call", "torch"):
                found[row["case"], f"{timed}-{dtype}"] = row | {"value": row["host_us"][timed]}
        elif name != "compile" and "peer" not in row:
            found[row["case"], row["variant"]] = row
    return found


def _gate(key: Key, rounds: list[dict[Key, dict[str, Any]]]) -> str | None:
    """ "ok" if it was in every round, else why not; None of what was in no round."""
    gates = [rows[key]["gate"] if key in rows else NOT_ALWAYS for rows in rounds]
    red = [gate for gate in gates if gate != "ok"]
    return None if set(gates) == {NOT_ALWAYS} else next(iter(red), "ok")


def _verdict(row: dict[str, Any], tolerance: float) -> str:
    base, head = (row["gates"][side] for side in SIDES)
    if {base, head} - {None, "ok"}:
        return "red gate"
    if base is None or head is None:
        return "only in head" if base is None else "only in base"
    if row["variant"].rpartition("-")[0] in CONTROLS:
        return "control"
    change = row["ratio"] - 1
    if abs(change) <= max(row["noise"] + tolerance, LEAST):
        return "same"
    return "slower" if change > 0 else "faster"


def checked_out(text: str, target: Path) -> Tree:
    """The tree that `text` names: a folder as it is, or a revision, unpacked into `target`.

    Raises:
        CompareError: it names neither, or what it names does not hold this package.
    """
    if Path(text).is_dir():
        tree = Tree(Path(text).resolve(), None)
    else:
        commit = _git("rev-parse", "--verify", f"{text}^{{commit}}", of=text).strip()
        packed = target.with_suffix(".zip")
        _git("archive", "--format=zip", f"--output={packed}", commit, of=text)
        shutil.unpack_archive(packed, target)
        tree = Tree(target, commit)
    if not (tree.folder / "snapkernels" / "__main__.py").is_file():
        raise CompareError(f"{text} does not hold this package: no snapkernels/__main__.py in it")
    if tree.commit:
        place_library(tree)
    return tree


def place_library(tree: Tree) -> None:
    """Give a fresh tree its CUDA kernels where there is a GPU: this tree's, or what is built of it.

    Raises:
        CompareError: they do not build.
    """
    if not torch.cuda.is_available() or not (tree.folder / "csrc").is_dir():
        return
    if extension.load() is None and _built_of(tree.folder) == _built_of(ROOT):
        shutil.copy(extension.LIBRARY, tree.folder / "snapkernels")
        return
    say(f"building the CUDA kernels of {tree.commit}")
    environment = {name: value for name, value in os.environ.items() if name != "SNAPKERNELS_BUILD"}
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=tree.folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise CompareError(f"the CUDA kernels of {tree.commit} do not build: {_last_line(done)}")
    say(_last_line(done))


def _built_of(folder: Path) -> tuple[int, list[bytes]]:
    files = [(folder / name).read_bytes() for name in BUILD_FILES]
    return extension.source_hash(folder / "csrc"), files


def measure(
    trees: dict[str, Tree], parts: list[str], rounds: int, scratch: Path
) -> dict[str, list[dict[str, Any]]]:
    """{side: its records, one a round}; none of a tree that has no case with such a part.

    Raises:
        CompareError: neither tree has a case with some part in its name, or a bench failed.
    """
    cases = {side: _python(side, tree, "list").stdout for side, tree in trees.items()}
    ids = {side: re.findall(r"^ +(\S+/\S+/\S+/fwd) ", text, re.M) for side, text in cases.items()}
    having = {side: [p for p in parts if any(p in one for one in ids[side])] for side in SIDES}
    for part in parts:
        if not any(part in found for found in having.values()):
            raise CompareError(f"neither tree has a case with {part!r} in its name")
    records: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    for number in range(rounds):
        for side in SIDES if number % 2 == 0 else reversed(SIDES):
            if having[side]:
                say(f"round {number + 1} of {rounds}: {side}")
                target = scratch / f"{side}-{number}.json"
                records[side].append(_record(side, trees[side], having[side], target))
    return records


def _record(side: str, tree: Tree, parts: list[str], target: Path) -> dict[str, Any]:
    """What `python -m snapkernels bench` writes; it ends in 1 also where a gate is red."""
    done = _python(side, tree, "bench", "--case", *parts, "--json", str(target), red_is=1)
    record = json.loads(target.read_text()) if target.is_file() else None
    if record is None or is_cut_off(record):
        raise CompareError(f"bench failed in {side}: {_last_line(done)}")
    return record


def _python(
    side: str, tree: Tree, *arguments: str, red_is: int = 0
) -> subprocess.CompletedProcess[str]:
    """Run `python -m snapkernels` with `arguments` in `tree`.

    A revision is named in SNAPKERNELS_COMMIT. Where the caller names one, it is this tree's.
    """
    path = os.pathsep.join(filter(None, [str(tree.folder), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PYTHONPATH": path}
    if tree.commit:
        environment["SNAPKERNELS_COMMIT"] = tree.commit
    elif tree.folder != ROOT:
        environment.pop("SNAPKERNELS_COMMIT", None)
    command = [sys.executable, "-m", "snapkernels", *arguments]
    done = subprocess.run(command, cwd=tree.folder, env=environment, capture_output=True, text=True)
    if done.returncode not in (0, red_is):
        raise CompareError(f"{arguments[0]} failed in {side}: {_last_line(done)}")
    return done


def _git(*arguments: str, of: str) -> str:
    try:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise CompareError(f"{of} is neither a folder nor a revision of this repository") from error


def _last_line(done: subprocess.CompletedProcess[str]) -> str:
    lines = done.stderr.strip().splitlines()
    return lines[-1] if lines else f"it ended with code {done.returncode} and said nothing"


def as_json(
    records: dict[str, list[dict[str, Any]]], rows: Rows, args: argparse.Namespace
) -> dict[str, Any]:
    """What --json writes.

    "schema"; "commits": {side: "commit" and "dirty", as its records have them, or None where the
    tree has none of the cases}; "device", its name; "taken", when the first run ended; "rounds";
    "tolerance_pct"; and "rows", as `verdicts` returns them.
    """
    runs = [record for side in SIDES for record in records[side]]
    return {
        "schema": SCHEMA,
        "commits": {
            side: {name: taken[0][name] for name in ("commit", "dirty")} if taken else None
            for side, taken in records.items()
        },
        "device": runs[0]["device"]["name"],
        "taken": min(record["taken"] for record in runs),
        "rounds": args.rounds,
        "tolerance_pct": args.tolerance,
        "rows": rows,
    }


def print_table(result: dict[str, Any]) -> None:
    """A line a row, and how often each verdict fell."""
    for side, of in result["commits"].items():
        commit = of and of["commit"][:12] + " and changes" * of["dirty"]
        print(f"{side}: {commit or 'has none of these cases'}")
    above = f"{result['tolerance_pct']:g} % above noise"
    print(f"{result['device']}; {result['rounds']} rounds; {above}")
    columns = ("case", "variant", "base", "head", "head/base", "noise")
    print("{:<36} {:<14} {:>10} {:>10} {:>12} {:>8}".format(*columns))
    for row in result["rows"]:
        print(line(row))
    fallen = [row["verdict"] for row in result["rows"]]
    print(", ".join(f"{fallen.count(one)} {one}" for one in dict.fromkeys(fallen)))


def line(row: dict[str, Any]) -> str:
    """A row of `verdicts` as it is printed, with the reason of a red gate."""
    start = f"{row['case']:<36} {row['variant']:<14}"
    if "ratio" in row:
        unit, scale = ("us", 1e3) if row["unit"] == "ms" else (row["unit"], 1)
        times = f"{scale * row['base']:10.2f} {scale * row['head']:10.2f} {unit}"
        return f"{start} {times} {row['ratio']:9.3f}  {100 * row['noise']:5.1f} %  {row['verdict']}"
    reasons = [f"{side}: {gate}" for side, gate in row["gates"].items() if gate not in (None, "ok")]
    return f"{start} {'; '.join([row['verdict'], *reasons])}"


def _percent(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number from 0 up, got {text!r}")
    return value


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("base", metavar="BASE", help="a folder or a git revision")
    parser.add_argument(
        "head", metavar="HEAD", nargs="?", default=str(ROOT), help="likewise (this tree)"
    )
    parser.add_argument(
        "--case",
        nargs="+",
        default=[""],
        metavar="PART",
        help="cases with this in their name, as bench takes them; several allowed",
    )
    parser.add_argument("--rounds", type=positive_int, default=5, help="runs of each tree (5)")
    parser.add_argument(
        "--tolerance", type=_percent, default=1.0, metavar="PCT", help="percent above noise (1)"
    )
    parser.add_argument("--json", type=file_path, metavar="FILE", help="write the verdicts here")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
