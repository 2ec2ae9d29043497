"""What the benches share: the clip, progress, arguments, running out of memory."""

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from snapkernels.testing.load import Load
from snapkernels.testing.timing import Timing

CLIP = Path(__file__).resolve().parent / "clips" / "big_buck_bunny.mp4"
OUT_OF_MEMORY = "out of memory"
# How PyTorch's CPU allocator and the CUDA libraries say it, in a plain RuntimeError.
ALLOCATION_FAILURES = ("not enough memory", "can't allocate memory", "ALLOC_FAILED")


@dataclass
class Memory:
    """Whether it ran out."""

    exhausted: bool = False


@contextmanager
def reported_out_of_memory() -> Iterator[Memory]:
    """Turn running out of memory, on the GPU or the CPU, into a flag."""
    memory = Memory()
    try:
        yield memory
    except (torch.OutOfMemoryError, MemoryError):
        memory.exhausted = True
    except RuntimeError as error:
        if not any(words in str(error) for words in ALLOCATION_FAILURES):
            raise
        memory.exhausted = True
    if memory.exhausted and torch.cuda.is_available():
        torch.cuda.empty_cache()


def available_bytes() -> int:
    """What Linux can give without swapping."""
    meminfo = Path("/proc/meminfo").read_text()
    return int(meminfo.split("MemAvailable:")[1].split()[0]) * 1024


def figures(timing: Timing, floor: float, share: int = 1) -> dict[str, float]:
    """The measured fields of a row.

    Args:
        timing: of a call, in ms.
        floor: of one of the `share` equal parts of a call, in ms.
        share: by which the call's times are divided.
    """
    value, p20, p80 = (significant(ms / share) for ms in timing)
    told = {"value": value, "p20": p20, "p80": p80, "floor": significant(floor)}
    return told | {"pct_of_floor": round(100 * floor / value, 1)}


def is_shared(load: Load) -> bool:
    """Whether others use the GPU too, which is said: a bench then ends in code 2."""
    if reason := load.shared():
        print(f"error: {reason}: no figure would be of this program alone", file=sys.stderr)
    return reason is not None


def significant(value: float) -> float:
    """`value` to five significant digits."""
    return float(f"{value:.5g}")


def say(message: str) -> None:
    """Progress, kept out of the figures' stream."""
    print(message, file=sys.stderr, flush=True)


def positive_int(text: str) -> int:
    """A count among a command's arguments."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number above 0, got {text!r}")
    return int(text)


def positive_float(text: str) -> float:
    """A positive, finite number among a command's arguments."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number above 0, got {text!r}")
    return value
