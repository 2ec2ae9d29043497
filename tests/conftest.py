"""Test tiers (cpu, gpu), the ledger of what could not run here, and the stamp of a GPU run."""

import os
import time
from collections import Counter

# Small tensors: a second thread mostly waits, and waits long on a machine that is busy. NumPy reads
# it when it is imported, and the programs that tests start have it too.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

if not torch.cuda.is_available():
    # Triton and snapkernels read it when they are imported: kernels then run interpreted.
    os.environ.setdefault("TRITON_INTERPRET", "1")

from snapkernels.testing import record, stamp

torch.set_num_threads(1)
ROOM = 20 * 2**30  # bytes
MOST_WAIT = 60  # seconds: a test that another process leaves no room runs all the same


def pytest_addoption(parser):
    parser.addoption(
        "--stamp",
        type=record.record_path,
        help="write what ran, where and of which commit, here",
    )


def pytest_configure(config):
    config.lacking = Counter()


def pytest_collection_modifyitems(config, items):
    """Every test is in the cpu tier unless marked gpu; what this machine lacks is not run."""
    here = []
    for item in items:
        if item.get_closest_marker("gpu") is None:
            item.add_marker(pytest.mark.cpu)
        elif not torch.cuda.is_available():
            config.lacking["an NVIDIA GPU"] += 1
            continue
        proof = getattr(item, "callspec", None) and item.callspec.params.get("proof")
        if proof and proof.lacks:
            config.lacking[proof.lacks] += 1
            continue
        here.append(item)
    left = [item for item in items if item not in set(here)]
    if left:
        config.hook.pytest_deselected(items=left)
        items[:] = here


def pytest_runtest_setup(item):
    """Beside other workers a test waits for the memory that most of the large ones take."""
    if item.get_closest_marker("gpu") and "PYTEST_XDIST_WORKER" in os.environ:
        until = time.monotonic() + MOST_WAIT
        while torch.cuda.mem_get_info()[0] < ROOM and time.monotonic() < until:
            time.sleep(0.2)


def pytest_runtest_teardown(item):
    """What a test leaves cached of the GPU's memory is another process's to take."""
    if item.get_closest_marker("gpu"):
        torch.cuda.empty_cache()


def pytest_sessionfinish(session):
    """Under xdist every worker collects all tests, and the process that reports collects none."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["lacking"] = dict(session.config.lacking)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    if hasattr(node, "workeroutput"):  # not if it crashed
        node.config.lacking = Counter(node.workeroutput["lacking"])


def pytest_terminal_summary(terminalreporter, config):
    if config.lacking:
        terminalreporter.section("not run here")
        for line in stamp.ledger(config.lacking):
            terminalreporter.line(line)
    counts = {kind: len(terminalreporter.stats.get(kind, [])) for kind in stamp.OUTCOMES}
    if (target := config.getoption("--stamp")) and counts["passed"]:
        stamp.write(target, config.getoption("-m"), counts, config.lacking)
        terminalreporter.line(f"stamp written to {target}")


@pytest.fixture
def gpu():
    """The GPU, for tests marked gpu."""
    return torch.device("cuda")


@pytest.fixture
def rng():
    """A seeded generator on the CPU."""
    return torch.Generator().manual_seed(0)
