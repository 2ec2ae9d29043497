"""The loss of a small FIT in training, by the fused kernels and all eager, from one seed.

python bench/curves.py --json curves.json   # 500 steps of each on the committed clip
"""

import argparse
import math
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple
from unittest import mock

import torch
from support import CLIP, positive_int, say, significant

from snapkernels import dispatch, forward_process, library
from snapkernels.roofline import measure_ceilings, short_name
from snapkernels.spec import Backend, Spec
from snapkernels.testing.load import Load
from snapkernels.testing.record import new_record, record_path, write
from snapkernels.testing.timing import Timing
from snapvideo_core import (
    FIT,
    PRESETS,
    Clip,
    Conditioning,
    FITConfig,
    SnapDiffusion,
    VideoError,
    read_clip,
    sample_sigma,
    training_loss,
)
from snapvideo_core.flops import TRAIN_FORWARDS, graph_tflop

# Of the upsampler what decides which kernels run: 24 latents of a group, 16 heads, and groups that
# are absorbed with less work than projected. Two videos are 18,432 patch tokens.
SMALL = FITConfig(
    name="small",
    height=72,
    width=128,
    group=(16, 9, 8),
    patch_dim=512,
    patch_head_dim=32,
    num_latents=192,
    latent_dim=512,
    latent_head_dim=64,
    cond_dim=256,
    blocks=2,
    global_layers=1,
    text_dim=64,
    text_length=16,
    sigma_in=8.0,
)
CONFIGS = {config.name: config for config in (SMALL, PRESETS["tiny"])}
VARIANTS = {"ours": None, "eager": "eager"}
KERNELS = {"cuda", "triton"}
CLIP_FRAMES, FRAMERATE = 64, 25.0  # all of the clip
SEED = 0
# As the paper trains: warmed up, then a cosine to 0, and gradients clipped. At a constant rate
# without a clip the loss jumps, and trainings that differ by roundings come up to 10 % apart. At
# 3e-4 two of eager's, whose attention adds in any order, ended 0.6 % apart.
LEARNING_RATE = 1e-4  # at the most
WARMUP = 0.05  # of the steps
MOST_GRADIENT = 1.0  # norm of all
EVERY = 50  # steps to a line
LIMIT = 0.005  # of the ratio of the mean losses, beside 1
FALLEN = 0.6  # of the first losses, at most, is to be left in the end
NOISE_LIMIT = 2e-6  # normals reach 6.67, where two units in the last place are 1e-6


class Batch(NamedTuple):
    """What one step is given."""

    video: torch.Tensor  # (B, 3, T, H, W) float32 in [-1, 1]
    cond: Conditioning
    sigma: torch.Tensor  # (B,)
    sample: torch.Tensor  # (B,) numbers of the videos, of which their noise is a function
    generator: torch.Generator  # of what is dropped


class Curve(NamedTuple):
    """The loss of every step, and {op: the backends that ran it}."""

    losses: list[float]
    backends: dict[str, set[str]]


def main(arguments: list[str] | None = None) -> int:
    """Train twice; 0, or 1 when a gate was red, or 2 where the clip cannot be read."""
    args = _parse(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    preset = args.preset or ("small" if device.type == "cuda" else "tiny")
    # Hidden dropout is drawn where it is applied: kernels may draw it otherwise than PyTorch.
    config = replace(CONFIGS[preset], dropout=0.0)
    try:
        size = (config.height, config.width)
        clip = read_clip(CLIP, frames=CLIP_FRAMES, size=size, framerate=FRAMERATE)
    except (VideoError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    say("measuring the ceilings of this machine")
    ceilings = measure_ceilings(device, dtype)
    load = Load(device)
    torch.manual_seed(SEED)
    initial = FIT(config).to(device)
    with load.watched():
        curves = {
            name: train(
                name,
                initial,
                dtype,
                batches(config, clip, args.steps, args.batch, device),
                args.steps,
            )
            for name in VARIANTS
        }
    noise = noise_difference(config, args.batch, device)
    rows = rows_of(curves, config, args.batch, noise, device, dtype)
    for row in rows:
        print(line(row))
    if args.json:
        given = {"preset": preset, "steps": args.steps, "batch": args.batch}
        flags = " ".join(f"--{name} {value}" for name, value in given.items())
        command = f"python bench/curves.py {flags}"
        write(new_record(command, device, load.fields(), ceilings, rows), args.json)
    return int(any(row["gate"] != "ok" for row in rows))


def batches(
    config: FITConfig, clip: Clip, steps: int, batch: int, device: torch.device
) -> Iterator[Batch]:
    """Windows of the clip with all that is drawn for them: the same whenever it is called."""
    drawn = torch.Generator().manual_seed(SEED)
    generator = torch.Generator(device).manual_seed(SEED)
    source = clip.video.to(device)
    text = torch.randn(1, config.text_length, config.text_dim, generator=drawn)
    cond = Conditioning(
        framerate=torch.full((batch,), clip.framerate, device=device),
        resolution=torch.tensor([clip.source_size] * batch, device=device, dtype=torch.float32),
        text=text.to(device).expand(batch, -1, -1),
        text_mask=torch.ones(batch, config.text_length, dtype=torch.bool, device=device),
    )
    for step in range(steps):
        starts = torch.randint(CLIP_FRAMES - config.frames + 1, (batch,), generator=drawn)
        yield Batch(
            video=torch.stack([source[:, one : one + config.frames] for one in starts.tolist()]),
            cond=cond,
            sigma=sample_sigma(batch, generator=drawn).to(device),
            sample=torch.arange(step * batch, (step + 1) * batch, device=device),
            generator=generator,
        )


def rate(step: int, steps: int) -> float:
    """The learning rate of a step, over the highest."""
    return min(1.0, (step + 1) / (WARMUP * steps)) * 0.5 * (1 + math.cos(math.pi * step / steps))


def train(name: str, initial: FIT, dtype: torch.dtype, given: Iterator[Batch], steps: int) -> Curve:
    """The curve of variant `name` from the float32 weights of `initial`, which stay as they are.

    The model has weights of `dtype`; AdamW updates float32 ones, of which those are rounded.
    """
    config = initial.config
    model = FIT(config, backend=VARIANTS[name]).to(initial.positions.device, dtype).train()
    model.load_state_dict(initial.state_dict())
    diffusion = SnapDiffusion(sigma_in=config.sigma_in)
    weights: list[torch.Tensor] = list(model.parameters())
    masters = [one.detach().clone().requires_grad_() for one in initial.parameters()]
    optimiser = torch.optim.AdamW(masters, lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, partial(rate, steps=steps))
    losses: list[torch.Tensor] = []
    since = time.perf_counter()
    with backends_chosen() as backends:
        for data in given:
            loss = training_loss(
                model,
                diffusion,
                data.video,
                data.cond,
                sigma=data.sigma,
                sample=data.sample,
                seed=SEED,
                generator=data.generator,
            )
            loss.backward()
            for master, weight in zip(masters, weights, strict=True):
                assert weight.grad is not None
                master.grad, weight.grad = weight.grad.float(), None
            torch.nn.utils.clip_grad_norm_(masters, MOST_GRADIENT)
            optimiser.step()
            schedule.step()
            with torch.no_grad():
                torch._foreach_copy_(weights, masters)
            losses.append(loss.detach())
            if len(losses) % EVERY == 0:
                mean = torch.stack(losses[-EVERY:]).mean().item()
                now = time.perf_counter()
                ms = (now - since) / EVERY * 1e3
                print(f"{name:<6} step {len(losses):>4}: loss {mean:.4f}, {ms:.1f} ms", flush=True)
                since = now
    return Curve([significant(one.item()) for one in losses], backends)


@contextmanager
def backends_chosen() -> Iterator[dict[str, set[str]]]:
    """{registered op: the backends that its calls run by while inside}, masked calls apart."""
    found: dict[str, set[str]] = {}

    def choose(spec: Spec, backend: str | None, values: tuple[Any, ...], **more: bool) -> Backend:
        chosen = dispatch.choose(spec, backend, values, **more)
        named = dict(zip(spec.inputs, values, strict=False))
        op = spec.name + " masked" * (named.get("mask") is not None)
        found.setdefault(op, set()).add(chosen.name)
        return chosen

    with mock.patch.object(library, "choose", choose):
        yield found


def noise_difference(config: FITConfig, batch: int, device: torch.device) -> float:
    """How far apart the noise of the two variants is at the most, of one batch."""
    nothing = torch.zeros(batch, 3, config.frames, config.height, config.width, device=device)
    sigma, sample = torch.ones(batch, device=device), torch.arange(batch, device=device)
    ours, eager = (
        forward_process(
            nothing, sigma, sample, sigma_in=config.sigma_in, seed=SEED, backend=backend
        )
        for backend in VARIANTS.values()
    )
    return (ours - eager).abs().max().item()


def rows_of(
    curves: dict[str, Curve],
    config: FITConfig,
    batch: int,
    noise: float,
    device: torch.device,
    dtype: torch.dtype,
) -> list[dict[str, Any]]:
    """Rows of a record: the mean loss in the end, and the curve. Ours is held to eager's."""
    steps = len(curves["eager"].losses)
    ends = {name: last(curve.losses) for name, curve in curves.items()}
    ratio = statistics.fmean(ends["ours"]) / statistics.fmean(ends["eager"])
    rows = []
    for name, curve in curves.items():
        gate = red(name, curve, device) or "ok"
        if name == "ours" and gate == "ok":
            gate = apart(ratio, noise) or "ok"
        row: dict[str, Any] = {
            "case": f"model/{config.name}/curve",
            "variant": f"{name}-{short_name(dtype)}",
            "batch": batch,
            "unit": "loss",
            "better": "lower",
            "gate": gate,
            "includes": f"mean of the last {len(ends[name])} of {steps} AdamW steps at "
            f"{LEARNING_RATE:g} at the most, gradients clipped; "
            "one seed of weights, videos, sigma and noise",
            "losses": [loss if math.isfinite(loss) else None for loss in curve.losses],
            "backends": {op: sorted(names) for op, names in sorted(curve.backends.items())},
        }
        if name == "ours":
            row |= {"ratio": ratio if math.isfinite(ratio) else None, "noise_difference": noise}
        if gate == "ok":
            _, p20, p80 = Timing.of(ends[name])
            row |= {"value": statistics.fmean(ends[name]), "p20": p20, "p80": p80}
            # A loss has no floor that is known.
            row |= {"floor": 0.0, "pct_of_floor": 0.0}
            row["tflop"] = significant(graph_tflop(config) * TRAIN_FORWARDS * batch * steps)
        rows.append(row)
    return rows


def last(losses: list[float]) -> list[float]:
    """The last fifth, 100 of 500: what is averaged."""
    return losses[-max(1, len(losses) // 5) :]


def red(name: str, curve: Curve, device: torch.device) -> str | None:
    """What is wrong with a curve by itself, or None."""
    losses = curve.losses
    if not all(map(math.isfinite, losses)):
        return "a loss is not finite"
    for op, names in curve.backends.items():
        of_patches = device.type == "cuda" and op in ("group_read", "group_write")
        wanted = {"eager"} if name == "eager" else KERNELS if of_patches else names
        if not names <= wanted:
            return f"{op} ran by {', '.join(sorted(names))}, not by {', '.join(sorted(wanted))}"
    first = statistics.fmean(losses[: max(1, len(losses) // 50)])
    end = statistics.fmean(last(losses))
    if end > FALLEN * first:
        return f"the loss fell from {first:.4g} to {end:.4g} only"
    return None


def apart(ratio: float, noise: float) -> str | None:
    """What is wrong with the two curves side by side, or None."""
    if not noise <= NOISE_LIMIT:
        return f"the noise differs by {noise:.1e}, limit {NOISE_LIMIT:.1e}"
    if not abs(ratio - 1) <= LIMIT:
        return f"mean loss {ratio:.5f} of eager's, limit {LIMIT:.1%}"
    return None


def line(row: dict[str, Any]) -> str:
    """A row as it is printed."""
    start = f"{row['case']} {row['variant']}:"
    if row["gate"] != "ok":
        return f"{start} no figure: {row['gate']}"
    ratio = f", {row['ratio']:.5f} of eager's" if "ratio" in row else ""
    return f"{start} {row['value']:.5g}{ratio}"


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--preset", choices=list(CONFIGS), help="default: small on a GPU, else tiny"
    )
    parser.add_argument("--steps", type=positive_int, default=500, help="of each training (500)")
    parser.add_argument("--batch", type=positive_int, default=2, help="videos of a step (2)")
    parser.add_argument("--json", type=record_path, metavar="FILE", help="write the record here")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
