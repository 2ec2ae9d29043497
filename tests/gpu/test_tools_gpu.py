"""The timing tools on a GPU."""

import pytest
import torch

from snapkernels.roofline import measure_ceilings
from snapkernels.testing.timing import measure

pytestmark = pytest.mark.gpu


def test_a_call_lasts_as_long_as_its_kernels(gpu):
    """Kernels that spin for a known number of cycles, one of them ten times as long."""
    heard, lengths = [], [2_000_000] * 9
    short = measure(lambda: torch.cuda._sleep(2_000_000), gpu, repeats=9, progress=heard.append)
    assert heard == list(range(1, 10))
    long = measure(lambda: torch.cuda._sleep(20_000_000), gpu, repeats=9)
    assert long.median / short.median == pytest.approx(10, rel=0.1)
    lengths[4] = 20_000_000
    left = iter(lengths)
    one_long = measure(lambda: torch.cuda._sleep(next(left)), gpu, repeats=9, warmup=0)
    assert one_long.median == pytest.approx(short.median, rel=0.2)


def test_ceilings_are_those_of_a_gpu(gpu):
    ceilings = measure_ceilings(gpu)
    assert ceilings["copy_tb_s"] > 0.1
    assert ceilings["bf16_tflop_s"] > 10
    if torch.cuda.get_device_capability() >= (8, 9):
        assert ceilings["fp8_tflop_s"] > 1.2 * ceilings["bf16_tflop_s"]
