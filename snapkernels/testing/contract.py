"""What every op promises whatever it computes: strides, empty batches, NaN, bad input, PyTorch."""

import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from snapkernels.registry import Op
from snapkernels.spec import Backend, Case, Spec, Tensor
from snapkernels.testing.cases import call, leaves, make_values


def named_backend_raises(
    spec: Spec, backend: Backend, values: tuple[Any, ...], reason: str
) -> None:
    """A backend that cannot run a call says why when it is named, and is not replaced."""
    from snapkernels.dispatch import choose

    message = _message(lambda: choose(spec, backend.name, values))
    assert reason in message and repr(backend.name) in message, message


def gradients_of(op: Op, values: tuple[Any, ...], backend: str | None) -> tuple[torch.Tensor, ...]:
    """Gradients of every floating-point input for `output_gradient`."""
    inputs = [leaf.requires_grad_() for leaf in leaves(op.spec, values)]
    output = call(op, values, backend)
    return torch.autograd.grad(output, inputs, output_gradient(output))


def output_gradient(output: torch.Tensor) -> torch.Tensor:
    """A random gradient of `output`, the same for the same shape, dtype and device."""
    generator = torch.Generator(output.device).manual_seed(1)
    drawn = torch.randn(
        output.shape, generator=generator, device=output.device, dtype=torch.bfloat16
    )
    return drawn.to(output.dtype)


def any_strides(op: Op, device: str) -> None:
    """Permuted, expanded and offset inputs give what contiguous ones give, gradients included."""
    values = _small(op.spec, device)
    expected = call(op, values)
    grads = gradients_of(op, values, None)
    for strided in (_permuted, _offset):
        moved = tuple(strided(v) if isinstance(v, torch.Tensor) else v for v in values)
        assert torch.allclose(call(op, moved), expected, rtol=1e-12, atol=1e-12)
        for one, other in zip(gradients_of(op, moved, None), grads, strict=True):
            assert torch.allclose(one, other, rtol=1e-10, atol=1e-10)
    inputs = [leaf.requires_grad_() for leaf in leaves(op.spec, values)]
    torch.autograd.grad(call(op, values).sum(), inputs)  # an expanded gradient


def empty_batch(op: Op, device: str) -> None:
    """No samples in, no samples out."""
    case = _small_case(op.spec)
    first = next(iter(op.spec.inputs.values()))
    assert isinstance(first, Tensor)
    batch = first.dims[0]
    none = (0, *case.sizes[batch][1:]) if batch == "..." else 0
    empty = replace(case, name="empty", sizes={**case.sizes, batch: none})
    values = make_values(op.spec, empty, torch.float32, device)
    result = call(op, values)
    assert result.numel() == 0 and result.shape == _reference(op.spec, values).shape


def not_finite(op: Op, device: str) -> None:
    """NaN and inf in the first input stay, and reach nothing that they do not in the equation.

    Of a sublayer only so much: PyTorch's SDPA on a CPU loses the NaN of a query.
    """
    for bad in (float("nan"), float("inf")):
        values = _small(op.spec, device)
        at = values[0].numel() // 3
        values[0].view(-1)[at] = bad
        result, expected = call(op, values), _reference(op.spec, values)
        assert not expected.isfinite().all()
        if op.spec.exact:
            assert torch.equal(result.nan_to_num(), expected.nan_to_num())
            assert torch.equal(result.isnan(), expected.isnan())
            continue
        assert not result.view(-1)[at].isfinite(), f"{bad} was lost"
        assert not (~result.isfinite() & expected.isfinite()).any(), f"{bad} spread"


def bad_input(op: Op, device: str) -> None:
    """A wrong type, rank, dtype or option raises ValueError that names the op and the thing."""
    spec, values = op.spec, _small(op.spec, device)

    def refused(position: int, value: Any, *named: str) -> None:
        changed = (*values[:position], value, *values[position + 1 :])
        message = _message(lambda: call(op, changed))
        assert message.startswith(f"{spec.name}: "), message
        assert any(re.search(rf"\b{re.escape(name)}", message) for name in named), message

    for position, (name, declared) in enumerate(spec.inputs.items()):
        value = values[position]
        if isinstance(declared, Tensor) and value is not None:
            refused(position, [[0.0]], name)
            refused(position, value.reshape(-1)[0], name)
            wrong = torch.int32 if declared.dtype is None else torch.float32
            refused(position, value.to(wrong), name)
        elif value is not None:
            refused(position, value[:-1], name)
    for position, (name, kind) in enumerate(spec.options.items(), len(spec.inputs)):
        bad = {"int": (0, -1, 2.0), "int[3]": ((1, 2), (1, 2, 0), 4)}
        for value in bad.get(kind, (-1.0, "x")):
            refused(position, value, name)
    message = _message(lambda: call(op, values, "no such backend"))
    assert all(repr(backend.name) in message for backend in spec.backends), message


def sizes_that_contradict(op: Op, device: str) -> None:
    """A dimension that a rule or another input binds raises ValueError when it is longer by one."""
    spec, values = op.spec, _small(op.spec, device)
    seen: list[str] = []
    for position, declared in enumerate(spec.inputs.values()):
        if not isinstance(declared, Tensor) or values[position] is None:
            continue
        tensor = values[position]
        for axis, dim in enumerate(declared.dims):
            bound = dim in seen or any(re.search(rf"\b{dim}\b", rule) for rule in spec.rules)
            seen.append(dim)
            if bound and dim != "C" and dim != "...":
                longer = torch.cat([tensor, tensor.narrow(axis, 0, 1)], axis)
                changed = (*values[:position], longer, *values[position + 1 :])
                message = _message(partial(call, op, changed))
                assert message.startswith(f"{spec.name}: "), message


def gradcheck(op: Op, device: str) -> None:
    """Gradients agree with finite differences in float64."""
    values = _small(op.spec, device)
    inputs = [leaf.requires_grad_() for leaf in leaves(op.spec, values)]

    def function(*tensors: torch.Tensor) -> torch.Tensor:
        return call(op, values)

    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)


def compiles(op: Op, device: str) -> None:
    """torch.compile takes the call without a graph break, forward and backward."""
    values = _small(op.spec, device)
    expected = gradients_of(op, values, None)
    compiled = Op(op.spec, torch.compile(op.function, fullgraph=True, backend="aot_eager"))
    torch.compiler.reset()
    for one, other in zip(gradients_of(compiled, values, None), expected, strict=True):
        assert torch.allclose(one, other, rtol=1e-10, atol=1e-10)


def opcheck(op: Op, device: str) -> None:
    """PyTorch's own checks of a registered op, with plain and permuted inputs."""
    registered = getattr(torch.ops.snapkernels, op.spec.name, None)
    if registered is None:
        assert all(callable(backend.run) for backend in op.spec.backends), "kernels need an op"
        return
    values = _small(op.spec, device)
    for strided in (torch.Tensor.clone, _permuted, _offset):
        moved = tuple(strided(v) if isinstance(v, torch.Tensor) else v for v in values)
        for leaf in leaves(op.spec, moved):
            leaf.requires_grad_()
        torch.library.opcheck(registered.default, moved)


CHECKS: dict[str, Callable[[Op, str], None]] = {
    "any strides": any_strides,
    "empty batch": empty_batch,
    "not finite": not_finite,
    "bad input": bad_input,
    "sizes that contradict": sizes_that_contradict,
    "gradcheck": gradcheck,
    "fullgraph": compiles,
    "opcheck": opcheck,
}


def _small_case(spec: Spec) -> Case:
    return next(case for case in spec.cases if torch.float64 in case.dtypes)


def _small(spec: Spec, device: str) -> tuple[Any, ...]:
    return make_values(spec, _small_case(spec), torch.float64, device)


def _reference(spec: Spec, values: tuple[Any, ...]) -> torch.Tensor:
    with torch.no_grad():
        return spec.reference(*values)


def _permuted(tensor: torch.Tensor) -> torch.Tensor:
    """The same values with the dimensions in memory reversed."""
    back = tuple(reversed(range(tensor.dim())))
    return tensor.detach().permute(back).contiguous().permute(back)


def _offset(tensor: torch.Tensor) -> torch.Tensor:
    """The same values, one element into their memory."""
    room = tensor.new_empty(tensor.numel() + 1)
    return room[1:].view(tensor.shape).copy_(tensor.detach())


def _message(function: Callable[[], object]) -> str:
    try:
        function()
    except ValueError as error:
        return str(error)
    raise AssertionError("no ValueError was raised")
