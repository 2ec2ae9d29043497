"""What must hold of every op, generated from its spec: values, gradients, contract, machine code.

`proofs` lists all of it, with what each proof needs that this machine may lack. The tests and
`python -m snapkernels check` run the same list.
"""

from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple

import torch

from snapkernels import env, extension
from snapkernels.dispatch import backward_of, has_triton, implementation, output_of, saving
from snapkernels.registry import OPS, Op
from snapkernels.spec import Backend, Case, Mutant, Spec, Tensor
from snapkernels.testing import aot, contract
from snapkernels.testing.cases import make_values
from snapkernels.testing.memory import nan_filled
from snapkernels.testing.mutants import missing, planted
from snapkernels.testing.numerics import relative_rms, same_bits, widened
from snapkernels.testing.probes import missed

# Relative rms error against float64, of a sublayer's branch: of eager PyTorch, which rounds every
# intermediate once, by dtype. Another backend must also be no worse than eager on the same input.
LIMITS = {
    torch.bfloat16: 1.5e-2,
    torch.float16: 2e-3,
    torch.float32: 2e-6,
    torch.float64: 1e-13,
}
# Where eager too is within a rounding or two of the exact result, the order of its sums decides who
# is nearer: an error of so many times that of the exact result, rounded once, is as good.
AS_GOOD = {torch.bfloat16: 1.02, torch.float16: 1.02, torch.float32: 16, torch.float64: 16}
# The rms of n roundings has a relative spread of 1 / sqrt(2 n) of its own: small tensors get three.
SPREADS = 3
GRADIENT_SLACK = 4  # a gradient sums more roundings than the branch: eager bf16 reaches 3.5e-2


# The error of a small case is luck, eager's too: one near its limit is judged by more draws. That
# of a gradient more so: a bias's may come from the roundings of eight numbers, and eager's be half
# of what it is over many draws.
NEAR = 1.25
NEAR_GRADIENT = 4
DRAWS = 8


class WrongError(AssertionError):
    """A result was judged and found wrong; a kernel that fails by itself raises something else."""


class NearError(WrongError):
    """A result's error is above its limit, but by less than `NEAR` (`NEAR_GRADIENT`)."""


class Proof(NamedTuple):
    """One thing that must hold.

    Attributes:
        id: the case, and what of it is proved by which backend in which dtype.
        lacks: what this machine does not have that the proof needs, or None.
        run: raises AssertionError if it does not hold.
        on_gpu: whether it runs on the GPU of this machine.
        of_code: whether it is of machine code: such proofs of one family share a compilation.
    """

    id: str
    lacks: str | None
    run: Callable[[], None]
    on_gpu: bool = False
    of_code: bool = False


def proofs() -> Iterator[Proof]:
    """Every proof of every op, those that cannot run here included."""
    yield Proof("csrc library", _no_library(), library)
    for op in OPS.values():
        for case in op.spec.cases:
            for backend in op.spec.backends[:-1]:  # the last is the reference
                if backend.name == "cpu" and case.tier != "cpu":
                    continue
                for dtype in case.dtypes:
                    yield from _of_a_case(op, case, backend, dtype)
        for mutant in op.spec.mutants:
            backend = op.spec.backend(mutant.backend)
            yield Proof(
                f"{op.spec.kind}/{op.spec.name} mutant {mutant.backend}: {mutant.name}",
                _lacks(backend, "cpu") or (missing() if mutant.file else None),
                partial(mutant_is_seen, op, mutant),
                _device(backend) == "cuda",
            )
        if any(backend.name == "triton" for backend in op.spec.backends):
            yield from _of_machine_code(op.spec)
        for device in ("cpu", "cuda"):
            lacks = "an NVIDIA GPU" if device == "cuda" and not torch.cuda.is_available() else None
            for name, check in contract.CHECKS.items():
                proof = f"{op.spec.kind}/{op.spec.name} {name} on {device}"
                yield Proof(proof, lacks, partial(check, op, device), device == "cuda")


def _of_a_case(op: Op, case: Case, backend: Backend, dtype: torch.dtype) -> Iterator[Proof]:
    lacks = _lacks(backend, case.tier)
    if lacks is None and case.tier == "cpu":
        call = make_values(op.spec, case, dtype, _device(backend))
        if reason := backend.refuses(*call):
            name = f"{op.spec.case_id(case, 'fwd')} {backend.name} {short(dtype)} refused"
            run = partial(contract.named_backend_raises, op.spec, backend, call, reason)
            yield Proof(name, None, run, _device(backend) == "cuda")
            return
    for direction, prove in (("fwd", values), ("bwd", gradients)):
        if direction == "bwd" and not (backend.differentiable and op.spec.trains):
            continue
        # A backward is the same kernels at every size: one dtype of the large cases is enough.
        if direction == "fwd" or case.tier == "cpu" or dtype == case.dtypes[0]:
            name = f"{op.spec.case_id(case, direction)} {backend.name} {short(dtype)}"
            run = partial(prove, op.spec, case, backend, dtype)
            yield Proof(name, lacks, run, _device(backend) == "cuda")


def _of_machine_code(spec: Spec) -> Iterator[Proof]:
    lacks = None if has_triton() else "the package triton"
    for case in aot.cases(spec):
        for dtype in (one for one in case.dtypes if aot.takes(spec, case, one)):
            for target in aot.targets(spec, case):
                name = f"{spec.case_id(case, 'fwd')} triton {short(dtype)} code {target}"
                run = partial(machine_code, spec, case, dtype, target)
                yield Proof(name, lacks, run, of_code=True)


def _device(backend: Backend) -> str:
    return "cuda" if torch.cuda.is_available() and backend.name != "cpu" else "cpu"


def _lacks(backend: Backend, tier: str) -> str | None:
    on_gpu = _device(backend) == "cuda"
    if not on_gpu and (tier != "cpu" or backend.name == "cuda"):
        return "an NVIDIA GPU"
    if backend.name == "triton":
        if not has_triton():
            return "the package triton"
        return None if on_gpu or env.INTERPRET else "TRITON_INTERPRET=1 in its environment"
    if backend.name == "cuda":
        fits = torch.cuda.get_device_capability() == extension.CAPABILITY
        return _no_library() if fits else "a GPU of compute capability 9.0"
    return None


def values(spec: Spec, case: Case, backend: Backend, dtype: torch.dtype) -> None:
    """The result is right, the same twice, and whole although memory was full of NaN.

    So is that of the forward that saves for the backward, where it is another, and, of a sublayer
    with a probe, so are the results at every marker.
    """
    call = make_values(spec, case, dtype, _device(backend))
    if reason := backend.refuses(*call):
        # A large case is asked here. Who would run it if it could must be able to.
        assert case.tier != "cpu" and backend.declines(*call), f"it cannot run: {reason}"
        contract.named_backend_raises(spec, backend, call, reason)
        return
    run = partial(output_of, backend)
    with torch.no_grad(), nan_filled():
        once, twice = run(*call), run(*call)
        try:
            judge(spec, case, backend, dtype, call, once)
        except NearError:
            if case.tier == "paper":
                raise
            judge_draws(spec, case, backend, dtype)
        if not same_bits(once, twice):
            raise WrongError("two runs on the same input differ")
        if backend.saving and not same_bits(once, output := saving(backend)(*call)[0]):
            judge(spec, case, backend, dtype, call, output)
        if spec.probe and (lost := missed(spec, spec.probe, call, run, LIMITS[dtype])):
            raise WrongError(f"wrong with markers in {spec.probe.tokens} at {lost}")


def judge(
    spec: Spec,
    case: Case,
    backend: Backend,
    dtype: torch.dtype,
    call: tuple[Any, ...],
    result: torch.Tensor,
) -> None:
    """Hold `result` of `call` against the reference: bit for bit, or by the error of its branch."""
    if spec.exact:
        if not same_bits(result, spec.reference(*call)):
            raise WrongError("not the reference, bit for bit")
        return
    exact = spec.reference(*widened(call))
    errors = [_branch_error(spec, call, result, exact)]
    # The error of one number is luck, eager's too.
    if backend.name != "eager" and exact.numel() > 1:
        eager = implementation(spec.backend("eager"))(*call)
        rounded = exact.to(result.dtype)
        errors += [_branch_error(spec, call, other, exact) for other in (eager, rounded)]
    _hold(spec, call, errors, dtype, result.dtype)


def judge_draws(spec: Spec, case: Case, backend: Backend, dtype: torch.dtype) -> None:
    """Hold the results of `DRAWS` inputs against the reference as if they were one."""
    squares = torch.zeros(4, dtype=torch.float64)  # of three errors, and of the exact branch
    for seed in range(DRAWS):
        call = make_values(spec, case, dtype, _device(backend), seed=seed)
        exact = spec.reference(*widened(call))
        result = output_of(backend, *call)
        eager = implementation(spec.backend("eager"))(*call)
        residual = _residual(spec, call)
        others = (result, eager, exact.to(result.dtype), torch.zeros_like(exact) + residual)
        squares += torch.stack([(one.double() - exact).square().sum() for one in others]).cpu()
    errors = (squares[:3] / squares[3]).sqrt().tolist()
    _hold(spec, call, errors, dtype, result.dtype)


def _hold(
    spec: Spec,
    call: tuple[Any, ...],
    errors: list[float],
    dtype: torch.dtype,
    rounded_to: torch.dtype,
) -> None:
    """`errors`: of the result and, unless it is eager's, of eager and of the exact one, rounded."""
    error, *others = errors
    limit = spec.limit or LIMITS[dtype]
    if others:
        eager, rounded = others
        as_eager = spec.slack(spec.check(*call)) * eager
        limit = min(limit, max(as_eager, AS_GOOD[rounded_to] * rounded, spec.negligible))
    if not error <= limit:
        kind = NearError if error <= NEAR * limit else WrongError
        raise kind(f"relative rms error {error:.2e}, limit {limit:.2e}")


def gradients(spec: Spec, case: Case, backend: Backend, dtype: torch.dtype) -> None:
    """The gradients of every input are those of the reference."""
    call = make_values(spec, case, dtype, _device(backend))
    if reason := backend.refuses(*call):
        assert case.tier != "cpu" and backend.declines(*call), f"it cannot run: {reason}"
        return

    def of_backend(call: tuple[Any, ...], *, asked: bool) -> tuple[torch.Tensor, ...]:
        with nan_filled():
            return contract.gradients_of(OPS[spec.name], call, backend.name, asked=asked)

    for asked in _asked(spec):
        if not spec.exact:
            gradients_of = partial(of_backend, asked=asked)
            judge_gradients(spec, case, backend, dtype, gradients_of, asked=asked)
            continue
        actual = of_backend(call, asked=asked)
        expected = contract.gradients_of(OPS[spec.name], call, "reference", asked=asked)
        wrong = [not same_bits(one, other) for one, other in zip(actual, expected, strict=True)]
        assert not any(wrong), f"gradients {wrong} are not the reference's, bit for bit"


def _asked(spec: Spec) -> tuple[bool, ...]:
    """Every gradient at once and, where training needs fewer, those: it may be another kernel."""
    declared = spec.inputs.values()
    fewer = any(isinstance(one, Tensor) and one.grad == "asked" for one in declared)
    return (True, False) if fewer else (True,)


def judge_gradients(
    spec: Spec,
    case: Case,
    backend: Backend,
    dtype: torch.dtype,
    gradients_of: Callable[[tuple[Any, ...]], tuple[torch.Tensor, ...]],
    *,
    asked: bool = True,
) -> None:
    """Hold what `gradients_of` a call is against the reference's in float64, each by its error.

    Of a small case that is near a limit, those of `DRAWS` inputs as if they were one.
    """

    def drawn(seed: int | None = None) -> tuple[list[list[float]], tuple[torch.Tensor, ...]]:
        more = {} if seed is None else {"seed": seed}
        call = make_values(spec, case, dtype, _device(backend), **more)
        actual = gradients_of(call)
        return _errors_of_gradients(spec, backend, call, actual, asked=asked), actual

    errors, actual = drawn()
    try:
        _hold_gradients(errors, spec, case, dtype, actual)
    except NearError:
        if case.tier == "paper":
            raise
        squares = torch.zeros(len(errors), len(actual), dtype=torch.float64)
        for seed in range(DRAWS):
            squares += torch.tensor(drawn(seed)[0], dtype=torch.float64).square()
        _hold_gradients((squares / DRAWS).sqrt().tolist(), spec, case, dtype, actual, DRAWS)


def _errors_of_gradients(
    spec: Spec,
    backend: Backend,
    call: tuple[Any, ...],
    actual: tuple[torch.Tensor, ...],
    *,
    asked: bool,
) -> list[list[float]]:
    """Of every gradient and, unless they are eager's, of eager's and of the exact ones, rounded."""
    expected = contract.gradients_of(OPS[spec.name], widened(call), "reference", asked=asked)
    if backend.name == "eager":
        return [_gradient_errors(actual, expected)]
    eager = contract.gradients_of(OPS[spec.name], call, "eager", asked=asked)
    rounded = tuple(wide.to(one.dtype) for one, wide in zip(actual, expected, strict=True))
    return [_gradient_errors(ones, expected) for ones in (actual, eager, rounded)]


def _hold_gradients(
    errors: list[list[float]],
    spec: Spec,
    case: Case,
    dtype: torch.dtype,
    actual: tuple[torch.Tensor, ...],
    draws: int = 1,
) -> None:
    """Of an op with several exact algorithms a backend may round elsewhere than eager does.

    In a small case, whose few tokens do not average that out, its error may be `NEAR` times that.
    """
    own, *others = errors
    limits = [GRADIENT_SLACK * LIMITS[dtype]] * len(own)
    if others:
        elsewhere = NEAR if case.tier != "paper" and spec.algorithms else 1
        for i, (one, eager, rounded) in enumerate(zip(actual, *others, strict=True)):
            spread = 1 + SPREADS / (2 * one.numel() * draws) ** 0.5
            as_good = max(elsewhere * spread * eager, AS_GOOD[one.dtype] * rounded)
            limits[i] = min(limits[i], as_good)
    bad = [(i, e, x) for i, (e, x) in enumerate(zip(own, limits, strict=True)) if not e <= x]
    if bad:
        near = all(error <= NEAR_GRADIENT * limit for _, error, limit in bad)
        kind = NearError if near else WrongError
        raise kind(f"(gradient, relative rms error, limit): {bad}")


def _gradient_errors(
    actual: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...]
) -> list[float]:
    """Of each gradient, over its own rms or, if that is more, a tenth of the largest's.

    A key bias adds one number to all scores of a query, so its exact gradient is zero.
    """
    scales = [other.square().mean().sqrt() for other in expected]
    least = max(scales) / 10
    errors = [
        (one.double() - other).square().mean().sqrt() / torch.maximum(scale, least)
        for one, other, scale in zip(actual, expected, scales, strict=True)
    ]
    return [error.item() if error.isfinite() else float("inf") for error in errors]


def mutant_is_seen(op: Op, mutant: Mutant) -> None:
    """Some small case's values, or gradients, are judged wrong when the bug is in."""
    spec = op.spec
    with planted(spec, mutant) as backend:
        # All that values are held to takes ten runs of some cases: most bugs are seen in the first.
        for judged in (own_gradients,) if mutant.backward else (one_run, values):
            for case, dtype in _judged_cases(spec, backend):
                try:
                    judged(spec, case, backend, dtype)
                except WrongError:
                    return
    raise AssertionError(f"no case of {spec.name} sees the bug: {mutant.name}")


def _judged_cases(spec: Spec, backend: Backend) -> Iterator[tuple[Case, torch.dtype]]:
    """The small cases that `backend` takes, each in one dtype."""
    for case in spec.cases:
        if case.tier == "paper" or _lacks(backend, case.tier):
            continue
        for dtype in (one for one in _JUDGED if one in case.dtypes):
            if backend.refuses(*make_values(spec, case, dtype, _device(backend))) is None:
                yield case, dtype
                break


def one_run(spec: Spec, case: Case, backend: Backend, dtype: torch.dtype) -> None:
    """The first thing that `values` holds, without more draws if the error is near its limit."""
    call = make_values(spec, case, dtype, _device(backend))
    with torch.no_grad(), nan_filled(), suppress(NearError):
        judge(spec, case, backend, dtype, call, output_of(backend, *call))


_JUDGED = (torch.float32, torch.bfloat16)  # in the first of them that the backend takes


def own_gradients(spec: Spec, case: Case, backend: Backend, dtype: torch.dtype) -> None:
    """The gradients that `backend` itself computes are those of the reference."""

    def by_itself(call: tuple[Any, ...], *, asked: bool) -> tuple[torch.Tensor, ...]:
        result = saving(backend)(*call)
        output, saved = (result[0], result[1:]) if isinstance(result, tuple) else (result, ())
        needs = contract.needed(spec, call, asked=asked)
        grads = backward_of(backend)(needs, contract.output_gradient(output), *saved, *call)
        return tuple(one for one in grads if one is not None)

    for asked in _asked(spec):
        judge_gradients(spec, case, backend, dtype, partial(by_itself, asked=asked), asked=asked)


def machine_code(spec: Spec, case: Case, dtype: torch.dtype, target: str) -> None:
    """The Triton kernels of `case`, compiled for `target`, hold the spec's limits."""
    launches = aot.reports(aot.family_of(spec))[aot.key(spec.name, case.name, dtype, target)]
    wanted = aot.wants(spec, case, target)
    found = aot.faults(launches, target, wanted, spec.most_registers)
    assert not found, "; ".join(found)


def library() -> None:
    """The CUDA library loads, has its schemas, and no kernel of it spills."""
    assert extension.load() is None, extension.load()
    for name, op in OPS.items():
        for backend in (one for one in op.spec.backends if one.name == "cuda"):
            for called in backend.library or (name,):
                assert hasattr(torch.ops.snapkernels_cuda, called), f"no schema of {called}"
    usage = aot.resources(aot.dump("--dump-resource-usage", extension.LIBRARY))
    assert usage, "the library holds no machine code"
    assert not any(stack for _, stack in usage), f"a kernel spills: (registers, bytes) {usage}"


def _no_library() -> str | None:
    return None if extension.LIBRARY.is_file() else "the CUDA library (nvcc builds it: make ext)"


def short(dtype: torch.dtype) -> str:
    """ "bf16" of torch.bfloat16."""
    return {2: "bf16" if dtype == torch.bfloat16 else "fp16", 4: "fp32", 8: "fp64"}[dtype.itemsize]


def _residual(spec: Spec, call: tuple[Any, ...]) -> torch.Tensor | float:
    """What a result is measured from: the input that a sublayer adds its branch to, or 0."""
    given = None if spec.residual is None else call[list(spec.inputs).index(spec.residual)]
    return 0.0 if given is None else given.double()


def _branch_error(
    spec: Spec, call: tuple[Any, ...], result: torch.Tensor, exact: torch.Tensor
) -> float:
    residual = _residual(spec, call)
    return relative_rms(result.double() - residual, exact - residual)
