"""Throughput of the paper's models on a real clip: ms/video/GPU, as in its table 2.

python bench/throughput.py                        # all of table 2 and the upsampler, beside peers
python bench/throughput.py --preset 3.9b --batch 16 --mode infer --json figures.json
python bench/throughput.py --recipe bf16 fp8 --backend ours eager compile
"""

import argparse
import gc
import sys
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from fit_subject import FITSubject
from report import figure_table
from resume import group_of, resumed
from subject import PEERS, Options, Subject, Variant
from support import (
    CLIP,
    OUT_OF_MEMORY,
    figures,
    is_shared,
    positive_float,
    positive_int,
    reported_out_of_memory,
    say,
    significant,
)
from unet import UNETS
from unet_subject import BACKENDS as UNET_BACKENDS
from unet_subject import UNetSubject
from workload import Sizes

from snapkernels import RECIPES
from snapkernels.roofline import measure_ceilings
from snapkernels.testing.bench import reason_of
from snapkernels.testing.load import Load
from snapkernels.testing.record import (
    RECORDS,
    command_so_far,
    new_record,
    newest,
    record_path,
    without_figure,
    write,
)
from snapkernels.testing.timing import measure
from snapvideo_core import PRESETS, VideoError, read_clip

MODELS: dict[str, Sizes] = {**UNETS, **PRESETS}
GPU_BATCHES = {"500m": [16, 64], "3.9b": [16], "3.9b-up": [1], "unet-284m": [32], "unet-85m": [32]}
CPU_BATCHES = {"unet-tiny": [1], "mini": [1]}
MODES = ("infer", "train")
LEAST_MS, MOST_REPEATS = 1000.0, 50  # the clock of a GPU settles, and is seen, in such a time
ABSENT = (ImportError, NotImplementedError)  # of a peer that cannot be had
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
BACKENDS = ("ours", "eager", "compile", "reference", *PEERS)
GPU_VARIANTS = (  # (recipe, backend)
    ("bf16", "ours"),
    ("fp8", "ours"),
    ("bf16", "eager"),
    ("bf16", "compile"),
    ("fp8", "compile"),
    ("fp8", "torchao"),
    ("bf16", "flash-attn"),
    ("bf16", "xformers"),
    ("fp8", "te"),
)
CPU_VARIANTS = (("bf16", "ours"),)


def main(arguments: list[str] | None = None) -> int:
    """Run the bench.

    Returns:
        0, or 1 when a gate of ours was red or nothing fitted in memory, or 2 on bad input.
    """
    args = _parse(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = device.type == "cuda"
    dtype = DTYPES[args.dtype or ("bf16" if on_gpu else "fp32")]
    default_batches = GPU_BATCHES if on_gpu else CPU_BATCHES
    presets = args.preset or list(default_batches)
    try:
        for config in map(MODELS.__getitem__, presets):
            size = (config.height, config.width)
            read_clip(args.clip, frames=config.frames, size=size, framerate=args.framerate)
    except (VideoError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    load = Load(device)
    if is_shared(load):
        return 2
    flags = [f"--{k}" if v is True else f"--{k} {v}" for k, v in _reproducible(args).items()]
    command = " ".join(["python bench/throughput.py", *flags])
    try:
        before = resumed(args.json, command, device) if args.resume else None
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if not on_gpu:
        told = "the figures below are CPU figures"
        print(f"No NVIDIA GPU here: {told} ({', '.join(presets)}).", flush=True)
    ceilings, rows, processes = {}, [], 1
    if before:  # all rows have one set of floors
        ceilings, rows = before["ceilings"], before["rows"]
        processes += before.get("processes", 1)
    else:
        say("measuring the ceilings of this machine")
        with reported_out_of_memory():
            ceilings = measure_ceilings(device, dtype)
    if not ceilings:
        print("error: out of memory measuring the ceilings", file=sys.stderr)
        return 1
    options = Options(
        device=device,
        dtype=dtype,
        capture=on_gpu and not args.no_capture,
        clip=args.clip,
        framerate=args.framerate,
        repeats=args.repeats or (10 if on_gpu else 3),
        ceilings=ceilings,
        load=load,
    )
    runs = [
        (name, variant, args.batch or batches_of(variant, default_batches.get(name, [1])))
        for name in presets
        for variant in variants_of(name, args, on_gpu)
    ]
    for number, (name, variant, batches) in enumerate(runs, 1):
        modes = MODES if args.mode == "both" else (args.mode,)
        title = variant.name(dtype)
        if (name, title) in map(group_of, rows):
            say(f"{name}: {title} is in {args.json} already")
        else:
            rows += bench_variant(name, variant, batches, modes, options)
        so_far = command_so_far(command, done=number == len(runs))
        record = new_record(so_far, device, load.fields(), ceilings, rows)
        record["processes"] = processes
        if args.json:  # each time: a run that is cut off leaves what it has
            write(record, args.json)
    print_figures(record)
    if args.json:
        print(f"record written to {args.json}")
    if not on_gpu:
        print_committed_record()
    gates = {row["gate"] for row in rows if not row.get("peer")}
    has_figures = any(row["gate"] == "ok" for row in rows)
    return 0 if has_figures and gates <= {"ok", OUT_OF_MEMORY} else 1


def variants_of(name: str, args: argparse.Namespace, on_gpu: bool) -> list[Variant]:
    """In which variants the model called `name` is run.

    A peer has one recipe, whatever others are asked for. A U-Net has none of our kernels and no
    fp8: eager stands for what it has not.
    """
    pairs = list(GPU_VARIANTS if on_gpu else CPU_VARIANTS)
    if args.recipe or args.backend:
        asked = product(args.recipe or ["bf16"], args.backend or ["ours"])
        pairs = list(dict.fromkeys((PEERS.get(backend, one), backend) for one, backend in asked))
    if name in UNETS:
        plain = [(recipe, backend) for recipe, backend in pairs if backend in UNET_BACKENDS]
        pairs = [pair for pair in plain if not RECIPES[pair[0]].layers] or [("bf16", "eager")]
    return [Variant(backend, RECIPES[recipe]) for recipe, backend in pairs]


def batches_of(variant: Variant, defaults: list[int]) -> list[int]:
    """Of the default batches the largest alone where every batch is a compilation."""
    return defaults[-1:] if variant.compiled else defaults


def subjects(
    name: str, variant: Variant, modes: tuple[str, ...], options: Options, batch: int
) -> Iterator[tuple[tuple[str, ...], Callable[[], Subject]]]:
    """What makes the model, once or, of a variant that differs in training, once a mode."""
    if name in UNETS:
        yield modes, partial(UNetSubject, UNETS[name], variant, options, batch)
    elif variant.backend == "torchao":
        for mode in modes:
            yield (mode,), partial(FITSubject, PRESETS[name], variant, options, batch, mode)
    else:
        yield modes, partial(FITSubject, PRESETS[name], variant, options, batch)


def bench_variant(
    name: str, variant: Variant, batches: list[int], modes: tuple[str, ...], options: Options
) -> Iterator[dict[str, Any]]:
    """Gate and time one model in one variant; a row for every batch size and mode."""
    title = variant.name(options.dtype)
    if "train" in modes and not variant.trains:
        say(f"{name}: {title} has no row of training: it is quantised, for inference")
        modes = tuple(mode for mode in modes if mode != "train")
    if not modes:
        return
    for chosen, make in subjects(name, variant, modes, options, batches[0]):
        say(f"{name}: building {title}")
        subject, gate = prepared(make, variant)
        for batch, mode in product(batches, chosen):
            row: dict[str, Any] = {
                "case": f"model/{name}/{mode}",
                "variant": title,
                "batch": batch,
                "unit": "ms/video",
                "better": "lower",
                "includes": subject.includes(mode) if subject else "nothing: it was not run",
            } | gate
            if variant.peer:
                row["peer"] = True
            if subject and row["gate"] == "ok":
                row = timed(row, subject, mode, options)
            if row["gate"] != "ok":
                print(f"{row['case']} batch {batch}: no figure: {row['gate']}", file=sys.stderr)
            yield row
        del subject  # before the next is built: what is compiled refers to itself
        gc.collect()
        if options.device.type == "cuda":
            torch.cuda.empty_cache()


def prepared(
    make: Callable[[], Subject], variant: Variant
) -> tuple[Subject | None, dict[str, Any]]:
    """The model, built and gated; and of a row the gate, the errors seen, whether it is absent."""
    subject: Subject | None = None
    found: dict[str, Any] = {"gate": OUT_OF_MEMORY, "error": {}}
    try:
        with reported_out_of_memory():
            subject = make()
            say(f"{subject.config.name}: checking against the float64 reference")
            found["gate"], found["error"] = subject.gated()
    except Exception as failure:  # whatever it is, our rows are not lost for it
        if variant.backend == "ours":
            raise
        found["gate"] = reason_of(failure)
        if subject is None and variant.peer and isinstance(failure, ABSENT):
            found["absent"] = True
    return subject, found


def timed(row: dict[str, Any], subject: Subject, mode: str, options: Options) -> dict[str, Any]:
    """`row` with its measured fields, or its red gate."""
    try:
        with reported_out_of_memory() as memory:
            row |= time_case(subject, row["batch"], mode, options)
    except Exception as failure:
        if subject.variant.backend == "ours":
            raise
        row = without_figure(row, reason_of(failure))
    subject.module.zero_grad(set_to_none=True)
    return without_figure(row, OUT_OF_MEMORY) if memory.exhausted else row


def time_case(subject: Subject, batch: int, mode: str, options: Options) -> dict[str, Any]:
    """The measured fields of one row, or its red gate."""
    subject.release()  # so that all that this case holds is in its peak
    on_gpu = options.device.type == "cuda"
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    make = subject.training_step if mode == "train" else subject.inference
    case = f"model/{subject.config.name}/{mode} batch {batch}"
    say(f"{case}: warming up")
    call = make(batch)
    call()
    if mode == "train" and not all(
        parameter.grad is not None and parameter.grad.isfinite().all()
        for parameter in subject.module.parameters()
    ):
        return {"gate": "a gradient is missing or not finite"}
    floor = subject.floor_ms(mode)
    told: dict[str, Any] = {
        "tflop": significant(subject.tflop(mode)),
        "includes": subject.includes(mode),
    }
    if probe := options.load.probe():
        told["probe_tflop_s"] = probe
    repeats = repeats_of(floor * batch, options)
    with options.load.watched() as window:
        timing = measure(
            call,
            options.device,
            repeats=repeats,
            warmup=1,
            progress=lambda done: say(f"{case}: repetition {done} of {repeats}"),
        )
    if window.refusal:
        return {"gate": window.refusal}
    told |= figures(timing, floor, batch) | window.medians()
    if on_gpu:
        told["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    return told


def repeats_of(floor: float, options: Options) -> int:
    """How often a call of at least `floor` ms is timed: on a GPU for `LEAST_MS` if it can be."""
    if options.device.type != "cuda":
        return options.repeats
    return max(options.repeats, min(MOST_REPEATS, int(LEAST_MS / floor)))


def print_figures(record: dict[str, Any]) -> None:
    """The tables of a record, with its ceilings above them."""
    ceilings = ", ".join(f"{name} {value:g}" for name, value in record["ceilings"].items())
    print(f"\n{record['device']['name']}; ceilings measured in this process: {ceilings}")
    print(figure_table(record))


def print_committed_record() -> None:
    """The newest GPU record of the repository, for comparison."""
    found = newest("throughput")
    if found is None:
        print("\nNo GPU record is committed yet.")
        return
    path, record = found
    print(f"\nThe newest committed GPU record, {path.relative_to(RECORDS.parent.parent)}:")
    print_figures(record)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--preset",
        nargs="+",
        choices=list(MODELS),
        metavar="NAME",
        help=f"{', '.join(MODELS)}; default: {', '.join(GPU_BATCHES)} on a GPU, "
        f"else {', '.join(CPU_BATCHES)}",
    )
    parser.add_argument(
        "--batch",
        nargs="+",
        type=positive_int,
        metavar="N",
        help="videos at once; several allowed; what is compiled is timed at the largest of the "
        "default ones alone",
    )
    parser.add_argument("--dtype", choices=list(DTYPES), help="default: bf16 on a GPU, else fp32")
    parser.add_argument(
        "--backend",
        nargs="+",
        choices=BACKENDS,
        help="of the ops: the fastest of each (ours), PyTorch's calls as they are or under "
        "torch.compile, the equations, or a peer; several allowed. Default: ours and, on a GPU, "
        "what it is held against",
    )
    parser.add_argument(
        "--recipe",
        nargs="+",
        choices=list(RECIPES),
        help="bf16, all in --dtype, or fp8; several allowed. Default: bf16 and, on a GPU, fp8",
    )
    parser.add_argument(
        "--no-capture",
        action="store_true",
        help="on a GPU, infer by launches and not by one CUDA graph of the whole model",
    )
    parser.add_argument("--mode", choices=[*MODES, "both"], default="both", help="what to time")
    parser.add_argument("--clip", type=Path, default=CLIP, help="a video or image file")
    parser.add_argument(
        "--framerate", type=positive_float, default=24.0, help="frames/s of the clip read"
    )
    parser.add_argument("--repeats", type=positive_int, help="default: 10 on a GPU, else 3")
    parser.add_argument("--json", type=record_path, metavar="FILE", help="write the record here")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on with the record of --json, of a run that was cut off: what it has of a variant "
        "is not measured again",
    )
    args = parser.parse_args(arguments)
    quantised = args.recipe and all(RECIPES[recipe].layers for recipe in args.recipe)
    if args.resume and not args.json:
        parser.error("--resume needs --json: the record to go on with")
    if args.mode == "train" and quantised and not set(args.backend or ["ours"]) & set(PEERS):
        parser.error("--mode train needs --recipe bf16: what is quantised has no gradients")
    return args


def _reproducible(args: argparse.Namespace) -> dict[str, Any]:
    """The flags that differ from none given, without paths of this machine."""
    flags = {
        "preset": " ".join(args.preset or []),
        "batch": " ".join(map(str, args.batch or [])),
        "dtype": args.dtype,
        "backend": " ".join(args.backend or []),
        "recipe": " ".join(args.recipe or []),
        "no-capture": args.no_capture,
        "mode": args.mode if args.mode != "both" else None,
        "clip": args.clip.name if args.clip != CLIP else None,
        "framerate": args.framerate if args.framerate != 24 else None,
        "repeats": args.repeats,
    }
    return {name: value for name, value in flags.items() if value}


if __name__ == "__main__":
    sys.exit(main())
