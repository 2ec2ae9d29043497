"""The forward process: what its noise is a function of, and of nothing else."""

import pytest
import torch

from snapkernels import forward_process
from snapkernels.philox import normals


def noisy(video, sigma, sample, **options):
    return forward_process(video, sigma, sample, **{"sigma_in": 4.0, "seed": 5} | options)


def drawn(rng, batch=4):
    video = torch.randn(batch, 3, 2, 5, 8, generator=rng)
    return video, torch.rand(batch, generator=rng) + 0.1, torch.arange(batch) + 2**40


def test_it_is_the_equation(rng):
    video, sigma, sample = drawn(rng)
    eps = normals(5, sample, (3, 2, 5, 8))
    expected = video / 4 + sigma.view(-1, 1, 1, 1, 1) * eps
    torch.testing.assert_close(noisy(video, sigma, sample), expected)


def test_the_split_into_batches_changes_nothing(rng):
    video, sigma, sample = drawn(rng)
    whole = noisy(video, sigma, sample)
    for part in (slice(0, 1), slice(1, 4), [3, 1]):
        assert torch.equal(noisy(video[part], sigma[part], sample[part]), whole[part])


def test_seed_and_sample_change_everything(rng):
    video, sigma, sample = drawn(rng)
    first = noisy(video, sigma, sample)
    for other in (noisy(video, sigma, sample + 1), noisy(video, sigma, sample, seed=6)):
        assert (first == other).float().mean() < 0.01


def test_what_reaches_the_data(rng):
    video, sigma, sample = drawn(rng)
    video.requires_grad_()
    (grad,) = torch.autograd.grad(noisy(video, sigma, sample).sum(), video)
    assert torch.equal(grad, torch.full_like(video, 0.25))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"sigma": torch.tensor([1.0, 0.0])}, r"sigma must be above 0, got \[1.0, 0.0\]"),
        ({"sigma": torch.tensor([1.0, -2.0])}, "sigma must be above 0"),
        ({"sigma": torch.tensor([1.0, float("nan")])}, "sigma must be above 0"),
        ({"sigma": torch.ones(3)}, "sigma has B = 3"),
        ({"sample": torch.arange(3)}, "sample has B = 3"),
        ({"sample": torch.arange(2).float()}, "sample must be torch.int64"),
        ({"seed": 2**63}, "seed must be an int from 0"),
        ({"sigma_in": 0.0}, "sigma_in must be a finite number above 0"),
    ],
)
def test_what_does_not_fit_is_named(change, named, rng):
    video, sigma, sample = drawn(rng, 2)
    call = {"video": video, "sigma": sigma, "sample": sample, "sigma_in": 4.0, "seed": 5}
    noisy(video, sigma, sample)  # what passed once does not let a bad sigma by
    with pytest.raises(ValueError, match=f"forward_process: {named}"):
        forward_process(**call | change)


@pytest.mark.gpu
def test_a_sigma_on_the_gpu_that_is_not_above_zero_gives_nan(gpu):
    video, sigma = torch.ones(3, 3, 1, 2, 4, device=gpu), torch.tensor([0.0, 1.0, -1.0], device=gpu)
    for backend in ("cuda", "triton", "eager"):
        out = noisy(video, sigma, torch.arange(3, device=gpu), backend=backend)
        assert out[0].isnan().all() and out[1].isfinite().all() and out[2].isnan().all()


@pytest.mark.gpu
def test_normals_are_within_two_units_of_float64_on_every_backend(gpu):
    """Of sigma alone: the video is zeros, so the result is the noise."""
    video, sample = torch.zeros(4, 3, 16, 36, 64, device=gpu), torch.arange(4, device=gpu) * 2**33
    one = torch.ones(4, device=gpu)
    exact = normals(5, sample, tuple(video.shape[1:]))
    for backend in ("cuda", "triton"):
        eps = noisy(video, one, sample, backend=backend)
        apart = (eps.view(torch.int32) - exact.view(torch.int32)).abs()
        assert apart.max() <= 2, (backend, apart.max())
