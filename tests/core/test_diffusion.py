"""Table 1 and the identities of appendices D and E, in float64."""

import pytest
import torch

from snapvideo_core import EDMDiffusion, SnapDiffusion

COLUMNS = [EDMDiffusion, SnapDiffusion]
SIGMA_IN = [1.0, 4.0, 32.0]
SIGMA_DATA = [0.5, 1.0]


@pytest.fixture(params=SIGMA_DATA)
def sigma_data(request):
    return request.param


@pytest.fixture(params=SIGMA_IN)
def sigma_in(request):
    return request.param


def draw(rng, batch=64):
    x, eps = (torch.randn(batch, 3, 2, 2, 2, generator=rng).double() for _ in range(2))
    sigma = torch.logspace(-3, 2, batch).double()
    return x, eps, sigma, sigma.view(-1, 1, 1, 1, 1)


@pytest.mark.parametrize("column", COLUMNS)
def test_the_two_forms_of_the_loss_are_one(column, sigma_in, sigma_data, rng):
    """lambda |D - x|^2 = w |F - c_nrm F_tgt|^2, element by element, for any F."""
    diffusion = column(sigma_in=sigma_in, sigma_data=sigma_data)
    x, eps, sigma_B, sigma = draw(rng)
    F = torch.randn(x.shape, generator=rng).double()
    denoised, _ = diffusion.denoise(
        lambda *_: (F, None), diffusion.noise(x, eps, sigma_B), sigma_B, None
    )
    left = diffusion.loss_weight(sigma) * (denoised - x) ** 2
    target = diffusion.c_nrm(sigma) * diffusion.target(x, eps, sigma)
    right = diffusion.weight(sigma) * (F - target) ** 2
    torch.testing.assert_close(left, right, rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(diffusion.loss(F, x, eps, sigma_B), left.mean())


@pytest.mark.parametrize("column", COLUMNS)
def test_the_target_makes_a_perfect_denoiser(column, sigma_in, sigma_data, rng):
    diffusion = column(sigma_in=sigma_in, sigma_data=sigma_data)
    x, eps, sigma_B, sigma = draw(rng)
    target = diffusion.c_nrm(sigma) * diffusion.target(x, eps, sigma)
    denoised, _ = diffusion.denoise(
        lambda *_: (target, None), diffusion.noise(x, eps, sigma_B), sigma_B, None
    )
    torch.testing.assert_close(denoised, x, rtol=1e-8, atol=1e-8)


def test_input_and_target_have_unit_variance(sigma_in, sigma_data):
    """From the coefficients of the independent x and eps, not from samples."""
    diffusion = SnapDiffusion(sigma_in=sigma_in, sigma_data=sigma_data)
    _, _, sigma_B, sigma = draw(torch.Generator())
    one, zero = torch.ones_like(sigma), torch.zeros_like(sigma)

    def variance(f):
        return (sigma_data * f(one, zero)) ** 2 + f(zero, one) ** 2

    for value in (
        variance(lambda x, eps: diffusion.c_in(sigma) * diffusion.noise(x, eps, sigma_B)),
        variance(lambda x, eps: diffusion.c_nrm(sigma) * diffusion.target(x, eps, sigma)),
    ):
        torch.testing.assert_close(value, one)


def test_edm_has_unit_variance_at_sigma_in_1_and_a_spurious_term_elsewhere(sigma_data):
    sigma = torch.logspace(-3, 2, 50).double()
    for sigma_in, spurious in ((1.0, 0.0), (4.0, 0.75)):
        diffusion = EDMDiffusion(sigma_in=sigma_in, sigma_data=sigma_data)
        of_x = diffusion.target(torch.ones_like(sigma), torch.zeros_like(sigma), sigma)
        torch.testing.assert_close(of_x, sigma + spurious * sigma_data**2 / sigma)


def test_columns_are_equal_at_sigma_in_1_with_f_negated(sigma_data, rng):
    edm, ours = (column(sigma_in=1.0, sigma_data=sigma_data) for column in COLUMNS)
    x, eps, sigma_B, sigma = draw(rng)
    torch.testing.assert_close(ours.c_in(sigma), edm.c_in(sigma))
    torch.testing.assert_close(ours.c_skip(sigma), edm.c_skip(sigma))
    torch.testing.assert_close(ours.c_out(sigma), -edm.c_out(sigma))
    torch.testing.assert_close(ours.target(x, eps, sigma), -edm.target(x, eps, sigma))
    torch.testing.assert_close(ours.weight(sigma), edm.weight(sigma))
    F = torch.randn(x.shape, generator=rng).double()
    torch.testing.assert_close(ours.loss(F, x, eps, sigma_B), edm.loss(-F, x, eps, sigma_B))


def test_weight_reaches_sigma_in_squared_and_stays_in_float32(sigma_in):
    diffusion = SnapDiffusion(sigma_in=sigma_in)
    tiny = torch.tensor([1e-5])
    assert diffusion.weight(tiny).item() == pytest.approx(sigma_in**2, rel=1e-4)
    x = torch.ones(1, 3, dtype=torch.bfloat16)
    assert diffusion.noise(x, torch.ones(1, 3), tiny).dtype == torch.float32
    assert diffusion.loss(x, x.float(), x.float(), tiny).dtype == torch.float32


def test_the_network_sees_c_in_x_and_gets_everything(rng):
    diffusion = SnapDiffusion(sigma_in=4.0)
    x, eps, sigma_B, sigma = draw(rng, batch=2)
    x_sigma, seen = diffusion.noise(x, eps, sigma_B), []
    diffusion.denoise(
        lambda *arguments: seen.append(arguments) or (x, None), x_sigma, sigma_B, "cond", "previous"
    )
    ((network_x, network_sigma, cond, previous),) = seen
    torch.testing.assert_close(network_x, x_sigma / (1 / 16 + sigma**2).sqrt())
    assert network_sigma is sigma_B and (cond, previous) == ("cond", "previous")


def test_guidance_moves_away_from_the_null_branch(rng):
    diffusion = SnapDiffusion(sigma_in=4.0)
    x_sigma, null_F, sigma_B, _ = draw(rng, batch=3)
    F = torch.randn(x_sigma.shape, generator=rng).double()
    D, null_D = (
        diffusion.denoise(lambda *_, out=out: (out, None), x_sigma, sigma_B, None)[0]
        for out in (F, null_F)
    )
    for weight in (0.0, 6.5):
        guided = diffusion.guided(F, null_F, x_sigma, sigma_B, weight)
        torch.testing.assert_close(guided, D + weight * (D - null_D))


def test_bad_input_is_named():
    diffusion = SnapDiffusion(sigma_in=4.0)
    with pytest.raises(ValueError, match=r"sigma must be \(2,\), got \(3,\)"):
        diffusion.noise(torch.zeros(2, 3), torch.zeros(2, 3), torch.ones(3))
    with pytest.raises(ValueError, match=r"eps must be \(2, 3\) like x, got \(2, 4\)"):
        diffusion.noise(torch.zeros(2, 3), torch.zeros(2, 4), torch.ones(2))
    for field in ("sigma_in", "sigma_data"):
        with pytest.raises(ValueError, match=f"{field} must be above 0, got 0"):
            SnapDiffusion(**{"sigma_in": 4.0, field: 0})
