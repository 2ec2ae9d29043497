"""Every case of every op under pytest-benchmark, by the backend that is chosen and by eager.

pytest bench --benchmark-only                # all that suit the machine
pytest bench --benchmark-only -k patchify

On a GPU these are the paper's cases, elsewhere the small ones. A call is timed as a user makes it,
by the clock, on one set of inputs: caches are warm, and the launch and the wait for the GPU are
inside. The figures of the records are those of `python -m snapkernels bench`. A backend is
proved on its case first, and has no time if that fails. On a CPU the rounds are five, so that all
of it takes three minutes on two cores.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch

from snapkernels.dispatch import choose
from snapkernels.registry import OPS, Op
from snapkernels.roofline import measure_ceilings
from snapkernels.spec import Backend, Case
from snapkernels.testing.bench import directions, slow_in_eager
from snapkernels.testing.cases import make_values, prepare
from snapkernels.testing.cost import compulsory_bytes, floor_ms, flops
from snapkernels.testing.proofs import gradients, short, values

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TIER = "paper" if DEVICE.type == "cuda" else "cpu"
ROUNDS = 30 if DEVICE.type == "cuda" else 5


def pytest_generate_tests(metafunc: Any) -> None:
    """An entry for every case of the tier, direction and backend; its id is the case's."""
    found = [
        (op, case, direction, who)
        for op in OPS.values()
        for case in op.spec.cases
        if case.tier == TIER
        for direction in directions(op.spec)
        for who in ("ours", "eager")
        if who == "ours" or not slow_in_eager(case, direction, DEVICE)
    ]
    ids = [f"{op.spec.case_id(case, direction)}-{who}" for op, case, direction, who in found]
    metafunc.parametrize(("op", "case", "direction", "who"), found, ids=ids)


def test_op(benchmark: Any, op: Op, case: Case, direction: str, who: str) -> None:
    """Prove and time one entry; a red proof fails it."""
    spec, dtype = op.spec, case.dtypes[0]
    inputs = make_values(spec, case, dtype, DEVICE)
    tracked = direction != "fwd"
    backend = choose(spec, None if who == "ours" else who, inputs, tracked=tracked)
    prove(op, case, backend, direction)
    benchmark.group = spec.case_id(case, direction)
    benchmark.extra_info |= {
        "variant": f"{backend.name}-{short(dtype)}",
        "floor_ms": floor_ms(spec, case, direction, dtype, ceilings()),
        "tflop": flops(spec, case, direction) / 1e12,
        "bytes": compulsory_bytes(spec, case, direction, dtype),
    }
    # Ours names no backend, as a user's call: what chooses one is in its time.
    timed = prepare(op, inputs, direction, None if who == "ours" else who)
    benchmark.pedantic(partial(finished, timed), rounds=ROUNDS, warmup_rounds=2)


def prove(op: Op, case: Case, backend: Backend, direction: str) -> None:
    """Hold the values or the gradients of `backend` to the limits of the op.

    Raises:
        AssertionError: they are wrong.
    """
    proof = values if direction == "fwd" else gradients
    proof(op.spec, case, backend, case.dtypes[0])


def finished(call: Callable[[], Any]) -> None:
    """Run `call` to its end on the device."""
    call()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


@cache
def ceilings() -> dict[str, float]:
    """Those of this machine, measured at the first entry."""
    return measure_ceilings(DEVICE)
