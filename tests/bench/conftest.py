"""What the tests of the benches share."""

import json
from dataclasses import replace
from functools import partial

import page
import pytest
import throughput
import torch
from made_records import make_records
from subject import Options
from support import CLIP

from snapkernels.testing.load import Load
from snapkernels.testing.timing import Timing
from snapvideo_core import capture


@pytest.fixture
def rows(monkeypatch, tmp_path):
    """A function of flags: the rows of the record of a run in this process, timed as 6 ms."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(throughput, "measure", lambda *_, **__: Timing(6.0, 6.0, 6.0))
    ceilings = {"fp32_tflop_s": 0.5, "bf16_tflop_s": 0.5, "fp8_tflop_s": 1.0}
    monkeypatch.setattr(throughput, "measure_ceilings", lambda *_: ceilings)

    def run_here(*flags, code=0):
        target = tmp_path / "figures.json"
        given = flags if "--preset" in flags else ("--preset", "tiny", *flags)
        assert throughput.main([*given, "--json", str(target)]) == code
        return json.loads(target.read_text())["rows"]

    return run_here


@pytest.fixture(scope="session")
def text():
    """The page of made-up records."""
    whole = make_records()
    return page.render(whole, page.pictures(whole))


@pytest.fixture
def played(monkeypatch):
    """A CUDA graph of a FIT is played on any device; the batch of every one that was recorded."""
    batches = []

    def recorded(evaluate, device, name):
        outputs = evaluate()
        batches.append(len(outputs[0]))

        def replay():
            for memory, result in zip(outputs, evaluate(), strict=True):
                memory.copy_(result)

        return replay, outputs

    monkeypatch.setattr(capture, "recorded", recorded)
    return batches


@pytest.fixture
def cpu_options():
    """A function of changes: what a run on a CPU has in common."""
    cpu = torch.device("cpu")
    options = Options(
        device=cpu,
        dtype=torch.float32,
        capture=False,
        clip=CLIP,
        framerate=24.0,
        repeats=1,
        ceilings={"fp32_tflop_s": 0.5, "bf16_tflop_s": 0.5},
        load=Load(cpu),
    )
    return partial(replace, options)
