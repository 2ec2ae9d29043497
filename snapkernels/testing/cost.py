"""What a case must cost at the least: bytes through memory, FLOPs, and the time both take."""

from math import prod

import torch

from snapkernels.spec import Case, Spec
from snapkernels.testing.cases import leaves, make_values


def compulsory_bytes(spec: Spec, case: Case, direction: str, dtype: torch.dtype) -> int:
    """Bytes that `case` has to move, each tensor once.

    Forward reads the inputs and writes the output. Backward reads the output's gradient and the
    spec's `backward_reads`, and writes the gradients that training needs. "fwd_bwd" is the sum.
    """
    values = make_values(spec, case, dtype, "meta")
    inputs = dict(zip(spec.inputs, values, strict=False))
    output = _output_bytes(spec, values)
    forward = sum(map(_nbytes, inputs.values())) + output
    backward = sum(_nbytes(inputs[name]) for name in spec.backward_reads)
    backward += output + sum(map(_nbytes, leaves(spec, values, asked=False)))
    return {"fwd": forward, "bwd": backward, "fwd_bwd": forward + backward}[direction]


FORWARDS = {"fwd": 1, "bwd": 2, "fwd_bwd": 3}


def flops(spec: Spec, case: Case, direction: str) -> int:
    """FLOPs of `case`; a backward pass has twice those of the forward."""
    sizes = spec.check(*make_values(spec, case, torch.float32, "meta"))
    return spec.flops(sizes) * FORWARDS[direction]


def least_flops(spec: Spec, case: Case, direction: str) -> int:
    """FLOPs of `case` by the exact algorithm that has the fewest."""
    sizes = spec.check(*make_values(spec, case, torch.float32, "meta"))
    counts = [count(sizes) for count in spec.algorithms.values()]
    return min(counts, default=spec.flops(sizes)) * FORWARDS[direction]


def floor_ms(
    spec: Spec, case: Case, direction: str, dtype: torch.dtype, ceilings: dict[str, float]
) -> float:
    """The least milliseconds of `case` where copies and matrix products reach `ceilings`.

    Of several exact algorithms it is that of the least work. "fwd_bwd" is the sum: a backward
    waits for its forward. Products of e4m3 numbers are held to the device's own, if any.
    `ceilings` are those of `snapkernels.roofline.measure_ceilings` for `dtype`.
    """
    if direction == "fwd_bwd":
        return sum(floor_ms(spec, case, one, dtype, ceilings) for one in ("fwd", "bwd"))
    matrix = next(rate for name, rate in ceilings.items() if name.endswith("_tflop_s"))
    if spec.multiplies_fp8:
        matrix = ceilings.get("fp8_tflop_s", matrix)
    moving = compulsory_bytes(spec, case, direction, dtype) / ceilings["copy_tb_s"] / 1e9
    return max(moving, least_flops(spec, case, direction) / matrix / 1e9)


def _output_bytes(spec: Spec, values: tuple[object, ...]) -> int:
    shape = spec.output.shape(spec.check(*values))
    return prod(shape) * spec.result_dtype(values).itemsize


def _nbytes(value: object) -> int:
    if isinstance(value, tuple):
        return sum(map(_nbytes, value))
    return value.nbytes if isinstance(value, torch.Tensor) else 0
