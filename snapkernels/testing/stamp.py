"""Stamps: what ran on a GPU, at which commit; and whether that is still what the code is."""

import json
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from snapkernels.testing import record

# A change of these makes a stamp stale.
CODE = (
    "csrc",
    "setup.py",
    "snapkernels",
    "snapvideo_core",
    "bench/*.py",
    "tests/*.py",
    ":(exclude)*.md",
)
OUTCOMES = ("passed", "failed", "error", "skipped")


def write(path: Path, tier: str | None, counts: dict[str, int], skipped: dict[str, int]) -> None:
    """Write the stamp of a run to `path`, whole or not at all.

    Args:
        path: of the JSON file.
        tier: of the tests that ran; None for all of them.
        counts: {one of `OUTCOMES`: how many}.
        skipped: {why it could not run: how many}.
    """
    commit, dirty = record.commit()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    stamp = {
        "commit": commit,
        "dirty": dirty,
        "taken": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "device": record.device_fields(device),
        "versions": record.versions(),
        "tier": tier,
        **{outcome: counts.get(outcome, 0) for outcome in OUTCOMES},
        "not_run": skipped,
    }
    record.replace_file(path, json.dumps(stamp, indent=1) + "\n")


def describe(path: Path) -> str:
    """One line of what the stamp at `path` says, and whether it is stale."""
    stamp: dict[str, Any] = json.loads(path.read_text())
    changed = subprocess.run(
        ["git", "-C", str(record.ROOT), "diff", "--quiet", stamp["commit"], "--", *CODE],
        capture_output=True,
    ).returncode
    state = {0: "still current", 1: "STALE: the code has changed since"}
    return (
        f"stamp {path.stem}, tier {stamp['tier'] or 'any'}: {stamp['passed']} passed, "
        f"{stamp['failed'] + stamp['error']} failed on {stamp['device']['name']} "
        f"at {stamp['commit'][:10]}{' (changed)' * stamp['dirty']} ({stamp['taken'][:10]}), "
        f"{state.get(changed, 'its commit is not in this history')}"
    )


def ledger(skipped: dict[str, int]) -> list[str]:
    """Lines that say how much could not run here, why, and which committed stamps close it."""
    lines = [f"{count} not run: this machine lacks {why}" for why, count in skipped.items()]
    return lines + [describe(path) for path in sorted(STAMPS.glob("*.json"))]


STAMPS = record.ROOT / "tests" / "stamps"
