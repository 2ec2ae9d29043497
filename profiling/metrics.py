"""A table and verdicts of an Nsight Compute report.

python profiling/metrics.py profiling/out/op_patchify_up-b1_fwd.ncu-rep --case op/patchify/up-b1/fwd

The floor of a case is the time that its compulsory bytes take at the bandwidth of a copy. Where a
call launches several kernels, it and those bytes belong to their sum: a call is then taken to
launch the rarest kernel once.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from launches import Launch, NoReaderError, load, medians, short_name
from verdict import verdict

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "fp64": "float64"}
COLUMNS = (
    "kernel",
    "launches",
    "time us",
    "% of floor",
    "DRAM MB",
    "compulsory MB",
    "DRAM %",
    "tensor %",
    "occupancy %",
    "registers",
    "top stall",
)
NAME_WIDTH = 44


def main(arguments: list[str] | None = None) -> int:
    """Print the table and the verdicts; 0, 2 for a wrong call or file, 3 if it takes ncu."""
    args = _parser().parse_args(arguments)
    try:
        compulsory = compulsory_bytes(args.case, args.dtype) if args.case else None
        launches = load(args.report)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 3 if isinstance(error, NoReaderError) else 2
    except OSError as error:
        print(f"error: {args.report}: {error.strerror}", file=sys.stderr)
        return 2
    kernels = launches if args.all else medians(launches)
    print(describe(kernels, compulsory, args.copy_tb_s))
    return 0


def describe(launches: list[Launch], compulsory: int | None, copy_tb_s: float) -> str:
    """The table of `launches` and a verdict on each, as text."""
    floor_us = compulsory / copy_tb_s / 1e6 if compulsory else None
    if len({launch.kernel for launch in launches}) == 1:
        rows = [_row(launch, compulsory, floor_us) for launch in launches]
        verdicts = [verdict(launch, compulsory, floor_us) for launch in launches]
    else:
        rows = [_row(launch, None, None) for launch in launches]
        rows.append(_row(call_sum(launches), compulsory, floor_us))
        verdicts = [verdict(launch) for launch in launches]
    return "\n\n".join([table(rows), *verdicts])


def call_sum(launches: list[Launch]) -> Launch:
    """Time and DRAM bytes of all kernels of one call, as if the rarest is launched once in it."""
    counts: dict[str, int] = {}
    for launch in launches:
        counts[launch.kernel] = counts.get(launch.kernel, 0) + launch.count
    calls = min(counts.values())

    def total(name: str) -> float | None:
        values = [getattr(launch, name) for launch in launches]
        if None in values:
            return None
        pairs = zip(values, launches, strict=True)
        return sum(value * launch.count for value, launch in pairs) / calls

    summed = Launch(kernel="sum of a call", count=sum(counts.values()) // calls)
    names = ("time_us", "read_bytes", "written_bytes")
    return replace(summed, **{name: total(name) for name in names})  # type: ignore[arg-type]


def table(rows: list[list[str]]) -> str:
    """`rows` under their titles, the first and last column to the left, the others to the right."""
    cells = [list(COLUMNS), *rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(COLUMNS))]
    last = len(COLUMNS) - 1
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i in (0, last) else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in cells
    )


def compulsory_bytes(case_id: str, dtype: str) -> int:
    """Bytes that the case has to move.

    Raises:
        ValueError: there is no such case.
    """
    import torch  # here, so that a report without a case needs no torch

    from snapkernels.testing import cases, cost

    op, case, direction = cases.find(case_id)
    return cost.compulsory_bytes(op.spec, case, direction, getattr(torch, DTYPES[dtype]))


def _row(launch: Launch, compulsory: int | None, floor_us: float | None) -> list[str]:
    name = launch.kernel if launch.kernel == "sum of a call" else short_name(launch.kernel)
    percent = 100 * floor_us / launch.time_us if floor_us and launch.time_us else None
    moved = launch.dram_bytes
    stall = launch.top_stall
    return [
        name if len(name) <= NAME_WIDTH else f"{name[: NAME_WIDTH - 3]}...",
        str(launch.count),
        _cell(launch.time_us, ".2f"),
        _cell(percent, ".0f"),
        _cell(None if moved is None else moved / 1e6, ".2f"),
        _cell(None if compulsory is None else compulsory / 1e6, ".2f"),
        _cell(launch.dram_pct, ".0f"),
        _cell(launch.tensor_pct, ".0f"),
        _cell(launch.occupancy_pct, ".0f"),
        _cell(launch.registers, ".0f"),
        f"{stall} {launch.stalls[stall]:.0f} %" if stall else "-",
    ]


def _cell(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _bandwidth(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number above 0, got {text!r}")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("report", type=Path, help="a .ncu-rep, or its raw page as CSV")
    parser.add_argument("--case", help="what ran, such as op/patchify/up-b1/fwd, for its floor")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="of the case (bf16)")
    parser.add_argument(
        "--copy-tb-s", type=_bandwidth, default=3.0, help="TB/s of a copy, read plus write (3.0)"
    )
    parser.add_argument("--all", action="store_true", help="every launch, instead of medians")
    return parser


if __name__ == "__main__":
    sys.exit(main())
