"""The training loss: two passes, what is dropped, where gradients go."""

import math
from dataclasses import replace

import pytest
import torch

from snapkernels.philox import normals
from snapvideo_core import FIT, SnapDiffusion, sample_sigma, training_loss
from snapvideo_core.config import TINY, TINY_UP
from snapvideo_core.training import augment_low_res

DIFFUSION = SnapDiffusion(sigma_in=4.0)


class Recorder(torch.nn.Module):
    """A model that remembers how it was called."""

    def __init__(self, model):
        super().__init__()
        self.model, self.config, self.calls = model, model.config, []
        self.backend = model.backend

    def forward(self, x, sigma, cond, previous=None, *, scale_B, end=None):
        result, z = self.model(x, sigma, cond, previous, scale_B=scale_B, end=end)
        call = {"x": x, "sigma": sigma, "cond": cond, "previous": previous, "z": z}
        self.calls.append(call | {"grad": torch.is_grad_enabled(), "scale": scale_B})
        return result, z


def video(config, batch, rng):
    return torch.randn(batch, 3, config.frames, config.height, config.width, generator=rng)


@pytest.mark.parametrize("config", [TINY, TINY_UP], ids=lambda c: c.name)
def test_both_passes_see_the_same_and_only_the_second_has_gradients(
    config, rng, conditioning, random_fit
):
    config = replace(config, self_conditioning=0.5, label_dropout=0.5)
    recorder = Recorder(random_fit(config, rng).train())
    cond = conditioning(config, 16, rng)
    loss = training_loss(recorder, DIFFUSION, video(config, 16, rng), cond, generator=rng)
    loss.backward()
    first, second = recorder.calls
    for name in ("x", "sigma", "cond", "scale"):
        assert first[name] is second[name]
    assert (first["grad"], second["grad"]) == (False, True)
    assert first["previous"] is None and not second["previous"].requires_grad
    kept = second["previous"].flatten(1).any(1)
    assert 0 < kept.sum() < 16
    assert torch.equal(second["previous"][kept], first["z"][kept])
    dropped = ~first["cond"].text.flatten(1).any(1)
    assert 0 < dropped.sum() < 16
    assert all(p.grad is not None and p.grad.isfinite().all() for p in recorder.parameters())


def test_what_it_draws(rng, conditioning, random_fit):
    """Noise is standard normal, sigma log-normal, and equal generators draw equal losses."""
    recorder = Recorder(random_fit(TINY, rng))
    x, cond = video(TINY, 32, rng), conditioning(TINY, 32, rng)
    losses = [
        training_loss(recorder, DIFFUSION, x, cond, generator=torch.Generator().manual_seed(seed))
        for seed in (1, 1, 2)
    ]
    assert losses[0] == losses[1] != losses[2]
    sigma = recorder.calls[0]["sigma"]
    assert len(sigma.unique()) == 32
    assert sigma.log().mean().item() == pytest.approx(-1.2, abs=0.8)
    sigma = sigma.view(-1, 1, 1, 1, 1)
    eps = (recorder.calls[0]["x"] - x / 4) / sigma
    assert eps.mean().item() == pytest.approx(0, abs=0.02)
    assert eps.std().item() == pytest.approx(1, abs=0.02)


def test_another_sigma_in_than_the_models_is_refused(rng, conditioning):
    x, cond = video(TINY, 1, rng), conditioning(TINY, 1, rng)
    with pytest.raises(ValueError, match=r"sigma_in = 1\.0, but the model tiny has sigma_in = 4.0"):
        training_loss(FIT(TINY), SnapDiffusion(sigma_in=1.0), x, cond)


def test_it_is_the_loss_of_the_second_pass(rng, conditioning, random_fit):
    model = random_fit(replace(TINY, self_conditioning=1.0, label_dropout=0.0), rng)
    x, cond = video(TINY, 2, rng), conditioning(TINY, 2, rng)
    sigma, sample = torch.tensor([0.1, 2.0]), torch.tensor([7, 2**40])
    loss = training_loss(model, DIFFUSION, x, cond, sigma=sigma, sample=sample, seed=3)
    x_sigma = x / 4 + sigma.view(-1, 1, 1, 1, 1) * normals(3, sample, tuple(x.shape[1:]))
    with torch.no_grad():
        _, previous = DIFFUSION.denoise(model, x_sigma, sigma, cond)
        denoised, _ = DIFFUSION.denoise(model, x_sigma, sigma, cond, previous)
    weight = DIFFUSION.loss_weight(sigma).view(-1, 1, 1, 1, 1)
    expected = (weight * (denoised - x) ** 2).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)


def test_stored_noise_is_as_good_as_counted(rng, conditioning, random_fit):
    model = random_fit(replace(TINY, self_conditioning=1.0, label_dropout=0.0), rng)
    x, cond = video(TINY, 2, rng), conditioning(TINY, 2, rng)
    sigma, sample = torch.tensor([0.1, 2.0]), torch.tensor([7, 2**40])
    eps = normals(3, sample, tuple(x.shape[1:]))
    counted = training_loss(model, DIFFUSION, x, cond, sigma=sigma, sample=sample, seed=3)
    stored = training_loss(model, DIFFUSION, x, cond, sigma=sigma, eps=eps)
    assert stored.item() == pytest.approx(counted.item(), rel=1e-5)
    ours, theirs = (torch.autograd.grad(one, model.stem.weight)[0] for one in (counted, stored))
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-6)
    with pytest.raises(ValueError, match="either that of sample or eps"):
        training_loss(model, DIFFUSION, x, cond, sample=sample, eps=eps)


def test_a_sigma_that_is_not_above_zero_is_refused(rng, conditioning):
    x, cond = video(TINY, 2, rng), conditioning(TINY, 2, rng)
    for bad in (0.0, -1.0):
        sigma = torch.tensor([1.0, bad])
        with pytest.raises(ValueError, match="sigma must be above 0, got"):
            training_loss(FIT(TINY), DIFFUSION, x, cond, sigma=sigma)
        with pytest.raises(ValueError, match="sigma must be above 0, got"):
            DIFFUSION.denoise(FIT(TINY), x, sigma, cond)
        with pytest.raises(ValueError, match="sigma must be above 0, got"):
            DIFFUSION.noise(x, x, sigma)


def test_a_few_steps_bring_the_loss_down(rng, conditioning):
    torch.manual_seed(0)
    model = FIT(TINY)
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
    x, cond = video(TINY, 4, rng), conditioning(TINY, 4, rng)
    sigma, sample = torch.full((4,), 0.5), torch.arange(4)
    losses = []
    for _ in range(30):
        optimiser.zero_grad()
        loss = training_loss(model, DIFFUSION, x, cond, sigma=sigma, sample=sample, generator=rng)
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_sigma_is_log_normal(rng):
    log = sample_sigma(100_000, generator=rng).log()
    assert log.mean().item() == pytest.approx(-1.2, abs=0.02)
    assert log.std().item() == pytest.approx(1.2, abs=0.02)


def test_augmentation_runs_from_the_video_to_pure_noise(rng):
    low_res = torch.full((3, 3, 4, 40, 50), 0.5)
    out = augment_low_res(low_res, torch.tensor([0.0, 0.5, 1.0]), generator=rng)
    assert torch.equal(out[0], low_res[0])
    half = math.sqrt(0.5)
    for video, mean, std in ((out[1], 0.5 * half, half), (out[2], 0.0, 1.0)):
        assert video.mean().item() == pytest.approx(mean, abs=0.03)
        assert video.std().item() == pytest.approx(std, rel=0.03)
    with pytest.raises(ValueError, match=r"level must be \(3,\), got \(1,\)"):
        augment_low_res(low_res, torch.zeros(1))
