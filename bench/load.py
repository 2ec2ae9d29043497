"""Clock and power of the GPU while a bench runs."""

import statistics
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from record import query_gpu

FIELDS = {"sm_clock_mhz": "clocks.sm", "power_w": "power.draw"}
INTERVAL_S = 0.5


@contextmanager
def watch_load(device: torch.device) -> Iterator[dict[str, list[float]]]:
    """Yield a dict: once left, {field: [before, median while inside]}, or empty on a CPU."""
    load: dict[str, list[float]] = {}
    before = query_gpu(*FIELDS.values()) if device.type == "cuda" else None
    if before is None:
        yield load
        return
    samples: list[list[str]] = []
    left = threading.Event()

    def sample() -> None:
        while not left.wait(INTERVAL_S):
            if (answer := query_gpu(*FIELDS.values())) is not None:
                samples.append(answer)

    watcher = threading.Thread(target=sample, daemon=True)
    watcher.start()
    try:
        yield load
    finally:
        left.set()
        watcher.join()
        for index, field in enumerate(FIELDS):
            inside = [float(answer[index]) for answer in samples] or [float(before[index])]
            load[field] = [float(before[index]), statistics.median(inside)]
