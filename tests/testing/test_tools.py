"""The judging and timing tools themselves."""

import math

import pytest
import torch

from snapkernels.roofline import measure_ceilings, short_name
from snapkernels.testing.memory import kept_bytes
from snapkernels.testing.numerics import relative_rms
from snapkernels.testing.timing import Timing, measure


def test_relative_rms_is_relative_and_sees_what_is_not_finite():
    expected = torch.tensor([3.0, 4.0])
    assert relative_rms(expected * 1.01, expected) == pytest.approx(0.01)
    assert relative_rms(torch.zeros(2), expected) == 1.0
    for bad in (math.nan, math.inf):
        assert relative_rms(torch.tensor([3.0, bad]), expected) == math.inf
    with pytest.raises(ValueError, match="all zeros"):
        relative_rms(expected, torch.zeros(2))
    with pytest.raises(ValueError, match=r"shape \(2,\), expected \(3,\)"):
        relative_rms(expected, torch.ones(3))


def test_timing_is_a_median_with_quantiles():
    assert Timing.of([5.0, 1.0, 100.0, 2.0, 3.0, 4.0]) == (3.5, 2.0, 5.0)
    calls, heard = [], []
    timing = measure(
        lambda: calls.append(0),
        torch.device("cpu"),
        repeats=4,
        warmup=3,
        progress=heard.append,
    )
    assert len(calls) == 7 and heard == [1, 2, 3, 4]
    assert 0 < timing.p20 <= timing.median <= timing.p80
    with pytest.raises(ValueError, match="repeats must be at least 1, got 0"):
        measure(lambda: None, torch.device("cpu"), repeats=0)


def test_ceilings_of_this_machine_are_plausible():
    ceilings = measure_ceilings(torch.device("cpu"), torch.float32, repeats=2)
    assert set(ceilings) == {"copy_tb_s", "fp32_tflop_s"}
    assert 1e-3 < ceilings["copy_tb_s"] < 10
    assert 1e-3 < ceilings["fp32_tflop_s"] < 100
    with pytest.raises(ValueError, match=r"got torch\.int8"):
        short_name(torch.int8)


def test_what_a_forward_keeps_is_all_but_its_output_and_not_what_its_first_call_makes(monkeypatch):
    held = {"bytes": 1000}

    def forward():
        held["bytes"] += 512 * (not calls) + 40 + 16
        calls.append(0)
        return torch.zeros(8)[:4].view(2, 2)  # 32 bytes of storage

    calls = []
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: held["bytes"])
    assert kept_bytes(forward) == 40 + 16 - 32 and len(calls) == 2
