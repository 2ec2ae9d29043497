"""The record of an op, written once: checks, dispatch, proofs, benches and cost all read it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from snapkernels.validate import Arguments, Rule

Sizes = dict[str, int]
Tier = Literal["cpu", "gpu", "paper"]
Check = Callable[[Arguments, str, Any], None]
OPTION_CHECKS: dict[str, Check] = {
    "int": Arguments.count,
    "int[3]": Arguments.three,
    "probability": Arguments.probability,
    "float": Arguments.number,
}


@dataclass(frozen=True)
class Tensor:
    """A tensor argument or result, by its dimensions: Tensor("B G N P").

    A first dimension "..." stands for any number. `dtype` None is that of the op's first tensor.
    """

    text: str
    dtype: torch.dtype | None = None
    optional: bool = False
    dims: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "dims", tuple(self.text.split()))

    def bind(self, args: Arguments, name: str, value: Any) -> None:
        if value is not None or not self.optional:
            args.bind(name, value, self.dims, dtype=self.dtype)


@dataclass(frozen=True)
class Fields:
    """An argument that is a named tuple of tensors, such as the weights of a sublayer."""

    kind: type[tuple]
    dims: dict[str, tuple[str, ...]]

    def bind(self, args: Arguments, name: str, value: Any) -> None:
        args.bind_fields(name, value, self.dims)


@dataclass(frozen=True, kw_only=True)
class Backend:
    """One implementation: called with the inputs, then the options, in the spec's order.

    Attributes:
        name: what a caller writes in `backend=`.
        run: the function, or "module:function" to be imported at first use.
        refuses: with the same arguments, why it cannot run them, or None.
    """

    name: str
    run: Callable[..., torch.Tensor] | str
    refuses: Callable[..., str | None] = lambda *_: None


@dataclass(frozen=True, kw_only=True)
class Case:
    """Sizes and options an op is proved and timed at.

    Attributes:
        name: the paper's shape, or what is odd about a small case.
        tier: "cpu" runs anywhere, "gpu" needs a GPU, "paper" too and is timed.
        sizes: of the inputs' dimensions; of "...", a tuple.
        options: of the call.
        dtypes: of the tensors.
    """

    name: str
    tier: Tier
    sizes: Mapping[str, Any]
    options: Mapping[str, Any]
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float32)


@dataclass(frozen=True, kw_only=True)
class Mutant:
    """A seeded bug: the source of `backend` with `find`, which it has once, replaced.

    The source is the module of the backend's function or, for a compiled one, `file` in csrc.
    """

    name: str
    backend: str
    find: str
    replace: str
    file: str | None = None


@dataclass(frozen=True, kw_only=True)
class Probe:
    """Zeros that make a result depend on one marked token of each group, the softmax uniform.

    Attributes:
        tokens: the input that is read; zero but for the marker, along its last dimension but one.
        zeros: the other inputs, or "weights.field", that are zero.
    """

    tokens: str
    zeros: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Spec:
    """What an op computes, on what, by what, and where that is proved.

    Attributes:
        name: of the public function.
        kind: "op", or "layer" for a sublayer from LayerNorm to residual; the case ids begin so.
        math: the equation, and where the paper has it.
        legend: {dimension: what it counts}.
        inputs: {argument: `Tensor` or `Fields`}, the first of which sets dtype and device.
        options: {argument: a key of `OPTION_CHECKS`}; the parts of an int[3] are name[0] to [2].
        rules: between sizes and options, see `snapkernels.validate`.
        output: the result.
        backends: in the order they are tried.
        reference: the equation, differentiable, in the dtype it is given.
        cases, mutants: what it is proved with.
        probe: of an op that reads tokens by a softmax, with a residual.
        flops: of a forward call, from its sizes.
        exact: a result is right only if it is the reference's, bit for bit.
        residual: the input that the op adds its branch to; errors are measured on the branch.
        backward_reads: the inputs that the backward pass has to read.
        sass: {GPU architecture: instructions that every Triton kernel has there}.
        most_registers: of a thread of its Triton kernels; 255 is all that there are.
    """

    name: str
    kind: Literal["op", "layer"]
    math: str
    legend: dict[str, str]
    inputs: dict[str, Tensor | Fields]
    options: dict[str, str]
    rules: tuple[str, ...] = ()
    output: Tensor
    backends: tuple[Backend, ...]
    reference: Callable[..., torch.Tensor]
    cases: tuple[Case, ...]
    mutants: tuple[Mutant, ...] = ()
    probe: Probe | None = None
    flops: Callable[[Sizes], int] = lambda sizes: 0
    exact: bool = False
    residual: str | None = None
    backward_reads: tuple[str, ...] = ()
    sass: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    most_registers: int = 255
    checks: tuple[tuple[str, Check], ...] = field(init=False, repr=False)
    parsed_rules: tuple[Rule, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        checks: list[tuple[str, Check]] = []
        checks += [(name, tensor.bind) for name, tensor in self.inputs.items()]
        checks += [(name, OPTION_CHECKS[kind]) for name, kind in self.options.items()]
        object.__setattr__(self, "checks", tuple(checks))
        object.__setattr__(self, "parsed_rules", tuple(map(Rule.parse, self.rules)))

    def check(self, *values: Any) -> Sizes:
        """The sizes of a call's inputs and options, in the spec's order.

        Raises:
            ValueError: one of them does not fit; the message names it and what is allowed.
        """
        args = Arguments(self.name)
        for (name, check), value in zip(self.checks, values, strict=True):
            check(args, name, value)
        for rule in self.parsed_rules:
            args.hold(rule)
        return args.sizes

    def backend(self, name: str) -> Backend:
        """The backend called `name`.

        Raises:
            ValueError: there is none.
        """
        for backend in self.backends:
            if backend.name == name:
                return backend
        names = ", ".join(repr(backend.name) for backend in self.backends)
        raise ValueError(f"{self.name}: backend={name!r} is not one of {names}")

    def case_id(self, case: Case, direction: str) -> str:
        """As tests, benches, records and NVTX ranges call it: "op/patchify/up-b1/fwd"."""
        return f"{self.kind}/{self.name}/{case.name}/{direction}"
