"""A FIT as a CUDA graph: replays with new inputs are the evaluations they stand for."""

from dataclasses import replace

import pytest
import torch
from support import CLIP
from workload import build_model, load_batch

from snapkernels import quantise
from snapkernels.testing.numerics import relative_rms
from snapvideo_core import PRESETS, SnapDiffusion, sample, sigma_schedule
from snapvideo_core.fit import Mix

pytestmark = pytest.mark.gpu


@pytest.fixture(params=["bf16", "fp8"])
def case(request, gpu):
    """The 500M model, captured at batch 2, the inputs of that and others."""
    config = PRESETS["500m"]
    model = quantise(build_model(config, gpu, torch.bfloat16, None).eval(), request.param)
    data = load_batch(CLIP, config, 2, 24.0, gpu)
    captured = model.capture(data.x_sigma, data.sigma, data.cond)
    other = (
        data.x_sigma.flip(0) * 0.5,
        data.sigma.flip(0) * 2,
        replace(data.cond, text=data.cond.text.flip(0), framerate=data.cond.framerate / 2),
    )
    return model, captured, (data.x_sigma, data.sigma, data.cond), other


@torch.no_grad()
def test_replays_are_the_evaluations_bit_for_bit(case):
    model, captured, *calls = case
    found, previous = [], None
    for x, sigma, cond in (*calls, *calls):
        scale, mix = 1 / (1 + sigma), torch.stack([sigma, 1 - sigma, -sigma], dim=1)
        more = {"scale_B": scale, "end": Mix(mix=mix, video=x, other=-x)}
        expected = model(x, sigma, cond, previous, **more)
        got = captured(x, sigma, cond, previous, **more)
        assert all(map(torch.equal, got, expected))
        found.append(got)
        previous = got[1] * 0.5
    assert not torch.equal(found[0][0], found[1][0])
    F, z = captured(*calls[0])
    expected_F, expected_z = model(*calls[0])
    assert torch.equal(z, expected_z)
    assert relative_rms(F, expected_F) < 1e-6  # the head's kernel without an end is another


@torch.no_grad()
def test_denoising_and_sampling_by_replays(case):
    model, captured, (x, sigma, cond), _ = case
    diffusion = SnapDiffusion(sigma_in=model.config.sigma_in)
    expected = diffusion.denoise(model, x, sigma, cond)
    for got, wanted in zip(diffusion.denoise(captured, x, sigma, cond), expected, strict=True):
        assert relative_rms(got, wanted) < 1e-6
    videos = [
        sample(network, diffusion, cond, x, sigmas=sigma_schedule(4))
        for network in (model, captured)
    ]
    assert relative_rms(*videos) < 1e-4


def test_another_shape_is_refused(case):
    _, captured, (x, sigma, cond), _ = case
    with pytest.raises(ValueError, match=r"captured: x must be torch.float32 \(2, 3, 16, 36, 64\)"):
        captured(x[:1], sigma, cond)


@torch.no_grad()
def test_the_graph_keeps_the_weights_it_reads(case):
    model, captured, call, _ = case
    expected = captured(*call)
    model.to("cpu")
    taken = torch.full((2**28,), float("nan"), device=call[0].device)  # what was freed, and more
    assert all(map(torch.equal, captured(*call), expected))
    del taken
