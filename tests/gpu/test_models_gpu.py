"""The paper's models on a GPU: the gate of the bench, a training step, and its memory."""

from dataclasses import replace

import curves
import pytest
import torch
from gate import gate
from support import CLIP
from workload import build_model, load_batch

from snapvideo_core import FIT, PRESETS, Conditioning, SnapDiffusion, read_clip, training_loss

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("preset", ["500m", "3.9b", "3.9b-up"])
def test_the_gate_is_green_and_a_training_step_reaches_every_weight(preset, gpu):
    config = PRESETS[preset]
    diffusion = SnapDiffusion(sigma_in=config.sigma_in)
    model = build_model(config, gpu, torch.bfloat16, None).eval()
    data = load_batch(CLIP, config, 1, 24.0, gpu)
    x = diffusion.c_in(data.sigma.view(1, 1, 1, 1, 1)) * data.x_sigma
    with torch.no_grad():
        _, previous = model(x, data.sigma, data.cond)
    errors = {}
    for backend in ("eager", None):
        for module in model.modules():
            if hasattr(module, "backend"):
                module.backend = backend
        verdict, error = gate(model, x, data.sigma, data.cond, previous)
        assert verdict == "ok", (backend, error)
        errors[backend] = error["rms_vs_fp64"]
    assert errors[None] <= errors["eager"], errors
    model.train()
    loss = training_loss(model, diffusion, data.video, data.cond, sigma=data.sigma)
    loss.backward()
    assert loss.isfinite()
    bad = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert bad == []


def test_a_batch_gives_what_its_videos_give(gpu):
    """Batch 64 of the 500M model, float32: indexing past 2^31 bytes included."""
    config = PRESETS["500m"]
    model = build_model(config, gpu, torch.float32, "eager").eval()
    data = load_batch(CLIP, config, 64, 24.0, gpu)
    with torch.no_grad():
        F, _ = model(data.x_sigma, data.sigma, data.cond)
        fields = {name: value[63:] for name, value in vars(data.cond).items() if value is not None}
        alone, _ = model(data.x_sigma[63:], data.sigma[63:], Conditioning(**fields))
    torch.testing.assert_close(F[63:], alone, rtol=1e-3, atol=1e-4)


def test_the_curves_are_of_the_kernels_and_of_eager_and_start_alike(gpu):
    config = replace(curves.SMALL, dropout=0.0)
    clip = read_clip(
        CLIP, frames=curves.CLIP_FRAMES, size=(config.height, config.width), framerate=25.0
    )
    torch.manual_seed(0)
    initial = FIT(config).to(gpu)
    ours, eager = (
        curves.train(name, initial, torch.bfloat16, curves.batches(config, clip, 3, 2, gpu), 3)
        for name in curves.VARIANTS
    )
    kernel = "cuda" if torch.cuda.get_device_capability() == (9, 0) else "triton"
    assert ours.backends["group_read"] == ours.backends["group_write"] == {kernel}
    assert ours.backends.keys() == eager.backends.keys()
    assert set().union(*eager.backends.values()) == {"eager"}
    assert curves.noise_difference(config, 2, gpu) <= curves.NOISE_LIMIT
    assert ours.losses == pytest.approx(eager.losses, rel=1e-2)
