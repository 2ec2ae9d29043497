"""Medians of repeated calls: CUDA events on a GPU, the wall clock on a CPU."""

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch


class Timing(NamedTuple):
    """Milliseconds of one call: median, 20th and 80th percentile."""

    median: float
    p20: float
    p80: float

    @classmethod
    def of(cls, samples: list[float]) -> "Timing":
        """Summarise samples in milliseconds."""
        ordered = sorted(samples)
        last = len(ordered) - 1
        return cls(
            statistics.median(ordered), ordered[round(0.2 * last)], ordered[round(0.8 * last)]
        )


def measure(
    call: Callable[[], object],
    device: torch.device,
    *,
    repeats: int,
    warmup: int = 2,
    progress: Callable[[int], None] = lambda done: None,
) -> Timing:
    """Time `call` after `warmup` calls, `repeats` times; `progress` hears how many are done.

    On a GPU a call is timed between two CUDA events with the queue drained before it, so that
    launch latency at the start of a call is inside.

    Raises:
        ValueError: repeats < 1.
    """
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, got {repeats}")
    for _ in range(warmup):
        call()
    one = _cuda_call if device.type == "cuda" else _cpu_call
    samples = []
    for done in range(repeats):
        samples.append(one(call))
        progress(done + 1)
    return Timing.of(samples)


def _cuda_call(call: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def _cpu_call(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e3
