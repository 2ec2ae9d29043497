"""Ops that PyTorch knows: schema, fake and autograd of a spec, under torch.ops.snapkernels."""

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import forward_ad
from torch.utils.flop_counter import register_flop_formula

from snapkernels.dispatch import backward_of, choose, implementation, require_backward, saving
from snapkernels.spec import PLAIN, Backend, Fields, Spec

_LIBRARY = torch.library.Library("snapkernels", "FRAGMENT")
_MOST_PASSED = 256  # calls remembered of one op
_SCHEMA_TYPES = {
    "int": "SymInt",
    "int[3]": "SymInt[]",
    "probability": "float",
    "float": "float",
    "positive": "float",
    "seed": "SymInt",
    "seed?": "SymInt?",
}
Call = tuple[Any, ...]  # inputs, then options, in the spec's order


def define(
    spec: Spec,
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> Callable[..., torch.Tensor]:
    """Register the op of `spec`; returns what a public function calls with all its arguments.

    That checks the call against the spec (what passed once is remembered) and enters the op. The
    registered op does not check; it chooses its backend when it runs, not when it is traced. It
    does not know whether its result will be differentiated: a backend without a backward may make
    the value, and <name>_backward then computes the call once more by the first that has one.

    A small call costs its host time, so PyTorch's dispatcher is entered only where it has a part:
    for the gradient of a kernel, or while a mode, a transform, a trace or the profiler looks on.
    That saves two thirds of what a call costs beyond its backend. `custom_op` would wrap each call
    once more. Of an op whose backends are all differentiated by PyTorch it has no part in a
    gradient, whoever looks on: the op would run the forward again for it.

    Args:
        setup_context, backward: as `torch.library.register_autograd` takes them, of an op whose
            backward is another op. Without them an op <name>_backward is registered beside it: it
            runs what the backend has for that, or differentiates the backend's PyTorch calls. An
            op that has no gradient at all has no backward.
    """
    op = _register_forward(spec)
    by_another_op = backward is not None
    by_kernels = by_another_op or any(backend.backward for backend in spec.backends)
    if backward is None and spec.trains:
        setup_context, backward = _register_backward(spec)
    if backward is not None:
        name = f"snapkernels::{spec.name}"
        torch.library.register_autograd(name, backward, setup_context=setup_context, lib=_LIBRARY)
    passed: set[Call] = set()

    def check(call: Call, backend: str | None) -> None:
        spec.check(*call)
        if backend is not None:
            spec.backend(backend)

    def is_tracked(flat: list[Any], backend: str | None) -> bool:
        tracked = torch.is_grad_enabled() and any(
            one.requires_grad for one in flat if one is not None
        )
        if tracked and backend is not None:
            require_backward(spec, spec.backend(backend))
        return tracked

    def check_once(call: Call, flat: list[Any], backend: str | None) -> None:
        options = call[len(spec.inputs) :]
        forms = [None if one is None else (one.shape, one.dtype, one.device) for one in flat]
        key = (*forms, *options, *map(type, options), backend)
        try:
            known = key in passed
        except TypeError:  # a list among the options has no hash
            check(call, backend)
            return
        if known:
            spec.look_inside(*call)
            return
        check(call, backend)
        if len(passed) == _MOST_PASSED:
            passed.clear()
        passed.add(key)

    def enter(*values: Any) -> torch.Tensor:
        call, backend = values[:-1], values[-1]
        if torch.compiler.is_compiling() or not _is_plain(spec, call):
            check(call, backend)
            flat = spec.flatten(call)
            if is_tracked(flat, backend) and not by_kernels:
                return _output(implementation(choose(spec, backend, call, tracked=True))(*call))
            return _output(op(*flat, *call[len(spec.inputs) :], backend))
        flat = spec.flatten(call)
        check_once(call, flat, backend)
        if forward_ad._current_level >= 0:  # PyTorch would leave the tangent out and say nothing
            raise NotImplementedError(f"{spec.name} has no forward-mode derivative")
        tracked = is_tracked(flat, backend)
        if not _watched() or (tracked and not by_kernels):
            chosen = choose(spec, backend, call, tracked=tracked)
            if not tracked or not (by_another_op or chosen.backward):
                return _output(implementation(chosen)(*call))
            if not by_another_op:
                backend = chosen.name  # the op alone would not know that it is tracked
        return _output(op(*flat, *call[len(spec.inputs) :], backend))

    return enter


def _register_forward(spec: Spec) -> Callable[..., Any]:
    """The op <name>: the output, and after it what the spec's kernels save."""
    results = "Tensor" if not spec.saved else f"({', '.join(['Tensor'] * (1 + len(spec.saved)))})"
    _LIBRARY.define(f"{spec.name}({_schema(spec)}, str? backend=None) -> {results}")

    def run(*flat: Any) -> Any:
        call, backend = _split(spec, flat)
        chosen = choose(spec, backend, call)
        if not spec.saved:
            return saving(chosen)(*call)
        if chosen.backward and _keeps(spec, call, backend):
            return saving(chosen)(*call)
        kept = (torch.zeros_like(one) for one in _saved(spec, call, backend))
        return _output(implementation(chosen)(*call)), *kept

    def fake(*flat: Any) -> Any:
        call, backend = _split(spec, flat)
        output = flat[0].new_empty(spec.result_shape(call), dtype=spec.result_dtype(call))
        return (output, *_saved(spec, call, backend)) if spec.saved else output

    def flops(*flat: Any, out_val: Any) -> int:
        call, _ = _split(spec, flat)
        return spec.flops(spec.check(*call))

    _LIBRARY.impl(spec.name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"snapkernels::{spec.name}", fake, lib=_LIBRARY)
    packet = getattr(torch.ops.snapkernels, spec.name)
    register_flop_formula(packet, get_raw=True)(flops)
    return packet.default


def _register_backward(spec: Spec) -> tuple[Callable[..., None], Callable[..., Any]]:
    """The op <name>_backward, and the two functions of its autograd."""
    name = f"{spec.name}_backward"
    saved = "".join(f"Tensor {one}, " for one in spec.saved)
    _LIBRARY.define(
        f"{name}(Tensor grad, {saved}{_schema(spec)}, bool[] needs, str? backend=None) -> Tensor[]"
    )
    count = len(spec.saved)
    forward_only = any(not backend.differentiable for backend in spec.backends)

    def kept_by(chosen: Backend, call: Call, backend: str | None) -> bool:
        """Whether the forward kept something, and not for another that made the value."""
        if not _keeps(spec, call, backend):
            return False
        return not forward_only or choose(spec, backend, call) is chosen

    def run(grad: torch.Tensor, *rest: Any) -> list[torch.Tensor]:
        kept, (call, needs, backend) = rest[:count], _split_needs(spec, rest[count:])
        chosen = choose(spec, backend, call, tracked=True)
        if chosen.backward:
            if kept and not kept_by(chosen, call, backend):
                kept = saving(chosen)(*call)[1:]
            grads = backward_of(chosen)(tuple(needs), grad, *kept, *call)
            return [one for one in grads if one is not None]
        return _differentiated(spec, implementation(chosen), call, needs, grad)

    def fake(grad: torch.Tensor, *rest: Any) -> list[torch.Tensor]:
        call, needs, _ = _split_needs(spec, rest[count:])
        tensors = _with_gradients(spec, spec.flatten(call))
        return [one.new_empty(one.shape) for one, need in zip(tensors, needs, strict=True) if need]

    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"snapkernels::{name}", fake, lib=_LIBRARY)

    def no_second(ctx: Any, *grads: Any) -> None:
        raise NotImplementedError(f"{spec.name} has no second derivative")

    def flops(grad: torch.Tensor, *rest: Any, out_val: Any) -> int:
        call, _, _ = _split_needs(spec, rest[count:])
        return 2 * spec.flops(spec.check(*call))

    torch.library.register_autograd(f"snapkernels::{name}", no_second, lib=_LIBRARY)
    packet = getattr(torch.ops.snapkernels, name)
    register_flop_formula(packet, get_raw=True)(flops)
    op = packet.default
    number = len(spec.differentiable)

    def keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        flat, ctx.options = inputs[:number], inputs[number:]
        kept = output[1:] if spec.saved else ()
        ctx.mark_non_differentiable(*kept)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*kept, *flat)

    def backward(ctx: Any, grad: torch.Tensor | None, *_: Any) -> tuple[torch.Tensor | None, ...]:
        nothing = (None,) * len(ctx.options)
        if grad is None:
            return (*(None for _ in range(number)), *nothing)
        *options, backend = ctx.options
        wanted = _with_gradients(spec, list(ctx.needs_input_grad[:number]))
        grads = iter(op(grad, *ctx.saved_tensors, *options, wanted, backend))
        needed = [d and n for d, n in zip(spec.differentiable, ctx.needs_input_grad, strict=False)]
        return (*(next(grads) if need else None for need in needed), *nothing)

    return keep, backward


def _differentiated(
    spec: Spec, run: Callable[..., Any], call: Call, needs: list[bool], grad: torch.Tensor
) -> list[torch.Tensor]:
    """The gradients of a backend that is PyTorch calls, by PyTorch.

    The dispatcher runs an op with autograd switched off; it is switched on again for these calls.
    """
    keys = torch._C.DispatchKey
    switched_off = torch._C._dispatch_tls_local_exclude_set()
    for key in (keys.AutogradCPU, keys.AutogradCUDA, keys.AutogradOther, keys.ADInplaceOrView):
        switched_off = switched_off.remove(key)
    switched_off = switched_off.remove(keys.AutogradFunctionality)
    flat = [one.detach() if isinstance(one, torch.Tensor) else one for one in spec.flatten(call)]
    pairs = zip(_with_gradients(spec, flat), needs, strict=True)
    leaves = [one.requires_grad_() for one, need in pairs if need]
    included = torch._C._dispatch_tls_local_include_set()
    with torch._C._ForceDispatchKeyGuard(included, switched_off), torch.enable_grad():
        output = run(*spec.unflatten(flat), *call[len(spec.inputs) :])
        grads = torch.autograd.grad(output, leaves, grad)
    return [one.detach() for one in grads]


def _is_plain(spec: Spec, call: Call) -> bool:
    """Whether every tensor is an ordinary one; no more is known of them."""
    for declared, value in zip(spec.inputs.values(), call, strict=False):
        if isinstance(declared, Fields):
            if type(value) is not declared.kind or any(type(one) not in PLAIN for one in value):
                return False
        elif type(value) not in PLAIN and not (value is None and declared.optional):
            return False
    return True


def _watched() -> bool:
    """Whether something besides autograd wants to see ops: a mode, transform, trace, profiler."""
    return (
        torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
        or torch.autograd._profiler_enabled()
    )


def _schema(spec: Spec) -> str:
    """The arguments of the op: the inputs, those of named tuples one by one, then the options."""
    arguments = []
    for name, declared in spec.inputs.items():
        if isinstance(declared, Fields):
            arguments += [f"Tensor {name}_{field}" for field in declared.dims]
        else:
            arguments.append(f"Tensor{'?' * declared.optional} {name}")
    arguments += [f"{_SCHEMA_TYPES[kind]} {name}" for name, kind in spec.options.items()]
    return ", ".join(arguments)


def _split(spec: Spec, flat: tuple[Any, ...]) -> tuple[Call, str | None]:
    """The call and the backend of an op's arguments.

    The dispatcher leaves out a trailing argument that equals its default.
    """
    inputs, count = len(spec.differentiable), len(spec.differentiable) + len(spec.options)
    backend = flat[count] if len(flat) > count else None
    return (*spec.unflatten(list(flat[:inputs])), *flat[inputs:count]), backend


def _split_needs(spec: Spec, flat: tuple[Any, ...]) -> tuple[Call, list[bool], str | None]:
    """The call, the gradients that are needed, and the backend of a backward op's arguments."""
    count = len(spec.differentiable) + len(spec.options)
    call, _ = _split(spec, flat[:count])
    return call, flat[count], flat[count + 1] if len(flat) > count + 1 else None


def _with_gradients(spec: Spec, flat: list[Any]) -> list[Any]:
    """Of what stands for the flattened inputs, that of the differentiable ones."""
    return [one for one, has in zip(flat, spec.differentiable, strict=True) if has]


def _keeps(spec: Spec, call: Call, backend: str | None) -> bool:
    """Whether a call keeps what a backward needs: the one named, or of none the spec knows.

    Not what the environment names: a compiled call may be kept for another process.
    """
    if backend is not None:
        return spec.backend(backend).backward is not None
    return spec.keeps(spec.check(*call))


def _saved(spec: Spec, call: Call, backend: str | None) -> list[torch.Tensor]:
    """Uninitialised tensors of the forms that are kept, without elements where none are."""
    sizes, like = spec.check(*call), spec.flatten(call)[0]
    if not _keeps(spec, call, backend):
        return [like.new_empty(0, dtype=one.dtype) for one in spec.saved.values()]
    return [like.new_empty(one.shape(sizes), dtype=one.dtype) for one in spec.saved.values()]


def _output(result: Any) -> torch.Tensor:
    return result[0] if isinstance(result, (tuple, list)) else result
