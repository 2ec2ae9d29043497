"""The sampler recovers Gaussian data, spends the evaluations it says, and refuses bad levels."""

from itertools import pairwise

import pytest
import torch

from snapkernels.testing.numerics import relative_rms
from snapvideo_core import SelfConditionedDenoiser, SnapDiffusion, integrate, sample, sigma_schedule
from snapvideo_core.config import TINY, TINY_UP

MEAN, STD = 0.4, 0.5  # pixels in [-1, 1]; EDM takes 0.5 for their spread


def gaussian_denoiser(sigma_in):
    """E[x | x_sigma] for x ~ N(MEAN, STD^2) and x_sigma = x / sigma_in + sigma eps."""

    def denoise(x, sigma):
        signal = STD**2 / sigma_in
        return MEAN + signal / (signal / sigma_in + sigma[:, None] ** 2) * (x - MEAN / sigma_in)

    return denoise


@pytest.mark.parametrize("sigma_in", [1.0, 4.0, 32.0])
@pytest.mark.parametrize(("steps", "tolerance"), [(256, 0.01), (40, 0.02)])
def test_gaussian_data_is_recovered(sigma_in, steps, tolerance, rng):
    """The flow is linear in the noise, so two starting points give mean and std exactly."""
    noise = torch.tensor([[-1.0], [1.0]]).double()
    out = integrate(
        gaussian_denoiser(sigma_in), noise, sigmas=sigma_schedule(steps), sigma_in=sigma_in
    )
    assert out.dtype == torch.float64
    assert out.mean().item() == pytest.approx(MEAN, abs=tolerance * STD)
    assert (out[1] - out[0]).item() / 2 == pytest.approx(STD, rel=tolerance)


def test_second_order_is_worth_its_evaluations():
    noise = torch.tensor([[-1.0], [1.0]]).double()
    errors, calls = {}, {}
    for second_order in (False, True):
        denoise, count = gaussian_denoiser(4.0), []
        out = integrate(
            lambda x, s, d=denoise, c=count: c.append(s) or d(x, s),
            noise,
            sigmas=sigma_schedule(40),
            sigma_in=4.0,
            second_order=second_order,
        )
        errors[second_order] = abs((out[1] - out[0]).item() / 2 - STD)
        calls[second_order] = len(count)
    assert calls == {False: 40, True: 79}
    assert errors[True] < errors[False] / 3


def test_schedule_is_edms():
    sigmas = sigma_schedule(256)
    assert len(sigmas) == 257 and sigmas.dtype == torch.float64
    assert sigmas[0].item() == pytest.approx(80)
    assert sigmas[-2].item() == pytest.approx(0.002)
    assert sigmas[-1] == 0
    assert (sigmas[1:] < sigmas[:-1]).all()
    middle = ((80 ** (1 / 7) + 0.002 ** (1 / 7)) / 2) ** 7
    assert sigma_schedule(3)[1].item() == pytest.approx(middle)


def test_latents_travel_from_evaluation_to_evaluation(rng, conditioning, random_fit):
    model, seen = random_fit(TINY, rng), []

    def network(x, sigma, cond, previous):
        F, latents = model(x, sigma, cond, previous)
        seen.append((previous, latents))
        return F, latents

    noise = torch.randn(1, 3, TINY.frames, TINY.height, TINY.width, generator=rng)
    diffusion, cond = SnapDiffusion(sigma_in=4.0), conditioning(TINY, 1, rng)
    out = sample(network, diffusion, cond, noise, sigmas=sigma_schedule(3))
    denoiser = SelfConditionedDenoiser(model, diffusion, cond)
    with torch.no_grad():
        by_hand = integrate(denoiser, noise, sigmas=sigma_schedule(3), sigma_in=4.0)
    assert relative_rms(out, by_hand) < 1e-5
    assert out.shape == noise.shape and out.dtype == torch.float32
    assert out.isfinite().all() and not out.requires_grad
    assert len(seen) == 5 and seen[0][0] is None
    for (_, latents), (previous, _) in pairwise(seen):
        assert previous is latents


@pytest.mark.parametrize("second_order", [True, False])
def test_steps_made_in_the_head_are_those_of_the_integrator(
    second_order, rng, conditioning, random_fit
):
    """A FIT makes its steps itself; float64 noise takes the integrator."""
    model, diffusion = random_fit(TINY_UP, rng), SnapDiffusion(sigma_in=4.0)
    cond = conditioning(TINY_UP, 2, rng)
    noise = torch.randn(2, 3, TINY_UP.frames, TINY_UP.height, TINY_UP.width, generator=rng)
    how = {"sigmas": sigma_schedule(4), "second_order": second_order}
    made_in_the_head = sample(model, diffusion, cond, noise, **how)
    integrated = sample(model, diffusion, cond, noise.double(), **how)
    assert made_in_the_head.dtype == torch.float32 and integrated.dtype == torch.float64
    assert relative_rms(made_in_the_head, integrated) < 1e-5


def test_a_network_in_training_mode_is_refused(rng, conditioning, random_fit):
    model = random_fit(TINY, rng).train()
    noise = torch.zeros(1, 3, TINY.frames, TINY.height, TINY.width)
    with pytest.raises(ValueError, match="training mode"):
        sample(
            model,
            SnapDiffusion(sigma_in=4.0),
            conditioning(TINY, 1, rng),
            noise,
            sigmas=sigma_schedule(3),
        )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sigma_schedule(1), "steps must be an int of at least 2, got 1"),
        (lambda: sigma_schedule(2.5), "steps must be an int of at least 2, got 2.5"),
        (lambda: sigma_schedule(8, sigma_max=float("inf")), "0 < sigma_min < sigma_max < inf"),
        (lambda: sigma_schedule(8, sigma_min=0.0), "0 < sigma_min < sigma_max"),
        (lambda: sigma_schedule(8, sigma_max=0.001), "0 < sigma_min < sigma_max"),
        (lambda: sigma_schedule(8, rho=0), "rho must be at least 1"),
        (lambda: run(torch.tensor([1.0, 2.0, 0.0])), "must fall strictly and end in 0"),
        (lambda: run(torch.tensor([float("inf"), 1.0, 0.0])), "must fall strictly"),
        (lambda: run(torch.tensor([2.0, 1.0])), "must fall strictly and end in 0"),
        (lambda: run(torch.tensor([0.0])), "must fall strictly and end in 0"),
        (lambda: run(torch.tensor([2.0, float("nan"), 0.0])), "must fall strictly"),
        (lambda: run(sigma_schedule(4), sigma_in=0.0), "sigma_in must be above 0, got 0.0"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def run(sigmas, sigma_in=1.0):
    return integrate(gaussian_denoiser(1.0), torch.zeros(1, 1), sigmas=sigmas, sigma_in=sigma_in)
