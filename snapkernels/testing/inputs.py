"""Random inputs that leave no term of an equation at zero."""

from collections.abc import Mapping
from typing import TypeVar

import torch

Weights = TypeVar("Weights", bound=tuple)


def random_weights(
    kind: type[Weights],
    dims: dict[str, tuple[str, ...]],
    sizes: Mapping[str, int],
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    generator: torch.Generator | None = None,
) -> Weights:
    """Random parameters of one sublayer: `kind`'s fields in the shapes `dims` names.

    Matrices keep the variance of their input, LayerNorm gains are near 1, biases near 0.3.

    Args:
        kind: a weights tuple such as `CrossAttentionWeights`.
        dims: its `DIMS`, {field: dimension names}.
        sizes: {dimension name: size}.
        dtype, device, generator: of the tensors; the generator is on the same device.
    """

    def draw(field: str, names: tuple[str, ...]) -> torch.Tensor:
        shape = [sizes[name] for name in names]
        return random_parameter(field, shape, device=device, generator=generator).to(dtype)

    return kind(**{field: draw(field, names) for field, names in dims.items()})


def random_parameter(
    name: str,
    shape: list[int],
    *,
    device: torch.device | str = "cpu",
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """One of `random_weights`, float32: the parameter `name` of `shape`."""
    values = torch.randn(shape, dtype=torch.float32, device=device, generator=generator)
    if len(shape) == 2:
        return values * shape[1] ** -0.5
    return 1 + 0.2 * values if name.endswith("norm_weight") else 0.3 * values
