"""Clock and power of the GPU, before a bench and while it times."""

import statistics
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from snapkernels.testing.record import query_gpu

FIELDS = {"sm_clock_mhz": "clocks.sm", "power_w": "power.draw"}
INTERVAL_S = 1.0  # a query may hold up the launches of a program that waits for its host


class Load:
    """Samples of `device`'s clock and power: one when made, the others while `watched`."""

    def __init__(self, device: torch.device):
        self.device = device
        self.before = self._sample()
        self.inside: list[dict[str, float]] = []

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Sample from time to time while inside."""
        left = threading.Event()

        def watch() -> None:
            while not left.wait(INTERVAL_S):
                self.inside.append(self._sample())

        watcher = threading.Thread(target=watch, daemon=True)
        if self.before:
            watcher.start()
        try:
            yield
        finally:
            left.set()
            if self.before:
                watcher.join()

    def fields(self) -> dict[str, list[float]]:
        """{field: [before, median while watched]}; a field the GPU does not tell is left out."""
        return {
            name: [self.before[name], statistics.median(told)]
            for name in self.before
            if (told := [sample[name] for sample in self.inside if name in sample])
        }

    def _sample(self) -> dict[str, float]:
        if self.device.type != "cuda":
            return {}
        answers = query_gpu(self.device, *FIELDS.values()) or []
        numbers = zip(FIELDS, answers, strict=False)
        return {name: float(text) for name, text in numbers if text.replace(".", "").isdigit()}
