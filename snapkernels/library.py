"""Ops that PyTorch knows: schema, fake and autograd of a spec, under torch.ops.snapkernels."""

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import forward_ad

from snapkernels.dispatch import choose, implementation
from snapkernels.spec import Spec

_LIBRARY = torch.library.Library("snapkernels", "FRAGMENT")
_PLAIN = (torch.Tensor, torch.nn.Parameter)
_MOST_PASSED = 256  # calls remembered of one op
_SCHEMA_TYPES = {"int": "SymInt", "int[3]": "SymInt[]", "probability": "float", "float": "float"}


def _watched() -> bool:
    """Whether something besides autograd wants to see ops: a mode, transform, trace, profiler."""
    return (
        torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
        or torch.autograd._profiler_enabled()
    )


def define(
    spec: Spec,
    setup_context: Callable[..., None],
    backward: Callable[..., Any],
) -> Callable[..., torch.Tensor]:
    """Register the op of `spec`; returns what a public function calls: (tensor, *options, backend).

    That checks the call against the spec (what passed once is remembered) and enters the op. The
    registered op does not check; it chooses its backend when it runs, not when it is traced.

    A small call costs its host time, so PyTorch's dispatcher is entered only where it has a part:
    for a gradient, or while a mode, a transform, a trace or the profiler looks on. That saves two
    thirds of what a call costs beyond its backend. `custom_op` would wrap each call once more.

    Args:
        spec: of an op of one tensor.
        setup_context, backward: as `torch.library.register_autograd` takes them.
    """
    (tensor_name,) = spec.inputs
    count = 1 + len(spec.options)
    options = ", ".join(f"{_SCHEMA_TYPES[kind]} {name}" for name, kind in spec.options.items())
    name = f"snapkernels::{spec.name}"
    _LIBRARY.define(f"{spec.name}(Tensor {tensor_name}, {options}, str? backend=None) -> Tensor")

    def run(*values: Any) -> torch.Tensor:
        # The dispatcher leaves out a trailing argument that equals its default.
        call, (backend,) = (values, (None,)) if len(values) == count else (values[:-1], values[-1:])
        return implementation(choose(spec, backend, call))(*call)

    def fake(*values: Any) -> torch.Tensor:
        sizes = spec.check(*values[:count])
        return values[0].new_empty([sizes[dim] for dim in spec.output.dims])

    _LIBRARY.impl(spec.name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(name, fake, lib=_LIBRARY)
    torch.library.register_autograd(name, backward, setup_context=setup_context, lib=_LIBRARY)
    op = getattr(torch.ops.snapkernels, spec.name).default
    passed: set[tuple[Any, ...]] = set()

    def check(*values: Any) -> None:
        *call, backend = values
        spec.check(*call)
        if backend is not None:
            spec.backend(backend)

    def enter(tensor: torch.Tensor, *rest: Any) -> torch.Tensor:
        if torch.compiler.is_compiling() or type(tensor) not in _PLAIN:
            check(tensor, *rest)
            return op(tensor, *rest)
        key = (tensor.shape, tensor.dtype, rest, *map(type, rest))
        try:
            known = key in passed
        except TypeError:  # a list among the options has no hash
            check(tensor, *rest)
            return op(tensor, *rest)
        if not known:
            check(tensor, *rest)
            if len(passed) == _MOST_PASSED:
                passed.clear()
            passed.add(key)
        if forward_ad._current_level >= 0:  # PyTorch would leave the tangent out and say nothing
            raise NotImplementedError(f"{spec.name} has no forward-mode derivative")
        if (tensor.requires_grad and torch.is_grad_enabled()) or _watched():
            return op(tensor, *rest)
        return run(tensor, *rest)

    return enter
