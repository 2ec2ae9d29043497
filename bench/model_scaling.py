"""Whole models at 2.5k to 1M patch tokens, 1 to 64 videos, 256 to 1536 latents: time and memory.

python bench/model_scaling.py                           # print the rows and the fitted exponents
python bench/model_scaling.py --axis tokens --mode infer --json rows.json

Ours and eager PyTorch have the same weights, ours takes the fastest backend of each op. On an axis
a variant stops at the first point at which it runs out of memory.
"""

import argparse
import math
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, NamedTuple

import torch
from fit_subject import FORWARDS, INCLUDES, inference, training_step
from gate import LIMITS, Inputs, use_backend
from scaling import line
from subject import CAPTURED, Options
from support import (
    CLIP,
    OUT_OF_MEMORY,
    figures,
    is_shared,
    reported_out_of_memory,
    say,
    significant,
)
from torch import nn
from workload import Batch, build_model, load_batch

from snapkernels import RECIPES
from snapkernels.roofline import measure_ceilings, short_name
from snapkernels.testing.bench import reason_of
from snapkernels.testing.load import Load
from snapkernels.testing.numerics import relative_rms
from snapkernels.testing.record import command_so_far, new_record, record_path, write
from snapkernels.testing.timing import measure
from snapvideo_core import (
    FIT,
    PRESETS,
    CapturedFIT,
    FITConfig,
    SnapDiffusion,
    VideoError,
    read_clip,
)
from snapvideo_core.flops import floor_ms, graph_tflop

AXES = ("tokens", "latents", "batch")  # the first two are of one model, built once
MODES = ("infer", "train")
VARIANTS = {"ours": None, "eager": "eager"}
FRAMERATE = 24.0
UNCHECKED = "not checked: eager ran out of memory in one evaluation of one video"
# Calls that are timed: as many as their floors fit into the budget, within these; most of them
# last longer than the 0.2 s after which a GPU's clock is sampled.
LEAST_REPEATS, MOST_REPEATS = 2, {"cuda": 30, "cpu": 3}
BUDGET_MS = 1000.0


class Plan(NamedTuple):
    """The points of each axis.

    Attributes:
        upsampler: what has more tokens, or other latents.
        first_stage: what has more videos.
        split: groups along height and width of every token grid.
        grids: (height, width) in tokens; a video has `frames` of them.
        batches, latents: counts.
        fitted_from: {axis: the point from which on a power law is fitted}; below, tokens are few
            beside the latents, and few videos do not fill a GPU.
    """

    upsampler: FITConfig
    first_stage: FITConfig
    split: tuple[int, int]
    grids: tuple[tuple[int, int], ...]
    batches: tuple[int, ...]
    latents: tuple[int, ...]
    fitted_from: dict[str, int]


PLANS = {
    "cuda": Plan(
        upsampler=PRESETS["3.9b-up"],
        first_stage=PRESETS["3.9b"],
        split=(8, 4),
        grids=((8, 20), (16, 40), (48, 48), (72, 128), (144, 256), (256, 256)),
        batches=(1, 2, 4, 8, 16, 32, 64),
        latents=(256, 512, 768, 1024, 1536),
        fitted_from={"tokens": 36864, "batch": 4, "latents": 256},
    ),
    "cpu": Plan(
        upsampler=PRESETS["tiny-up"],
        first_stage=PRESETS["tiny"],
        split=(2, 2),
        grids=((8, 8), (16, 16), (32, 32)),
        batches=(1, 2, 4),
        latents=(4, 8, 16),
        fitted_from={"tokens": 1024, "batch": 1, "latents": 4},
    ),
}


@dataclass(frozen=True)
class Run(Options):
    """What every point of a run has in common; `repeats` is at most."""

    plan: Plan
    modes: tuple[str, ...]

    def floor_ms(self, config: FITConfig, batch: int, mode: str) -> float:
        """Of a whole call."""
        rate = self.tflop_s
        one = floor_ms(config, RECIPES["bf16"], tflop_s=rate, quantised_tflop_s=rate)
        return one * batch * FORWARDS[mode]

    def includes(self, mode: str) -> str:
        """What is in the figures of `mode`."""
        how = CAPTURED if self.capture and mode == "infer" else ", by plain calls, host time in it"
        gated = f"F of the first video held to eager's in {short_name(self.dtype)}"
        return f"{INCLUDES[mode]}{how}; {gated}; peak_gib with the weights"


class Given(NamedTuple):
    """What both variants get at one point, and what they have to make of it.

    `previous` is (1, L, latent_dim); `expected` is F of the first video by eager, (1, 3, T, H, W),
    on the CPU, where no peak has it; None where eager ran out of memory.
    """

    data: Batch
    previous: torch.Tensor
    expected: torch.Tensor | None


def main(arguments: list[str] | None = None) -> int:
    """Run the bench.

    Returns:
        0, or 1 when a gate was red for another reason than memory or nothing fitted in it, or 2
        where the clip cannot be read or the GPU is shared.
    """
    args = _parse(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = device.type == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    try:
        read_clip(CLIP, framerate=FRAMERATE)
    except (VideoError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if not on_gpu:
        print("No NVIDIA GPU here: CPU figures, of small models.", flush=True)
    load = Load(device)
    if is_shared(load):
        return 2
    say("measuring the ceilings of this machine")
    run = Run(
        device=device,
        dtype=dtype,
        capture=on_gpu,  # infer, so that no host's time bends the exponents
        clip=CLIP,
        framerate=FRAMERATE,
        repeats=MOST_REPEATS[device.type],
        ceilings=measure_ceilings(device, dtype),
        load=load,
        plan=PLANS[device.type],
        modes=tuple(args.mode),
    )
    model: FIT | None = None
    rows: list[dict[str, Any]] = []
    for number, axis in enumerate(args.axis, 1):
        base = run.plan.first_stage if axis == "batch" else run.plan.upsampler
        if model is None or model.config.name != base.name:
            model = None  # the memory of one is free before the next is built
            say(f"building {base.name}")
            with reported_out_of_memory():
                model = build_model(base, device, dtype, None)
        if model is None:
            print(f"error: out of memory building {base.name}", file=sys.stderr)
            return 1
        for row in bench_axis(axis, model, run):
            rows.append(row)
            print(f"{axis:<7} {row['point']:>7}  {line(row)}", flush=True)
        so_far = command_so_far(_command(args), done=number == len(args.axis))
        record = new_record(so_far, device, load.fields(), run.ceilings, rows)
        record["exponents"] = exponents(rows, run.plan)
        record["memory_exponents"] = memory_exponents(rows, run.plan)
        if args.json:  # each time: a run that is cut off leaves what it has
            write(record, args.json)
    for what, name in (("time", "exponents"), ("memory above the weights", "memory_exponents")):
        for series, exponent in record[name].items():
            print(f"{series}: {what} grows with exponent {exponent:.3f}")
    gates = {row["gate"] for row in rows}
    return 0 if "ok" in gates and gates <= {"ok", OUT_OF_MEMORY} else 1


def points(axis: str, plan: Plan) -> list[tuple[int, FITConfig, int]]:
    """(point, config, batch) of an axis, from the smallest on."""
    if axis == "batch":
        return [(batch, plan.first_stage, batch) for batch in plan.batches]
    if axis == "latents":
        return [(count, replace(plan.upsampler, num_latents=count), 1) for count in plan.latents]
    configs = [on_grid(plan, grid) for grid in plan.grids]
    return [(config.num_groups * config.group_tokens, config, 1) for config in configs]


def on_grid(plan: Plan, grid: tuple[int, int]) -> FITConfig:
    """The upsampler with `grid` tokens a frame, and as 3.9b-up of an eighth of each side."""
    (height, width), (rows, columns) = grid, plan.split
    config = plan.upsampler
    return replace(
        config,
        height=config.patch * height,
        width=config.patch * width,
        group=(config.frames, height // rows, width // columns),
        low_res=(config.patch * height // 8, config.patch * width // 8),
    )


def adapt(model: FIT, config: FITConfig) -> None:
    """Give `model` the sizes of `config`, which has its widths, depth and number of groups.

    Positions and initial latents are drawn anew, all other parameters stay. So does `absorbs` of
    read and write, which tells nobody but `quantise`.
    """
    like = model.positions.detach()
    positions = like.new_empty(1, config.group_tokens, config.patch_dim).normal_(std=0.02)
    latents = like.new_empty(config.num_latents, config.latent_dim).normal_(std=0.02)
    model.config = config
    model.positions = nn.Parameter(positions)
    model.self_conditioning.latents = nn.Parameter(latents)


def clear(model: FIT, device: torch.device) -> None:
    """Drop what the row before has left: its gradients, and what its graph had of its own."""
    model.zero_grad(set_to_none=True)
    if device.type == "cuda":
        torch.cuda.empty_cache()


def bench_axis(axis: str, model: FIT, run: Run) -> Iterator[dict[str, Any]]:
    """Rows of a record, point by point; what has run out of memory is not tried on larger ones."""
    going = list(product(run.modes, VARIANTS))
    for point, config, batch in points(axis, run.plan):
        if not going:
            return
        say(f"{axis} {point}")
        adapt(model, config)
        given = prepared(model, batch, run)
        for mode, variant in list(going):
            row: dict[str, Any] = {
                "case": f"model/{config.name}/{mode}",
                "variant": f"{variant}-{short_name(run.dtype)}",
                "batch": batch,
                "unit": "ms",
                "better": "lower",
                "gate": OUT_OF_MEMORY,
                "includes": run.includes(mode),
                "axis": axis,
                "point": point,
            }
            try:
                with reported_out_of_memory():
                    row |= examined(model, given, variant, mode, run)
            except Exception as error:  # whatever it is, the other rows are not lost for it
                row["gate"] = reason_of(error)
            if row["gate"] == OUT_OF_MEMORY:
                going.remove((mode, variant))
            yield row
        del given  # before the next is made


def prepared(model: FIT, batch: int, run: Run) -> Given:
    """The clip in `batch` copies, and what eager makes of the first in its second evaluation."""
    config = model.config
    clear(model, run.device)
    data = load_batch(run.clip, config, batch, run.framerate, run.device)
    previous = model.positions.new_zeros(1, config.num_latents, config.latent_dim)
    first = Inputs(data.x_sigma, data.sigma, data.cond, previous).first(1)
    expected = None
    use_backend(model.eval(), "eager")
    with reported_out_of_memory():
        first = first._replace(previous=evaluated(model, config, first)[1])
        expected = evaluated(model, config, first)[0].cpu()
    return Given(data, first.previous, expected)


@torch.no_grad()
def evaluated(
    network: FIT | CapturedFIT, config: FITConfig, inputs: Inputs
) -> tuple[torch.Tensor, torch.Tensor]:
    """F and the final latents; x is not scaled yet, and has no scaled copy in any peak."""
    scale = SnapDiffusion(sigma_in=config.sigma_in).c_in(inputs.sigma)
    return network(*inputs, scale_B=scale)


def examined(model: FIT, given: Given, variant: str, mode: str, run: Run) -> dict[str, Any]:
    """The gate of a row and, where that is "ok", the measured fields."""
    if given.expected is None:
        return {"gate": OUT_OF_MEMORY if variant == "eager" else UNCHECKED}
    data = given.data
    use_backend(model.eval(), VARIANTS[variant])
    clear(model, run.device)
    if run.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    network: FIT | CapturedFIT = model
    if mode == "infer" and run.capture:
        network = model.capture(data.x_sigma, data.sigma, data.cond)
    previous = given.previous.repeat(len(data.sigma), 1, 1)
    inputs = Inputs(data.x_sigma, data.sigma, data.cond, previous)
    found = evaluated(network, model.config, inputs)[0][:1].cpu()
    error = relative_rms(found, given.expected)
    # Each of the two is 8e-3 off at most in bf16, and both together 1.1e-2.
    if error > (limit := LIMITS[run.dtype]):
        return {"gate": f"relative rms error {error:.2e} vs eager, limit {limit:.2e}"}
    if mode == "infer":
        call: Callable[[], object] = inference(network, model, data)
    else:
        call = training_step(model.train(), data)
        call()
        gradients = [parameter.grad for parameter in model.parameters()]
        if not all(one is not None and one.isfinite().all() for one in gradients):
            return {"gate": "a gradient is missing or not finite"}
        del gradients  # each step makes its own
    measured = timed(call, model, len(data.sigma), mode, run)
    return {"gate": "ok", "error": {"rms_vs_eager": error}} | measured


def timed(
    call: Callable[[], object], model: FIT, batch: int, mode: str, run: Run
) -> dict[str, Any]:
    """The measured fields of a row, or its red gate; the peak is that since it was reset."""
    floor = run.floor_ms(model.config, batch, mode)
    repeats = max(LEAST_REPEATS, min(run.repeats, int(BUDGET_MS / floor)))
    with run.load.watched() as window:
        timing = measure(call, run.device, repeats=repeats, warmup=0)
    if window.refusal:
        return {"gate": window.refusal}
    fields = figures(timing, floor)
    fields["tflop"] = significant(graph_tflop(model.config) * batch * FORWARDS[mode])
    if run.device.type == "cuda":
        weights = sum(one.numel() * one.element_size() for one in model.parameters())
        fields["peak_gib"] = significant(torch.cuda.max_memory_allocated() / 2**30)
        fields["weights_gib"] = significant(weights / 2**30)
    return fields


def exponents(rows: list[dict[str, Any]], plan: Plan) -> dict[str, float]:
    """{series: the slope of log time against log point}, over `plan.fitted_from`."""
    return fitted(rows, plan, lambda row: row["value"])


def memory_exponents(rows: list[dict[str, Any]], plan: Plan) -> dict[str, float]:
    """Likewise of the peak less the bytes of the weights; gradients stay in it."""
    measured = [row for row in rows if "peak_gib" in row]
    return fitted(measured, plan, lambda row: row["peak_gib"] - row["weights_gib"])


def fitted(
    rows: list[dict[str, Any]], plan: Plan, amount: Callable[[dict[str, Any]], float]
) -> dict[str, float]:
    """{"infer tokens ours-bf16": the slope of log amount against log point}.

    Of the points with a figure, from `plan.fitted_from` on; a series of fewer than two is left out.
    """
    series: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if row["gate"] == "ok" and row["point"] >= plan.fitted_from[row["axis"]]:
            name = f"{row['case'].rsplit('/', 1)[1]} {row['axis']} {row['variant']}"
            place = (math.log(row["point"]), math.log(amount(row)))
            series.setdefault(name, []).append(place)
    return {
        name: round(statistics.linear_regression(*zip(*found, strict=True)).slope, 4)
        for name, found in series.items()
        if len(found) > 1
    }


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--axis", nargs="+", choices=AXES, default=AXES, help="what grows; default: all in turn"
    )
    parser.add_argument("--mode", nargs="+", choices=MODES, default=MODES, help="default: both")
    parser.add_argument("--json", type=record_path, metavar="FILE", help="write the record here")
    args = parser.parse_args(arguments)
    args.axis = [axis for axis in AXES if axis in args.axis]
    args.mode = [mode for mode in MODES if mode in args.mode]
    return args


def _command(args: argparse.Namespace) -> str:
    """What was run, with the flags that leave something out."""
    given = {"axis": (args.axis, list(AXES)), "mode": (args.mode, list(MODES))}
    flags = [f"--{name} {' '.join(some)}" for name, (some, all_) in given.items() if some != all_]
    return " ".join(["python bench/model_scaling.py", *flags])


if __name__ == "__main__":
    sys.exit(main())
