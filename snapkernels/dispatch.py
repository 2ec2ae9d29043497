"""Which implementation of an op runs: the caller's choice, or the default."""

from collections.abc import Callable, Mapping
from typing import TypeVar

DEFAULT_BACKEND = "eager"

Implementation = TypeVar("Implementation", bound=Callable)


def choose(op: str, backends: Mapping[str, Implementation], backend: str | None) -> Implementation:
    """Return the implementation of `op` named `backend` (None: `DEFAULT_BACKEND`).

    An explicit choice never falls back.

    Raises:
        ValueError: `op` has no such backend.
    """
    name = DEFAULT_BACKEND if backend is None else backend
    if name not in backends:
        raise ValueError(f"{op}: backend={name!r} is not one of {', '.join(map(repr, backends))}")
    return backends[name]
