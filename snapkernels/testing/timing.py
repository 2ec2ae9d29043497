"""Medians of repeated calls: CUDA events on a GPU, the wall clock on a CPU."""

import statistics
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch


class Timing(NamedTuple):
    """Time of one call: median, 20th and 80th percentile, in the samples' unit."""

    median: float
    p20: float
    p80: float

    @classmethod
    def of(cls, samples: list[float]) -> "Timing":
        """Summarise `samples`, all in one unit."""
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

    On a GPU the calls follow each other with one always queued ahead, as in a loop that uses the
    results, and a call lasts from one CUDA event to the next: launch latency counts only where the
    GPU waits for it.

    Raises:
        ValueError: repeats < 1.
    """
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, got {repeats}")
    for _ in range(warmup):
        call()
    samples = []
    for sample in (_cuda_samples if device.type == "cuda" else _cpu_samples)(call, repeats):
        samples.append(sample)
        progress(len(samples))
    return Timing.of(samples)


def _cuda_samples(call: Callable[[], object], repeats: int) -> Iterator[float]:
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    marks[0].record()
    for done in range(1, repeats + 1):
        call()
        marks[done].record()
        if done > 1:
            marks[done - 1].synchronize()
            yield marks[done - 2].elapsed_time(marks[done - 1])
    marks[-1].synchronize()
    yield marks[-2].elapsed_time(marks[-1])


def _cpu_samples(call: Callable[[], object], repeats: int) -> Iterator[float]:
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        yield (time.perf_counter() - start) * 1e3
