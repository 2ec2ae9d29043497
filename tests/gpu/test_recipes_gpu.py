"""Quantised models on a GPU: the bench's gate, the memory that is freed, and files."""

import pytest
import torch
from gate import (
    QUANTISED_LIMIT,
    QUANTISED_RATIO,
    Inputs,
    expected_output,
    gate_videos,
    judged,
    plain_error,
)
from support import CLIP
from workload import build_model, load_batch

from snapkernels import quantise
from snapvideo_core import PRESETS, SnapDiffusion, load_model, save_model

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("preset", ["500m", "3.9b", "3.9b-up"])
def test_an_fp8_model_is_as_good_as_plain_fp8(preset, gpu):
    config = PRESETS[preset]
    model = build_model(config, gpu, torch.bfloat16, None).eval()
    data = load_batch(CLIP, config, gate_videos(config), 24.0, gpu)
    x = SnapDiffusion(sigma_in=config.sigma_in).network_input(data.x_sigma, data.sigma)
    with torch.no_grad():
        _, previous = model(x, data.sigma, data.cond)
    inputs = Inputs(x, data.sigma, data.cond, previous)
    expected = expected_output(model, inputs)
    quantise(model, "fp8")
    limit = min(QUANTISED_RATIO * plain_error(model, inputs, expected), QUANTISED_LIMIT)
    verdict, error = judged(model, inputs, expected, limit)
    assert verdict == "ok", (error, limit)


def test_a_model_is_quantised_within_the_memory_it_has(gpu):
    torch.cuda.empty_cache()
    model = build_model(PRESETS["3.9b"], gpu, torch.bfloat16, None).eval()
    whole = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    quantise(model, "fp8")
    assert torch.cuda.max_memory_allocated() < whole + 2**30  # float32 copies of one matrix
    assert torch.cuda.memory_allocated() < 0.56 * whole


def test_an_fp8_file_is_loaded_within_the_memory_it_fills(gpu, tmp_path):
    pytest.importorskip("safetensors")
    torch.cuda.empty_cache()
    model = quantise(build_model(PRESETS["3.9b"], gpu, torch.bfloat16, None).eval(), "fp8")
    save_model(model, tmp_path / "model")
    state = {name: tensor.cpu() for name, tensor in model.state_dict().items()}
    del model
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    loaded = load_model(tmp_path / "model", gpu)
    peak, now = torch.cuda.max_memory_allocated() - before, torch.cuda.memory_allocated() - before
    assert peak < now + 2**28
    assert loaded.state_dict().keys() == state.keys()
    for name, tensor in loaded.state_dict().items():
        assert tensor.is_cuda and tensor.dtype == state[name].dtype
        assert torch.equal(tensor.cpu().view(torch.uint8), state[name].view(torch.uint8)), name
