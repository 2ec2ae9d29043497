"""group_read and group_write from 1k to 1M patch tokens: time and memory against tokens.

python bench/scaling.py                                # print the rows
python bench/scaling.py --json rows.json --figure rows.png
"""

import argparse
import math
import statistics
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from support import OUT_OF_MEMORY, is_shared, reported_out_of_memory, say, significant

from snapkernels.dispatch import choose
from snapkernels.registry import OPS, Op
from snapkernels.roofline import measure_ceilings, short_name
from snapkernels.spec import Backend, Case
from snapkernels.testing.bench import Variant, included, interleaved, reason_of, sets_needed
from snapkernels.testing.cases import call, make_values, prepare
from snapkernels.testing.cost import compulsory_bytes, floor_ms, flops
from snapkernels.testing.load import Load
from snapkernels.testing.proofs import judge
from snapkernels.testing.record import (
    file_path,
    new_record,
    record_path,
    without_figure,
    write,
)

LAYERS = ("group_read", "group_write")
# Whole groups of 4608 but for the ends: one group that is smaller, and 256 of 4096.
TOKENS = (1024, 2304, 4608, 9216, 18432, 36864, 73728, 147456, 294912, 589824, 1048576)
CPU_MOST_TOKENS = 4608
FITTED_FROM = 147456  # the upsampler's own count: from here on a GPU is full
ROUNDS = {"cuda": 30, "cpu": 3}


class Widths(NamedTuple):
    """Of the tokens, the heads and the groups."""

    latent_dim: int
    patch_dim: int
    num_heads: int
    group: int
    latents: int


UPSAMPLER = Widths(latent_dim=3072, patch_dim=1024, num_heads=16, group=4608, latents=24)


def main(arguments: list[str] | None = None) -> int:
    """Run the bench; 0, or 1 when a gate was red but for memory, or 2 on a shared GPU."""
    args = _parse(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    tokens = [one for one in TOKENS if device.type == "cuda" or one <= CPU_MOST_TOKENS]
    if device.type == "cpu":
        print(f"No NVIDIA GPU here: CPU figures, to {CPU_MOST_TOKENS} tokens.", flush=True)
    load = Load(device)
    if is_shared(load):
        return 2
    say("measuring the ceilings of this machine")
    ceilings = measure_ceilings(device, dtype)
    rows: list[dict[str, Any]] = []
    for op in map(OPS.__getitem__, LAYERS):
        for count in tokens:
            say(f"{op.spec.name}: {count} tokens")
            with load.watched() as window:
                found = bench_tokens(op, count, UPSAMPLER, device, dtype, ceilings)
            if window.refusal:
                found = [without_figure(row, window.refusal) for row in found]
            rows += found
            print("\n".join(map(line, found)), flush=True)
    record = new_record("python bench/scaling.py", device, load.fields(), ceilings, rows)
    record["exponents"] = exponents(rows)
    for series, exponent in record["exponents"].items():
        print(f"{series}: time grows as tokens^{exponent:.3f} from {FITTED_FROM} up")
    if args.json:
        write(record, args.json)
    if args.figure:
        draw(rows, args.figure)
    return int(any(row["gate"] not in ("ok", OUT_OF_MEMORY) for row in rows))


def bench_tokens(
    op: Op,
    tokens: int,
    widths: Widths,
    device: torch.device,
    dtype: torch.dtype,
    ceilings: dict[str, float],
) -> list[dict[str, Any]]:
    """Rows of a record: the backend that is chosen for so many tokens, and eager PyTorch."""
    spec, case = op.spec, case_of(op, tokens, widths)
    moved = compulsory_bytes(spec, case, "fwd", dtype)
    names, gates = ["eager"], {"eager": OUT_OF_MEMORY}
    peaks: dict[str, float | None] = {}
    variants = []
    with reported_out_of_memory():
        seeds = range(sets_needed(device, moved))
        sets = [make_values(spec, case, dtype, device, seed=seed) for seed in seeds]
        names = list(dict.fromkeys((choose(spec, None, sets[0]).name, "eager")))
        for name in names:
            gates[name], peaks[name] = examined(op, case, spec.backend(name), dtype, sets[0])
            calls = [prepare(op, one, "fwd", name) for one in sets]
            variants += [Variant(name, calls, "ok")] if gates[name] == "ok" else []
    stream = torch.cuda.Stream() if device.type == "cuda" else None
    timings, failed = interleaved(variants, stream, ROUNDS[device.type])
    gates |= {name: _shortened(reason) for name, reason in failed.items()}
    floor = floor_ms(spec, case, "fwd", dtype, ceilings)
    rows = []
    for name in names:
        row: dict[str, Any] = {
            "case": spec.case_id(case, "fwd"),
            "variant": f"{name}-{short_name(dtype)}",
            "batch": 1,
            "unit": "ms",
            "better": "lower",
            "gate": gates[name],
            "includes": included(device, moved),
            "tokens": tokens,
            "chosen": name == names[0],
        }
        if row["gate"] == "ok":
            value, p20, p80 = map(significant, timings[name])
            row |= {"value": value, "p20": p20, "p80": p80, "floor": significant(floor)}
            row["pct_of_floor"] = round(100 * floor / value, 1)
            row["tflop"] = flops(spec, case, "fwd") / 1e12
            if (peak := peaks[name]) is not None:
                row["peak_gib"] = round(peak, 3)
        rows.append(row)
    return rows


def case_of(op: Op, tokens: int, widths: Widths) -> Case:
    """`tokens` patch tokens in the fewest equal groups that are not above `widths.group`."""
    groups = -(-tokens // widths.group)
    while tokens % groups:
        groups += 1
    dims = (widths.latent_dim, widths.patch_dim)
    updated, read = dims if op.spec.name == "group_read" else dims[::-1]
    sizes = {"B": 1, "G": groups, "L": widths.latents, "N": tokens // groups}
    sizes |= {"D": updated, "C": read, "I": min(dims)}
    count = f"{tokens / 1e6:.0f}m" if tokens >= 10**6 else f"{tokens / 1e3:.0f}k"
    options = {"num_heads": widths.num_heads, "eps": 1e-6, "mask": False}
    return Case(name=f"tokens-{count}", tier="paper", sizes=sizes, options=options)


def examined(
    op: Op, case: Case, backend: Backend, dtype: torch.dtype, values: tuple[Any, ...]
) -> tuple[str, float | None]:
    """The gate of a backend, on the first, middle and last group, and its peak in GiB on a GPU.

    Groups do not meet, so the float64 reference needs no more memory at a million tokens.
    """
    verdict, peak = OUT_OF_MEMORY, None
    try:
        with reported_out_of_memory(), torch.no_grad():
            _judge_few(op, case, backend, dtype, values)
            peak = _peak_gib(op, backend, values)
            verdict = "ok"
    except Exception as error:  # whatever it is, the other rows are not lost for it
        verdict = reason_of(error)
    return verdict, peak


def _judge_few(
    op: Op, case: Case, backend: Backend, dtype: torch.dtype, values: tuple[Any, ...]
) -> None:
    groups = case.sizes["G"]
    picked = sorted({0, groups // 2, groups - 1})
    few = tuple(one[:, picked] if isinstance(one, torch.Tensor) else one for one in values)
    judge(op.spec, case, backend, dtype, few, call(op, values, backend.name)[:, picked])


def _peak_gib(op: Op, backend: Backend, values: tuple[Any, ...]) -> float | None:
    """The most memory that a call holds above its inputs, its output included."""
    if not values[0].is_cuda:
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call(op, values, backend.name)
    return (torch.cuda.max_memory_allocated() - before) / 2**30


def _shortened(reason: str) -> str:
    return OUT_OF_MEMORY if reason.startswith("OutOfMemoryError") else reason


def series_of(row: dict[str, Any]) -> str:
    """What a row is a point of: an op by whichever backend is chosen, or by eager PyTorch."""
    layer = row["case"].split("/")[1]
    return f"{layer} {'chosen' if row['chosen'] else row['variant']}"


def exponents(rows: list[dict[str, Any]]) -> dict[str, float]:
    """{series: the slope of log time against log tokens}, of the counts from `FITTED_FROM` up."""
    points: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if row["gate"] == "ok" and row["tokens"] >= FITTED_FROM:
            point = (math.log(row["tokens"]), math.log(row["value"]))
            points.setdefault(series_of(row), []).append(point)
    return {
        series: round(statistics.linear_regression(*zip(*found, strict=True)).slope, 4)
        for series, found in points.items()
        if len(found) > 1
    }


def line(row: dict[str, Any]) -> str:
    """A row as it is printed."""
    start = f"{row['case']:<34} {row['variant']:<15}"
    if row["gate"] != "ok":
        return f"{start} no figure: {row['gate']}"
    peak = f"  {row['peak_gib']:.2f} GiB" if "peak_gib" in row else ""
    time = f"{row['value']:10.4g} ms ({row['p20']:.4g}-{row['p80']:.4g})"
    return f"{start} {time}  {row['pct_of_floor']:.0f} % of floor{peak}"


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """A figure of time and, where it was measured, peak memory against tokens, on log axes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    timed = [row for row in rows if row["gate"] == "ok"]
    wanted = [("value", "ms a call"), ("peak_gib", "GiB above the inputs")]
    shown = [pair for pair in wanted if any(pair[0] in row for row in timed)]
    figure, axes = pyplot.subplots(1, len(shown), squeeze=False, figsize=(6 * len(shown), 4.5))
    for axis, (key, label) in zip(axes[0], shown, strict=True):
        for series in dict.fromkeys(map(series_of, timed)):
            points = [row for row in timed if series_of(row) == series and key in row]
            axis.plot(
                [row["tokens"] for row in points],
                [row[key] for row in points],
                marker="o",
                label=series,
            )
        axis.set(xscale="log", yscale="log", xlabel="patch tokens", ylabel=label)
        axis.grid(True, which="both", alpha=0.3)
        axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=record_path, metavar="FILE", help="write the record here")
    parser.add_argument("--figure", type=file_path, metavar="FILE.png", help="draw the rows here")
    args = parser.parse_args(arguments)
    if args.figure and find_spec("matplotlib") is None:
        parser.error("--figure needs the package matplotlib: pip install matplotlib")
    return args


if __name__ == "__main__":
    sys.exit(main())
