"""Going on with the record of a run that was cut off, and what of it is measured again."""

import json
from pathlib import Path
from typing import Any

import torch

from snapkernels.testing.record import command_so_far, new_record, problems

SLOWED = "the GPU was slowed down"  # the gate of a row that may be green another time


def resumed(path: Path, command: str, device: torch.device) -> dict[str, Any] | None:
    """The record at `path`, without what is to be measured again; None where there is none yet.

    Raises:
        ValueError: it is no record, or of another command, commit, device or version than this
            run, or of a tree with changes, which may be others.
    """
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text())
        wrong = problems(found)
    except (ValueError, AttributeError, TypeError):
        wrong = ["it is no record"]
    if wrong:
        raise ValueError(f"--resume {path}: {'; '.join(wrong)}")
    now = new_record(command, device, {}, {}, [])
    if found["command"] == command_so_far(command, done=False):
        found["command"] = command
    for field in ("command", "commit", "versions"):
        if found[field] != now[field]:
            raise ValueError(f"--resume {path}: its {field} is {found[field]}, here {now[field]}")
    if found["device"]["name"] != now["device"]["name"]:
        raise ValueError(f"--resume {path}: it is of a {found['device']['name']}")
    if found["dirty"] or now["dirty"]:
        raise ValueError(f"--resume {path}: a tree has changes: commit them first")
    again = {group_of(row) for row in found["rows"] if row["gate"].startswith(SLOWED)}
    found["rows"] = [row for row in found["rows"] if group_of(row) not in again]
    return found


def group_of(row: dict[str, Any]) -> tuple[str, str]:
    """The model and variant of a row: what is measured together."""
    return row["case"].split("/")[1], row["variant"]
