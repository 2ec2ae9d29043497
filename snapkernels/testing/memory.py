"""Memory that shows what was never written, and what a forward keeps of it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch


@contextmanager
def nan_filled() -> Iterator[None]:
    """Inside, PyTorch fills new floating-point memory with NaN before it hands it out."""
    before = torch.are_deterministic_algorithms_enabled()
    warn = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn)
        torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]


def kept_bytes(forward: Callable[[], torch.Tensor]) -> int:
    """Bytes of the GPU's memory that `forward` leaves allocated beside its output.

    Of a forward with gradients that is what it keeps for its backward. It runs once before: what
    a first call makes for all later ones is not counted.
    """
    forward()
    before = torch.cuda.memory_allocated()
    output = forward()
    return torch.cuda.memory_allocated() - before - output.untyped_storage().nbytes()
