"""Records: one JSON form for every measured figure, and where the committed ones lie."""

import argparse
import json
import os
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from snapkernels import env

SCHEMA = 1
SOURCE = (".py", ".cu", ".cuh", ".cpp", ".h")
ROOT = Path(__file__).resolve().parents[2]
RECORDS = ROOT / "bench" / "records"

FIELDS = ("schema", "commit", "dirty", "taken", "command", "device", "versions", "ceilings", "rows")
ROW_FIELDS = ("case", "variant", "batch", "unit", "better", "gate", "includes")
MEASURED_FIELDS = ("value", "p20", "p80", "floor", "pct_of_floor", "tflop")
# What was measured: a row whose gate is red has none of it.
FIGURES = ("value", "p20", "p80", "pct_of_floor", "tb_s", "pct_of_copy", "saved_gib", "peak_gib")


def new_record(
    command: str,
    device: torch.device,
    load: dict[str, list[float]],
    ceilings: dict[str, float],
    rows: list[dict[str, Any]],
) -> dict[str, Any]:
    """A record of `rows`, with where, when and of which commit they were measured.

    Args:
        command: what was run, without paths of this machine.
        device: where it ran.
        load: "sm_clock_mhz" and "power_w", each [before, under load]; empty on a CPU.
        ceilings: as `snapkernels.roofline.measure_ceilings` gives them.
        rows: see DESIGN.md, "Records".
    """
    head, dirty = commit()
    return {
        "schema": SCHEMA,
        "commit": head,
        "dirty": dirty,
        "taken": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "command": command,
        "device": device_fields(device) | load,
        "versions": versions(),
        "ceilings": {name: round(value, 3) for name, value in ceilings.items()},
        "rows": rows,
    }


def problems(record: dict[str, Any]) -> list[str]:
    """What is wrong with the form of `record`; empty when nothing is."""
    found = [f"field {name!r} is missing" for name in FIELDS if name not in record]
    if record.get("schema") != SCHEMA:
        found.append(f"schema is {record.get('schema')!r}, not {SCHEMA}")
    for index, row in enumerate(record.get("rows", [])):
        wanted = ROW_FIELDS + (MEASURED_FIELDS if row.get("gate") == "ok" else ())
        found += [f"row {index}: {name!r} is missing" for name in wanted if name not in row]
        told = [name for name in FIGURES if name in row and row.get("gate") != "ok"]
        found += [f"row {index}: {name!r} beside gate {row.get('gate')!r}" for name in told]
    return found


def write(record: dict[str, Any], path: Path) -> None:
    """Write `record` to `path`, whole or not at all.

    Raises:
        ValueError: the record is not in form.
    """
    if wrong := problems(record):
        raise ValueError(f"{path}: {'; '.join(wrong)}")
    replace_file(path, json.dumps(record, indent=1) + "\n")


SO_FAR = " (so far)"


def command_so_far(command: str, *, done: bool) -> str:
    """`command` as a record names it: of a run that goes on, which may be cut off, it says so."""
    return command if done else command + SO_FAR


def is_cut_off(record: dict[str, Any]) -> bool:
    """Whether `record` is of a run that did not come to its end."""
    return str(record["command"]).endswith(SO_FAR)


def without_figure(row: dict[str, Any], reason: str) -> dict[str, Any]:
    """`row` with `reason` as its gate, and without what was measured."""
    told = {name: value for name, value in row.items() if name not in FIGURES}
    return told | {"gate": reason}


def replace_file(path: Path, text: str) -> None:
    """Write `text` to `path`, whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    os.replace(partial, path)


def file_path(text: str) -> Path:
    """The argument of a program that names a file to write, refused before anything is measured.

    Raises:
        argparse.ArgumentTypeError: there can be no such file.
    """
    path = Path(text)
    if path.is_dir() or not os.access(path.resolve().parent, os.W_OK):
        raise argparse.ArgumentTypeError(
            f"{path}: it must be a file in a folder that exists and can be written to"
        )
    return path


def record_path(text: str) -> Path:
    """Likewise of a record.

    Raises:
        argparse.ArgumentTypeError: there can be no such file, or the tree has a history whose HEAD
            is another commit than SNAPKERNELS_COMMIT.
    """
    named, head = env.commit(), commit()[0]
    if named and named != head:
        raise argparse.ArgumentTypeError(
            f"SNAPKERNELS_COMMIT is {named}, but HEAD of this tree is {head}"
        )
    return file_path(text)


def newest(what: str) -> tuple[Path, dict[str, Any]] | None:
    """The newest committed record whose file is named <date>-`what`.json, or None."""
    found = [(path, json.loads(path.read_text())) for path in RECORDS.glob(f"*/*-{what}.json")]
    return max(found, key=lambda pair: pair[1]["taken"], default=None)


def commit() -> tuple[str, bool]:
    """HEAD and whether the tree differs from it, new source files included.

    A clean tree copied without its history names its commit in SNAPKERNELS_COMMIT.
    """
    try:
        if _git("rev-parse", "--show-prefix"):
            raise OSError(f"{ROOT} lies in some other repository")
        head = _git("rev-parse", "HEAD")
        changes = _git("status", "--porcelain", "--untracked-files=all").splitlines()
    except (OSError, subprocess.CalledProcessError):
        named = env.commit()
        return named or "unknown", not named
    return head, any(not c.startswith("??") or c.endswith(SOURCE) for c in changes)


def _git(*arguments: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(ROOT), *arguments], check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


def device_fields(device: torch.device) -> dict[str, Any]:
    """Name, count and, of a GPU, driver."""
    if device.type != "cuda":
        return {"name": f"CPU, {platform.machine()}, {torch.get_num_threads()} threads", "count": 1}
    driver = query_gpu(device, "driver_version")
    return {
        "name": torch.cuda.get_device_name(device),
        "count": 1,
        "driver": driver[0] if driver else "unknown",
    }


def versions() -> dict[str, Any]:
    """Versions of what a figure depends on."""
    found: dict[str, Any] = {"python": platform.python_version(), "torch": torch.__version__}
    if torch.version.cuda:
        import triton

        found |= {
            "cuda": torch.version.cuda,
            "triton": triton.__version__,
            "cudnn": torch.backends.cudnn.version(),
        }
    return found


def query_gpu(device: torch.device, *fields: str) -> list[str] | None:
    """What nvidia-smi says of `device`, a string a field; None where it does not answer."""
    uuid = torch.cuda.get_device_properties(device).uuid
    query = f"--query-gpu={','.join(fields)}"
    command = ["nvidia-smi", f"--id=GPU-{uuid}", query, "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return [field.strip() for field in done.stdout.splitlines()[0].split(",")]
