"""Which number format of latent attention's core, between fp8 projections, costs how much accuracy.

python bench/attention_error.py                      # the models' widths
python bench/attention_error.py --small --json error.json   # 1024 wide, for a CPU

Of each distribution and format: the relative rms error of the branch, from LayerNorm to before the
residual, against the float64 equation of the same dequantised weights, and its ratio to that of a
bf16 core. What the GPU would compute is done in float32 on rounded numbers.

Legend: L and M tokens, D width, H heads, E channels of a head, T runs of tokens.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from support import say, significant

from snapkernels import quantise_rows
from snapkernels.ops.latent_attn.reference import latent_attention
from snapkernels.ops.latent_attn.weights import SelfAttentionWeights
from snapkernels.roofline import measure_ceilings
from snapkernels.testing.load import Load
from snapkernels.testing.numerics import relative_rms
from snapkernels.testing.record import new_record, record_path, write

Errors = dict[str, list[float]]  # {format: the error of each draw}

BAR = 1.15  # times the error of a bf16 core
EPS = 1e-5
RUN = 128  # tokens of a head that share an int8 scale: a tile of keys
E4M3_LARGEST, INT8_LARGEST, UINT8_LARGEST = 448, 127, 255
DITHER = tuple(n / 16 for n in (-7, 1, -3, 5, -5, 3, -1, 7))  # by key, in units of P
SMALL_WIDTH = 1024


@dataclass(frozen=True)
class Shape:
    """Sizes of one attention."""

    tokens: int
    width: int
    head_dim: int


@dataclass(frozen=True)
class Distribution:
    """What is odd about latents and weights; without anything odd, normal numbers."""

    qk_gain: float = 1.0  # of the weights of q and k; the scores' deviation is its square
    norm_bias: float = 0.1  # deviation
    latent_mean: float = 0.0  # of a vector that all tokens have in common, beside noise of 1
    latent_outliers: float = 1.0  # factor of every 17th channel of the latents
    outlier_head: float = 1.0  # factor of head 0's k
    outlier_channels: float = 1.0  # factor of k's every 16th channel; q's has the inverse
    outlier_values: float = 1.0  # likewise of v's, and of o's columns
    k_bias: float = 0.1  # deviation
    v_bias: float = 0.1  # deviation
    kept: int = 1  # all tokens but every such one are zeros
    sink: float = 0.0  # by how much token 0 is ahead in every query's scores


@dataclass(frozen=True)
class Format:
    """Numbers of the core: q and k, v, the unnormalised softmax P, and what is done to them."""

    qk: str
    v: str
    p: str
    smooth: bool = False  # k's bias is -W_k norm_bias: constant over keys, it leaves the softmax
    fold: bool = False  # v's constant part goes past the core, into o's bias
    rotate: bool = False  # q and k by a Hadamard matrix
    balance: bool = False  # channels: q by t, k by 1 / t, v by 1 / u and its average by u


SHAPES = {"500m": Shape(512, 1024, 64), "3.9b": Shape(768, 3072, 128)}
DISTRIBUTIONS = {
    "normal": Distribution(),
    "peaked_1.5": Distribution(qk_gain=1.5),
    "peaked_2": Distribution(qk_gain=2),
    "peaked_4": Distribution(qk_gain=4),
    "norm_bias": Distribution(norm_bias=2),
    "latent_mean": Distribution(latent_mean=2),
    "latent_outliers": Distribution(latent_outliers=50),
    "outlier_head": Distribution(outlier_head=50),
    "outlier_channels": Distribution(outlier_channels=50),
    "outlier_values": Distribution(outlier_values=50),
    "k_bias": Distribution(k_bias=10),
    "v_bias": Distribution(v_bias=2),
    "zeros": Distribution(kept=2),
    "mostly_zeros": Distribution(kept=16),
    "sink": Distribution(sink=7),
    "one_key": Distribution(sink=30),
}
FORMATS = {
    "bf16": Format("bf16", "bf16", "bf16"),
    "bf16_folded": Format("bf16", "bf16", "bf16", fold=True),
    "e4m3": Format("e4m3", "e4m3", "e4m3"),
    "e4m3_bound": Format("e4m3_bound", "e4m3_bound", "e4m3"),
    "e4m3_smooth": Format("e4m3", "e4m3", "e4m3", smooth=True),
    "e4m3_rotated": Format("e4m3", "e4m3", "e4m3", smooth=True, rotate=True),
    "int8_bf16": Format("int8", "bf16", "bf16", smooth=True, balance=True),
    "int8_e4m3": Format("int8", "e4m3_bound", "e4m3", smooth=True, balance=True),
    "int8": Format("int8", "int8", "uint8", smooth=True),
    "int8_rough": Format("int8", "int8", "uint8"),  # k is not smoothed
    "int8_token": Format("int8_token", "int8", "uint8", smooth=True),
    "int8_rotated": Format("int8", "int8", "uint8", smooth=True, rotate=True),
    "int8_balanced": Format("int8", "int8", "uint8", smooth=True, balance=True),
    "int8_p128": Format("int8", "int8", "uint8_128", smooth=True, balance=True),
    "int8_p64": Format("int8", "int8", "uint8_64", smooth=True, balance=True),
    "int8_dithered": Format("int8", "int8", "uint8_dithered", smooth=True, balance=True),
    "int8_folded": Format("int8", "int8", "uint8_dithered", smooth=True, balance=True, fold=True),
}


def rounded_rows(rows: torch.Tensor) -> torch.Tensor:
    """What `quantise_rows` makes of the last dimension's vectors, as float32."""
    numbers, scale = quantise_rows(rows.flatten(0, -2))
    return (numbers.float() * scale[:, None]).view_as(rows)


def e4m3(x: torch.Tensor, scale: torch.Tensor | float) -> torch.Tensor:
    """`x` rounded to `scale` times e4m3 numbers; it saturates."""
    numbers = (x / scale).clamp(-E4M3_LARGEST, E4M3_LARGEST).to(torch.float8_e4m3fn)
    return numbers.float() * scale


def int8(x: torch.Tensor, largest: torch.Tensor) -> torch.Tensor:
    """`x` rounded to whole multiples of `largest` / 127."""
    scale = largest / INT8_LARGEST
    return (x / torch.where(scale == 0, 1, scale)).round() * scale


def int8_runs(x_HLE: torch.Tensor) -> torch.Tensor:
    """int8 with a scale for every `RUN` tokens of a head."""
    tokens = x_HLE.shape[1]
    padded = torch.nn.functional.pad(x_HLE, (0, 0, 0, -tokens % RUN))
    x_HTLE = padded.unflatten(1, (-1, RUN))
    return int8(x_HTLE, x_HTLE.abs().amax((2, 3), keepdim=True)).flatten(1, 2)[:, :tokens]


def uint8(p: torch.Tensor, more: torch.Tensor | float = 0.0) -> torch.Tensor:
    """`p`, in [0, 1], rounded to whole multiples of 1 / 255, `more` of them added before."""
    return (p * UINT8_LARGEST + more).round() / UINT8_LARGEST


def uint8_runs(scores_HLM: torch.Tensor, run: int, *, dither: bool) -> torch.Tensor:
    """Their exp, of every `run` keys relative to the largest of the run.

    That factor is one by which the run's products with int8 v join the others anyway. Dithered,
    many keys below half a unit do not all vanish, and a P of 0 stays 0.
    """
    tokens = scores_HLM.shape[2]
    padded = torch.nn.functional.pad(scores_HLM, (0, -tokens % run), value=float("-inf"))
    scores_HLTM = padded.unflatten(2, (-1, run))
    largest_HLT1 = scores_HLTM.amax(-1, keepdim=True)
    more_M = torch.tensor(DITHER, device=scores_HLM.device).repeat(run // len(DITHER))
    rounded_HLTM = uint8((scores_HLTM - largest_HLT1).exp(), more_M * dither)
    return (rounded_HLTM * largest_HLT1.exp()).flatten(2)[:, :, :tokens]


# {number format: (q, k or v of (H, L, E), a bound of each head's numbers (H, 1, 1)) -> rounded}
NUMBERS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "bf16": lambda x, bound: x.bfloat16().float(),
    "e4m3": lambda x, bound: rounded_rows(x),
    "e4m3_bound": lambda x, bound: e4m3(x, bound / E4M3_LARGEST),
    "int8": lambda x, bound: int8_runs(x),
    "int8_token": lambda x, bound: int8(x, x.abs().amax(-1, keepdim=True)),
}
# {number format: scores minus their row's largest -> P, rounded}
SOFTMAX: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "bf16": lambda scores: scores.exp().bfloat16().float(),
    "e4m3": lambda scores: e4m3(scores.exp(), 1 / E4M3_LARGEST),
    "uint8": lambda scores: uint8(scores.exp()),
    "uint8_128": lambda scores: uint8_runs(scores, 128, dither=False),
    "uint8_64": lambda scores: uint8_runs(scores, 64, dither=False),
    "uint8_dithered": lambda scores: uint8_runs(scores, 128, dither=True),
}


def main(arguments: list[str] | None = None) -> int:
    """Run the bench; 0, or 1 when an error was not finite."""
    args = _parse(arguments)
    draws = args.draws or (1 if args.small else 5)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    say("measuring the ceilings of this machine")
    ceilings, load = measure_ceilings(device), Load(device)
    rows = []
    _print_line("ratio to a bf16 core", *FORMATS)
    for name, size in SHAPES.items():
        shape = Shape(size.tokens, min(size.width, SMALL_WIDTH), size.head_dim)
        shape = shape if args.small else size
        for odd, distribution in DISTRIBUTIONS.items():
            errors = errors_of(shape, distribution, draws, device)
            made = rows_of(f"{name}-{odd}", shape, errors)
            _print_line(f"{name}-{odd}", *map(_cell, made))
            rows += made
    if args.json:
        command = f"python bench/attention_error.py{' --small' if args.small else ''}"
        command += f" --draws {draws}"
        write(new_record(command, device, load.fields(), ceilings, rows), args.json)
    return int(any(row["gate"] != "ok" for row in rows))


def errors_of(shape: Shape, distribution: Distribution, draws: int, device: torch.device) -> Errors:
    """The error of the branch in each format, a number a draw."""
    errors: Errors = {name: [] for name in FORMATS}
    for seed in range(draws):
        latents_LD, w = draw(shape, distribution, seed, device)
        expected_LD = truth(latents_LD, w, shape.head_dim)
        for name, form in FORMATS.items():
            actual_LD = branch(latents_LD, w, shape.head_dim, form)
            errors[name].append(relative_rms(actual_LD, expected_LD))
    return errors


def draw(
    shape: Shape, odd: Distribution, seed: int, device: torch.device
) -> tuple[torch.Tensor, SelfAttentionWeights]:
    """Latents (L, D), which are bf16 numbers, and weights whose matrices are rounded rows."""
    generator = torch.Generator().manual_seed(seed)
    D, E = shape.width, shape.head_dim

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator)

    q, k, v, o = (normal(D, D) / D**0.5 for _ in range(4))
    deviations = (0.1, odd.k_bias, odd.v_bias, 0.1)
    q_bias, k_bias, v_bias, o_bias = (deviation * normal(D) for deviation in deviations)
    q, k = q * odd.qk_gain, k * odd.qk_gain
    k_factor, v_factor = torch.ones(2, D)
    k_factor[::16], v_factor[::16] = odd.outlier_channels, odd.outlier_values
    q, q_bias = q / k_factor[:, None], q_bias / k_factor
    k_factor[:E] *= odd.outlier_head
    k, k_bias = k * k_factor[:, None], k_bias * k_factor
    v, v_bias, o = v * v_factor[:, None], v_bias * v_factor, o / v_factor
    latents_LD = normal(shape.tokens, D) + odd.latent_mean * normal(D)
    latents_LD[:, ::17] *= odd.latent_outliers
    latents_LD[torch.arange(shape.tokens) % odd.kept > 0] = 0
    norm = (1 + 0.1 * normal(D), odd.norm_bias * normal(D))
    matrices = [rounded_rows(m.to(device)) for m in (q, k, v, o)]
    vectors = (q_bias, k_bias, v_bias, o_bias)
    pairs = zip(matrices, (b.to(device) for b in vectors), strict=True)
    w = SelfAttentionWeights(
        *(n.to(device) for n in norm), *(tensor for pair in pairs for tensor in pair)
    )
    latents_LD = latents_LD.bfloat16().float().to(device)
    return latents_LD, with_sink(latents_LD, w, E, odd.sink)


def with_sink(
    latents_LD: torch.Tensor, w: SelfAttentionWeights, head_dim: int, ahead: float
) -> SelfAttentionWeights:
    """`w` with a bias of q that adds `ahead` to every query's score of token 0."""
    k_HE = (_normalised(latents_LD[:1], w) @ w.k_weight.T + w.k_bias).unflatten(-1, (-1, head_dim))
    more_HE = ahead * head_dim**0.5 * k_HE / k_HE.square().sum(-1, keepdim=True)
    return w._replace(q_bias=w.q_bias + more_HE.flatten())


def truth(latents_LD: torch.Tensor, w: SelfAttentionWeights, head_dim: int) -> torch.Tensor:
    """The branch in float64, nothing of it rounded."""
    x_BLD = latents_LD.double()[None]
    exact = SelfAttentionWeights(*(tensor.double() for tensor in w))
    return (latent_attention(x_BLD, exact, len(w.q_bias) // head_dim, EPS) - x_BLD)[0]


def branch(
    latents_LD: torch.Tensor, w: SelfAttentionWeights, head_dim: int, form: Format
) -> torch.Tensor:
    """The branch with projections of e4m3 rows, and the core in `form`.

    P is of the row's final maximum, which rounds no finer than a running one, and its sum is that
    of the rounded numbers.
    """
    w = with_moved_biases(w, form)
    z_LD = rounded_rows(_normalised(latents_LD, w))
    projections = ((w.q_weight, w.q_bias), (w.k_weight, w.k_bias), (w.v_weight, w.v_bias))
    q_HLE, k_HME, v_HME = (_heads(z_LD @ matrix.T + b, head_dim) for matrix, b in projections)
    u_H1E = torch.ones_like(v_HME[:, :1])
    bounds = [bound(w, matrix, b, head_dim) for matrix, b in projections]
    if form.balance:
        t_H1E, u_H1E = balance(w, head_dim)
        factors = (t_H1E, 1 / t_H1E, 1 / u_H1E)
        q_HLE, k_HME, v_HME = q_HLE * factors[0], k_HME * factors[1], v_HME * factors[2]
        bounds = [b * factor for b, factor in zip(bounds, factors, strict=True)]
    if form.rotate:
        assert form.qk != "e4m3_bound", "the bound is of what is not rotated"
        turn_EE = hadamard(head_dim, q_HLE.device)
        q_HLE, k_HME = q_HLE @ turn_EE, k_HME @ turn_EE
    q_bound, k_bound, v_bound = (b.amax(-1, keepdim=True) for b in bounds)
    q_HLE, k_HME = NUMBERS[form.qk](q_HLE, q_bound), NUMBERS[form.qk](k_HME, k_bound)
    v_HME = NUMBERS[form.v](v_HME, v_bound)
    scores_HLM = q_HLE @ k_HME.mT * head_dim**-0.5
    p_HLM = SOFTMAX[form.p](scores_HLM - scores_HLM.amax(-1, keepdim=True))
    context_HLE = p_HLM @ v_HME / p_HLM.sum(-1, keepdim=True) * u_H1E
    return rounded_rows(context_HLE.transpose(0, 1).flatten(1)) @ w.o_weight.T + w.o_bias


def with_moved_biases(w: SelfAttentionWeights, form: Format) -> SelfAttentionWeights:
    """`w` as `Format.smooth` and `Format.fold` have it: the branch is the same one."""
    if form.smooth:
        w = w._replace(k_bias=-w.k_weight @ w.norm_bias)
    if form.fold:
        constant = w.v_weight @ w.norm_bias
        o_bias = w.o_bias + w.o_weight @ (constant + w.v_bias)
        w = w._replace(v_bias=-constant, o_bias=o_bias)
    return w


def bound(
    w: SelfAttentionWeights, matrix: torch.Tensor, bias: torch.Tensor, head_dim: int
) -> torch.Tensor:
    """What no number of a channel passes, (H, 1, E), as the normalised latents' norm is sqrt(D).

    And a sixteenth more, by which rounding z may lengthen it.
    """
    varying = (matrix * w.norm_weight).norm(dim=1) * matrix.shape[1] ** 0.5
    largest = varying + (matrix @ w.norm_bias + bias).abs()
    return largest.view(-1, 1, head_dim) * (1 + 1 / 16)


def balance(w: SelfAttentionWeights, head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """t = sqrt(std k / std q) and u = std v of each channel, (H, 1, E).

    The deviations are those of normalised latents that are random.
    """
    q_std, k_std, v_std = (
        (matrix * w.norm_weight).norm(dim=1).view(-1, 1, head_dim)
        for matrix in (w.q_weight, w.k_weight, w.v_weight)
    )
    return (k_std / q_std).sqrt(), v_std


def hadamard(size: int, device: torch.device) -> torch.Tensor:
    """The orthogonal one of a power of two."""
    turn = torch.ones(1, 1, device=device)
    while len(turn) < size:
        turn = torch.cat([torch.cat([turn, turn], 1), torch.cat([turn, -turn], 1)])
    return turn * size**-0.5


def rows_of(name: str, shape: Shape, errors: Errors) -> list[dict[str, Any]]:
    """Rows of a record, a format each; of the draws the median, ratio by ratio."""
    tokens, width = shape.tokens, shape.width
    rows = []
    for variant, measured in errors.items():
        error_of_bf16 = _quantile(errors["bf16"], 0.5)
        error = _quantile(measured, 0.5)
        finite = all(e < float("inf") for e in measured)
        row: dict[str, Any] = {
            "case": f"layer/latent_attn_core/{name}/error",
            "variant": variant,
            "batch": 1,
            "unit": "relative rms",
            "better": "lower",
            "gate": "ok" if finite else "the output is not finite",
            "error": {"rms_vs_fp64": error, "rms_eager": error_of_bf16},
            "includes": f"LN to before the residual, {tokens} x {width}, heads of"
            f" {shape.head_dim}, e4m3 projections; {len(measured)} seeds",
        }
        if finite:
            row |= {
                "value": significant(error),
                "p20": significant(_quantile(measured, 0.2)),
                "p80": significant(_quantile(measured, 0.8)),
                "floor": 0.0,  # none is known
                "pct_of_floor": 0.0,
                "tflop": (8 * tokens * width**2 + 4 * tokens**2 * width) / 1e12,
                "ratio": significant(_quantile(list(_ratios(measured, errors["bf16"])), 0.5)),
                "ratio_max": significant(max(_ratios(measured, errors["bf16"]))),
            }
        rows.append(row)
    return rows


def _ratios(errors: list[float], of_bf16: list[float]) -> Iterator[float]:
    return (error / eager for error, eager in zip(errors, of_bf16, strict=True))


def _quantile(values: list[float], share: float) -> float:
    return torch.tensor(values, dtype=torch.float64).quantile(share).item()


def _normalised(latents_LD: torch.Tensor, w: SelfAttentionWeights) -> torch.Tensor:
    return torch.nn.functional.layer_norm(
        latents_LD, latents_LD.shape[-1:], w.norm_weight, w.norm_bias, EPS
    )


def _heads(x_LD: torch.Tensor, head_dim: int) -> torch.Tensor:
    return x_LD.unflatten(-1, (-1, head_dim)).transpose(0, 1).contiguous()


def _print_line(label: str, *cells: str) -> None:
    print(f"{label:24}", *(f"{cell:>12}" for cell in cells), flush=True)


def _cell(row: dict[str, Any]) -> str:
    """The median ratio, marked where that of some draw is over the bar."""
    if row["gate"] != "ok":
        return "not finite"
    return f"{row['ratio']:.3f}{' ' if row['ratio_max'] <= BAR else '!'}"


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="at most 1024 wide")
    parser.add_argument(
        "--draws",
        type=int,
        choices=range(1, 101),
        metavar="N",
        help="of latents and weights; default: 1 if small, else 5",
    )
    parser.add_argument("--json", type=record_path, metavar="FILE", help="write the record here")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
