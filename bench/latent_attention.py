"""Latent attention in fp8: the core alone beside SDPA, and the sublayer, in CUDA graphs.

python bench/latent_attention.py --json latents.json   # on a GPU that the CUDA library is for

A round times every variant once, so that ratios are of the same clocks. The core, of 8-bit integers
as the projection leaves them, is gated against the float64 equation of these, the sublayer against
that of its quantised weights, each of the first video. A graph has `CALLS` calls, and so no launch
that waits for the host.

Legend: B videos of L tokens, M all of them, H heads of E channels, T tiles of 128 tokens.
"""

import argparse
import sys
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from support import say, significant
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from snapkernels import extension, latent_attention, latent_attention_fp8, quantise_latent_attention
from snapkernels.ops.latent_attn.config import CUDA_TILE
from snapkernels.ops.latent_attn.reference import latent_attention_fp8 as expected_fp8
from snapkernels.ops.latent_attn.spec_fp8 import LIMIT as SUBLAYER_LIMIT
from snapkernels.ops.latent_attn.weights import DIMS, SelfAttentionWeights
from snapkernels.roofline import measure_ceilings
from snapkernels.testing.inputs import random_weights
from snapkernels.testing.load import Load
from snapkernels.testing.numerics import relative_rms, widened
from snapkernels.testing.record import new_record, record_path, write
from snapkernels.testing.timing import Timing, measure

LARGEST = 127
LIMIT = 0.035  # of the result: rounding to e4m3 is 0.026
ROUNDS, REPEATS = 15, 5
CALLS = 10  # of a graph
SDPA = {"sdpa-cudnn": SDPBackend.CUDNN_ATTENTION, "sdpa-flash": SDPBackend.FLASH_ATTENTION}
Calls = dict[str, Callable[[], object]]


class Shape(NamedTuple):
    """Sizes of one core; all videos' tokens are a multiple of 256, and one's of `CUDA_TILE`."""

    videos: int
    tokens: int
    heads: int
    channels: int

    @property
    def tflop(self) -> float:
        """Of the two products."""
        return 4 * self.videos * self.heads * self.tokens**2 * self.channels / 1e12

    @property
    def width(self) -> int:
        """Of a token and of all heads."""
        return self.heads * self.channels

    @property
    def sublayer_tflop(self) -> float:
        """With the four projections."""
        return self.tflop + 8 * self.videos * self.tokens * self.width**2 / 1e12


SHAPES = {
    "3.9b-b16": Shape(16, 768, 24, 128),
    "up-b1": Shape(1, 768, 24, 128),
    "500m-b64": Shape(64, 512, 16, 64),
}


class Heads(NamedTuple):
    """Heads in 8 bits, as csrc/latent_attn has them."""

    qk: torch.Tensor  # (M, 2 H E), int8: q, then k
    v: torch.Tensor  # (H E, M), int8
    q_scale: torch.Tensor  # (H, M)
    k_scale: torch.Tensor  # (H, T)
    v_scale: torch.Tensor  # (H, T)


def main(arguments: list[str] | None = None) -> int:
    """Run the bench; 0, or 1 without the library or when a result was wrong."""
    args = _parse(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if reason := extension.refuses(torch.empty(0, device=device)):
        say(f"the core is of the CUDA library, and {reason}")
        return 1
    say("measuring the ceilings of this machine")
    ceilings, load = measure_ceilings(device), Load(device)
    rows = []
    with load.watched():
        for name, shape in SHAPES.items():
            rows += rows_of(
                f"op/latent_attn_core/{name}/fwd", shape, *core(shape, device), ceilings
            )
            found = sublayer(shape, device)
            rows += rows_of(f"layer/latent_attn/{name}/fwd", shape, *found, ceilings)
    for row in rows:
        print(f"{row['case']} {row['variant']}: {row.get('value', row['gate'])} {row['unit']}")
    if args.json:
        command = "python bench/latent_attention.py"
        write(new_record(command, device, load.fields(), ceilings, rows), args.json)
    return int(any(row["gate"] != "ok" for row in rows))


def core(shape: Shape, device: torch.device) -> tuple[float, dict[str, Timing]]:
    """The error of ours, and the time of every variant of the core in ms."""
    torch.manual_seed(0)
    sizes = shape.videos, shape.tokens, 3, shape.heads, shape.channels
    drawn = torch.randn(sizes, device=device, dtype=torch.bfloat16)
    q, k, v = drawn.permute(2, 0, 3, 1, 4)  # (B, H, L, E), as a projection leaves them
    heads = quantised(drawn.flatten(0, 1).float())
    out_MI = torch.empty_like(heads.v.T.contiguous(), dtype=torch.float8_e4m3fn)
    scale_M = torch.empty(len(out_MI), device=device)

    def ours() -> None:
        torch.ops.snapkernels_cuda.latent_core(
            *heads, out_MI, scale_M, shape.tokens, shape.channels
        )

    def sdpa(backend: SDPBackend) -> torch.Tensor:
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(q, k, v)

    calls: Calls = {"ours-fp8": ours}
    calls |= {name: partial(sdpa, backend) for name, backend in SDPA.items()}
    ours()
    found = out_MI[: shape.tokens].double() * scale_M[: shape.tokens, None].double()
    error = relative_rms(found, equation(heads, shape.tokens))
    return error, timed(calls, device)


def sublayer(shape: Shape, device: torch.device) -> tuple[float, dict[str, Timing]]:
    """The error of ours, and the time of every variant of the sublayer in ms."""
    sizes = {"D": shape.width, "I": shape.width}
    rng = torch.Generator(device).manual_seed(0)
    weights = random_weights(
        SelfAttentionWeights, DIMS, sizes, dtype=torch.bfloat16, generator=rng, device=device
    )
    in_fp8, heads = quantise_latent_attention(weights), shape.heads
    latents = torch.randn(
        shape.videos, shape.tokens, shape.width, device=device, dtype=weights.q_bias.dtype
    )

    def ours() -> torch.Tensor:
        return latent_attention_fp8(latents, in_fp8, num_heads=heads)

    calls: Calls = {
        "ours-fp8": ours,
        "eager-bf16": lambda: latent_attention(latents, weights, num_heads=heads),
        "eager-fp8": lambda: latent_attention_fp8(
            latents, in_fp8, num_heads=heads, backend="eager"
        ),
    }
    with torch.no_grad():
        exact = expected_fp8(*widened((latents[:1], in_fp8, heads, 1e-6)))
        residual = latents[:1].double()
        error = relative_rms(ours()[:1].double() - residual, exact - residual)
        return error, timed(calls, device)


def captured(call: Callable[[], object]) -> Callable[[], None]:
    """`CALLS` of `call` as one CUDA graph."""
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # cuDNN makes its plans and workspace for a stream
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(CALLS):
            call()
    return graph.replay


def timed(calls: Calls, device: torch.device) -> dict[str, Timing]:
    """Every call's time in ms, in `ROUNDS` rounds of all."""
    graphs = {name: captured(call) for name, call in calls.items()}
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, graph in graphs.items():
            samples[name].append(measure(graph, device, repeats=REPEATS).median / CALLS)
    return {name: Timing.of(some) for name, some in samples.items()}


def quantised(qkv: torch.Tensor) -> Heads:
    """(M, 3, H, E) `qkv` as the projection leaves it: a scale for a token's q, a tile's k or v."""
    q, k, v = qkv.unbind(1)  # (M, H, E)
    q_scale = q.abs().amax(2) / LARGEST
    k_scale, v_scale = (
        one.unflatten(0, (-1, CUDA_TILE)).abs().amax((1, 3)) / LARGEST for one in (k, v)
    )
    by_token = (scale.repeat_interleave(CUDA_TILE, 0) for scale in (k_scale, v_scale))
    counts = [
        (one / scale[..., None]).round().to(torch.int8).flatten(1)
        for one, scale in zip((q, k, v), (q_scale, *by_token), strict=True)
    ]
    scales = (scale.T.contiguous() for scale in (q_scale, k_scale, v_scale))
    return Heads(torch.cat(counts[:2], 1), counts[2].T.contiguous(), *scales)


def equation(heads: Heads, tokens: int) -> torch.Tensor:
    """(tokens, I) in float64: the attention of the first `tokens` of `heads` to themselves."""
    scales = heads.q_scale, *(s.repeat_interleave(CUDA_TILE, 1) for s in heads[3:])
    q, k, v = (
        one[:tokens].double().unflatten(1, (len(scale), -1)).transpose(0, 1)
        * scale[:, :tokens, None].double()
        for one, scale in zip((*heads.qk.chunk(2, 1), heads.v.T), scales, strict=True)
    )
    weights = (q @ k.transpose(1, 2) / q.shape[-1] ** 0.5).softmax(-1)
    return (weights @ v).transpose(0, 1).flatten(1)


def rows_of(
    case: str,
    shape: Shape,
    error: float,
    timings: dict[str, Timing],
    ceilings: dict[str, float],
) -> list[dict[str, Any]]:
    """Rows of a record; integers have the ceiling of fp8."""
    alone = case.startswith("op/")
    limit, tflop = (LIMIT, shape.tflop) if alone else (SUBLAYER_LIMIT, shape.sublayer_tflop)
    what = "softmax(q k^T) v of heads as a projection leaves them" if alone else "LN to residual"
    rows = []
    for variant, timing in timings.items():
        own, in_fp8 = variant == "ours-fp8", variant.endswith("fp8")
        row: dict[str, Any] = {
            "case": case,
            "variant": variant,
            "batch": shape.videos,
            "unit": "ms",
            "better": "lower",
            "tflop": significant(tflop),
            "gate": "ok" if not own or error < limit else f"error {error:.3e}, over {limit}",
            "error": {"rms_vs_fp64": error} if own else {},
            "includes": f"{what}; {CALLS} calls in a CUDA graph",
        }
        if row["gate"] == "ok":
            floor = tflop / ceilings["fp8_tflop_s" if in_fp8 else "bf16_tflop_s"] * 1e3
            row |= {key: significant(value) for key, value in timing._asdict().items()}
            row["value"] = row.pop("median")
            row["floor"] = significant(floor)
            row["pct_of_floor"] = significant(100 * floor / timing.median)
            row["tflop_s"] = significant(tflop / timing.median * 1e3)
        rows.append(row)
    return rows


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=record_path, metavar="FILE", help="write the record here")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
