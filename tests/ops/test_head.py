"""The head's ends against each other and PyTorch's own calls."""

import pytest
import torch
from torch.nn.functional import layer_norm

from snapkernels import (
    HeadWeights,
    forward_process,
    head,
    head_loss,
    head_mix,
    patchify,
    unpatchify,
    video_mix,
)
from snapkernels.ops.head.kernels import triton_bwd
from snapkernels.ops.head.spec import HEAD
from snapkernels.ops.head.weights import DIMS
from snapkernels.testing import proofs
from snapkernels.testing.inputs import random_weights

GROUP, PATCH, DIM, SIZE = (2, 3, 2), 2, 20, (4, 7, 12)
AT = {"patch": PATCH, "group": GROUP}


@pytest.fixture
def parts(rng):
    """Tokens of two videos with five padded rows, weights, and two videos."""
    sizes = {"D": DIM, "P": 3 * PATCH**2}
    w = random_weights(HeadWeights, DIMS, sizes, dtype=torch.float64, generator=rng)
    tokens = torch.randn(2, 12, 12, DIM, generator=rng).double()
    video, other = (torch.randn(2, 3, *SIZE, generator=rng).double() for _ in range(2))
    return tokens, w, video, other


def of(table, column):
    return table[:, column].view(-1, 1, 1, 1, 1)


def test_it_is_the_calls_it_stands_for(parts):
    tokens, w, _, _ = parts
    y = layer_norm(tokens, (DIM,), w.norm_weight, w.norm_bias, 1e-6) @ w.weight.T + w.bias
    expected = unpatchify(y, size=(4, 12, 12), **AT)[..., :7, :]
    for backend in ("eager", "reference"):
        torch.testing.assert_close(head(tokens, w, size=SIZE, **AT, backend=backend), expected)


def test_a_mixture_is_a_sum(parts, rng):
    tokens, w, video, other = parts
    mix = torch.randn(2, 3, generator=rng).double()
    F = head(tokens, w, size=SIZE, **AT)
    two = of(mix, 0) * F + of(mix, 1) * video
    torch.testing.assert_close(head_mix(tokens, video, None, mix, w, **AT), two)
    three = two + of(mix, 2) * other
    torch.testing.assert_close(head_mix(tokens, video, other, mix, w, **AT), three)
    torch.testing.assert_close(video_mix(F, video, other, mix), three)


def test_the_loss_knows_the_noise_of_the_forward_process(parts, rng):
    """eps comes back out of x_sigma, and the loss is zero where F is the target."""
    tokens, w, video, _ = parts
    sample, terms = torch.tensor([3, 2**40]), torch.randn(2, 3, generator=rng).double()
    sigma = torch.tensor([0.5, 2.0])
    x_sigma = forward_process(video, sigma, sample, sigma_in=4.0, seed=9)
    eps = (x_sigma - video / 4) / sigma.view(-1, 1, 1, 1, 1)
    F = head(tokens, w, size=SIZE, **AT)
    error = F - of(terms, 1) * video - of(terms, 2) * eps
    expected = (of(terms, 0) * error**2).mean()
    loss = head_loss(tokens, video, sample, terms, w, seed=9, **AT)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
    assert loss.shape == ()
    stale = head_loss(tokens, video, sample + 1, terms, w, seed=9, **AT)
    assert abs(stale - loss) > 1e-3 * abs(loss)


def test_padded_rows_have_no_part_in_the_loss(parts, rng):
    tokens, w, video, _ = parts
    sample, terms = torch.arange(2), torch.randn(2, 3, generator=rng).double()
    tokens.requires_grad_()
    loss = head_loss(tokens, video, sample, terms, w, seed=0, **AT)
    (grad,) = torch.autograd.grad(loss, tokens)
    # Rows of patches by (groups T, H, W, group T, H, W): of six rows the last two are padding.
    by_row = grad.unflatten(1, (2, 2, 3)).unflatten(4, GROUP)
    assert not by_row[:, :, 1, :, :, 1:].any() and by_row[:, :, 1, :, :, :1].any()


def saved_by(op, *call):
    """What Triton's forward keeps, of a call in float32: on a GPU, or interpreted."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    moved = [
        one.float() if torch.is_tensor(one) and one.is_floating_point() else one for one in call
    ]
    moved = [one.to(device) if torch.is_tensor(one) else one for one in moved]
    _, *saved = getattr(torch.ops.snapkernels, op).default(*moved, "triton")
    return [one.double().cpu() for one in saved]


def test_features_and_moments_are_kept_in_token_order(parts, rng):
    """Those of rows of pixels that are cropped too."""
    tokens, w, video, other = parts
    features = layer_norm(tokens, (DIM,), w.norm_weight, w.norm_bias, 1e-6) @ w.weight.T + w.bias
    rstd = 1 / (tokens.var(-1, correction=0) + 1e-6).sqrt()
    expected = [features, torch.stack([tokens.mean(-1), rstd], -1)]
    mix = torch.randn(2, 3, generator=rng).double()
    for saved in (
        saved_by("head", tokens, *w, SIZE, PATCH, GROUP, 1e-6),
        saved_by("head_mix", tokens, video, other, mix, *w, PATCH, GROUP, 1e-6),
    ):
        for one, wanted in zip(saved, expected, strict=True):
            torch.testing.assert_close(one, wanted, rtol=1e-5, atol=1e-5)


def test_the_loss_keeps_the_gradient_at_its_features_and_two_sums_of_it(parts, rng):
    tokens, w, video, _ = parts
    sample, terms = torch.tensor([3, 2**40]), torch.randn(2, 3, generator=rng).double()
    F = head(tokens, w, size=SIZE, **AT).requires_grad_()
    eps = forward_process(0 * video, torch.ones(2), sample, sigma_in=1.0, seed=9)
    error = F - of(terms, 1) * video - of(terms, 2) * eps
    (grad,) = torch.autograd.grad((of(terms, 0) * error**2).sum() / 2, F)
    dF = patchify(torch.cat([grad, grad.new_zeros(2, 3, 4, 5, 12)], 3), **AT)
    mean, rstd = tokens.mean(-1), 1 / (tokens.var(-1, correction=0) + 1e-6).sqrt()
    g = (dF @ w.weight) * w.norm_weight
    xhat = (tokens - mean[..., None]) * rstd[..., None]
    rows = torch.stack([mean, rstd, g.mean(-1), (g * xhat).mean(-1)], -1)
    saved = saved_by("head_loss", tokens, video, sample, terms, *w, 9, PATCH, GROUP, 1e-6)
    for one, wanted in zip(saved, (dF, rows), strict=True):
        torch.testing.assert_close(one, wanted, rtol=1e-4, atol=1e-4)


def test_ranges_of_several_steps_add_up(monkeypatch):
    """The small cases have no more blocks of tokens than there are ranges: here, 18 in 4."""
    monkeypatch.setattr(triton_bwd, "TRITON_BWD_PARTS", 4)
    case = next(case for case in HEAD.cases if case.name == "odd")
    proofs.gradients(HEAD, case, HEAD.backend("triton"), torch.float32)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"video": torch.zeros(2, 3, 4, 13, 12).double()}, "tokens has G = 12, but G = .* = 18"),
        ({"video": torch.zeros(1, 3, 4, 7, 12).double()}, "video has B = 1"),
        (
            {"video": torch.zeros(2, 2, 4, 7, 12).double()},
            "weights.weight has P = 12, but P = .* = 8",
        ),
        ({"mix": torch.zeros(2, 2).double()}, "mix has M = 2, but M = 3"),
        ({"mix": torch.zeros(3, 3).double()}, "mix has B = 3"),
        ({"other": torch.zeros(2, 3, 4, 8, 12).double()}, "other has H = 8"),
    ],
)
def test_what_does_not_fit_is_named(change, named, parts):
    tokens, w, video, _ = parts
    call = {"tokens": tokens, "video": video, "other": None, "mix": torch.zeros(2, 3).double()}
    with pytest.raises(ValueError, match=f"head_mix: .*({named})"):
        head_mix(**call | {"weights": w} | AT | change)


@pytest.mark.gpu
def test_a_batch_past_two_to_the_31_is_its_videos_one_by_one(gpu):
    """Sixteen upsampled videos are 2.4e9 token elements."""
    generator = torch.Generator(gpu).manual_seed(0)
    tokens = torch.randn(16, 32, 4608, 1024, device=gpu, generator=generator, dtype=torch.bfloat16)
    sizes = {"D": 1024, "P": 48}
    w = random_weights(
        HeadWeights, DIMS, sizes, dtype=torch.bfloat16, device=gpu, generator=generator
    )
    at = {"size": (16, 288, 512), "patch": 4, "group": (16, 18, 16)}
    for backend in ("cuda", "triton"):
        whole = head(tokens, w, **at, backend=backend)
        for b in (0, 7, 14, 15):
            alone = head(tokens[b : b + 1], w, **at, backend=backend)
            assert torch.equal(whole[b : b + 1], alone)
