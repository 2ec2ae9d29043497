"""What an evaluation of a FIT costs, part by part: operations and bytes beside measured time.

python bench/costs.py                                  # what suits the machine
python bench/costs.py --preset 3.9b --recipe fp8 --json costs.json

Every part is predicted by its ops: each takes the longer of its operations at the ceiling of their
format and its bytes at that of a copy. It is measured inside a whole evaluation, on a GPU between
events in a CUDA graph. Beside that a graph without events is timed: `explained_pct` is the sum of
the parts over it. An event lets no kernel start before the one ahead of it is done, so the sum can
come out above the whole.
"""

import argparse
import sys
from collections import Counter
from itertools import product
from typing import Any

import torch
from fit_subject import FITSubject, inference
from op_costs import Measured, OpCost, Rates, counted, in_calls, in_graphs, timed
from subject import Options, Variant
from support import (
    CLIP,
    OUT_OF_MEMORY,
    figures,
    is_shared,
    positive_int,
    reported_out_of_memory,
    say,
    significant,
)
from workload import load_batch

from snapkernels import RECIPES, Recipe
from snapkernels.roofline import measure_ceilings
from snapkernels.testing.load import Load
from snapkernels.testing.record import command_so_far, new_record, record_path, write
from snapvideo_core import PRESETS, FITConfig
from snapvideo_core.flops import graph_tflop

GPU_BATCHES = {"500m": 64, "3.9b": 16, "3.9b-up": 1}
CPU_BATCHES = {"mini": 1}
FRAMERATE = 24.0
ROUNDS = {"cuda": 10, "cpu": 3}
ENOUGH = 95  # % of an evaluation that its parts are to explain
INCLUDES = {
    "cpu": "one denoiser evaluation, no guidance",
    "cuda": "one denoiser evaluation, no guidance, by a replay of one CUDA graph",
}
GAPS = "launch gaps and events"  # the whole less what is between marks: below 0 if these cost more
COLUMNS = (
    "part",
    "calls",
    "ms/video",
    "%",
    "predicted",
    "measured/predicted",
    "TFLOP/s",
    "TB/s",
)


def main(arguments: list[str] | None = None) -> int:
    """Run the bench.

    Returns:
        0, or 1 where a gate was red or memory ran out, or 2 on bad input or a shared GPU.
    """
    args = _parse(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = device.type == "cuda"
    batches = GPU_BATCHES if on_gpu else CPU_BATCHES
    presets = args.preset or list(batches)
    recipes = args.recipe or (list(RECIPES) if on_gpu else ["bf16"])
    if not on_gpu:
        print(f"No NVIDIA GPU here: CPU figures ({', '.join(presets)}).", flush=True)
    load, dtype = Load(device), torch.bfloat16 if on_gpu else torch.float32
    if is_shared(load):
        return 2
    say("measuring the ceilings of this machine")
    options = Options(
        device=device,
        dtype=dtype,
        capture=on_gpu,
        clip=CLIP,
        framerate=FRAMERATE,
        repeats=ROUNDS[device.type],
        ceilings=measure_ceilings(device, dtype),
        load=load,
    )
    command = f"python bench/costs.py --preset {' '.join(presets)} --recipe {' '.join(recipes)}"
    command += f" --batch {args.batch}" if args.batch else ""
    runs, rows = list(product(presets, recipes)), []
    for preset, recipe in runs:
        batch = args.batch or batches.get(preset, 1)
        rows.append(row_of(PRESETS[preset], RECIPES[recipe], batch, options))
        print(told(rows[-1]), flush=True)
        if args.json:  # each time: a run that is cut off leaves what it has
            so_far = command_so_far(command, done=len(rows) == len(runs))
            write(new_record(so_far, device, load.fields(), options.ceilings, rows), args.json)
    return int(any(row["gate"] != "ok" for row in rows))


def row_of(config: FITConfig, recipe: Recipe, batch: int, options: Options) -> dict[str, Any]:
    """The row of one model: its gate and, where that is ok, what its parts cost."""
    variant = Variant("ours", recipe)
    row: dict[str, Any] = {
        "case": f"model/{config.name}/infer",
        "variant": variant.name(options.dtype),
        "batch": batch,
        "unit": "ms/video",
        "better": "lower",
        "gate": OUT_OF_MEMORY,  # unless it is not
        "error": {},
        "includes": INCLUDES[options.device.type],
        "tflop": significant(graph_tflop(config)),
    }
    say(f"{config.name}: {row['variant']}, checking against the float64 reference")
    with reported_out_of_memory():
        subject = FITSubject(config, variant, options, batch)
        verdict, row["error"] = subject.gated()
        if verdict == "ok":
            say(f"{config.name}: {row['variant']}, counting and timing {batch} videos")
            row |= {"gate": "ok"} | measured_row(subject, batch, options)
        else:
            row["gate"] = verdict
    return row


def measured_row(subject: FITSubject, batch: int, options: Options) -> dict[str, Any]:
    """The measured fields of a row, per video, or its red gate."""
    rates, model = Rates.of(options.ceilings, options.dtype), subject.module
    data = load_batch(options.clip, subject.config, batch, options.framerate, options.device)
    evaluate = inference(model, model, data)
    ops = counted(model, evaluate)
    whole, parts = (in_graphs if options.capture else in_calls)(model, evaluate)
    with options.load.watched() as window:
        found = timed(whole, parts, options.device, rounds=options.repeats)
    if window.refusal:
        return {"gate": window.refusal}
    fields = figures(found.whole, subject.floor_ms("infer"), batch)
    return fields | explained(ops, found, rates, batch)


def explained(ops: list[OpCost], found: Measured, rates: Rates, batch: int) -> dict[str, Any]:
    """Where the time of an evaluation of `batch` videos went, all per video.

    Returns:
        "explained_pct", the parts' share of the whole; "parts", by role, and "blocks", each with
        "ms", "predicted_ms", "tflop" and "gb"; and "rest", {what is in no part: ms}, which with
        the parts makes up the whole.
    """
    segments, whole = found.segments, found.whole.median
    places = [place for place, _ in segments if place]
    outside = [0.0 if place else ms for place, ms in segments]
    in_parts = sum(ms for place, ms in segments if place)

    def sums(kind: str, value: str | int) -> dict[str, float]:
        """Of the places whose field `kind` is `value`."""
        own = [op for op in ops if getattr(op.place, kind, None) == value]
        totals = {
            "ms": sum(ms for place, ms in segments if getattr(place, kind, None) == value),
            "predicted_ms": sum(op.predicted_ms(rates) for op in own),
            "tflop": sum(op.flops for op in own) / 1e12,
            "gb": sum(op.moved for op in own) / 1e9,
        }
        return {name: significant(total / batch) for name, total in totals.items()}

    def names(part: str) -> dict[str, int]:
        return dict(Counter(op.name for op in ops if op.place and op.place.part == part))

    rest = {
        "before the stem: the scales of sigma": outside[0],
        "between the parts": sum(outside[1:-1]),
        "after the head": outside[-1],
        GAPS: whole - in_parts - sum(outside),
    }
    return {
        "explained_pct": round(100 * in_parts / whole, 1),
        "parts": [
            {"part": part, "calls": calls, "ops": names(part), **sums("part", part)}
            for part, calls in Counter(place.part for place in places).items()
        ],
        "blocks": [
            {"block": block, **sums("block", block)}
            for block in sorted({one.block for one in places if one.block is not None})
        ],
        "rest": {what: significant(ms / batch) for what, ms in rest.items()},
    }


def told(row: dict[str, Any]) -> str:
    """A row as a table of its parts, and of what is in none."""
    head = f"\n{row['case']} {row['variant']}, batch {row['batch']}: "
    if row["gate"] != "ok":
        return f"{head}no figure: {row['gate']}"
    parts, whole = row["parts"], row["value"]
    total = {key: sum(part[key] for part in parts) for key in ("ms", "predicted_ms", "tflop", "gb")}
    total |= {"part": "all parts", "calls": sum(part["calls"] for part in parts)}
    lines = [COLUMNS, *(_cells(part, whole) for part in (*parts, total))]
    lines += [
        (what, "", f"{ms:.4g}", f"{100 * ms / whole:.1f}", *[""] * 4)
        for what, ms in row["rest"].items()
    ]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = [
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip()
        for line in lines
    ]
    share = row["explained_pct"]
    end = f"the parts explain {share:g} % of the evaluation"
    if share < ENOUGH:
        end += f": short of {ENOUGH} %"
    if row["rest"][GAPS] < 0:
        end += "; with marks it takes longer than without: they cost time, and forbid overlap"
    return "\n".join([f"{head}{whole:.4g} ms/video, floor {row['floor']:.4g}", *text, end])


def _cells(part: dict[str, Any], whole: float) -> tuple[str, ...]:
    ms, predicted = part["ms"], part["predicted_ms"]
    return (
        part["part"],
        str(part["calls"]),
        f"{ms:.4g}",
        f"{100 * ms / whole:.1f}",
        f"{predicted:.4g}",
        f"{ms / predicted:.2f}",
        f"{part['tflop'] / ms * 1e3:.3g}",
        f"{part['gb'] / ms:.3g}",
    )


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--preset",
        nargs="+",
        choices=list(PRESETS),
        metavar="NAME",
        help=f"{', '.join(PRESETS)}; default: the first three on a GPU, else mini",
    )
    parser.add_argument(
        "--recipe", nargs="+", choices=list(RECIPES), help="default: both on a GPU, else bf16"
    )
    parser.add_argument(
        "--batch", type=positive_int, metavar="N", help="videos at once; default: 64, 16 and 1"
    )
    parser.add_argument("--json", type=record_path, metavar="FILE", help="write the record here")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
