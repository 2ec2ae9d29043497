"""Which backend of an op runs a call, and why not another."""

import importlib
import importlib.util
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch

from snapkernels import env
from snapkernels.spec import Backend, Spec


def choose(
    spec: Spec, backend: str | None, values: tuple[Any, ...], *, tracked: bool = False
) -> Backend:
    """The backend called `backend`, or, for None, the first that takes `values` and would.

    `values` are the call's inputs, then its options. A named backend never falls back, and is not
    asked whether it pays; one named in SNAPKERNELS_BACKEND is named. A call that is `tracked` is to
    be differentiated.

    Raises:
        ValueError: there is no such backend, or it cannot run this call; the message says why.
        NotImplementedError: the one named has no backward, and the call is tracked.
    """
    name = backend if backend is not None else env.BACKENDS.get(spec.name)
    if name is not None:
        chosen = spec.backend(name)
        if reason := chosen.refuses(*values):
            raise ValueError(f"{spec.name}: backend={name!r} cannot run this call: {reason}")
        if tracked:
            require_backward(spec, chosen)
        return chosen
    for candidate in spec.backends:
        if tracked and not candidate.differentiable:
            continue
        takes = candidate.refuses(*values) is None and not _interpreted(candidate)
        if takes and candidate.declines(*values) is None:
            return candidate
    raise AssertionError(f"{spec.name}: the reference refuses and declines nothing")


def require_backward(spec: Spec, backend: Backend) -> None:
    """Refuse to have what `backend` computes differentiated, if it has no backward.

    Raises:
        NotImplementedError: it has none.
    """
    if not backend.differentiable:
        raise NotImplementedError(
            f"{spec.name}: backend={backend.name!r} has no backward yet: name another one, or "
            "none, where a gradient is wanted, or call it under torch.no_grad()"
        )


def candidates(spec: Spec, values: tuple[Any, ...]) -> Iterator[Backend]:
    """The backends that take `values`, those that decline them too, in the spec's order.

    Interpreted kernels are left out: they are there to be proved, and too slow for anything else.
    """
    for candidate in spec.backends:
        if not _interpreted(candidate) and candidate.refuses(*values) is None:
            yield candidate


def _interpreted(backend: Backend) -> bool:
    return env.INTERPRET and backend.name == "triton"


def implementation(backend: Backend) -> Callable[..., Any]:
    """The function of `backend`, imported now if it was named by its module."""
    return _import(backend.run) if isinstance(backend.run, str) else backend.run


def saving(backend: Backend) -> Callable[..., Any]:
    """The function that runs `backend` where its backward may follow, imported like the other."""
    function = backend.saving or backend.run
    return _import(function) if isinstance(function, str) else function


def backward_of(backend: Backend) -> Callable[..., Any]:
    """The function of the backward of `backend`, which has one, imported like the forward's."""
    assert backend.backward is not None
    return _import(backend.backward) if isinstance(backend.backward, str) else backend.backward


def output_of(backend: Backend, *values: Any) -> torch.Tensor:
    """What `backend` makes of inputs and options, without what it saves for its backward."""
    result = implementation(backend)(*values)
    return result[0] if isinstance(result, tuple) else result


def explain(spec: Spec, *values: Any) -> str:
    """Which backend would run a call with the inputs and options `values`, and why not another.

    Raises:
        ValueError: the arguments do not fit.
    """
    sizes = spec.check(*values)
    lines = [
        f"{spec.name}: {spec.math}",
        "  " + ", ".join(f"{name} = {size}" for name, size in sizes.items()),
    ]
    work = [f"{name} {flops(sizes) / 1e9:.3g} GFLOP" for name, flops in spec.algorithms.items()]
    lines += [f"  {', '.join(work)}"] * bool(work)
    chosen = choose(spec, None, values).name
    preferred = env.BACKENDS.get(spec.name)
    trains = None if preferred else choose(spec, None, values, tracked=True).name
    for backend in spec.backends:
        if backend.name == chosen:
            verdict = "runs" + " (SNAPKERNELS_BACKEND)" * (preferred == chosen)
        elif reason := backend.refuses(*values):
            verdict = f"cannot: {reason}"
        elif reason := backend.declines(*values):
            verdict = f"can, but declines: {reason}"
        else:
            verdict = f"can, but {chosen} is preferred"
        if not backend.differentiable:
            verdict += "; has no backward yet"
        elif backend.name == trains != chosen:
            verdict += "; runs what is to be differentiated"
        lines.append(f"  {backend.name:<10} {verdict}")
    return "\n".join(lines)


def triton_refuses(tensor: torch.Tensor, *_: Any) -> str | None:
    """Why no Triton kernel can run on `tensor`, or None."""
    if not tensor.is_cuda and not env.INTERPRET:
        return f"Triton kernels need a CUDA tensor, this one is on {tensor.device.type}"
    return None if has_triton() else "the package triton is not installed"


@cache
def has_triton() -> bool:
    """Whether the package triton is installed."""
    return importlib.util.find_spec("triton") is not None


@cache
def _import(path: str) -> Callable[..., Any]:
    if env.INTERPRET:
        importlib.import_module("snapkernels.interpreter").install()
    module, _, function = path.partition(":")
    return getattr(importlib.import_module(module), function)
