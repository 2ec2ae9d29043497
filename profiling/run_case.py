"""Replay one case under a profiler: its calls alone, in an NVTX range of its name.

python profiling/run_case.py op/patchify/up-b1/fwd --backend triton
"""

import argparse
import sys
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from itertools import cycle
from typing import Any

import torch

from snapkernels.dispatch import choose
from snapkernels.testing.bench import sets_needed
from snapkernels.testing.cases import find, make_values, prepare
from snapkernels.testing.cost import compulsory_bytes

DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "fp64": torch.float64,
}


def main(arguments: list[str] | None = None) -> int:
    """Run the case that the command line names; 0 if it ran, 2 for a wrong call."""
    args = _parser().parse_args(arguments)
    try:
        replay(args.case, args.backend, DTYPES[args.dtype], args.repeats, args.warmup)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def replay(
    case_id: str, backend: str | None, dtype: torch.dtype, repeats: int, warmup: int
) -> None:
    """Call the case `warmup` times, then `repeats` times with the profiler on, and say so.

    Raises:
        ValueError: no such case or backend, or the backend cannot run the case here.
    """
    op, case, direction = find(case_id)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    moved = compulsory_bytes(op.spec, case, direction, dtype)
    count = sets_needed(device, moved)
    sets = [make_values(op.spec, case, dtype, device, seed=seed) for seed in range(count)]
    name = choose(op.spec, backend, sets[0]).name
    # The warm-up takes the sets that were made first, and the profiled calls go on from there.
    calls = cycle([prepare(op, values, direction, name) for values in sets])
    # Kept, so that a call does not write where the one before it wrote.
    results: deque[Any] = deque(maxlen=count)
    _call(calls, warmup, results)

    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
    with _range(case_id):
        _call(calls, repeats, results)
        if on_gpu:
            torch.cuda.synchronize()
    # Before the profiler stops: a profiler may end the process there.
    machine = torch.cuda.get_device_name() if on_gpu else "the CPU"
    print(
        f"{case_id}: {name}, {str(dtype).removeprefix('torch.')}, on {machine}; {warmup} warm-up "
        f"and {repeats} profiled calls, sets of inputs: {count}, bytes of a call: {moved:,}",
        flush=True,
    )
    if on_gpu:
        torch.cuda.profiler.stop()


def _call(calls: Iterator[Callable[[], Any]], times: int, results: deque[Any]) -> None:
    for _ in range(times):
        results.append(next(calls)())


def _range(name: str) -> AbstractContextManager[Any]:
    try:
        import nvtx
    except ImportError:
        print("the package nvtx is not installed: going on without an NVTX range", file=sys.stderr)
        return nullcontext()
    return nvtx.annotate(name)


def _count(least: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {least} on")
        return int(text)

    return number


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("case", help="such as op/patchify/up-b1/fwd; also .../bwd, .../fwd_bwd")
    parser.add_argument("--backend", help="the one to run (as dispatch chooses)")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="of the tensors (bf16)")
    parser.add_argument("--repeats", type=_count(1), default=5, help="profiled calls (5)")
    parser.add_argument("--warmup", type=_count(0), default=3, help="calls before them (3)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
