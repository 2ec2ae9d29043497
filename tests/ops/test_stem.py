"""The stem against PyTorch's own calls, and what its spec cannot say."""

import pytest
import torch
from torch.nn.functional import interpolate, layer_norm

from snapkernels import StemWeights, patchify, stem
from snapkernels.dispatch import choose
from snapkernels.ops.stem.spec import STEM
from snapkernels.ops.stem.weights import DIMS
from snapkernels.testing.inputs import random_weights

GROUP, PATCH, DIM = (2, 3, 2), 2, 20


def weights(channels, rng, dtype=torch.float64, tables=1):
    sizes = {"D": DIM, "P": channels * PATCH**2, "N": 12, "S": tables}
    return random_weights(StemWeights, DIMS, sizes, dtype=dtype, generator=rng)


def videos(rng, height=7, batch=2):
    video = torch.randn(batch, 3, 4, height, 12, generator=rng).double()
    low_res = torch.randn(batch, 2, 4, 3, 4, generator=rng).double()
    return video, torch.tensor([0.5, 2.0][:batch]).double(), low_res


def test_it_is_the_calls_it_stands_for(rng):
    video, scale, low_res = videos(rng)
    w = weights(5, rng)
    big = interpolate(low_res.transpose(1, 2).flatten(0, 1), size=(7, 12), mode="bilinear")
    big = big.unflatten(0, (2, 4)).transpose(1, 2)
    x = torch.cat([video * scale.view(-1, 1, 1, 1, 1), big], 1)
    x = torch.cat([x, x.new_zeros(2, 5, 4, 5, 12)], 3)
    tokens = patchify(x, patch=PATCH, group=GROUP)
    y = tokens @ w.weight.T + w.bias
    expected = layer_norm(y, (DIM,), w.norm_weight, w.norm_bias, 1e-6) + w.positions
    for backend in ("eager", "reference"):
        out = stem(video, scale, low_res, w, patch=PATCH, group=GROUP, backend=backend)
        torch.testing.assert_close(out, expected)


def test_nothing_below_the_last_row_is_read(rng):
    """A patch of padding alone is the LayerNorm of the bias, whatever the videos hold."""
    video, scale, low_res = videos(rng)
    w = weights(5, rng)
    out = stem(video * 1e6, scale, low_res * 1e6, w, patch=PATCH, group=GROUP)
    empty = layer_norm(w.bias, (DIM,), w.norm_weight, w.norm_bias, 1e-6) + w.positions[0]
    # The last of six rows of patches: the third row of patches in the second row of groups.
    below = out.unflatten(1, (2, 2, 3)).unflatten(4, GROUP)[:, :, 1, :, :, 2]
    wanted = empty.unflatten(0, GROUP)[:, 2]
    torch.testing.assert_close(below, wanted.expand(below.shape))


def test_upsampling_has_half_pixel_centres_and_keeps_frames_apart():
    """The token is (u, -u) / sqrt(u^2 + eps), with an eps that makes that u / 1000."""
    low_res = torch.zeros(1, 1, 2, 2, 2).double()
    low_res[0, 0, 1] = torch.tensor([[0.0, 1.0], [2.0, 3.0]])
    zeros, ones = torch.zeros(2).double(), torch.ones(2).double()
    weight = torch.tensor([[0.0, 1.0], [0.0, -1.0]]).double()
    w = StemWeights(weight, zeros, ones, zeros, torch.zeros(1, 16, 2).double())
    video, scale = torch.zeros(1, 1, 2, 4, 4).double(), ones[:1]
    for backend in ("eager", "reference"):
        out = stem(video, scale, low_res, w, patch=1, group=(1, 4, 4), eps=1e6, backend=backend)
        up = 1e3 * out[0, :, :, 0].view(2, 4, 4)
        assert not up[0].any()
        row = torch.tensor([0.0, 0.25, 0.75, 1.0]).double()
        torch.testing.assert_close(up[1], row + 2 * row[:, None], rtol=1e-4, atol=1e-6)


def test_group_g_has_its_own_table(rng):
    video, scale, low_res = videos(rng)
    w = weights(5, rng, tables=12)
    out = stem(video, scale, low_res, w, patch=PATCH, group=GROUP)
    bare = stem(
        video, scale, low_res, w._replace(positions=0 * w.positions), patch=PATCH, group=GROUP
    )
    torch.testing.assert_close(out - bare, w.positions.expand(out.shape))


def test_gradients_are_asked_for_one_by_one(rng):
    video, scale, low_res = videos(rng)
    w = weights(5, rng)

    def grads(*tensors):
        for one in tensors:
            one.requires_grad_()
        out = stem(video, scale, low_res, w, patch=PATCH, group=GROUP)
        found = torch.autograd.grad(out.square().sum(), tensors)
        for one in tensors:
            one.requires_grad_(False)
        return found

    everything = grads(video, *w)
    assert everything[0].shape == video.shape
    for one, whole in ((video, everything[0]), (w.bias, everything[2])):
        torch.testing.assert_close(grads(one)[0], whole)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda c: c.update(scale=c["scale"][:1]), "scale has B = 1"),
        (lambda c: c.update(low_res=c["low_res"][:, :, :3]), "low_res has T = 3"),
        (lambda c: c.update(low_res=c["low_res"][:1]), "low_res has B = 1"),
        (lambda c: c.update(low_res=c["low_res"][:, :1]), r"P = \(C \+ c\) \* patch \* patch = 16"),
        (lambda c: c.update(low_res=None), r"weights has P = 20|P = .* = 12"),
        (lambda c: c.update(scale=c["scale"].requires_grad_()), "scale has no gradient here"),
        (lambda c: c.update(group=(2, 3, 5)), "W = 12 is not divisible"),
        (lambda c: c.update(group=(3, 3, 2)), r"T = 4 is not divisible by group\[0\] = 3"),
    ],
)
def test_what_does_not_fit_is_named(change, named, rng):
    video, scale, low_res = videos(rng)
    call = {"video": video, "scale": scale, "low_res": low_res, "weights": weights(5, rng)}
    call |= {"patch": PATCH, "group": GROUP}
    change(call)
    with pytest.raises(ValueError, match=f"stem: .*({named})"):
        stem(**call)


def test_it_has_no_second_derivative_in_a_graph(rng):
    """The registered op says so; it does not return zeros."""
    video, scale, low_res = videos(rng)
    w = weights(5, rng)
    video.requires_grad_()
    op = torch.ops.snapkernels.stem
    out, _ = op(video, scale, low_res, *w, PATCH, GROUP, 1e-6)
    (first,) = torch.autograd.grad(out.square().sum(), video, create_graph=True)
    with pytest.raises(NotImplementedError, match="stem has no second derivative"):
        torch.autograd.grad(first.sum(), video)


@pytest.mark.gpu
def test_a_batch_past_two_to_the_31_is_its_videos_one_by_one(gpu):
    """Sixteen upsampled videos are 2.4e9 token elements."""
    generator = torch.Generator(gpu).manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, device=gpu, generator=generator)

    video, scale, low_res = draw(16, 3, 16, 288, 512), draw(16), draw(16, 3, 16, 36, 64)
    sizes = {"D": 1024, "P": 96, "N": 4608, "S": 1}
    w = random_weights(
        StemWeights, DIMS, sizes, dtype=torch.bfloat16, device=gpu, generator=generator
    )
    at = {"patch": 4, "group": (16, 18, 16)}
    for backend in ("cuda", "triton"):
        whole = stem(video, scale, low_res, w, **at, backend=backend)
        assert whole.numel() > 2**31
        for b in (0, 7, 14, 15):
            one = slice(b, b + 1)
            alone = stem(video[one], scale[one], low_res[one], w, **at, backend=backend)
            assert torch.equal(whole[one], alone)
        del whole


@pytest.mark.gpu
def test_cuda_is_what_the_model_gets(gpu):
    from snapkernels.testing.cases import make_values

    for case in STEM.cases:
        if case.tier == "paper" and case.sizes["B"] < 32:
            values = make_values(STEM, case, torch.bfloat16, gpu)
            assert choose(STEM, None, values).name == "cuda", case.name
