"""The training curves at small sizes on the CPU: what both see, gates, the record, bad input."""

import json

import curves
import pytest
import torch

from snapkernels import library
from snapkernels.ops.group_attn import config as launch
from snapkernels.ops.group_attn import cost
from snapkernels.testing import record
from snapvideo_core import FIT, PRESETS, read_clip

CPU, GPU = torch.device("cpu"), torch.device("cuda")
TINY = PRESETS["tiny"]
CEILINGS = {"copy_tb_s": 0.01, "fp32_tflop_s": 0.1}


@pytest.fixture(scope="module")
def clip():
    size = (TINY.height, TINY.width)
    return read_clip(curves.CLIP, frames=curves.CLIP_FRAMES, size=size, framerate=curves.FRAMERATE)


@pytest.fixture
def on_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(curves, "measure_ceilings", lambda *_: CEILINGS)
    monkeypatch.setattr(curves, "EVERY", 10)
    monkeypatch.setattr(curves, "FALLEN", 2.0)  # twenty steps are too few to tell


def test_the_small_model_is_one_that_the_kernels_take():
    small = curves.SMALL
    sizes = {"B": 2, "G": small.num_groups, "N": small.group_tokens, "I": small.patch_dim}
    sizes |= {"L": small.num_latents // small.num_groups}
    sizes |= {"num_heads": small.patch_dim // small.patch_head_dim}
    assert cost.read_keeps(sizes | {"D": small.latent_dim, "C": small.patch_dim})
    assert cost.write_keeps(sizes | {"D": small.patch_dim, "C": small.latent_dim})
    assert sizes["L"] == launch.CUDA_LATENTS
    assert sizes["num_heads"] * sizes["L"] == launch.CUDA_COLUMNS
    assert small.patch_dim % launch.CUDA_CHANNELS == 0
    assert small.group_tokens % launch.CUDA_READ_TOKENS == 0


def given_to(name, clip, monkeypatch, steps=2):
    """What the steps of a variant get: initial weights, videos, sigma, noise, what is drawn."""
    found = []

    def seen(model, diffusion, video, cond, *, sigma, sample, seed, generator):
        noisy = curves.forward_process(
            video, sigma, sample, sigma_in=diffusion.sigma_in, seed=seed, backend=model.backend
        )
        first = [] if found else [one.detach().clone() for one in model.parameters()]
        state = generator.get_state()
        found.append([*first, video, cond.text, cond.resolution, sigma, sample, noisy, state])
        keywords = {"sigma": sigma, "sample": sample, "seed": seed, "generator": generator}
        return whole(model, diffusion, video, cond, **keywords)

    whole = curves.training_loss
    monkeypatch.setattr(curves, "training_loss", seen)
    torch.manual_seed(curves.SEED)
    initial = FIT(TINY)
    batches = curves.batches(TINY, clip, steps, 2, CPU)
    curve = curves.train(name, initial, torch.float32, batches, steps)
    monkeypatch.setattr(curves, "training_loss", whole)
    assert len(found) == len(curve.losses) == steps
    return found


def same(some, others):
    pairs = [zip(*pair, strict=True) for pair in zip(some, others, strict=True)]
    return [all(torch.equal(one, other) for one, other in pair) for pair in pairs]


def test_both_variants_are_given_the_same_and_every_step_something_else(clip, monkeypatch):
    ours, eager = (given_to(name, clip, monkeypatch) for name in curves.VARIANTS)
    assert same(ours, eager) == [True] * 2
    for first, second in zip(ours[0][-4:], ours[1][-4:], strict=True):
        assert not torch.equal(first, second)  # sigma, sample, x_sigma, state of the generator
    monkeypatch.setattr(curves, "SEED", 1)
    other = given_to("eager", clip, monkeypatch)
    assert same(ours, other) == [False] * 2


def test_updates_below_a_bf16s_precision_are_not_lost(clip, monkeypatch):
    """The float32 weights take them up, and those they start from stay as they are."""
    monkeypatch.setattr(curves, "LEARNING_RATE", 1e-5)
    torch.manual_seed(0)
    initial, seen = FIT(TINY), []
    before = initial.state_dict()["head.weight"].clone()
    whole = curves.training_loss

    def noted(model, *given, **more):
        seen.append(model.head.weight)
        return whole(model, *given, **more)

    monkeypatch.setattr(curves, "training_loss", noted)
    curves.train("ours", initial, torch.bfloat16, curves.batches(TINY, clip, 8, 1, CPU), 8)
    after = seen[0]
    assert after.dtype == torch.bfloat16 and torch.equal(initial.head.weight, before)
    large = before.abs() > 0.1  # one step is less than half of a unit in the last place there
    assert large.any() and (after[large] != before[large].bfloat16()).any()


def test_the_rate_rises_and_falls_to_nothing():
    rates = [curves.rate(step, 500) for step in range(500)]
    assert rates[0] == pytest.approx(1 / 25) and max(rates) == rates[24] > 0.99
    assert rates[24:] == sorted(rates[24:], reverse=True) and rates[-1] < 1e-4


def test_a_run_writes_a_record_with_both_curves(on_the_cpu, tmp_path, capsys):
    target = tmp_path / "curves.json"
    flags = ["--steps", "20", "--batch", "1", "--json", str(target)]
    assert curves.main(flags) == 0
    written = json.loads(target.read_text())
    assert record.problems(written) == []
    assert written["command"] == "python bench/curves.py --preset tiny --steps 20 --batch 1"
    ours, eager = written["rows"]
    assert (ours["variant"], eager["variant"]) == ("ours-fp32", "eager-fp32")
    assert ours["ratio"] == 1 and ours["noise_difference"] == 0
    for row in (ours, eager):
        assert row["gate"] == "ok" and row["case"] == "model/tiny/curve" and row["unit"] == "loss"
        assert len(row["losses"]) == 20
        assert row["value"] == pytest.approx(sum(row["losses"][-4:]) / 4)
        assert row["p20"] <= row["value"] <= row["p80"]
        assert row["backends"]["group_write"] == row["backends"]["head_loss"] == ["eager"]
        assert {"group_read", "group_read masked"} <= row["backends"].keys()
    out = capsys.readouterr().out
    assert "ours   step   10: loss " in out and "eager  step   20: loss " in out
    assert "model/tiny/curve ours-fp32: " in out and "1.00000 of eager's" in out


def rows_of(ours, eager, device=GPU, noise=0.0):
    return curves.rows_of({"ours": ours, "eager": eager}, TINY, 2, noise, device, torch.bfloat16)


FUSED = {"group_read": {"cuda"}, "group_read masked": {"eager"}, "group_write": {"cuda"}}
EAGER = {op: {"eager"} for op in FUSED}
FALLING = [9.0] * 10 + [1.0] * 40


@pytest.mark.parametrize(
    ("ours", "eager", "noise", "reason"),
    [
        ((FALLING, FUSED), (FALLING, EAGER), 0.0, "ok"),
        (([9.0] * 40 + [1.004] * 10, FUSED), (FALLING, EAGER), 0.0, "ok"),
        (([9.0] * 40 + [1.006] * 10, FUSED), (FALLING, EAGER), 0.0, "mean loss 1.00600 of eager"),
        (([9.0] * 40 + [0.994] * 10, FUSED), (FALLING, EAGER), 0.0, "mean loss 0.99400 of eager"),
        (([9.0] * 49 + [float("nan")], FUSED), (FALLING, EAGER), 0.0, "a loss is not finite"),
        (([9.0] * 40 + [8.8] * 10, FUSED), (FALLING, EAGER), 0.0, "the loss fell from 9 to 8.8"),
        ((FALLING, FUSED), (FALLING, EAGER), 1e-3, "the noise differs by 1.0e-03"),
        ((FALLING, EAGER), (FALLING, EAGER), 0.0, "group_read ran by eager, not by cuda, triton"),
        (
            (FALLING, FUSED | {"group_write": {"cuda", "eager"}}),
            (FALLING, EAGER),
            0.0,
            "group_write ran by cuda, eager, not by cuda, triton",
        ),
    ],
)
def test_what_makes_our_gate_red(ours, eager, noise, reason):
    first, second = rows_of(curves.Curve(*ours), curves.Curve(*eager), noise=noise)
    assert first["gate"].startswith(reason) and second["gate"] == "ok"
    assert ("value" in first) == (reason == "ok") and len(first["losses"]) == 50
    assert reason.removeprefix("ok") in curves.line(first)
    given = record.new_record("python bench/curves.py", CPU, {}, CEILINGS, [first, second])
    assert record.problems(given) == [] and json.dumps(given, allow_nan=False)


def test_the_eager_curve_is_eager_throughout():
    ours, eager = curves.Curve(FALLING, FUSED), curves.Curve(FALLING, EAGER | {"stem": {"cuda"}})
    assert rows_of(ours, eager)[1]["gate"] == "stem ran by cuda, not by eager"
    on_a_cpu = rows_of(curves.Curve(FALLING, EAGER), curves.Curve(FALLING, EAGER), CPU)
    assert [row["gate"] for row in on_a_cpu] == ["ok", "ok"]  # it has no kernels


def test_what_ran_is_seen_whoever_named_it(clip):
    """Backends are noted where they are chosen, and the ops are as before afterwards."""
    model = FIT(TINY, backend="reference")
    data = next(curves.batches(TINY, clip, 1, 1, CPU))
    before = library.choose
    with curves.backends_chosen() as found:
        model(data.video, data.sigma, data.cond)
    assert found["group_read"] == found["group_read masked"] == {"reference"}
    assert library.choose is before


def test_a_red_gate_is_the_exit_code(on_the_cpu, monkeypatch, tmp_path, capsys):
    honest = curves.forward_process

    def other_noise(*given, seed, backend, **more):
        return honest(*given, seed=seed + (backend == "eager"), backend=backend, **more)

    monkeypatch.setattr(curves, "forward_process", other_noise)
    target = tmp_path / "curves.json"
    flags = ["--steps", "20", "--batch", "1", "--json", str(target)]
    assert curves.main(flags) == 1
    assert "ours-fp32: no figure: the noise differs by" in capsys.readouterr().out
    ours, eager = json.loads(target.read_text())["rows"]
    assert "value" not in ours and eager["gate"] == "ok"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "4b"], "invalid choice: '4b'"),
        (["--steps", "0"], "must be a whole number above 0, got '0'"),
        (["--batch", "two"], "must be a whole number above 0, got 'two'"),
        (["--json", "no/such/folder/c.json"], "it must be a file in a folder that exists"),
        (["--json", "bench"], "it must be a file in a folder that exists"),
    ],
)
def test_bad_input_is_one_clear_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        curves.main(arguments)
    assert stopped.value.code == 2 and message in capsys.readouterr().err.splitlines()[-1]


def test_a_clip_that_is_not_there_is_one_clear_line(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(curves, "CLIP", tmp_path / "gone.mp4")
    assert curves.main([]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith("error: ") and "gone.mp4" in said
