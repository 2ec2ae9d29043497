"""python -m snapkernels list | explain | check | bench.

list     the ops, their backends and cases, and the environment variables
explain  which backend would run a case here, why not another, and what it must cost
check    prove what this machine can, and say what it could not; --stamp keeps the result
bench    time the paper's cases, or those named, beside eager PyTorch, a copy and peers
"""

import argparse
import os
import sys
from collections import Counter
from typing import Any

import torch

from snapkernels import dispatch, env, registry, roofline
from snapkernels.registry import OPS, Op
from snapkernels.spec import Backend, Case
from snapkernels.testing import bench, cases, cost, proofs, record, stamp
from snapkernels.testing.load import Load


def main(arguments: list[str] | None = None) -> int:
    """Run a command; 0 if all is well, 1 if something is red or nothing ran, 2 if called wrong."""
    args = _parser().parse_args(arguments)
    try:
        for name, backend in env.BACKENDS.items():
            registry.op(name).spec.backend(backend)
        return args.run(args)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _list(args: argparse.Namespace) -> int:
    for op in OPS.values():
        spec = op.spec
        print(f"{spec.name}: {spec.math}")
        print(f"  backends: {', '.join(backend.name for backend in spec.backends)}")
        for case in spec.cases:
            dtypes = ", ".join(map(proofs.short, case.dtypes))
            print(f"  {spec.case_id(case, 'fwd'):<36} {case.tier:<6} {dtypes}")
        print(f"  seeded bugs: {len(spec.mutants)}")
    print("environment:")
    for name, meaning in env.VARIABLES.items():
        print(f"  {name:<20} {meaning}")
    return 0


def _explain(args: argparse.Namespace) -> int:
    op, case, direction = cases.find(args.case)
    dtype = case.dtypes[0]
    values = cases.make_values(op.spec, case, dtype, _device())
    print(dispatch.explain(op.spec, *values))
    moved = cost.compulsory_bytes(op.spec, case, direction, dtype)
    work = cost.flops(op.spec, case, direction)
    print(f"  {direction} in {proofs.short(dtype)}: {work / 1e9:.4g} GFLOP, {moved / 1e6:.4g} MB")
    return 0


def _check(args: argparse.Namespace) -> int:
    if not torch.cuda.is_available() and not env.INTERPRET:
        # Triton reads this when it is imported, so it takes a new process.
        command = [sys.executable, "-m", "snapkernels", *sys.argv[1:]]
        os.execve(sys.executable, command, os.environ | {"TRITON_INTERPRET": "1"})
    chosen = [proof for proof in proofs.proofs() if args.only in proof.id]
    if not chosen:
        raise ValueError(f"no proof has {args.only!r} in its name")
    torch.set_num_threads(1)
    counts: Counter[str] = Counter()
    lacking: Counter[str] = Counter()
    mutants = 0
    for proof in chosen:
        if proof.lacks:
            lacking[proof.lacks] += 1
            continue
        try:
            proof.run()
            counts["passed"] += 1
            mutants += " mutant " in proof.id
        except AssertionError as error:
            counts["failed"] += 1
            print(f"RED  {proof.id}: {error}", flush=True)
        except Exception as error:
            counts["error"] += 1
            print(f"RED  {proof.id}: {type(error).__name__}: {error}", flush=True)
    red = counts["failed"] + counts["error"]
    print(f"{counts['passed']} passed, {red} failed; seeded bugs among them: {mutants}")
    print("\n".join(stamp.ledger(dict(lacking))))
    if args.stamp:
        tier = "check" + f" --only {args.only}" * bool(args.only)
        stamp.write(args.stamp, tier, counts, dict(lacking))
    return int(red > 0 or not counts["passed"])


def _bench(args: argparse.Namespace) -> int:
    device = _device()
    chosen = _chosen(args.case, "paper" if device.type == "cuda" else "cpu")
    load = Load(device)
    if shared := load.shared():
        raise ValueError(f"{shared}: no figure would be of this program alone")
    print("measuring the ceilings", file=sys.stderr)
    ceilings = roofline.measure_ceilings(device)
    rows: list[dict[str, Any]] = []
    for number, (op, case) in enumerate(chosen, 1):
        for dtype in case.dtypes:
            for direction in bench.directions(op.spec):
                with load.watched() as window:
                    found = bench.bench(
                        op, case, direction, dtype, device, ceilings, rounds=args.rounds
                    )
                if window.refusal:
                    found = [record.without_figure(row, window.refusal) for row in found]
                rows += found
                for row in found:
                    print(_line(row), flush=True)
        red = any(row["gate"] != "ok" for row in found if "peer" not in row)
        if not red and hasattr(torch.ops.snapkernels, op.spec.name):
            values = cases.make_values(op.spec, case, case.dtypes[0], device)
            backend = dispatch.choose(op.spec, None, values)
            rows.append(_overhead_row(op, case, backend, device))
            print(_line(rows[-1]), flush=True)
        if args.json:  # each time: a run that is cut off leaves what it has
            parts = f" --case {' '.join(args.case)}" if args.case != [""] else ""
            command = record.command_so_far(
                f"python -m snapkernels bench{parts}", done=number == len(chosen)
            )
            taken = record.new_record(command, device, load.fields(), ceilings, rows)
            record.write(taken, args.json)
    return int(any(row["gate"] != "ok" for row in rows if "peer" not in row))


def _chosen(parts: list[str], tier: str) -> list[tuple[Op, Case]]:
    """The cases with one of `parts` in their name: of each part those of `tier`, if it has any."""
    listed = [(op, case) for op in OPS.values() for case in op.spec.cases]
    tiers = {op.spec.case_id(case, "fwd"): case.tier for op, case in listed}
    chosen: set[str] = set()
    for part in parts:
        named = {name for name in tiers if part in name}
        if not named:
            raise ValueError(f"no case has {part!r} in its name; list has them all")
        chosen |= {name for name in named if tiers[name] == tier} or named
    return [(op, case) for op, case in listed if op.spec.case_id(case, "fwd") in chosen]


def _overhead_row(op: Op, case: Case, backend: Backend, device: torch.device) -> dict[str, Any]:
    timings = bench.overhead_us(op, case, backend, device)
    overhead = timings.pop("overhead")
    return {
        "case": op.spec.case_id(case, "call"),
        "variant": f"{backend.name}-{proofs.short(case.dtypes[0])}",
        "batch": case.sizes.get("B", 1),
        "unit": "us",
        "better": "lower",
        "gate": "ok",
        "includes": "host time of a call beyond its backend's own: checks, schema, dispatch",
        "value": overhead.median,
        "p20": overhead.p20,
        "p80": overhead.p80,
        "floor": 0.0,
        "pct_of_floor": 0.0,
        "tflop": 0.0,
        "host_us": {name: timing.median for name, timing in timings.items()},
    }


def _line(row: dict[str, Any]) -> str:
    start = f"{row['case']:<36} {row['variant']:<14}"
    if row["gate"] != "ok":
        return f"{start} no figure: {row['gate']}"
    unit, scale = ("us", 1e3) if row["unit"] == "ms" else (row["unit"], 1)
    times = [scale * row[name] for name in ("value", "p20", "p80")]
    line = "{} {:9.2f} {} ({:.2f}-{:.2f})".format(start, times[0], unit, *times[1:])
    if "tb_s" in row:
        line += f"  {row['tb_s']:.2f} TB/s  {row['pct_of_floor']:.0f} % of floor"
    if "saved_gib" in row:
        line += f"  {row['saved_gib']:.3f} GiB kept"
    if "pct_of_copy" in row:
        line += f"  {row['pct_of_copy']:.0f} % of a copy"
    return line


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 on")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m snapkernels",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="command")
    listing = commands.add_parser("list", help="ops, backends, cases, environment")
    listing.set_defaults(run=_list)
    explaining = commands.add_parser("explain", help="which backend would run a case, and why")
    explaining.add_argument("case", help="such as op/patchify/up-b1/fwd")
    explaining.set_defaults(run=_explain)
    checking = commands.add_parser("check", help="prove what this machine can")
    checking.add_argument("--only", default="", help="proofs with this in their name")
    checking.add_argument(
        "--stamp", type=record.record_path, help="write what ran, and where, to this file"
    )
    checking.set_defaults(run=_check)
    timing = commands.add_parser("bench", help="time cases")
    timing.add_argument(
        "--case",
        nargs="+",
        default=[""],
        metavar="PART",
        help="cases with this in their name; several allowed",
    )
    timing.add_argument("--rounds", type=_positive, default=30, help="samples of each variant (30)")
    timing.add_argument(
        "--json", type=record.record_path, help="write the figures as a record to this file"
    )
    timing.set_defaults(run=_bench)
    return parser


if __name__ == "__main__":
    sys.exit(main())
