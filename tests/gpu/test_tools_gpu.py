"""The timing tools on a GPU."""

import importlib.util

import pytest
import torch

from snapkernels.registry import OPS
from snapkernels.roofline import measure_ceilings
from snapkernels.testing.bench import bench
from snapkernels.testing.timing import measure

pytestmark = pytest.mark.gpu


def test_a_call_lasts_as_long_as_its_kernels(gpu):
    """Kernels that spin for a known number of cycles, one of them ten times as long.

    The least median of five measurements: workers beside this one may have the GPU in between.
    """

    def median(lengths):
        left, heard = iter(lengths), []
        call = lambda: torch.cuda._sleep(next(left))  # noqa: E731
        timing = measure(call, gpu, repeats=9, warmup=0, progress=heard.append)
        assert heard == list(range(1, 10))
        return timing.median

    short, long = [2_000_000] * 9, [20_000_000] * 9
    one_long = [*short[:4], *long[:1], *short[:4]]
    medians = [[median(lengths) for lengths in (short, long, one_long)] for _ in range(5)]
    of_short, of_long, of_one_long = (min(some) for some in zip(*medians, strict=True))
    assert of_long / of_short == pytest.approx(10, rel=0.1)
    assert of_one_long == pytest.approx(of_short, rel=0.2)


def test_ceilings_are_those_of_a_gpu(gpu):
    ceilings = measure_ceilings(gpu)
    assert ceilings["copy_tb_s"] > 0.1
    assert ceilings["bf16_tflop_s"] > 10
    if torch.cuda.get_device_capability() >= (8, 9):
        assert ceilings["fp8_tflop_s"] > 1.2 * ceilings["bf16_tflop_s"]


@pytest.mark.parametrize("name", ["group_read", "group_write"])
def test_forward_and_backward_are_timed_with_what_is_kept_between(name, gpu):
    """Eager keeps keys, values and queries of every patch, the kernels none of them."""
    op = OPS[name]
    case = next(case for case in op.spec.cases if case.name == "three-tiles")
    ceilings = {"copy_tb_s": 3.0, "bf16_tflop_s": 700.0}
    rows = bench(op, case, "fwd_bwd", torch.bfloat16, gpu, ceilings, rounds=3)
    timed = {row["variant"]: row for row in rows if row["gate"] == "ok"}
    assert {"cuda-bf16", "triton-bf16", "eager-bf16", "compile-bf16"} <= timed.keys()
    assert all(row["saved_gib"] > 0 and row["value"] > 0 for row in timed.values())
    assert timed["cuda-bf16"]["saved_gib"] < timed["eager-bf16"]["saved_gib"]


@pytest.mark.parametrize("name", ["linear_fp8", "feed_forward_fp8"])
def test_fp8_is_timed_beside_its_peers(name, gpu):
    """Each has a time, or the reason why it has none."""
    op = OPS[name]
    case = next(case for case in op.spec.cases if case.name == "ragged-tiles")
    ceilings = {"copy_tb_s": 3.0, "bf16_tflop_s": 700.0, "fp8_tflop_s": 1400.0}
    rows = bench(op, case, "fwd", torch.bfloat16, gpu, ceilings, rounds=3)
    gates = {row["variant"].removesuffix("-bf16"): row["gate"] for row in rows}
    absent = {"transformer-engine": gates.pop("transformer-engine")}
    if importlib.util.find_spec("torchao") is None:
        absent["torchao"] = gates.pop("torchao")
    assert all(" is absent: " in gate for gate in absent.values())
    names = ["cuda", "triton", "eager", "compile", "torchao"]
    assert gates == {name: "ok" for name in names if name not in absent}
    assert len({row["floor"] for row in rows if row["gate"] == "ok"}) == 1
