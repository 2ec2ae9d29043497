"""How far a result is from a more precise one, and whether it is another bit for bit."""

from typing import Any

import torch


def widened(call: tuple[Any, ...]) -> tuple[Any, ...]:
    """`call` with its floating-point tensors in float64."""

    def wide(value: Any) -> Any:
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            return value.detach().double()
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return type(value)(*map(wide, value))
        return value

    return tuple(map(wide, call))


def relative_rms(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """rms(actual - expected) / rms(expected), in float64; NaN or inf anywhere in `actual` is inf.

    Raises:
        ValueError: the shapes differ, or `expected` is all zeros (nothing to compare with).
    """
    if actual.shape != expected.shape:
        raise ValueError(
            f"actual has shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
        )
    reference = expected.detach().double()
    scale = reference.norm()
    if not scale > 0:
        raise ValueError("expected is all zeros or holds NaN: a relative error means nothing")
    error = (actual.detach().double() - reference).norm() / scale
    return error.item() if error.isfinite() else float("inf")


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal shapes and bits: NaN is itself, and 0 is not -0."""
    bits = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return (
        a.shape == b.shape
        and a.dtype == b.dtype
        and torch.equal(a.contiguous().view(bits), b.contiguous().view(bits))
    )
