"""The error of the attention core's formats: exact where it must be, and a lost scale is seen."""

import attention_error as bench
import pytest
import torch
from attention_error import DISTRIBUTIONS, FORMATS, NUMBERS, SOFTMAX, Distribution, Format, Shape

from snapkernels.testing import record
from snapkernels.testing.numerics import relative_rms

TINY = Shape(tokens=200, width=256, head_dim=64)  # a tail of 72 tokens
CPU = torch.device("cpu")


def ratios(distribution, shape=TINY):
    errors = bench.errors_of(shape, distribution, 1, CPU)
    return {name: error / errors["bf16"][0] for name, (error,) in errors.items()}


@pytest.fixture
def unrounded(monkeypatch):
    monkeypatch.setattr(bench, "rounded_rows", lambda rows: rows)
    monkeypatch.setitem(NUMBERS, "float32", lambda x, bound: x)
    monkeypatch.setitem(SOFTMAX, "float32", lambda scores: scores.exp())


@pytest.mark.parametrize("step", ["smooth", "fold", "rotate", "balance"])
@pytest.mark.parametrize(
    "name", ["normal", "norm_bias", "outlier_channels", "outlier_values", "sink"]
)
def test_what_is_done_to_the_core_leaves_the_branch(name, step, unrounded):
    latents, w = bench.draw(TINY, DISTRIBUTIONS[name], 0, CPU)
    form = Format("float32", "float32", "float32", **{step: True})
    actual = bench.branch(latents, w, TINY.head_dim, form)
    assert relative_rms(actual, bench.truth(latents, w, TINY.head_dim)) < 1e-4


def test_int8_beats_e4m3_on_normal_numbers_and_both_cost_something():
    found = ratios(Distribution())
    assert 1.0 < found["int8"] < 1.1 < found["e4m3"] < 1.5
    assert found["int8_token"] < found["int8"]


@pytest.mark.parametrize(
    ("name", "worse", "better", "factor"),
    [
        ("k_bias", "int8_rough", "int8", 1.2),
        ("k_bias", "e4m3", "e4m3_smooth", 1.5),
        ("outlier_channels", "int8", "int8_balanced", 2),
        ("outlier_channels", "e4m3_rotated", "e4m3", 2),
        ("outlier_values", "int8", "int8_balanced", 2),
        ("v_bias", "int8_dithered", "int8_folded", 4),
        ("sink", "int8_balanced", "int8_dithered", 1.3),
    ],
)
def test_a_distribution_tells_formats_apart(name, worse, better, factor):
    found = ratios(DISTRIBUTIONS[name], Shape(512, 256, 64))
    assert found[worse] > factor * found[better]


@pytest.mark.parametrize(
    ("table", "name", "wrong"),
    [
        (NUMBERS, "int8", lambda x, bound: 1.1 * bench.int8_runs(x)),
        (NUMBERS, "int8", lambda x, bound: bench.int8(x, x[:, :1].abs().amax()).roll(1, 0)),
        (SOFTMAX, "uint8", lambda scores: bench.uint8(scores.exp() / 64)),
        (SOFTMAX, "uint8", lambda scores: bench.uint8((scores / 2).exp())),
    ],
)
def test_a_lost_scale_is_seen(table, name, wrong, monkeypatch):
    monkeypatch.setitem(table, name, wrong)
    assert ratios(Distribution())["int8"] > bench.BAR


def test_int8_is_within_half_a_step_of_its_own_runs_scale():
    x = torch.randn(2, 200, 64)
    x[1, 5] *= 100
    off = (bench.int8_runs(x) - x).abs()
    for head, run in ((0, slice(0, 128)), (1, slice(0, 128)), (1, slice(128, 200))):
        step = x[head, run].abs().max() / 127
        assert step / 3 < off[head, run].max() <= step / 2 * 1.001
    assert bench.int8_runs(torch.zeros(1, 3, 4)).eq(0).all()


@pytest.mark.parametrize("dither", [False, True])
def test_uint8_of_a_run_is_relative_to_its_own_largest(dither):
    scores = 2 * torch.randn(2, 5, 200)
    scores[:, :, :128] -= 20
    scores[:, :, 150] = float("-inf")
    p = bench.uint8_runs(scores, 128, dither=dither)
    for run in (slice(0, 128), slice(128, 200)):
        step = scores[:, :, run].amax(-1, keepdim=True).exp() / 255
        off = ((p - scores.exp())[:, :, run] / step).abs().max()
        assert 0.4 < off < (0.95 if dither else 0.501)
    assert p[:, :, 150].eq(0).all()


def test_dither_is_even():
    assert sum(bench.DITHER) == 0
    assert max(map(abs, bench.DITHER)) < 0.5
    assert bench.uint8(torch.full((8,), 0.25 / 255), torch.tensor(bench.DITHER)).sum() * 255 == 2


def test_no_number_passes_its_bound():
    latents, w = bench.draw(TINY, DISTRIBUTIONS["norm_bias"], 0, CPU)
    largest = (bench._normalised(latents, w) @ w.k_weight.T + w.k_bias).abs().amax(0)
    bounds = bench.bound(w, w.k_weight, w.k_bias, TINY.head_dim).flatten()
    assert (largest < bounds).all()
    # Latents that are a channel's weights come within a few percent of it.
    row = w.k_weight[0] * w.norm_weight
    w = w._replace(norm_bias=torch.zeros_like(w.norm_bias), k_bias=0 * w.k_bias)
    reached = (bench._normalised(row[None], w) @ w.k_weight[0]).item()
    mine = bench.bound(w, w.k_weight[:1], w.k_bias[:1], 1).item()
    assert 0.9 < reached / mine < 1


def test_the_sink_is_ahead_in_every_query():
    latents, w = bench.draw(TINY, Distribution(sink=7), 0, CPU)
    _, plain = bench.draw(TINY, Distribution(), 0, CPU)
    k = bench._normalised(latents[:1], w) @ w.k_weight.T + w.k_bias
    ahead = ((w.q_bias - plain.q_bias) * k).view(-1, TINY.head_dim).sum(1) / TINY.head_dim**0.5
    assert torch.allclose(ahead, torch.full_like(ahead, 7))


def test_rows_take_the_median_of_the_draws_and_refuse_what_is_not_finite():
    errors = {"bf16": [0.01, 0.02, 0.04], "int8": [0.012, 0.022, 0.05], "e4m3": [0.1, 0.1, 1e999]}
    eager, good, bad = bench.rows_of("500m-normal", TINY, errors)
    assert good["case"] == "layer/latent_attn_core/500m-normal/error"
    assert good["error"] == {"rms_vs_fp64": 0.022, "rms_eager": 0.02}
    assert (good["value"], good["ratio"], good["ratio_max"]) == (0.022, 1.2, 1.25)
    assert eager["ratio"] == 1 and "value" not in bad
    assert bad["gate"] == "the output is not finite"


def test_a_run_gives_a_record(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(bench, "measure_ceilings", lambda *_: {"bf16_tflop_s": 0.5})
    monkeypatch.setattr(bench, "SHAPES", {"tiny": TINY})
    target = tmp_path / "error.json"
    assert bench.main(["--small", "--json", str(target)]) == 0
    written = record.json.loads(target.read_text())
    assert record.problems(written) == []
    assert written["command"] == "python bench/attention_error.py --small --draws 1"
    named = {(row["case"].split("/")[2], row["variant"]) for row in written["rows"]}
    assert named == {(f"tiny-{odd}", form) for odd in DISTRIBUTIONS for form in FORMATS}
    printed = capsys.readouterr().out
    assert printed.splitlines()[0].split()[-1] == "int8_folded" and "tiny-sink" in printed
