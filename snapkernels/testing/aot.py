"""Triton kernels compiled ahead of time, without a GPU, exactly as a case would launch them.

A backend is called on tensors without data while launches are recorded instead of made; each is
then compiled for a GPU that need not be there, and its machine code is read with the tools that
Triton brings. Needs TRITON_INTERPRET unset: `reports` runs this file as a program of its own.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch

from snapkernels import env
from snapkernels.dispatch import backward_of, implementation, saving
from snapkernels.registry import OPS
from snapkernels.spec import Backend, Case, Spec
from snapkernels.testing import contract
from snapkernels.testing.cases import make_values

# Compute capability: the most shared memory of a block, in bytes.
TARGETS = {"sm_90": 227 * 1024, "sm_89": 99 * 1024, "sm_80": 163 * 1024}
TRITON_DTYPES = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.float8_e4m3fn: "*fp8e4nv",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.int8: "*i8",
    torch.bool: "*i1",
}


class Report(NamedTuple):
    """What the compiler made of one launch.

    Attributes:
        kernel: its name.
        registers: of a thread.
        stack, shared: bytes of stack, of shared memory.
        products: whether it multiplies matrices.
        instructions: that its machine code has; of a case that wants some.
    """

    kernel: str
    registers: int
    stack: int
    shared: int
    products: bool
    instructions: list[str]


@cache
def reports(family: str) -> dict[str, list[Report]]:
    """{"<op> <case> <dtype> <target>": a report of each launch} of every Triton case of a family.

    Paper cases are compiled for every target of their spec, those of the cpu tier for the first.

    Raises:
        RuntimeError: the compiling program failed; the message is its last words.
    """
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "snapkernels.testing.aot", family],
        capture_output=True,
        text=True,
        env=environment,
    )
    if done.returncode:
        raise RuntimeError(f"ahead-of-time compilation failed: {done.stderr[-2000:]}")
    found = json.loads(done.stdout)
    return {key: [Report(*fields) for fields in launches] for key, launches in found.items()}


def family_of(spec: Spec) -> str:
    """The folder of `spec` in `snapkernels.ops`: its ops launch many of the same kernels."""
    return OPS[spec.name].function.__module__.split(".")[-2]


def cases(spec: Spec) -> list[Case]:
    """The cases of `spec` that are compiled: all but those that only repeat another's kernel."""
    return [case for case in spec.cases if case.tier != "gpu"]


def takes(spec: Spec, case: Case, dtype: torch.dtype) -> bool:
    """Whether the Triton backend of `spec` would take `case` in `dtype` on a GPU."""
    with mock.patch.object(env, "INTERPRET", True):  # else it asks for a CUDA tensor
        return spec.backend("triton").refuses(*make_values(spec, case, dtype, "meta")) is None


def targets(spec: Spec, case: Case) -> tuple[str, ...]:
    """What `case` is compiled for."""
    return spec.targets if case.tier == "paper" else spec.targets[:1]


def wants(spec: Spec, case: Case, target: str) -> tuple[str, ...]:
    """The instructions that the kernels of `case` must have."""
    return spec.sass.get(target, ()) if case.tier == "paper" else ()


def key(op: str, case: str, dtype: torch.dtype, target: str) -> str:
    """The key of a case in `reports`."""
    return f"{op} {case} {dtype} {target}"


def faults(
    launches: list[Report], target: str, wanted: tuple[str, ...], most_registers: int
) -> list[str]:
    """What is wrong with `launches`: spills, registers, shared memory, a `wanted` instruction.

    One of the tensor cores, an MMA, is wanted only of a kernel that has products.
    """
    found = [] if launches else ["nothing was launched"]
    for report in launches:
        if report.stack:
            found.append(f"{report.kernel} spills {report.stack} bytes")
        if report.registers > most_registers:
            found.append(
                f"{report.kernel} has {report.registers} registers, more than {most_registers}"
            )
        if report.shared > TARGETS[target]:
            found.append(f"{report.kernel} needs {report.shared} bytes of shared memory")
        for instruction in wanted:
            needed = report.products or not instruction.endswith("MMA")
            if needed and not any(instruction in one for one in report.instructions):
                found.append(f"{report.kernel} has no {instruction}")
    return found


def _all_reports(family: str) -> dict[str, list[Report]]:
    found = {}
    for spec in (op.spec for op in OPS.values() if family_of(op.spec) == family):
        if all(backend.name != "triton" for backend in spec.backends):
            continue
        for case in cases(spec):
            for dtype in (one for one in case.dtypes if takes(spec, case, one)):
                values = make_values(spec, case, dtype, "meta")
                launches = _launches(partial(_both_ways, spec, spec.backend("triton"), values))
                for target in targets(spec, case):
                    read = bool(wants(spec, case, target))
                    found[key(spec.name, case.name, dtype, target)] = [
                        _compile(launch, target, instructions=read) for launch in launches
                    ]
    return found


def _both_ways(spec: Spec, backend: Backend, values: tuple[Any, ...]) -> None:
    """Each forward of `backend`, and its backward for every gradient, if it has one of its own."""
    result = implementation(backend)(*values)
    if backend.saving:
        result = saving(backend)(*values)
    if backend.backward:
        output, *saved = result if isinstance(result, tuple) else (result,)
        needs = contract.needed(spec, values)
        backward_of(backend)(needs, torch.empty_like(output), *saved, *values)


def _launches(call: Any) -> list[tuple[Any, tuple[Any, ...], dict[str, Any]]]:
    """The (kernel, arguments, options) that `call` would launch."""
    from triton.runtime.jit import JITFunction

    found = []

    def record(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        found.append((kernel, args, options))

    launch, JITFunction.run = JITFunction.run, record
    try:
        call()
    finally:
        JITFunction.run = launch
    return found


def _compile(
    launch: tuple[Any, tuple[Any, ...], dict[str, Any]], target: str, *, instructions: bool
) -> Report:
    """Compile as Triton's own launch would: 1 is a constant, multiples of 16 are known to be.

    Its machine code is taken apart, which takes as long, only where `instructions` are asked for.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel, args, options = launch
    signature, constants, attributes = {}, {}, {}
    for index, (parameter, value) in enumerate(zip(kernel.params, args, strict=True)):
        if isinstance(value, torch.Tensor):
            signature[parameter.name] = TRITON_DTYPES[value.dtype]
            attributes[index,] = [["tt.divisibility", 16]]
        elif isinstance(value, float) and not parameter.is_constexpr:
            signature[parameter.name] = "fp32"
        elif parameter.is_constexpr or value is None or value == 1:
            signature[parameter.name] = "constexpr"
            constants[index,] = value
        else:
            signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0:
                attributes[index,] = [["tt.divisibility", 16]]
    same = repr((kernel.__name__, signature, constants, attributes, options, target))
    if same not in _COMPILED:
        source = ASTSource(kernel, signature, constants, attributes)
        compiled = triton.compile(source, GPUTarget("cuda", int(target[3:]), 32), options)
        cubin = compiled.asm["cubin"]
        usage = resources(_dump("--dump-resource-usage", cubin))
        shared, products = compiled.metadata.shared, "tt.dot" in compiled.asm["ttir"]
        report = Report(kernel.__name__, *usage[0], shared, products, [])
        _COMPILED[same] = cubin, report
    cubin, report = _COMPILED[same]
    if instructions and not report.instructions:
        found = _INSTRUCTION.findall(_dump("--dump-sass", cubin))
        report.instructions.extend(sorted(set(found)))
    return report


_COMPILED: dict[str, tuple[bytes, Report]] = {}


def _dump(option: str, cubin: bytes) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        return dump(option, path)


def resources(usage: str) -> list[tuple[int, int]]:
    """Registers and bytes of stack and local memory of every kernel of a resource dump."""
    found = re.findall(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    return [(int(registers), int(stack) + int(local)) for registers, stack, local in found]


def dump(option: str, path: Path) -> str:
    """What the cuobjdump of Triton's package says of a binary."""
    import triton

    program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    done = subprocess.run([program, option, path], capture_output=True, text=True, check=True)
    return done.stdout


_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9_.]*)")

if __name__ == "__main__":
    import snapkernels  # noqa: F401, the ops enter the registry

    print(json.dumps(_all_reports(sys.argv[1])))
