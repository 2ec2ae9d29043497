"""A case of a spec as tensors and calls: what proofs, benches and profiles run."""

from collections.abc import Callable, Iterator
from typing import Any

import torch

from snapkernels.registry import OPS, Op
from snapkernels.spec import Case, Fields, Spec, Tensor
from snapkernels.testing.inputs import random_parameter, random_weights
from snapkernels.validate import resolved

DIRECTIONS = ("fwd", "bwd", "fwd_bwd")


def find(case_id: str) -> tuple[Op, Case, str]:
    """The op, case and direction that an id such as "op/patchify/up-b1/fwd" names.

    Raises:
        ValueError: there is no such case; the message lists near ones.
    """
    for op in OPS.values():
        for case in op.spec.cases:
            for direction in DIRECTIONS:
                if op.spec.case_id(case, direction) == case_id:
                    return op, case, direction
    parts = case_id.split("/")
    near = [one for one in all_ids() if len(parts) > 1 and parts[1] in one.split("/")]
    raise ValueError(f"no case is called {case_id!r}; there are {', '.join(near or OPS)}")


def all_ids() -> Iterator[str]:
    """Every case id, in its forward direction."""
    for op in OPS.values():
        for case in op.spec.cases:
            yield op.spec.case_id(case, "fwd")


def make_values(
    spec: Spec, case: Case, dtype: torch.dtype, device: torch.device | str, *, seed: int = 0
) -> tuple[Any, ...]:
    """Random inputs of `case`, then its options, in the spec's order; a mask is half true.

    Those that the spec makes of others (`Spec.made`) are made of random ones. On the device "meta"
    the tensors have shapes only.
    """
    generator = torch.Generator(device).manual_seed(seed) if str(device) != "meta" else None
    values: list[Any] = []
    for name, declared in (spec.made.of if spec.made else spec.inputs).items():
        if isinstance(declared, Fields):
            values.append(
                random_weights(
                    declared.kind,
                    declared.dims,
                    case.sizes,
                    dtype=dtype,
                    device=device,
                    generator=generator,
                )
            )
            continue
        if declared.optional and not case.options.get(name, False):
            values.append(None)
            continue
        shape: list[int] = []
        for dim in declared.dims:
            shape += case.sizes[dim] if dim == "..." else [case.sizes[dim]]
        if declared.parameter:
            drawn = random_parameter(name, shape, device=device, generator=generator)
            values.append(drawn.to(dtype))
            continue
        values.append(_drawn(declared, shape, dtype, device, generator))
    if case.change:
        values = list(case.change(*values))
    if spec.made:
        values = list(spec.made.by(*values))
    return (*values, *(case.options[name] for name in spec.options))


def _drawn(
    declared: Tensor,
    shape: list[int],
    dtype: torch.dtype,
    device: torch.device | str,
    generator: torch.Generator | None,
) -> torch.Tensor:
    if declared.dtype == torch.int64:
        return torch.randint(0, 2**40, shape, device=device, generator=generator)
    wanted = resolved(declared.dtype, dtype)
    drawn = wanted if wanted in (torch.bfloat16, torch.float64) else torch.float32
    random = torch.randn(shape, device=device, generator=generator, dtype=drawn)
    if declared.positive:
        random = random.exp()
    return random > 0 if wanted == torch.bool else random.to(wanted)


def leaves(spec: Spec, values: tuple[Any, ...], *, asked: bool = True) -> list[torch.Tensor]:
    """The differentiable tensors among the inputs, those of named tuples one by one.

    Without `asked`, those only that training needs the gradients of.
    """
    found: list[torch.Tensor] = []
    for declared, value in zip(spec.inputs.values(), values, strict=False):
        if isinstance(declared, Fields):
            found += value if declared.differentiable else ()
        elif value is not None and declared.differentiable and (asked or declared.grad != "asked"):
            found.append(value)
    return found


def call(op: Op, values: tuple[Any, ...], backend: str | None = None) -> torch.Tensor:
    """Call the public function of `op` with `values`, inputs and options in the spec's order."""
    names = (*op.spec.inputs, *op.spec.options)
    return op.function(**dict(zip(names, values, strict=True)), backend=backend)


def prepare(
    op: Op, values: tuple[Any, ...], direction: str, backend: str | None
) -> Callable[[], Any]:
    """A call of `op` in `direction`, to be repeated: the forward, the backward, or both.

    The backward alone runs on a forward made here, with a random gradient of the output.
    """
    if direction == "fwd":
        return lambda: call(op, values, backend)
    inputs = [leaf.requires_grad_() for leaf in leaves(op.spec, values, asked=False)]
    output = call(op, values, backend)
    grad = torch.randn_like(output)
    if direction == "bwd":
        return lambda: torch.autograd.grad(output, inputs, grad, retain_graph=True)
    return lambda: torch.autograd.grad(call(op, values, backend), inputs, grad)
