"""Exact probes: inputs on which a single lost, leaked or twice counted token shows.

With zero queries the softmax is uniform. With every token that is read zero but one in each group,
a marker, the result is that marker over the number of tokens: a dropped token gives zero, a leaked
one another group's marker, counted padding a smaller share. On random inputs such bugs can hide
among the other tokens.
"""

from collections.abc import Callable
from typing import Any

import torch

from snapkernels.spec import Probe, Spec
from snapkernels.testing.numerics import widened

SLACK = 8  # an element's error over the rms error that a dtype is allowed


def borders(count: int) -> list[int]:
    """Of `count` tokens the first, the last, and both sides of every power of two from 16."""
    powers = [1 << bit for bit in range(4, count.bit_length())]
    found = {0, count - 1, *powers, *(power - 1 for power in powers)}
    return sorted(position for position in found if position < count)


def missed(
    spec: Spec,
    probe: Probe,
    values: tuple[Any, ...],
    run: Callable[..., torch.Tensor],
    limit: float,
) -> list[int]:
    """The markers, by position, with which the result of `run` is not the reference's in float64.

    An element may be `SLACK` * `limit` of the branch's rms off, and rounded once in its dtype; it
    must be the residual, bit for bit, where nothing can be read.

    Args:
        spec: of a sublayer with a residual.
        probe: its marker.
        values: inputs and options of a call, of which the marked tokens and weights are kept.
        run: called with such values.
        limit: relative rms error of the branch.
    """
    tokens = values[list(spec.inputs).index(probe.tokens)]
    found = []
    for position in borders(tokens.shape[-2]):
        call = marked(spec, probe, values, position)
        result = run(*call)
        residual = call[list(spec.inputs).index(spec.residual or "")].double()
        exact = spec.reference(*widened(call))
        branch = exact - residual
        allowed = SLACK * limit * branch.square().mean().sqrt()
        allowed = allowed + torch.finfo(result.dtype).eps * exact.abs()
        error = (result.double() - exact).abs()
        if not (error <= torch.where(branch == 0, 0, allowed)).all():
            found.append(position)
    return found


def marked(spec: Spec, probe: Probe, values: tuple[Any, ...], position: int) -> tuple[Any, ...]:
    """`values` with the probe's zeros, and its tokens zero except at `position` of each group."""
    call = dict(zip((*spec.inputs, *spec.options), values, strict=True))
    for path in probe.zeros:
        name, _, part = path.partition(".")
        if part:
            call[name] = call[name]._replace(**{part: torch.zeros_like(getattr(call[name], part))})
        else:
            call[name] = torch.zeros_like(call[name])
    tokens = torch.zeros_like(call[probe.tokens])
    tokens[..., position, :] = call[probe.tokens][..., position, :]
    call[probe.tokens] = tokens
    return tuple(call.values())
