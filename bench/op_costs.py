"""Two passes over an evaluation of a FIT: what its parts have to do, and the time they take.

A part is a sublayer, named by its role and equal in all blocks, or an end of the model. `watched`
says when each begins and ends: by that ops are counted, and marks are set in time.
"""

import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

from snapkernels.registry import OPS
from snapkernels.roofline import short_name
from snapkernels.spec import Spec
from snapkernels.testing.timing import Timing, measure
from snapvideo_core import FIT, fit
from snapvideo_core.capture import Outputs, recorded

# {child of a block: its part}; and the parts of a global layer, in order.
ROLES = {
    "cond_read": "cond read",
    "cond_ff": "cond read FF",
    "read": "read",
    "read_ff": "read FF",
    "write": "write",
    "write_ff": "write FF",
}
GLOBAL_ROLES = ("global attention", "global FF")
# {function that `FIT.forward` calls: its part}
ENDS = {"stem": "stem", "head_mix": "head", "head": "head"}


class Place(NamedTuple):
    """A part, and the block it is in; None for one of the whole model."""

    part: str
    block: int | None = None


Segments = list[tuple[Place | None, float]]  # in order, the ms of each; None outside the parts


class Measured(NamedTuple):
    """Times of an evaluation of a batch, in ms: of all of it, and from mark to mark."""

    whole: Timing
    segments: Segments


class Rates(NamedTuple):
    """What a device reaches: TB/s copied, TFLOP/s of the weights' dtype and of e4m3 numbers."""

    copy: float
    matrix: float
    fp8: float

    @classmethod
    def of(cls, ceilings: dict[str, float], dtype: torch.dtype) -> "Rates":
        """From `measure_ceilings` for `dtype`; without fp8 units e4m3 is multiplied in that."""
        matrix = ceilings[f"{short_name(dtype)}_tflop_s"]
        return cls(ceilings["copy_tb_s"], matrix, ceilings.get("fp8_tflop_s", matrix))


class OpCost(NamedTuple):
    """What one call of an op has to do.

    Attributes:
        name: of the op.
        place: where it was called; None for outside the parts.
        flops: of its matrix products, by the exact algorithm that has the fewest.
        moved: bytes of every tensor that is an input or the output, once each: copying into one and
            adding to it both move it and what is copied or added.
        in_fp8: whether it multiplies e4m3 numbers.
    """

    name: str
    place: Place | None
    flops: int
    moved: int
    in_fp8: bool

    def predicted_ms(self, rates: Rates) -> float:
        """The longer of multiplying and moving, each at its ceiling."""
        rate = rates.fp8 if self.in_fp8 else rates.matrix
        return max(self.flops / rate, self.moved / rates.copy) / 1e9


def sublayers(model: FIT) -> Iterator[tuple[nn.Module, Place]]:
    """The modules that the model calls, and the part that each is."""
    yield model.self_conditioning, Place("self-conditioning")
    yield model.conditioning, Place("conditioning")
    for index, block in enumerate(model.blocks):
        for name, part in ROLES.items():
            yield block.get_submodule(name), Place(part, index)
        for layer in block.get_submodule("global_layers").children():
            for child, part in zip(layer.children(), GLOBAL_ROLES, strict=True):
                yield child, Place(part, index)


@contextmanager
def watched(
    model: FIT, enter: Callable[[Place], None], leave: Callable[[], None]
) -> Iterator[None]:
    """Inside, evaluations of `model` call `enter` before every part and `leave` after it."""
    with ExitStack() as undo:
        for module, place in sublayers(model):
            begin, end = _hooks(place, enter, leave)
            undo.callback(module.register_forward_pre_hook(begin).remove)
            undo.callback(module.register_forward_hook(end).remove)
        for name, part in ENDS.items():
            function = getattr(fit, name)
            undo.callback(setattr, fit, name, function)
            setattr(fit, name, _between(function, *_hooks(Place(part), enter, leave)))
        yield


def counted(model: FIT, evaluate: Callable[[], object]) -> list[OpCost]:
    """The cost of every op of one evaluation, in order.

    It is not one to be timed: some kernels keep more where a dispatch mode looks on.
    """
    counter = Counter()
    with watched(model, counter.enter, counter.leave), counter:
        evaluate()
    return counter.ops


class Counter(TorchDispatchMode):
    """Inside, the cost of every op that moves something is kept, by the place entered last.

    An op of ours counts as one, whatever its backend launches.
    """

    def __init__(self) -> None:
        super().__init__()
        self.place: Place | None = None
        self.ops: list[OpCost] = []

    def enter(self, place: Place) -> None:
        """What follows is of `place`."""
        self.place = place

    def leave(self) -> None:
        """What follows is of no part."""
        self.place = None

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name, own = func.overloadpacket.__name__, func.namespace == "snapkernels"
        given = list(_tensors([*args, *kwargs.values()]))
        made = list(_tensors([result]))
        if own:
            made = made[:1]  # the others are kept for a backward
            flops = _least_flops(OPS[name].spec, args)
        elif name.startswith("_scaled_dot_product"):  # the registry lacks that of a CPU
            flops = sdpa_flop_count(*(one.shape for one in args[:3]))
        else:
            formula = flop_registry.get(func.overloadpacket)
            flops = formula(*args, **kwargs, out_val=result) if formula else 0
        if own or func._schema.is_mutable or not _are_views(made, given):
            # Distinct ones: what is written in place is given, and made as well.
            moved = sum(size for _, size in {(one.data_ptr(), one.nbytes) for one in given + made})
            in_fp8 = any(one.dtype == torch.float8_e4m3fn for one in given)
            self.ops.append(OpCost(name, self.place, flops, moved, in_fp8))
        return result


class Trace:
    """The marks of one evaluation: at every border of a part the moment, as `now` gives it."""

    def __init__(self, now: Callable[[], Any]):
        self.now = now
        self.places: list[Place | None] = []
        self.moments: list[Any] = []

    def enter(self, place: Place | None) -> None:
        """From now on it is in `place`."""
        self.places.append(place)
        self.moments.append(self.now())

    def leave(self) -> None:
        """From now on it is in no part."""
        self.enter(None)

    def segments(self, elapsed_ms: Callable[[Any, Any], float]) -> Segments:
        """The time from each mark to the next."""
        times = map(elapsed_ms, self.moments, self.moments[1:])
        return list(zip(self.places, times, strict=False))


def traced(model: FIT, evaluate: Callable[[], object], now: Callable[[], Any]) -> Trace:
    """The marks of one evaluation, its beginning and end among them."""
    trace = Trace(now)
    with watched(model, trace.enter, trace.leave):
        trace.leave()
        evaluate()
        trace.leave()
    return trace


def in_calls(
    model: FIT, evaluate: Callable[[], Outputs]
) -> tuple[Callable[[], object], Callable[[], Segments]]:
    """An evaluation, and one with marks, which returns the times between them."""

    def parts() -> Segments:
        trace = traced(model, evaluate, time.perf_counter)
        return trace.segments(lambda start, end: (end - start) * 1e3)

    return evaluate, parts


def in_graphs(
    model: FIT, evaluate: Callable[[], Outputs]
) -> tuple[Callable[[], object], Callable[[], Segments]]:
    """Likewise as replays of two CUDA graphs, the marks events in the second."""
    device, name = model.positions.device, model.config.name
    traces: list[Trace] = []

    def marked() -> Outputs:
        results: list[Outputs] = []
        traces.append(traced(model, lambda: results.append(evaluate()), _event))
        return results[0]

    whole, _ = recorded(evaluate, device, name)
    replay, _ = recorded(marked, device, name)
    trace = traces[-1]  # of the capture; those before are of warm-ups

    def parts() -> Segments:
        replay()
        torch.cuda.synchronize(device)
        return trace.segments(lambda start, end: start.elapsed_time(end))

    return whole, parts


def timed(
    whole: Callable[[], object],
    parts: Callable[[], Segments],
    device: torch.device,
    *,
    rounds: int,
) -> Measured:
    """Evaluations without marks and with them, in turn, so that both have the same clocks."""
    wholes, traces = [], []
    ahead = int(device.type == "cuda")  # a replay is queued behind another, or its launch counts
    for _ in range(rounds):
        wholes.append(measure(whole, device, repeats=1, warmup=ahead).median)
        traces.append(parts())
    segments = [
        (same[0][0], statistics.median(ms for _, ms in same)) for same in zip(*traces, strict=True)
    ]
    return Measured(Timing.of(wholes), segments)


def _event() -> torch.cuda.Event:
    """An event recorded now or, of a capture, by every replay."""
    event = torch.cuda.Event(enable_timing=True, external=True)
    event.record()
    return event


def _hooks(
    place: Place, enter: Callable[[Place], None], leave: Callable[[], None]
) -> tuple[Callable[..., None], Callable[..., None]]:
    """What to call before and after the module or function at `place`."""
    return lambda *_: enter(place), lambda *_: leave()


def _between(
    function: Callable[..., torch.Tensor], begin: Callable[[], None], end: Callable[[], None]
) -> Callable[..., torch.Tensor]:
    """`function`, with a call before and one after it."""

    def call(*args: Any, **keywords: Any) -> torch.Tensor:
        begin()
        result = function(*args, **keywords)
        end()
        return result

    return call


def _least_flops(spec: Spec, flat: tuple[Any, ...]) -> int:
    """FLOPs of a call of our op, from the arguments of the registered one."""
    inputs = len(spec.differentiable)
    options = flat[inputs : inputs + len(spec.options)]
    sizes = spec.check(*spec.unflatten(list(flat[:inputs])), *options)
    return min((count(sizes) for count in spec.algorithms.values()), default=spec.flops(sizes))


def _are_views(made: list[torch.Tensor], given: list[torch.Tensor]) -> bool:
    """Whether all that was made is memory that was given; so it is where nothing was made."""
    memory = {one.untyped_storage().data_ptr() for one in given}
    return all(one.untyped_storage().data_ptr() in memory for one in made)


def _tensors(values: Iterable[Any]) -> Iterator[torch.Tensor]:
    """Those in `values`, and in lists and tuples in it."""
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)
