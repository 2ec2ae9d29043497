"""The record of an op, written once: checks, dispatch, proofs, benches and cost all read it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from snapkernels.validate import Arguments, Dtype, Rule, resolved

Sizes = dict[str, int]
Tier = Literal["cpu", "gpu", "paper"]
Check = Callable[[Arguments, str, Any], None]
OPTION_CHECKS: dict[str, Check] = {
    "int": Arguments.count,
    "int[3]": Arguments.three,
    "probability": Arguments.probability,
    "float": Arguments.number,
    "positive": Arguments.positive,
    "seed": Arguments.seed,
    "seed?": Arguments.optional_seed,
}


PLAIN = (torch.Tensor, torch.nn.Parameter)  # and not a tensor that stands for one in a trace


@dataclass(frozen=True)
class Tensor:
    """A tensor argument or result, by its dimensions: Tensor("B G N P").

    A first dimension "..." stands for any number.

    Attributes:
        dtype: None for that of the call, which the first such input sets; "free" for any floating
            one; "wide" for the call's but at least float32; or one by name.
        optional: whether None is taken.
        grad: whether it has a gradient: "asked" for one that training does not need, so that
            proofs want it and benches do not. What is not floating point has none.
        positive: whether every element has to be above 0. That is held against a CPU tensor;
            elsewhere it would wait for the device, and what is not above 0 gives NaN.
        parameter: whether it is drawn as those of named tuples are, see
            `snapkernels.testing.inputs`.
    """

    text: str
    dtype: Dtype = None
    optional: bool = False
    grad: Literal["always", "asked", "never"] = "always"
    positive: bool = False
    parameter: bool = False
    dims: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "dims", tuple(self.text.split()))

    @property
    def differentiable(self) -> bool:
        return self.grad != "never" and not isinstance(self.dtype, torch.dtype)

    def bind(self, args: Arguments, name: str, value: Any) -> None:
        if value is not None or not self.optional:
            args.bind(name, value, self.dims, dtype=self.dtype)

    @property
    def looks_inside(self) -> bool:
        """Whether more than shape, dtype and device has to be right."""
        return self.grad == "never" or self.positive

    def look_inside(self, args: Arguments, name: str, value: Any) -> None:
        """Check what two tensors of one shape, dtype and device may differ in."""
        if self.grad == "never":
            refuse_gradient(args, name, value)
        if type(value) not in PLAIN or torch.compiler.is_compiling():
            return
        if self.positive and value.device.type == "cpu" and not (value > 0).all():
            args.fail(f"{name} must be above 0, got {value.tolist()}")

    def shape(self, sizes: Sizes) -> list[int]:
        """Its shape in a call of `sizes`."""
        return [sizes[dim] for dim in self.dims]


@dataclass(frozen=True)
class Fields:
    """An argument that is a named tuple of tensors, such as the weights of a sublayer.

    Attributes:
        kind: the class of the tuple.
        dims: {field: its dimensions}.
        dtypes: {field: its dtype}, of those that are not of the call's.
        grad: whether the fields have gradients.
    """

    kind: type[tuple]
    dims: dict[str, tuple[str, ...]]
    dtypes: Mapping[str, torch.dtype] = field(default_factory=dict)
    grad: Literal["always", "never"] = "always"

    @property
    def differentiable(self) -> bool:
        return self.grad != "never"

    def bind(self, args: Arguments, name: str, value: Any) -> None:
        args.bind_fields(name, value, self.dims, self.dtypes)

    @property
    def looks_inside(self) -> bool:
        """Whether more than shape, dtype and device has to be right."""
        return self.grad == "never"

    def look_inside(self, args: Arguments, name: str, value: Any) -> None:
        """Check what two tuples of one form may differ in."""
        for part, tensor in zip(self.dims, value, strict=True):
            refuse_gradient(args, f"{name}.{part}", tensor)


def refuse_gradient(args: Arguments, name: str, value: torch.Tensor | None) -> None:
    """Fail if a gradient of `value`, which has none, is asked for."""
    if value is not None and value.requires_grad and torch.is_grad_enabled():
        args.fail(f"{name} has no gradient here, but requires one: detach it")


@dataclass(frozen=True)
class Made:
    """How random inputs of a call are made, where they cannot be drawn one by one.

    Attributes:
        of: {name: its form} of what is drawn.
        by: called with that, returns the inputs.
    """

    of: Mapping[str, Tensor | Fields]
    by: Callable[..., tuple[Any, ...]]


@dataclass(frozen=True, kw_only=True)
class Backend:
    """One implementation: called with the inputs, then the options, in the spec's order.

    Attributes:
        name: what a caller writes in `backend=`.
        run: the function, or "module:function" to be imported at first use. It returns the
            output; of a backend with `backward` and no `saving`, the spec's `saved` after it.
        saving: likewise, of a backend with `backward` whose inference is not to pay for what is
            saved: it returns the output and the spec's `saved`, and `run` the output alone. It is
            what the registered op runs: a call that is to be differentiated, or is traced.
        backward: likewise, called with what gradients are needed, the output's gradient and what
            was saved, then the inputs and options: the gradients of every differentiable tensor
            of the inputs, None where one is not needed. Without it PyTorch differentiates `run`.
        differentiable: False for a forward that has no backward yet, by itself or by PyTorch: what
            is to be differentiated runs another backend.
        refuses: with the same arguments as `run`, why it cannot run them, or None.
        declines: likewise, why it does not pay to run them although it can, or None. Who names it
            gets it all the same.
        library: of a compiled one, the ops of the library that it calls; none for its own name's.
    """

    name: str
    run: Callable[..., Any] | str
    saving: Callable[..., Any] | str | None = None
    backward: Callable[..., Any] | str | None = None
    differentiable: bool = True
    refuses: Callable[..., str | None] = lambda *_: None
    declines: Callable[..., str | None] = lambda *_: None
    library: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Case:
    """Sizes and options an op is proved and timed at.

    Attributes:
        name: the paper's shape, or what is odd about a small case.
        tier: "cpu" runs anywhere, "gpu" needs a GPU, "paper" too and is timed.
        sizes: of the inputs' dimensions; of "...", a tuple.
        options: of the call.
        dtypes: of the tensors.
        change: called with what was drawn, returns what the inputs are to be.
    """

    name: str
    tier: Tier
    sizes: Mapping[str, Any]
    options: Mapping[str, Any]
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float32)
    change: Callable[..., tuple[Any, ...]] | None = None


@dataclass(frozen=True, kw_only=True)
class Mutant:
    """A seeded bug: the source of `backend` with `find`, which it has once, replaced.

    The source is the module of the backend's function, or of its backward's, or the `module` beside
    that, which it imports, or, for a compiled one, `file` in csrc. The values show it or, with
    `backward`, the gradients.
    """

    name: str
    backend: str
    find: str
    replace: str
    file: str | None = None
    module: str | None = None
    backward: bool = False


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
        together: pairs of optional inputs of which a call gives both or neither.
        made: how random inputs are made, where they are not drawn one by one.
        output: the result.
        saved: {what a kernel keeps for its backward: its form}.
        keeps: whether that is kept in a call of such sizes that names no backend; the op's results
            have to be known before one is chosen. Where it is not, they are empty, and a backward
            that needs them runs the forward again.
        backends: in the order they are tried.
        reference: the equation, differentiable, in the dtype it is given.
        cases, mutants: what it is proved with.
        probe: of an op that reads tokens by a softmax, with a residual.
        flops: of a forward call, from its sizes.
        algorithms: {name: its FLOPs, likewise} where there are several that are exact.
        exact: a result is right only if it is the reference's, bit for bit.
        limit: relative error that its eager backend may have, where more is asked of its dtype
            than the recipe can give.
        slack: times eager's error that another backend may have, from a call's sizes.
        negligible: an error that is as good as none beside the recipe's own: where its roundings
            cancel, eager's is no measure.
        residual: the input that the op adds its branch to; errors are measured on the branch, or
            whole where a call leaves it out.
        moves: its time is that of moving its bytes, so a copy of them is timed beside it.
        compiled_beside: torch.compile of the eager backend is timed beside it.
        peers: {name: what others offer, a function as `Backend.run` is} that are timed beside the
            forward on a GPU and never chosen; one that raises keeps its reason.
        backward_reads: the inputs that the backward pass has to read.
        targets: what its Triton kernels are compiled for; small cases for the first alone.
        sass: {GPU architecture: instructions that every Triton kernel has there; those of the
            tensor cores, if it has products}.
        most_registers: of a thread of its Triton kernels; 255 is all that there are.
    """

    name: str
    kind: Literal["op", "layer"]
    math: str
    legend: dict[str, str]
    inputs: dict[str, Tensor | Fields]
    options: dict[str, str]
    rules: tuple[str, ...] = ()
    together: tuple[tuple[str, str], ...] = ()
    made: Made | None = None
    output: Tensor
    saved: Mapping[str, Tensor] = field(default_factory=dict)
    keeps: Callable[[Sizes], bool] = lambda sizes: True
    backends: tuple[Backend, ...]
    reference: Callable[..., torch.Tensor]
    cases: tuple[Case, ...]
    mutants: tuple[Mutant, ...] = ()
    probe: Probe | None = None
    flops: Callable[[Sizes], int] = lambda sizes: 0
    algorithms: Mapping[str, Callable[[Sizes], int]] = field(default_factory=dict)
    exact: bool = False
    limit: float | None = None
    slack: Callable[[Sizes], float] = lambda sizes: 1.0
    negligible: float = 0.0
    residual: str | None = None
    moves: bool = False
    compiled_beside: bool = False
    peers: Mapping[str, Callable[..., torch.Tensor] | str] = field(default_factory=dict)
    backward_reads: tuple[str, ...] = ()
    targets: tuple[str, ...] = ("sm_90", "sm_80")
    sass: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    most_registers: int = 255
    checks: tuple[tuple[str, Check], ...] = field(init=False, repr=False)
    inner_checks: tuple[tuple[int, str, Tensor | Fields], ...] = field(init=False, repr=False)
    parsed_rules: tuple[Rule, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        checks: list[tuple[str, Check]] = []
        checks += [(name, tensor.bind) for name, tensor in self.inputs.items()]
        checks += [(name, OPTION_CHECKS[kind]) for name, kind in self.options.items()]
        object.__setattr__(self, "checks", tuple(checks))
        inner = [
            (position, name, declared)
            for position, (name, declared) in enumerate(self.inputs.items())
            if declared.looks_inside
        ]
        object.__setattr__(self, "inner_checks", tuple(inner))
        object.__setattr__(self, "parsed_rules", tuple(map(Rule.parse, self.rules)))

    def check(self, *values: Any) -> Sizes:
        """The sizes of a call's inputs and options, in the spec's order.

        Raises:
            ValueError: one of them does not fit; the message names it and what is allowed.
        """
        args = Arguments(self.name)
        for (name, check), value in zip(self.checks, values, strict=True):
            check(args, name, value)
        names = tuple(self.inputs)
        for one, other in self.together:
            absent = [name for name in (one, other) if values[names.index(name)] is None]
            if len(absent) == 1:
                args.fail(f"{one} and {other} go together, but {absent[0]} is left out")
        for rule in self.parsed_rules:
            args.hold(rule)
        self.look_inside(*values)
        return args.sizes

    def look_inside(self, *values: Any) -> None:
        """Check of a call that was checked at these shapes, dtypes and device what may differ.

        Raises:
            ValueError: as `check` does.
        """
        for position, name, declared in self.inner_checks:
            declared.look_inside(Arguments(self.name), name, values[position])

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

    def flatten(self, values: tuple[Any, ...]) -> list[Any]:
        """The inputs of `values`, inputs and options, those of named tuples one by one."""
        found: list[Any] = []
        for declared, value in zip(self.inputs.values(), values, strict=False):
            found += list(value) if isinstance(declared, Fields) else [value]
        return found

    def unflatten(self, flat: list[Any]) -> list[Any]:
        """The inputs of which `flatten` made `flat`."""
        rest, found = iter(flat), []
        for declared in self.inputs.values():
            if isinstance(declared, Fields):
                found.append(declared.kind(*(next(rest) for _ in declared.dims)))
            else:
                found.append(next(rest))
        return found

    @property
    def differentiable(self) -> list[bool]:
        """Which of the flattened inputs have gradients."""
        found = []
        for declared in self.inputs.values():
            if isinstance(declared, Fields):
                found += [declared.differentiable] * len(declared.dims)
            else:
                found.append(declared.differentiable)
        return found

    @property
    def multiplies_fp8(self) -> bool:
        """Whether its products are of e4m3 numbers."""
        dtypes: list[Dtype] = []
        for declared in self.inputs.values():
            own = declared.dtypes.values() if isinstance(declared, Fields) else [declared.dtype]
            dtypes += own
        return torch.float8_e4m3fn in dtypes

    @property
    def trains(self) -> bool:
        """Whether anything has a gradient; an op for inference alone has none."""
        return any(self.differentiable)

    def call_dtype(self, values: tuple[Any, ...]) -> torch.dtype:
        """The dtype that a call's first input without one of its own sets."""
        for declared, value in zip(self.inputs.values(), values, strict=False):
            if isinstance(declared, Fields):
                return value[0].dtype
            if declared.dtype is None:
                return value.dtype
        raise AssertionError(f"{self.name}: every input has a dtype of its own")

    def result_shape(self, values: tuple[Any, ...]) -> list[int]:
        """The shape of the output of a call, "..." as the first input has it."""
        shape = self.output.shape(self.check(*values))
        if self.output.dims[:1] != ("...",):
            return shape
        first = next(iter(self.inputs.values()))
        assert isinstance(first, Tensor)
        leading = values[0].dim() - len(first.dims) + 1
        return [*values[0].shape[:leading], *shape[1:]]

    def result_dtype(self, values: tuple[Any, ...]) -> torch.dtype:
        """The dtype of the output of a call."""
        return resolved(self.output.dtype, self.call_dtype(values))

    def case_id(self, case: Case, direction: str) -> str:
        """As tests, benches, records and NVTX ranges call it: "op/patchify/up-b1/fwd"."""
        return f"{self.kind}/{self.name}/{case.name}/{direction}"
