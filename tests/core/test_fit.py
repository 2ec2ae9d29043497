"""The model: its two backends, conditioning, self-conditioning, padding, upsampler, state dict."""

import math
from dataclasses import replace

import by_hand
import pytest
import torch

from snapkernels import unpatchify
from snapkernels.testing.numerics import relative_rms
from snapvideo_core import FIT, Conditioning
from snapvideo_core.config import TINY, TINY_UP

CONFIGS = [TINY, TINY_UP, replace(TINY, name="tiny-token", positions="token")]


@pytest.fixture(params=CONFIGS, ids=lambda c: c.name)
def case(request, rng, conditioning, random_fit):
    config = request.param
    video = torch.randn(2, 3, config.frames, config.height, config.width, generator=rng)
    sigma = torch.rand(2, generator=rng) + 0.1
    previous = torch.randn(2, config.num_latents, config.latent_dim, generator=rng)
    return random_fit(config, rng), video, sigma, conditioning(config, 2, rng), previous


@torch.no_grad()
@pytest.mark.parametrize("backend", ["reference", "eager"])
def test_it_is_the_network_written_out_by_hand(case, backend):
    model, video, sigma, cond, previous = case
    fields = vars(cond).items()
    cond = replace(cond, **{n: v.double() for n, v in fields if v is not None and n != "text_mask"})
    double = FIT(model.config, backend=backend).eval().double()
    double.load_state_dict(model.state_dict())
    F, z = double(video.double(), sigma.double(), cond, previous)
    expected_F, expected_z = by_hand.fit(
        model.state_dict(), model.config, video, sigma, cond, previous
    )
    whole = unpatchify(
        expected_F,
        size=(model.config.frames, model.config.padded_height, model.config.width),
        group=model.config.group,
    )
    assert relative_rms(z, expected_z) < 1e-12
    assert relative_rms(F, whole[..., : model.config.height, :]) < 1e-12


@torch.no_grad()
def test_eager_agrees_with_the_float64_reference(case):
    model, *inputs = case
    reference = FIT(model.config, backend="reference").eval().double()
    reference.load_state_dict(model.state_dict())
    F, z = model(*inputs)
    expected_F, expected_z = reference(*inputs)
    assert expected_F.dtype == torch.float64
    assert relative_rms(F, expected_F) < 1e-6
    assert relative_rms(z, expected_z) < 1e-6


def test_shapes_and_that_every_weight_is_reached(case):
    model, video, sigma, cond, previous = case
    F, z = model(video, sigma, cond, previous)
    assert F.shape == video.shape
    assert z.shape == previous.shape
    (F.square().sum() + z.square().sum()).backward()
    unreached = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert unreached == []


@torch.no_grad()
def test_everything_it_is_conditioned_on_matters(case):
    model, video, sigma, cond, previous = case
    F, _ = model(video, sigma, cond, previous)
    changes = {
        "framerate": cond.framerate * 2,
        "resolution": cond.resolution.flip(1) * 2,
        "text": cond.text.flip(1),
        "text_mask": ~cond.text_mask | (torch.arange(model.config.text_length) == 0),
    }
    if model.config.low_res:
        changes |= {"low_res": -cond.low_res, "augmentation": 1 - cond.augmentation}
    for name, value in changes.items():
        changed, _ = model(video, sigma, replace(cond, **{name: value}), previous)
        assert relative_rms(changed, F) > 1e-4, name
    assert relative_rms(model(video, sigma * 3, cond, previous)[0], F) > 1e-4
    assert relative_rms(model(video, sigma, cond, -previous)[0], F) > 1e-4


@torch.no_grad()
def test_masked_text_does_not_matter(case):
    model, video, sigma, cond, previous = case
    noise = torch.where(cond.text_mask[..., None], 0.0, 100.0)
    F, _ = model(video, sigma, cond, previous)
    changed, _ = model(video, sigma, replace(cond, text=cond.text + noise), previous)
    torch.testing.assert_close(changed, F)


@torch.no_grad()
def test_videos_of_a_batch_do_not_mix(case):
    model, video, sigma, cond, previous = case
    fields = {n: v[1:] if isinstance(v, torch.Tensor) else v for n, v in vars(cond).items()}
    alone, _ = model(video[1:], sigma[1:], Conditioning(**fields), previous[1:])
    together, _ = model(video, sigma, cond, previous)
    assert relative_rms(alone, together[1:]) < 1e-5


@torch.no_grad()
def test_no_previous_latents_means_zeros_and_a_fresh_model_ignores_them(case, rng, conditioning):
    model, video, sigma, cond, previous = case
    none, _ = model(video, sigma, cond)
    zeros, _ = model(video, sigma, cond, torch.zeros_like(previous))
    assert torch.equal(none, zeros)
    fresh = FIT(model.config).eval()
    assert torch.equal(fresh(video, sigma, cond)[0], fresh(video, sigma, cond, previous)[0])


@torch.no_grad()
def test_padding_rows_are_zeros_at_the_bottom(rng, conditioning, random_fit):
    """A model of the padded height, fed zero rows, gives the same on the real rows."""
    padded = replace(TINY, height=TINY.padded_height)
    model, tall = random_fit(TINY, rng), FIT(padded).eval()
    tall.load_state_dict(model.state_dict())
    video = torch.randn(1, 3, TINY.frames, TINY.height, TINY.width, generator=rng)
    cond, sigma = conditioning(TINY, 1, rng), torch.ones(1)
    rows = torch.zeros(1, 3, TINY.frames, padded.height - TINY.height, TINY.width)
    F, _ = model(video, sigma, cond)
    expected, _ = tall(torch.cat([video, rows], dim=3), sigma, cond)
    assert torch.equal(F, expected[..., : TINY.height, :])


@torch.no_grad()
def test_an_upsampler_starts_as_the_first_stage(rng, conditioning):
    cond, sigma = conditioning(TINY_UP, 1, rng), torch.ones(1)
    model = FIT(TINY_UP).eval()
    video = torch.randn(1, 3, TINY_UP.frames, TINY_UP.height, TINY_UP.width, generator=rng)
    F, _ = model(video, sigma, cond)
    other, _ = model(video, sigma, replace(cond, low_res=-cond.low_res))
    assert torch.equal(F, other)


def test_an_image_is_a_finite_condition(rng, conditioning, random_fit):
    cond = replace(conditioning(TINY, 2, rng), framerate=torch.tensor([math.inf, 24.0]))
    video = torch.randn(2, 3, TINY.frames, TINY.height, TINY.width, generator=rng)
    F, _ = random_fit(TINY, rng)(video, torch.ones(2), cond)
    assert F.isfinite().all()
    assert relative_rms(F[:1], F[1:]) > 1e-4


@torch.no_grad()
def test_close_framerates_are_told_apart_in_bf16(rng, random_fit):
    """An embedding of 1 / framerate in seconds would differ in ten of its 256 features."""
    embed = random_fit(TINY, rng).bfloat16().conditioning.framerate
    at_24, at_25, image = embed(1000 / torch.tensor([24.0, 25.0, math.inf])).float()
    assert relative_rms(at_25, at_24) > 0.02
    assert relative_rms(image, at_24) > 0.02


def test_label_dropout_zeroes_the_features_and_keeps_the_mask(rng, conditioning):
    cond = conditioning(TINY, 2, rng)
    dropped = cond.with_text_kept(torch.tensor([True, False]))
    assert torch.equal(dropped.text[0], cond.text[0])
    assert not dropped.text[1].any()
    assert torch.equal(dropped.text_mask, cond.text_mask)


def test_dropout_acts_in_the_global_layers_of_training_only(rng, conditioning, random_fit):
    model = random_fit(TINY, rng)
    video = torch.randn(1, 3, TINY.frames, TINY.height, TINY.width, generator=rng)
    arguments = (video, torch.ones(1), conditioning(TINY, 1, rng))
    assert torch.equal(model(*arguments)[0], model(*arguments)[0])
    model.train()
    assert not torch.equal(model(*arguments)[0], model(*arguments)[0])
    active = [n for n, m in model.named_modules() if getattr(m, "dropout", 0) == TINY.dropout]
    assert active == [f"blocks.{b}.global_layers.0.1" for b in range(TINY.blocks)]


def test_state_dict_keeps_separate_logical_matrices():
    state = FIT(TINY).state_dict()
    for sublayer in ("cond_read", "read", "write", "global_layers.0.0"):
        for matrix in "qkvo":
            assert state[f"blocks.1.{sublayer}.{matrix}.weight"].dim() == 2


def test_initial_weights():
    torch.manual_seed(0)
    model = FIT(replace(TINY, positions="token", num_latents=64))
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            assert not module.bias.any(), name
            bound = math.sqrt(6 / (module.in_features + module.out_features))
            assert 0.8 * bound < module.weight.abs().max() <= bound, name
        if isinstance(module, torch.nn.LayerNorm):
            gain = 0.0 if name == "self_conditioning.norm" else 1.0
            assert (module.weight == gain).all() and not module.bias.any(), name
    for table in (model.positions, model.self_conditioning.latents):
        assert 0.03 < table.abs().max() <= 0.04
        assert table.std().item() == pytest.approx(0.0176, rel=0.05)  # 0.02, cut at two of them


def test_autocast_runs_an_fp32_model(rng, conditioning, random_fit):
    model, cond = random_fit(TINY, rng), conditioning(TINY, 2, rng)
    video = torch.randn(2, 3, TINY.frames, TINY.height, TINY.width, generator=rng)
    F, _ = model(video, torch.ones(2), cond)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        narrow, latents = model(video, torch.ones(2), cond)
    narrow.float().square().sum().backward()
    assert 1e-4 < relative_rms(narrow, F) < 0.1
    assert latents.dtype == torch.float32
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@torch.no_grad()
def test_weights_decide_the_dtype(rng, conditioning):
    model = FIT(TINY).eval().bfloat16()
    video = torch.randn(1, 3, TINY.frames, TINY.height, TINY.width, generator=rng)
    F, z = model(video, torch.ones(1), conditioning(TINY, 1, rng))
    assert z.dtype == torch.bfloat16 and F.dtype == torch.float32


@pytest.mark.parametrize(
    ("config", "change", "message"),
    [
        (TINY, {"x": torch.zeros(1, 3, 4, 20, 32)}, r"x must be .*\(1, 3, 4, 18, 32\), got .* 20"),
        (TINY, {"x": torch.zeros(1, 3, 4, 18, 32).int()}, "x must be a floating point tensor"),
        (TINY, {"sigma": torch.ones(2)}, r"sigma must be .*\(1,\), got torch.float32 \(2,\)"),
        (TINY, {"sigma": 0.5}, "sigma must be a floating point tensor .*, got 0.5"),
        (TINY, {"framerate": torch.ones(1, 1)}, "cond.framerate must be"),
        (TINY, {"text": torch.zeros(1, 6, 21)}, r"cond.text must be .*\(1, 6, 20\)"),
        (TINY, {"text": None}, "cond.text must be .*, got None"),
        (TINY, {"text_mask": torch.ones(1, 5, dtype=torch.bool)}, "cond.text_mask must be"),
        (TINY, {"text_mask": torch.ones(1, 6).long()}, "cond.text_mask must be a bool tensor"),
        (TINY, {"previous": torch.zeros(1, 8, 31)}, r"previous must be .*\(1, 8, 32\)"),
        (TINY, {"low_res": torch.zeros(1, 3, 4, 9, 16)}, "are an upsampler's"),
        (TINY_UP, {"low_res": None}, r"cond.low_res must be .*\(1, 3, 4, 18, 32\), got None"),
        (TINY_UP, {"low_res": torch.zeros(1, 3, 2, 18, 32)}, "cond.low_res must be"),
        (TINY_UP, {"augmentation": None}, "cond.augmentation must be .*, got None"),
    ],
)
def test_it_names_what_is_wrong(config, change, message, rng, conditioning):
    cond = conditioning(config, 1, rng)
    x = torch.zeros(1, 3, config.frames, config.height, config.width)
    call = {"x": x, "sigma": torch.ones(1), "previous": None}
    call |= {name: change.pop(name) for name in list(change) if name in call}
    with pytest.raises(ValueError, match=f"^FIT {config.name}: .*{message}"):
        FIT(config)(call["x"], call["sigma"], replace(cond, **change), call["previous"])
