"""Triton's interpreter as the GPU computes: it runs kernels on a CPU, for their proofs.

As shipped it multiplies the raw bits of bf16 operands in a dot product, truncates where bf16 should
round, and wraps fp8 where it should saturate, all without an error. `install` mends that: casts
then are torch's bit for bit, and dot products accumulate in float32. Other arithmetic on bf16
values stays wrong: kernels cast to float32 first.

It also looks through all of `triton.language` at every call of a function, a quarter of its time:
`install` lets it look once.
"""

import inspect
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

_FLOATS = {
    tl.float16: torch.float16,
    tl.bfloat16: torch.bfloat16,
    tl.float32: torch.float32,
    tl.float64: torch.float64,
    tl.float8e4nv: torch.float8_e4m3fn,
    tl.float8e5: torch.float8_e5m2,
}
_CARRIED_AS_BITS = (tl.bfloat16, tl.float8e4nv, tl.float8e5)
_BITS = {1: torch.uint8, 2: torch.uint16, 4: torch.uint32, 8: torch.uint64}


def install() -> None:
    """Mend the interpreter of this process; a second call changes nothing."""
    if interpreter._convert_float is not _convert:
        interpreter._convert_float = _convert
        interpreter.InterpreterBuilder.create_dot = _create_dot
        interpreter._patch_builtin = _patch_builtin


def _convert(values: np.ndarray, source: Any, target: Any, rounding: Any) -> np.ndarray:
    """Cast the bit patterns `values` between Triton's float types, by torch's rules."""
    if source not in _FLOATS or target not in _FLOATS:
        return _shipped_convert(values, source, target, rounding)
    flat = np.ascontiguousarray(values).reshape(-1)
    bits = torch.from_numpy(flat.view(f"u{flat.itemsize}"))
    cast = bits.view(_FLOATS[source]).to(_FLOATS[target])
    return cast.view(_BITS[cast.element_size()]).numpy().reshape(values.shape)


def _create_dot(builder: Any, a: Any, b: Any, c: Any, *options: Any) -> Any:
    """a @ b + c, with operands that the interpreter carries as bits decoded first."""
    product = np.matmul(_decoded(a), _decoded(b), dtype=c.data.dtype)
    return interpreter.TensorHandle(product + c.data, c.dtype.scalar)


def _patch_builtin(package: Any, builder: Any, scope: Any) -> None:
    """Give the builtins of `package` that are not patched yet the builder."""
    if package not in _BUILTINS:
        return _shipped_patch_builtin(package, builder, scope)
    for name in _BUILTINS[package]:
        member = getattr(package, name)
        if tl.core.is_builtin(member):
            interpreter._patch_attr(package, name, member, builder, scope)


def _decoded(handle: Any) -> np.ndarray:
    kind = handle.dtype.scalar
    if kind not in _CARRIED_AS_BITS:
        return handle.data
    return _convert(handle.data, kind, tl.float32, None).view(np.float32)


_shipped_convert = interpreter._convert_float
_shipped_patch_builtin = interpreter._patch_builtin
# As imported: a function that a kernel calls leaves what it patched as it is.
_BUILTINS = {
    package: [name for name, member in inspect.getmembers(package) if tl.core.is_builtin(member)]
    for package in (tl, tl.core, tl.math, tl.tensor, tl.core.tensor_descriptor_base)
}
