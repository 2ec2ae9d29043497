"""Test tiers (cpu, gpu), the ledger of what could not run here, and the stamp of a GPU run."""

import json
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import pytest
import record
import torch

# Small tensors: a second thread mostly waits, and waits long on a machine that is busy.
torch.set_num_threads(1)

STAMPS = Path(__file__).resolve().parent / "stamps"
STAMPED_CODE = ("snapkernels", "snapvideo_core", "bench/*.py", "tests/*.py")


def pytest_addoption(parser):
    parser.addoption("--stamp", type=Path, help="write what ran, where and of which commit, here")


def pytest_configure(config):
    target = config.getoption("--stamp")
    if target and not target.resolve().parent.is_dir():
        raise pytest.UsageError(f"--stamp {target}: its folder does not exist")


def pytest_collection_modifyitems(config, items):
    """Every test is in the cpu tier unless marked gpu; the gpu tier waits for a GPU."""
    config.left_for_a_gpu = []
    for item in items:
        if item.get_closest_marker("gpu") is None:
            item.add_marker(pytest.mark.cpu)
        elif not torch.cuda.is_available():
            config.left_for_a_gpu.append(item)
    if config.left_for_a_gpu:
        config.hook.pytest_deselected(items=config.left_for_a_gpu)
        items[:] = [item for item in items if item not in config.left_for_a_gpu]


def pytest_terminal_summary(terminalreporter, config):
    left = getattr(config, "left_for_a_gpu", [])
    if left:
        terminalreporter.section("not run here")
        terminalreporter.line(f"{len(left)} tests of the gpu tier: no NVIDIA GPU on this machine")
        for path in sorted(STAMPS.glob("*.json")):
            terminalreporter.line(_describe(path))
    counts = {kind: len(terminalreporter.stats.get(kind, [])) for kind in _OUTCOMES}
    if (target := config.getoption("--stamp")) and counts["passed"]:
        _write_stamp(target, config.getoption("-m"), counts)
        terminalreporter.line(f"stamp written to {target}")


_OUTCOMES = ("passed", "failed", "error", "skipped")


def _write_stamp(target, tier, counts):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    commit, dirty = record.commit()
    stamp = {
        "commit": commit,
        "dirty": dirty,
        "taken": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "device": record.device_fields(device),
        "versions": record.versions(),
        "tier": tier,
        **counts,
    }
    target.write_text(json.dumps(stamp, indent=1) + "\n")


def _describe(path):
    stamp = json.loads(path.read_text())
    changed = subprocess.run(
        ["git", "-C", str(record.ROOT), "diff", "--quiet", stamp["commit"], "--", *STAMPED_CODE],
        capture_output=True,
    ).returncode
    state = {0: "still current", 1: "STALE: the code has changed since"}
    return (
        f"stamp {path.stem}: {stamp['passed']} passed, {stamp['failed'] + stamp['error']} failed "
        f"on {stamp['device']['name']} at {stamp['commit'][:10]} ({stamp['taken'][:10]}), "
        f"{state.get(changed, 'its commit is not in this history')}"
    )


@pytest.fixture
def gpu():
    """The GPU, for tests marked gpu."""
    return torch.device("cuda")


@pytest.fixture
def rng():
    """A seeded generator on the CPU."""
    return torch.Generator().manual_seed(0)
