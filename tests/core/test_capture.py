"""A captured FIT, with a graph that is played: what goes in, what comes out, what is refused.

The graph itself needs a GPU: tests/gpu/test_capture_gpu.py.
"""

from dataclasses import replace

import pytest
import torch

from snapkernels import quantise
from snapvideo_core import (
    CapturedFIT,
    EDMDiffusion,
    SnapDiffusion,
    capture,
    sample,
    sigma_schedule,
)
from snapvideo_core.config import TINY, TINY_UP
from snapvideo_core.fit import Loss, Mix


@pytest.fixture(autouse=True)
def played(monkeypatch):
    """Instead of a graph: evaluate what lies in the inputs' memory, and write into the outputs'."""

    def recorded(evaluate, device, name):
        outputs = evaluate()

        def replay():
            for memory, result in zip(outputs, evaluate(), strict=True):
                memory.copy_(result)

        return replay, outputs

    monkeypatch.setattr(capture, "recorded", recorded)


@pytest.fixture(params=[TINY, TINY_UP], ids=lambda config: config.name)
def case(request, rng, conditioning, random_fit):
    """A model, its captured form, and a function that makes a call of other numbers each time."""
    config = request.param
    model = random_fit(config, rng)

    def call():
        video = torch.randn(2, 3, config.frames, config.height, config.width, generator=rng)
        return video, torch.rand(2, generator=rng) + 0.1, conditioning(config, 2, rng)

    return model, model.capture(*call()), call


def previous_of(model, rng):
    return torch.randn(2, model.config.num_latents, model.config.latent_dim, generator=rng)


@torch.no_grad()
def test_new_inputs_give_the_new_outputs(case, rng):
    model, captured, call = case
    assert isinstance(captured, CapturedFIT)
    for _ in range(2):
        x, sigma, cond = call()
        previous, scale = previous_of(model, rng), torch.rand(2, generator=rng)
        for given in ((), (previous,)):
            for more in ({}, {"scale_B": scale}):
                expected = model(x, sigma, cond, *given, **more)
                got = captured(x, sigma, cond, *given, **more)
                assert all(map(torch.equal, got, expected))


@torch.no_grad()
def test_every_end_but_a_loss(case, rng):
    model, captured, call = case
    x, sigma, cond = call()
    mix, other = torch.randn(2, 3, generator=rng), torch.randn(x.shape, generator=rng)
    for end in (Mix(mix=mix, video=x, other=other), Mix(mix=mix, video=x), None):
        expected = model(x, sigma, cond, end=end)
        assert all(map(torch.equal, captured(x, sigma, cond, end=end), expected))
    loss = Loss(terms=mix, video=x, sample=torch.arange(2), seed=0)
    with pytest.raises(ValueError, match="captured: end must be a Mix or None, got a Loss"):
        captured(x, sigma, cond, end=loss)


@torch.no_grad()
def test_outputs_stay_unless_the_graphs_own_are_asked_for(case):
    _, captured, call = case
    F, z = captured(*call())
    kept = F.clone(), z.clone()
    own, _ = captured(*call(), clone=False)
    assert torch.equal(F, kept[0]) and torch.equal(z, kept[1])
    before = own.clone()
    captured(*call())
    assert not torch.equal(own, before)


@pytest.mark.parametrize("diffusion", [SnapDiffusion, EDMDiffusion])
def test_the_sampler_and_denoise_take_it_for_the_fit(diffusion, case, rng):
    model, captured, call = case
    x, sigma, cond = call()
    diffusion = diffusion(sigma_in=model.config.sigma_in)
    with torch.no_grad():
        expected = diffusion.denoise(model, x, sigma, cond)
        assert all(map(torch.equal, diffusion.denoise(captured, x, sigma, cond), expected))
    for second_order in (True, False):
        videos = [
            sample(network, diffusion, cond, x, sigmas=sigma_schedule(3), second_order=second_order)
            for network in (model, captured)
        ]
        assert torch.equal(*videos)


def test_it_sees_what_is_written_into_the_weights_and_outlives_the_model(case):
    model, captured, call = case
    given = call()
    before, _ = captured(*given)
    held = {one.untyped_storage().data_ptr() for one in captured._weights}
    assert held >= {one.untyped_storage().data_ptr() for one in model.parameters()}
    with torch.no_grad():
        model.head.bias.add_(1)
    assert not torch.equal(captured(*given)[0], before)


def test_a_quantised_model_is_captured_too(rng, conditioning, random_fit):
    model = quantise(random_fit(TINY, rng).bfloat16(), "fp8")
    x = torch.randn(1, 3, TINY.frames, TINY.height, TINY.width, generator=rng)
    call = (x, torch.ones(1), conditioning(TINY, 1, rng))
    captured = model.capture(*call)
    assert all(map(torch.equal, captured(*call), model(*call)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"x": torch.zeros(1, 3, 4, 18, 32)},
            r"x must be .* \(2, 3, 4, 18, 32\) on cpu",
        ),
        ({"x": torch.zeros(2, 3, 4, 18, 32).double()}, "x must be .*, got torch.float64"),
        ({"sigma": torch.ones(2).double()}, "sigma must be .*, got torch.float64"),
        ({"sigma": 0.5}, "sigma must be .*, got 0.5"),
        ({"previous": torch.zeros(2, 8, 31)}, r"previous must be .*\(2, 8, 32\).*, got .*31"),
        ({"scale_B": torch.ones(1)}, "scale must be"),
        ({"text": torch.zeros(2, 5, 20)}, r"cond.text must be .*\(2, 6, 20\)"),
        ({"text": None}, "cond.text must be .*, got None"),
        ({"low_res": torch.zeros(2, 3, 4, 9, 16)}, "cond.low_res must be None as captured"),
        ({"end": Mix(mix=torch.ones(2, 2), video=torch.zeros(2, 3, 4, 18, 32))}, "end.mix must"),
        ({"end": Mix(mix=torch.ones(2, 3), video=torch.zeros(1))}, "end.video must be"),
    ],
)
def test_what_was_not_captured_is_named(change, message, rng, conditioning, random_fit):
    cond = conditioning(TINY, 2, rng)
    call = {"x": torch.zeros(2, 3, 4, 18, 32), "sigma": torch.ones(2), "previous": None}
    captured = random_fit(TINY, rng).capture(call["x"], call["sigma"], cond)
    before = [one.clone() for one in captured._inputs.values()]
    change = dict(change)
    call |= {name: change.pop(name) for name in list(change) if name in call}
    more = {name: change.pop(name) for name in list(change) if name in ("scale_B", "end")}
    with pytest.raises(ValueError, match=f"^FIT tiny, captured: {message}"):
        captured(call["x"], call["sigma"], replace(cond, **change), call["previous"], **more)
    assert all(map(torch.equal, captured._inputs.values(), before))  # nothing was written


def test_what_cannot_be_captured_is_refused(rng, conditioning, random_fit, monkeypatch):
    model, cond = random_fit(TINY, rng), conditioning(TINY, 1, rng)
    x, sigma = torch.zeros(1, 3, 4, 18, 32), torch.ones(1)
    with pytest.raises(ValueError, match=r"FIT tiny: x must be .*\(2, 3, 4, 17, 32\)"):
        model.capture(x.expand(2, -1, -1, -1, -1)[..., :17, :], sigma, cond)
    with pytest.raises(ValueError, match=r"FIT tiny: capture needs evaluation mode: call eval\(\)"):
        model.train().capture(x, sigma, cond)
    with pytest.raises(ValueError, match=r"FIT tiny: capture needs evaluation mode: call eval\(\)"):
        model.eval().blocks.train()
        model.capture(x, sigma, cond)
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"FIT tiny: capture makes a CUDA graph, .* on cpu"):
        model.eval().capture(x, sigma, cond)


def test_what_is_captured_in_inference_mode_is_called_outside_it(
    case, rng, conditioning, random_fit
):
    """And holds on to no graph of gradients."""
    model, cond = random_fit(TINY, rng).eval(), conditioning(TINY, 1, rng)
    x = torch.randn(1, 3, 4, 18, 32, generator=rng)
    with torch.inference_mode():
        captured = model.capture(x, torch.ones(1), cond)
    again = model.capture(2 * x.clone().requires_grad_(), torch.ones(1), cond)
    for one in (captured, again):
        assert all(tensor.grad_fn is None for tensor in one._inputs.values())
        one(x, torch.ones(1), cond)
