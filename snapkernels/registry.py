"""The public ops by name, each with its spec."""

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import torch

from snapkernels.spec import Spec

Function = TypeVar("Function", bound=Callable[..., torch.Tensor])


class Op(NamedTuple):
    """A public function and the record of what it computes."""

    spec: Spec
    function: Callable[..., torch.Tensor]


OPS: dict[str, Op] = {}


def public(spec: Spec) -> Callable[[Function], Function]:
    """Enter the decorated function as the op of `spec`."""

    def enter(function: Function) -> Function:
        assert spec.name not in OPS, f"two ops are called {spec.name}"
        OPS[spec.name] = Op(spec, function)
        return function

    return enter


def op(name: str) -> Op:
    """The op called `name`.

    Raises:
        ValueError: there is none.
    """
    if name not in OPS:
        raise ValueError(f"{name!r} is not an op; there are {', '.join(OPS)}")
    return OPS[name]
