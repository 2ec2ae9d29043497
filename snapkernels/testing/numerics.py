"""How far a result is from a more precise one."""

import torch


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
