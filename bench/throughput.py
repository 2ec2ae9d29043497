"""Throughput of the paper's models on a real clip: ms/video/GPU, as in its table 2.

python bench/throughput.py                        # every preset that suits the machine
python bench/throughput.py --preset 3.9b --batch 16 --mode infer --json figures.json
python bench/throughput.py --recipe bf16 fp8 --backend ours eager compile    # beside its peers
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from gate import (
    LIMITS,
    QUANTISED_LIMIT,
    QUANTISED_RATIO,
    Inputs,
    expected_output,
    gate_videos,
    judged,
    plain_error,
)
from report import figure_table
from workload import Batch, build_model, load_batch

from snapkernels import RECIPES, Recipe, quantise
from snapkernels.roofline import measure_ceilings, short_name
from snapkernels.testing.load import Load
from snapkernels.testing.record import (
    RECORDS,
    command_so_far,
    new_record,
    newest,
    record_path,
    write,
)
from snapkernels.testing.timing import measure
from snapvideo_core import (
    FIT,
    PRESETS,
    FITConfig,
    SnapDiffusion,
    VideoError,
    read_clip,
    training_loss,
)
from snapvideo_core.diffusion import Network
from snapvideo_core.flops import TRAIN_FORWARDS, floor_ms, graph_tflop

CLIP = Path(__file__).resolve().parent / "clips" / "big_buck_bunny.mp4"
GPU_BATCHES = {"500m": [16, 64], "3.9b": [16], "3.9b-up": [1]}
CPU_BATCHES = {"mini": [1]}
MODES = ("infer", "train")
OUT_OF_MEMORY = "out of memory"
# How PyTorch's CPU allocator and the CUDA libraries say it, in a plain RuntimeError.
ALLOCATION_FAILURES = ("not enough memory", "can't allocate memory", "ALLOC_FAILED")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
FORWARDS = {"infer": 1, "train": TRAIN_FORWARDS}
INCLUDES = {
    "infer": "one denoiser evaluation, no guidance",
    "train": "self-conditioning pass over the whole batch + forward + backward, no optimiser",
}
CAPTURED = ", by a replay of one CUDA graph, with copies of its inputs and outputs"


@dataclass(frozen=True)
class Options:
    """What every case of a run has in common."""

    device: torch.device
    dtype: torch.dtype
    backend: str
    recipe: Recipe
    capture: bool
    modes: tuple[str, ...]
    clip: Path
    framerate: float
    repeats: int
    ceilings: dict[str, float]
    load: Load

    @property
    def quantised(self) -> bool:
        return bool(self.recipe.layers)

    @property
    def variant(self) -> str:
        return f"{self.backend}-{self.recipe.name if self.quantised else short_name(self.dtype)}"

    def floor_ms(self, config: FITConfig) -> float:
        """Of one evaluation of one video; without fp8 units its products run at the dtype's."""
        rate = self.ceilings[f"{short_name(self.dtype)}_tflop_s"]
        quantised = self.ceilings.get("fp8_tflop_s", rate)
        return floor_ms(config, self.recipe, tflop_s=rate, quantised_tflop_s=quantised)


def main(arguments: list[str] | None = None) -> int:
    """Run the bench.

    Returns:
        0, or 1 when a gate was red or nothing fitted in memory, or 2 on bad input.
    """
    args = _parse(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = device.type == "cuda"
    dtype = DTYPES[args.dtype or ("bf16" if on_gpu else "fp32")]
    if args.capture and not on_gpu:
        print("error: --capture makes a CUDA graph, and there is no NVIDIA GPU", file=sys.stderr)
        return 2
    default_batches = GPU_BATCHES if on_gpu else CPU_BATCHES
    presets = args.preset or list(default_batches)
    try:
        for config in map(PRESETS.__getitem__, presets):
            size = (config.height, config.width)
            read_clip(args.clip, frames=config.frames, size=size, framerate=args.framerate)
    except (VideoError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if not on_gpu:
        figures = "the figures below are CPU figures"
        print(f"No NVIDIA GPU here: {figures} ({', '.join(presets)}).", flush=True)
    say("measuring the ceilings of this machine")
    with reported_out_of_memory() as memory:
        ceilings = measure_ceilings(device, dtype)
    if memory.exhausted:
        print("error: out of memory measuring the ceilings", file=sys.stderr)
        return 1
    load = Load(device)
    options = Options(
        device=device,
        dtype=dtype,
        backend=args.backend[0],
        recipe=RECIPES[args.recipe[0]],
        capture=args.capture,
        modes=MODES if args.mode == "both" else (args.mode,),
        clip=args.clip,
        framerate=args.framerate,
        repeats=args.repeats or (20 if on_gpu else 3),
        ceilings=ceilings,
        load=load,
    )
    flags = [f"--{k}" if v is True else f"--{k} {v}" for k, v in _reproducible(args).items()]
    command = " ".join(["python bench/throughput.py", *flags])
    runs = list(product(presets, args.recipe, args.backend))
    rows: list[dict[str, Any]] = []
    for number, (name, recipe, backend) in enumerate(runs, 1):
        chosen = replace(options, recipe=RECIPES[recipe], backend=backend)
        rows += bench_preset(PRESETS[name], args.batch or default_batches.get(name, [1]), chosen)
        so_far = command_so_far(command, done=number == len(runs))
        record = new_record(so_far, device, load.fields(), ceilings, rows)
        if args.json:  # each time: a run that is cut off leaves what it has
            write(record, args.json)
    print_figures(record)
    if args.json:
        print(f"record written to {args.json}")
    if not on_gpu:
        print_committed_record()
    gates = {row["gate"] for row in rows}
    return 0 if "ok" in gates and gates <= {"ok", OUT_OF_MEMORY} else 1


def bench_preset(
    config: FITConfig, batches: list[int], options: Options
) -> Iterator[dict[str, Any]]:
    """Gate and time one preset; a row for every batch size and mode."""
    modes = options.modes
    if "train" in modes and (options.quantised or options.capture):
        what = "captured" if options.capture else "quantised"
        say(f"{config.name}: {options.variant} has no row of training: it is {what}, for inference")
        modes = tuple(mode for mode in modes if mode != "train")
    cases = [(batch, mode) for batch in batches for mode in modes]
    if not cases:
        return
    say(f"{config.name}: building {options.variant}")
    with reported_out_of_memory() as memory:
        require_cpu_memory(config, options)
        calls = "eager" if options.backend == "compile" else options.backend
        backend = None if calls == "ours" else calls
        model = build_model(config, options.device, options.dtype, backend)
        say(f"{config.name}: checking against the float64 reference")
        verdict, error = prepare(model, options)
    if memory.exhausted:
        verdict, error = OUT_OF_MEMORY, {}
    for batch, mode in cases:
        row = {
            "case": f"model/{config.name}/{mode}",
            "variant": options.variant,
            "batch": batch,
            "unit": "ms/video",
            "better": "lower",
            "gate": verdict,
            "error": error,
            "includes": INCLUDES[mode] + CAPTURED * options.capture,
            "tflop": significant(graph_tflop(config) * FORWARDS[mode]),
        }
        if verdict == "ok":
            with reported_out_of_memory() as memory:
                row |= time_case(model, batch, mode, options)
            model.zero_grad(set_to_none=True)
            if memory.exhausted:
                row["gate"] = OUT_OF_MEMORY
        if row["gate"] != "ok":
            print(f"{row['case']} batch {batch}: no figure: {row['gate']}", file=sys.stderr)
        yield row


def prepare(model: FIT, options: Options) -> tuple[str, dict[str, float]]:
    """Make of `model` what is to be timed, and hold it against the float64 equations.

    Those are of the weights as they were built, on one video of the bench's own input (of a
    quantised model on several), with latents of an earlier evaluation. A quantised model may be off
    by `QUANTISED_RATIO` of what plain fp8 is.
    """
    model.eval()
    videos = gate_videos(model.config) if options.quantised else 1
    data = load_batch(options.clip, model.config, videos, options.framerate, options.device)
    diffusion = SnapDiffusion(sigma_in=model.config.sigma_in)
    x = diffusion.network_input(data.x_sigma, data.sigma)
    with torch.no_grad():
        _, previous = model(x, data.sigma, data.cond)
    inputs = Inputs(x, data.sigma, data.cond, previous)
    expected = expected_output(model, inputs)
    limit, eager = LIMITS[options.dtype], None
    if options.quantised:
        quantise(model, options.recipe)
        eager = plain_error(model, inputs, expected)
        limit = min(QUANTISED_RATIO * eager, QUANTISED_LIMIT)
    if options.backend == "compile":
        model.compile(dynamic=False)  # else a second batch is compiled for any batch
    verdict, error = judged(timed_network(model, data, options), inputs, expected, limit)
    if options.backend == "eager" and eager is None:
        eager = error["rms_vs_fp64"]
    return verdict, error | ({"rms_eager": eager} if eager is not None else {})


def timed_network(model: FIT, data: Batch, options: Options) -> Network:
    """The model, or its captured form for such a batch."""
    if options.backend == "compile":
        torch.compiler.reset()  # eight forms of a call are compiled, and a ninth is not
    return model.capture(data.x_sigma, data.sigma, data.cond) if options.capture else model


def time_case(model: FIT, batch: int, mode: str, options: Options) -> dict[str, Any]:
    """The measured fields of one row, or its red gate."""
    config = model.config
    data = load_batch(options.clip, config, batch, options.framerate, options.device)
    if options.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    network = timed_network(model.train(mode == "train"), data, options)
    call = _training_step(model, data) if mode == "train" else _inference(network, model, data)
    case = f"model/{config.name}/{mode} batch {batch}"
    say(f"{case}: warming up")
    call()
    if mode == "train" and not all(
        parameter.grad is not None and parameter.grad.isfinite().all()
        for parameter in model.parameters()
    ):
        return {"gate": "a gradient is missing or not finite"}
    with options.load.watched():
        timing = measure(
            call,
            options.device,
            repeats=options.repeats,
            warmup=1,
            progress=lambda done: say(f"{case}: repetition {done} of {options.repeats}"),
        )
    floor = FORWARDS[mode] * options.floor_ms(config)
    value, p20, p80 = (significant(ms / batch) for ms in timing)
    measured = {"value": value, "p20": p20, "p80": p80, "floor": significant(floor)}
    measured["pct_of_floor"] = round(100 * floor / value, 1)
    if options.device.type == "cuda":
        measured["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    return measured


def _inference(network: Network, model: FIT, data: Batch) -> Callable[[], object]:
    """One denoiser evaluation: c_in and c_skip scaling, network, self-conditioned."""
    config = model.config
    diffusion = SnapDiffusion(sigma_in=config.sigma_in)
    # The first has no latents before it: zeros, and not None, which would be compiled apart.
    latents = (len(data.sigma), config.num_latents, config.latent_dim)
    nothing = model.positions.new_zeros(latents)
    with torch.no_grad():
        _, previous = diffusion.denoise(network, data.x_sigma, data.sigma, data.cond, nothing)

    @torch.no_grad()
    def evaluate() -> None:
        diffusion.denoise(network, data.x_sigma, data.sigma, data.cond, previous)

    return evaluate


def _training_step(model: FIT, data: Batch) -> Callable[[], object]:
    """Both passes and the backward pass; gradients are made anew, as after an optimiser step.

    A user of PyTorch's calls draws noise by them and stores it; ours is counted.
    """
    diffusion = SnapDiffusion(sigma_in=model.config.sigma_in)

    def step() -> None:
        model.zero_grad(set_to_none=True)
        eps = None if model.backend is None else torch.randn_like(data.video)
        loss = training_loss(model, diffusion, data.video, data.cond, sigma=data.sigma, eps=eps)
        loss.backward()

    return step


def require_cpu_memory(config: FITConfig, options: Options) -> None:
    """Raise MemoryError where the weights and gradients alone exceed a CPU's free memory.

    Linux would grant them and then kill the process without a word.
    """
    if options.device.type == "cpu":
        with torch.device("meta"):
            numbers = sum(parameter.numel() for parameter in FIT(config).parameters())
        needed = numbers * options.dtype.itemsize * (2 if "train" in options.modes else 1)
        if needed > available_bytes():
            raise MemoryError


def available_bytes() -> int:
    """What Linux can give without swapping."""
    meminfo = Path("/proc/meminfo").read_text()
    return int(meminfo.split("MemAvailable:")[1].split()[0]) * 1024


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


def print_figures(record: dict[str, Any]) -> None:
    """The table of a record, with its ceilings above it."""
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


def significant(value: float) -> float:
    """`value` to five significant digits."""
    return float(f"{value:.5g}")


def say(message: str) -> None:
    """Progress, kept out of the figures' stream."""
    print(message, file=sys.stderr, flush=True)


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
        "--batch",
        nargs="+",
        type=positive_int,
        metavar="N",
        help="videos at once; several allowed",
    )
    parser.add_argument("--dtype", choices=list(DTYPES), help="default: bf16 on a GPU, else fp32")
    parser.add_argument(
        "--backend",
        nargs="+",
        choices=["ours", "eager", "compile", "reference"],
        default=["ours"],
        help="of the ops: the fastest of each (ours), PyTorch's calls as they are or under "
        "torch.compile, or the equations; several allowed",
    )
    parser.add_argument(
        "--recipe",
        nargs="+",
        choices=list(RECIPES),
        default=["bf16"],
        help="bf16, all in --dtype, or fp8, for inference; several allowed",
    )
    parser.add_argument(
        "--capture", action="store_true", help="infer by one CUDA graph of the whole model"
    )
    parser.add_argument("--mode", choices=[*MODES, "both"], default="both", help="what to time")
    parser.add_argument("--clip", type=Path, default=CLIP, help="a video or image file")
    parser.add_argument(
        "--framerate", type=_positive_float, default=24.0, help="frames/s of the clip read"
    )
    parser.add_argument("--repeats", type=positive_int, help="default: 20 on a GPU, else 3")
    parser.add_argument("--json", type=record_path, metavar="FILE", help="write the record here")
    args = parser.parse_args(arguments)
    if args.mode == "train" and (args.capture or all(RECIPES[r].layers for r in args.recipe)):
        parser.error("--mode train needs --recipe bf16 and no --capture: those have no gradients")
    return args


def positive_int(text: str) -> int:
    """A count among a command's arguments."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number above 0, got {text!r}")
    return int(text)


def _positive_float(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number above 0, got {text!r}")
    return value


def _reproducible(args: argparse.Namespace) -> dict[str, Any]:
    """The flags that differ from none given, without paths of this machine."""
    flags = {
        "preset": " ".join(args.preset or []),
        "batch": " ".join(map(str, args.batch or [])),
        "dtype": args.dtype,
        "backend": " ".join(args.backend) if args.backend != ["ours"] else None,
        "recipe": " ".join(args.recipe) if args.recipe != ["bf16"] else None,
        "capture": args.capture,
        "mode": args.mode if args.mode != "both" else None,
        "clip": args.clip.name if args.clip != CLIP else None,
        "framerate": args.framerate if args.framerate != 24 else None,
        "repeats": args.repeats,
    }
    return {name: value for name, value in flags.items() if value}


if __name__ == "__main__":
    sys.exit(main())
