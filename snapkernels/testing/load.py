"""Clock, power and slowdowns of the GPU, before a bench and while it times."""

import statistics
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from snapkernels.testing.record import query_gpu
from snapkernels.testing.timing import measure

FIELDS = {"sm_clock_mhz": "clocks.sm", "power_w": "power.draw"}
REASONS = "clocks_event_reasons.active"
FIRST_S = 0.2  # into what is watched: a case may last half a second
INTERVAL_S = 1.0  # a query may hold up the launches of a program that waits for its host
# Bits of `REASONS` that no figure survives. A power cap is none: it is a figure's own doing.
SLOWDOWNS = {
    0x08: "hardware slowdown",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "hardware power brake",
}
SHARED_GIB, SHARED_BUSY_PCT = 2.0, 10.0  # a context of ours takes 0.5 GiB, and an idle GPU 0 %
PROBE_SIZE, PROBE_CALLS = 8192, 200  # twice so many take an H100 0.6 s


class Load:
    """Samples of `device`'s clock and power: one when made, the others while `watched`."""

    def __init__(self, device: torch.device):
        self.device = device
        self.before, _ = self._sample()
        self.inside: list[dict[str, float]] = []

    @contextmanager
    def watched(self) -> Iterator["Window"]:
        """Sample from time to time while inside; what was seen is in the window afterwards."""
        left, window = threading.Event(), Window()

        def look() -> None:
            sample, slowdowns = self._sample()
            window.samples.append(sample)
            window.slowdowns |= slowdowns

        def watch() -> None:
            wait = FIRST_S
            while not left.wait(wait):
                look()
                wait = INTERVAL_S

        watcher = threading.Thread(target=watch, daemon=True)
        if self.before:
            watcher.start()
        try:
            yield window
        finally:
            left.set()
            if self.before:
                watcher.join()
                if not window.samples:  # it was over before the first
                    look()
            self.inside += window.samples

    def fields(self) -> dict[str, list[float]]:
        """{field: [before, median while watched]}; a field the GPU does not tell is left out."""
        return {
            name: [self.before[name], told]
            for name, told in _medians(self.inside).items()
            if name in self.before
        }

    def probe(self) -> float | None:
        """TFLOP/s of one fixed load, bf16 products of random numbers; None without a GPU.

        Such products go with the clock that the GPU gives them, so of two figures it says whether
        the GPU was in the same state. Their own clocks differ by the power that each draws, and
        what nvidia-smi tells of a moment differs by a fifth within one load.
        """
        if self.device.type != "cuda":
            return None
        a, b = (
            torch.randn(PROBE_SIZE, PROBE_SIZE, device=self.device, dtype=torch.bfloat16)
            for _ in range(2)
        )
        product = torch.empty_like(a)
        ms = measure(
            lambda: torch.mm(a, b, out=product),
            self.device,
            repeats=PROBE_CALLS,
            warmup=PROBE_CALLS,
        ).median
        return round(2 * PROBE_SIZE**3 / ms / 1e9, 1)

    def shared(self) -> str | None:
        """Why the GPU is not this process's alone, or None. Ask before anything runs on it."""
        if self.device.type != "cuda":
            return None
        busy = query_gpu(self.device, "utilization.gpu")
        free, total = torch.cuda.mem_get_info(self.device)
        others = (total - free - torch.cuda.memory_reserved(self.device)) / 2**30
        if others > SHARED_GIB:
            return f"the GPU is shared: others hold {others:.1f} GiB of it"
        if busy and busy[0].isdigit() and float(busy[0]) > SHARED_BUSY_PCT:
            return f"the GPU is shared: it is {busy[0]} % busy before anything of ours runs"
        return None

    def _sample(self) -> tuple[dict[str, float], set[str]]:
        """The numbers of `FIELDS`, and which of `SLOWDOWNS` are active."""
        if self.device.type != "cuda":
            return {}, set()
        answers = query_gpu(self.device, *FIELDS.values(), REASONS)
        # A driver before 535 does not know the last field, and then answers nothing.
        answers = answers or query_gpu(self.device, *FIELDS.values()) or []
        numbers = zip(FIELDS, answers, strict=False)
        told = {name: float(text) for name, text in numbers if text.replace(".", "").isdigit()}
        bits = int(answers[-1], 16) if answers and answers[-1].startswith("0x") else 0
        return told, {name for bit, name in SLOWDOWNS.items() if bits & bit}


class Window:
    """What was seen while something was timed.

    Attributes:
        samples: one dict of the numbers of `FIELDS` a time.
        slowdowns: which of `SLOWDOWNS` were active at any of these times.
    """

    def __init__(self) -> None:
        self.samples: list[dict[str, float]] = []
        self.slowdowns: set[str] = set()

    def medians(self) -> dict[str, float]:
        """{field: its median}."""
        return _medians(self.samples)

    @property
    def refusal(self) -> str | None:
        """Why there is no figure of what was timed; None where nothing slowed the GPU down."""
        if not self.slowdowns:
            return None
        return f"the GPU was slowed down: {', '.join(sorted(self.slowdowns))}"


def _medians(samples: list[dict[str, float]]) -> dict[str, float]:
    return {
        name: statistics.median(told)
        for name in FIELDS
        if (told := [sample[name] for sample in samples if name in sample])
    }
