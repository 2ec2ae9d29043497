"""Ops timed case by case: every backend that can run, eager PyTorch and a plain copy, side by side.

Variants take turns in one process. Each has inputs and outputs of its own, several sets of them, so
that what it reads has left the caches. On a GPU a sweep over the sets is replayed as a CUDA graph,
which leaves the host out; what the host needs for a call is timed beside it.
"""

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch

from snapkernels.dispatch import candidates, implementation
from snapkernels.registry import Op
from snapkernels.spec import Backend, Case, Spec
from snapkernels.testing.cases import call, make_values, prepare
from snapkernels.testing.contract import gradients_of
from snapkernels.testing.cost import compulsory_bytes, floor_ms, flops
from snapkernels.testing.memory import kept_bytes
from snapkernels.testing.proofs import gradients, judge, judge_gradients, short, values
from snapkernels.testing.timing import Timing

COLD_BYTES = {"cuda": 200_000_000, "cpu": 1}  # four times the L2 of an H100
MOST_SETS = 48
COPY_GRAIN = 4096  # bytes: on an H100 170,191,874 took 145 us to copy, 170,192,896 took 117
# A queue takes about a thousand launches before the host waits, and a layer has up to ten.
HOST_CALLS = {"op": 200, "layer": 40}


class Variant(NamedTuple):
    """One way to run a case: a name, and calls on sets of inputs of their own.

    `saved_gib` is what its forward keeps for its backward, where that was measured.
    """

    name: str
    calls: list[Callable[[], Any]]
    gate: str
    peer: bool = False
    saved_gib: float | None = None


def directions(spec: Spec) -> tuple[str, ...]:
    """What of an op is timed: of a sublayer forward and backward together too."""
    if not spec.trains:
        return ("fwd",)
    return ("fwd", "bwd", "fwd_bwd") if spec.kind == "layer" else ("fwd", "bwd")


def slow_in_eager(case: Case, direction: str, device: torch.device) -> bool:
    """Whether eager is left out: it counts noise, and PyTorch has no unsigned words to do it with.

    Its way takes a GPU a hundred times longer than ours.
    """
    return device.type == "cuda" and direction == "fwd" and case.options.get("seed") is not None


def bench(
    op: Op,
    case: Case,
    direction: str,
    dtype: torch.dtype,
    device: torch.device,
    ceilings: dict[str, float],
    *,
    rounds: int = 30,
) -> list[dict[str, Any]]:
    """Rows of a record, one a variant. A variant whose gate is red has its reason, and no time.

    The row of a peer, which is not ours to mend, says that it is one.
    """
    spec = op.spec
    moved = compulsory_bytes(spec, case, direction, dtype)
    floor = floor_ms(spec, case, direction, dtype, ceilings)
    # A backward runs on the stream of its forward, and a graph is recorded on none but a new one.
    stream = torch.cuda.Stream() if device.type == "cuda" else None
    with torch.cuda.stream(stream):
        variants = list(_variants(op, case, direction, dtype, device, moved))
    timings, failed = interleaved([v for v in variants if v.gate == "ok"], stream, rounds)
    rows = []
    for variant in variants:
        gate = failed.get(variant.name, variant.gate)
        row: dict[str, Any] = {
            "case": spec.case_id(case, direction),
            "variant": f"{variant.name}-{short(dtype)}",
            "batch": case.sizes.get("B", 1),
            "unit": "ms",
            "better": "lower",
            "gate": gate,
            "includes": included(device, moved),
        }
        if variant.peer:
            row["peer"] = True
        if gate == "ok":
            timing = timings[variant.name]
            row |= {
                "value": timing.median,
                "p20": timing.p20,
                "p80": timing.p80,
                "floor": floor,
                "pct_of_floor": round(100 * floor / timing.median, 1),
                "tflop": flops(spec, case, direction) / 1e12,
                "bytes": moved,
                "tb_s": round(moved / timing.median / 1e9, 4),
            }
            if variant.saved_gib is not None:
                row["saved_gib"] = round(variant.saved_gib, 6)
            if "copy" in timings:
                row["pct_of_copy"] = round(100 * timings["copy"].median / timing.median, 1)
        rows.append(row)
    return rows


def overhead_us(op: Op, case: Case, backend: Backend, device: torch.device) -> dict[str, Timing]:
    """Microseconds of host time of one call at a size seen before, not waiting for the device.

    "call" is the public function with no backend named, "backend" the function that it ends in; the
    difference of the two in each round is "overhead": checks, schema, dispatch. "gradient" is a
    call that is to be differentiated, "torch" PyTorch's own `zero_`, for scale.
    """
    dtype = case.dtypes[0]
    call_values = make_values(op.spec, case, dtype, device)
    run = implementation(backend)
    keywords = dict(zip((*op.spec.inputs, *op.spec.options), call_values, strict=True))
    scratch = torch.zeros(64, device=device)
    timed: dict[str, Callable[[], Any]] = {
        "call": lambda: op.function(**keywords),
        "backend": lambda: run(*call_values),
        "torch": scratch.zero_,
    }
    if op.spec.trains:
        leaf_values = make_values(op.spec, case, dtype, device)
        leaf_values[0].requires_grad_()
        of_leaf = dict(zip(keywords, leaf_values, strict=True))
        timed["gradient"] = lambda: op.function(**of_leaf)
    samples: dict[str, list[float]] = {name: [] for name in (*timed, "overhead")}
    for _ in range(30):
        for name, function in timed.items():
            samples[name].append(_host_us(function, HOST_CALLS[op.spec.kind], device))
        samples["overhead"].append(samples["call"][-1] - samples["backend"][-1])
    return {name: Timing.of(found) for name, found in samples.items()}


def _variants(
    op: Op,
    case: Case,
    direction: str,
    dtype: torch.dtype,
    device: torch.device,
    moved: int,
) -> Iterator[Variant]:
    spec = op.spec
    count = sets_needed(device, moved)
    sets = [make_values(spec, case, dtype, device, seed=seed) for seed in range(count)]
    prove = values if direction == "fwd" else gradients
    for backend in candidates(spec, sets[0]):
        if backend.name == "reference":
            continue
        if backend.name == "eager" and slow_in_eager(case, direction, device):
            continue
        if direction != "fwd" and not backend.differentiable:
            continue
        gate = _gate(partial(prove, spec, case, backend, dtype))
        yield _variant(op, backend.name, direction, sets, gate, backend.name)
    if direction != "bwd" and device.type == "cuda":
        yield from beside(op, case, direction, dtype, sets)
    if spec.moves:
        size = -(-moved // 2 // COPY_GRAIN) * COPY_GRAIN
        yield Variant("copy", [_copy(size, device) for _ in sets], "ok")


def _variant(
    op: Op,
    name: str,
    direction: str,
    sets: list[tuple[Any, ...]],
    gate: str,
    backend: str | None,
    *,
    peer: bool = False,
) -> Variant:
    """`op` in `direction` on each of `sets`; without calls where the gate is red."""
    if gate != "ok":
        return Variant(name, [], gate, peer)
    calls = [prepare(op, one, direction, backend) for one in sets]
    saved_gib = None
    if direction == "fwd_bwd" and sets[0][0].is_cuda:
        saved_gib = kept_bytes(partial(call, op, sets[0], backend)) / 2**30
    return Variant(name, calls, gate, peer, saved_gib)


def beside(
    op: Op, case: Case, direction: str, dtype: torch.dtype, sets: list[tuple[Any, ...]]
) -> Iterator[Variant]:
    """`case` by torch.compile, where the spec has that, and by its peers: "fwd" or "fwd_bwd"."""
    spec = op.spec
    found: dict[str, Callable[..., Any] | str] = {}
    torch.compiler.reset()  # else a second shape is compiled for any shape, a ninth not at all
    if spec.compiled_beside:
        found["compile"] = torch.compile(implementation(spec.backend("eager")))
    for name, run in (found | dict(spec.peers)).items():
        other = _by_another(op, Backend(name=name, run=run))
        gate = _gate(partial(_prove_other, other, case, direction, dtype, sets[0]))
        yield _variant(other, name, direction, sets, gate, None, peer=name in spec.peers)


def _by_another(op: Op, other: Backend) -> Op:
    """`op` as a function that is none of its backends computes it."""

    def function(*, backend: str | None, **keywords: Any) -> Any:
        return implementation(other)(*keywords.values())

    return Op(op.spec, function)


def _prove_other(
    other: Op, case: Case, direction: str, dtype: torch.dtype, call_values: tuple[Any, ...]
) -> None:
    """Hold what is not a backend, its values or its gradients, to the limits of eager PyTorch."""
    eager = other.spec.backend("eager")
    if direction == "fwd":
        with torch.no_grad():
            result = call(other, call_values)
        judge(other.spec, case, eager, dtype, call_values, result)
    else:
        of_other = partial(gradients_of, other, backend=None)
        judge_gradients(other.spec, case, eager, dtype, of_other)


def sets_needed(device: torch.device, moved: int) -> int:
    """Sets of inputs, of `moved` bytes each, after which the first has left the caches of a GPU."""
    return min(MOST_SETS, max(2, -(-COLD_BYTES[device.type] // moved)))


def included(device: torch.device, moved: int) -> str:
    """What is in a time of a call that has to move `moved` bytes."""
    text = "the op alone"
    if device.type == "cuda":
        cold = sets_needed(device, moved) * moved >= COLD_BYTES["cuda"]
        text += ", cold caches" if cold else ", warm caches"
        text += ", calls back to back in a CUDA graph"
    return text


def _gate(proof: Callable[[], None]) -> str:
    try:
        proof()
    except Exception as error:  # whatever it is, the other rows are not lost for it
        return reason_of(error)
    return "ok"


def reason_of(error: Exception) -> str:
    """The first line of `error`: a compiler's message goes on for pages."""
    first = next(iter(str(error).splitlines()), "")
    return f"{type(error).__name__}: {first}"


def _copy(size: int, device: torch.device) -> Callable[[], torch.Tensor]:
    return torch.randint(0, 256, (size,), dtype=torch.uint8, device=device).clone


def interleaved(
    variants: list[Variant], stream: torch.cuda.Stream | None, rounds: int
) -> tuple[dict[str, Timing], dict[str, str]]:
    """The times of `variants`, and why those that could not be timed could not."""
    make = partial(_graph_sweep, stream) if stream else _plain_sweep
    sweeps, failed = {}, {}
    for variant in variants:
        try:
            sweeps[variant.name] = make(variant.calls)
        except Exception as error:  # a peer may be right and not go into a CUDA graph
            failed[variant.name] = reason_of(error)
    samples: dict[str, list[float]] = {name: [] for name in sweeps}
    for _ in range(rounds):
        for name, sweep in sweeps.items():
            samples[name].append(sweep())
    return {name: Timing.of(found) for name, found in samples.items()}, failed


def _plain_sweep(calls: list[Callable[[], Any]]) -> Callable[[], float]:
    def sweep() -> float:
        start = time.perf_counter()
        for one in calls:
            one()
        return (time.perf_counter() - start) * 1e3 / len(calls)

    sweep()
    return sweep


def _graph_sweep(stream: torch.cuda.Stream, calls: list[Callable[[], Any]]) -> Callable[[], float]:
    """A replay of all `calls`, timed by events; every call writes memory of its own."""
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        for one in calls:  # a peer prepares the weights of each in its first call
            one()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        kept = [one() for one in calls]
    graph.replay()

    def sweep() -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / len(kept)

    return sweep


def _host_us(function: Callable[[], Any], calls: int, device: torch.device) -> float:
    function()
    start = time.perf_counter()
    for _ in range(calls):
        function()
    spent = time.perf_counter() - start
    if device.type == "cuda":
        torch.cuda.synchronize()
    return spent / calls * 1e6
