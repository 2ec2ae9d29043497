"""What every op promises whatever it computes: strides, empty batches, NaN, bad input, PyTorch."""

import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any
from unittest import mock

import torch

from snapkernels.dispatch import choose
from snapkernels.registry import Op
from snapkernels.spec import Backend, Case, Fields, Spec, Tensor
from snapkernels.testing.cases import call, leaves, make_values
from snapkernels.testing.numerics import same_bits


def named_backend_raises(
    spec: Spec, backend: Backend, values: tuple[Any, ...], reason: str
) -> None:
    """A backend that cannot run a call says why when it is named, and is not replaced."""
    message = _message(lambda: choose(spec, backend.name, values))
    assert reason in message and repr(backend.name) in message, message


def gradients_of(
    op: Op, values: tuple[Any, ...], backend: str | None, *, asked: bool = True
) -> tuple[torch.Tensor, ...]:
    """Gradients for `output_gradient` of every differentiable input.

    Without `asked`, of those only that training needs the gradients of.
    """
    return _gradients(op, values, backend, None, asked)


def output_gradient(output: torch.Tensor) -> torch.Tensor:
    """A random gradient of `output`, the same for the same shape, dtype and device."""
    generator = torch.Generator(output.device).manual_seed(1)
    drawn = torch.randn(
        output.shape, generator=generator, device=output.device, dtype=torch.bfloat16
    )
    return drawn.to(output.dtype)


def needed(spec: Spec, values: tuple[Any, ...], *, asked: bool = True) -> tuple[bool, ...]:
    """What a backend's backward is told when the gradients of `leaves` are wanted."""
    wanted = {id(leaf) for leaf in leaves(spec, values, asked=asked)}
    pairs = zip(spec.flatten(values), spec.differentiable, strict=True)
    return tuple(id(one) in wanted for one, has in pairs if has)


def any_strides(op: Op, device: str) -> None:
    """Permuted and offset inputs give what contiguous ones give, or a named backend says why not.

    So for every backend that can run here, in the first of `_STRIDED` that it takes, and for none
    named, gradients included, and for a gradient that is one number expanded.
    """
    values = _small(op.spec, device)
    if op.spec.trains:
        expected = call(op, values)
        ones = _gradients(op, values, None, torch.ones_like(expected))
        expanded = _gradients(op, values, None, expected.new_ones(()).expand(expected.shape))
        assert _near(expanded, ones)
    for backend in (None, *op.spec.backends):
        name = backend.name if backend else None
        for dtype in _STRIDED:
            values = make_values(op.spec, _small_case(op.spec), dtype, device)
            if dtype in _small_case(op.spec).dtypes and not (backend and backend.refuses(*values)):
                break
        else:
            continue
        has_gradients = op.spec.trains and (backend is None or backend.differentiable)
        expected = call(op, values, name)
        grads = gradients_of(op, values, name) if has_gradients else ()
        for strided in (_permuted, _offset):
            moved = _each(strided, values)
            if backend and (reason := backend.refuses(*moved)):
                named_backend_raises(op.spec, backend, moved, reason)
                continue
            assert _near((call(op, moved, name),), (expected,)), f"{name} misreads strides"
            if name != "reference" and has_gradients:
                assert _near(gradients_of(op, moved, name), grads), f"gradients of {name}"


def backward_keeps_the_backend(op: Op, device: str) -> None:
    """The backward of a registered op runs the backend that the forward was asked for."""
    if not hasattr(torch.ops.snapkernels, op.spec.name) or not op.spec.trains:
        return
    asked = []

    def spy(spec: Spec, backend: str | None, values: tuple[Any, ...], **how: bool) -> Backend:
        asked.append(backend)
        return choose(spec, backend, values, **how)

    registered = getattr(torch.ops.snapkernels, op.spec.name).default
    values = _small(op.spec, device)
    for leaf in leaves(op.spec, values):
        leaf.requires_grad_()
    flat = (*op.spec.flatten(values), *values[len(op.spec.inputs) :])
    with mock.patch("snapkernels.library.choose", spy):
        result = registered(*flat, "eager")
        output = result[0] if isinstance(result, tuple) else result
        torch.autograd.grad(output, leaves(op.spec, values), output_gradient(output))
    assert set(asked) == {"eager"}, asked


def empty_batch(op: Op, device: str) -> None:
    """No samples in, no samples out; a mean of none is NaN."""
    case = _small_case(op.spec)
    first = next(iter(op.spec.inputs.values()))
    assert isinstance(first, Tensor)
    batch = first.dims[0]
    none = (0, *case.sizes[batch][1:]) if batch == "..." else 0
    empty = replace(case, name="empty", sizes={**case.sizes, batch: none})
    values = make_values(op.spec, empty, torch.float32, device)
    result = call(op, values)
    assert result.isnan().all() and result.shape == _reference(op.spec, values).shape


def not_finite(op: Op, device: str) -> None:
    """NaN and inf in the first input stay, and reach nothing that they do not in the equation.

    Of a sublayer that adds to it only so much: PyTorch's SDPA on a CPU loses the NaN of a query.
    """
    own_residual = op.spec.residual == next(iter(op.spec.inputs))
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
        if not own_residual:
            assert torch.equal(result.isfinite(), expected.isfinite()), f"{bad} was lost or spread"
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
            refused(position, value.to(torch.int32), name)
        elif isinstance(declared, Fields):
            refused(position, value[:-1], name)
            for field in declared.dtypes:
                wrong = value._replace(**{field: getattr(value, field).to(torch.int32)})
                refused(position, wrong, f"{name}.{field}")
    for pair in spec.together:
        for left_out in pair:
            refused(list(spec.inputs).index(left_out), None, left_out)
    for position, (name, kind) in enumerate(spec.options.items(), len(spec.inputs)):
        bad: dict[str, tuple[Any, ...]] = {
            "int": (0, -1, 2.0, True),
            "int[3]": ((1, 2), (1, 2, 0), 4),
            "seed": (-1, 2**63, 1.0, True),
            "seed?": (-1, 2**63, 1.0, True),
            "positive": (0.0, -1.0, float("inf"), float("nan"), "x"),
        }
        for value in bad.get(kind, (-1.0, "x")):
            refused(position, value, name)
    message = _message(lambda: call(op, values, "no such backend"))
    assert all(repr(backend.name) in message for backend in spec.backends), message


def sizes_that_contradict(op: Op, device: str) -> None:
    """A dimension that a rule or another input binds raises ValueError when it is longer by one."""
    spec, values = op.spec, _small(op.spec, device)
    seen: list[str] = []
    held = {dim for rule in spec.parsed_rules if rule.under and not rule.up for dim in rule.over}
    held |= {rule.name for rule in spec.parsed_rules if rule.name}
    for fields in spec.inputs.values():
        held |= set(sum(fields.dims.values(), ())) if isinstance(fields, Fields) else set()
    for position, declared in enumerate(spec.inputs.values()):
        if not isinstance(declared, Tensor) or values[position] is None:
            continue
        tensor = values[position]
        for axis, dim in enumerate(declared.dims, -len(declared.dims)):
            bound = dim in seen or dim in held
            seen.append(dim)
            if bound and dim != "...":
                longer = torch.cat([tensor, tensor.narrow(axis, 0, 1)], axis)
                changed = (*values[:position], longer, *values[position + 1 :])
                message = _message(partial(call, op, changed))
                assert message.startswith(f"{spec.name}: "), message


def gradcheck(op: Op, device: str) -> None:
    """Gradients agree with finite differences in float64; an op without any refuses to give one."""
    values = _small(op.spec, device)
    if not op.spec.trains:
        _refuses_gradients(op, values)
        return
    inputs = [leaf.requires_grad_() for leaf in leaves(op.spec, values)]

    def function(*tensors: torch.Tensor) -> torch.Tensor:
        return call(op, values)

    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)


def _refuses_gradients(op: Op, values: tuple[Any, ...]) -> None:
    """Every tensor that requires a gradient is named, and welcome where none is recorded."""
    for one in op.spec.flatten(values):
        if one is None or not one.is_floating_point():
            continue
        one.requires_grad_()
        assert "has no gradient here" in _message(partial(call, op, values))
        with torch.no_grad():
            call(op, values)
        one.requires_grad_(False)


def compiles(op: Op, device: str) -> None:
    """torch.compile takes the call without a graph break, forward and, if any, backward."""
    values = _small(op.spec, device)

    def results(op: Op) -> tuple[torch.Tensor, ...]:
        return gradients_of(op, values, None) if op.spec.trains else (call(op, values),)

    expected = results(op)
    compiled = Op(op.spec, torch.compile(op.function, fullgraph=True, backend="aot_eager"))
    torch.compiler.reset()
    for one, other in zip(results(compiled), expected, strict=True):
        assert torch.allclose(one, other, rtol=1e-10, atol=1e-10)


def opcheck(op: Op, device: str) -> None:
    """PyTorch's own checks of a registered op, with plain and permuted inputs.

    Of these the one that inputs are left alone cannot compare float8: it is made here.
    """
    registered = getattr(torch.ops.snapkernels, op.spec.name, None)
    if registered is None:
        assert all(callable(backend.run) for backend in op.spec.backends), "kernels need an op"
        return
    values = _small(op.spec, device)
    floats = (one.dtype for one in op.spec.flatten(values) if one is not None)
    narrow = any(dtype.is_floating_point and dtype.itemsize == 1 for dtype in floats)
    tests = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    for strided in (torch.Tensor.clone, _permuted, _offset):
        moved = _each(strided, values)
        for leaf in leaves(op.spec, moved):
            leaf.requires_grad_()
        flat = (*op.spec.flatten(moved), *moved[len(op.spec.inputs) :])
        before = _each(torch.clone, moved)
        torch.library.opcheck(registered.default, flat, test_utils=tests if narrow else "ALL")
        for one, other in zip(op.spec.flatten(moved), op.spec.flatten(before), strict=True):
            assert one is None or same_bits(one, other), "an input was changed"


_STRIDED = (torch.float64, torch.float32, torch.bfloat16)
_NEAR = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 2e-2}

CHECKS: dict[str, Callable[[Op, str], None]] = {
    "any strides": any_strides,
    "backward keeps the backend": backward_keeps_the_backend,
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


def _gradients(
    op: Op,
    values: tuple[Any, ...],
    backend: str | None,
    grad: torch.Tensor | None,
    asked: bool = True,
) -> tuple[torch.Tensor, ...]:
    for leaf in leaves(op.spec, values):
        leaf.requires_grad_(False)
    inputs = [leaf.requires_grad_() for leaf in leaves(op.spec, values, asked=asked)]
    output = call(op, values, backend)
    return torch.autograd.grad(output, inputs, output_gradient(output) if grad is None else grad)


def _near(ones: tuple[torch.Tensor, ...], others: tuple[torch.Tensor, ...]) -> bool:
    pairs = zip(ones, others, strict=True)
    return all(
        torch.allclose(one, other, rtol=_NEAR[one.dtype], atol=_NEAR[one.dtype])
        for one, other in pairs
    )


def _reference(spec: Spec, values: tuple[Any, ...]) -> torch.Tensor:
    with torch.no_grad():
        return spec.reference(*values)


def _each(
    change: Callable[[torch.Tensor], torch.Tensor], values: tuple[Any, ...]
) -> tuple[Any, ...]:
    """`values` with every tensor changed, those of named tuples too."""

    def changed(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return change(value)
        named = isinstance(value, tuple) and hasattr(value, "_fields")
        return type(value)(*map(change, value)) if named else value

    return tuple(map(changed, values))


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
