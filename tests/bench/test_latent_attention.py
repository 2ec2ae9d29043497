"""The bench of latent attention: its core's heads and equation, its rows."""

import latent_attention
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from snapkernels.testing import record
from snapkernels.testing.numerics import relative_rms
from snapkernels.testing.timing import Timing

CEILINGS = {"copy_tb_s": 4.0, "bf16_tflop_s": 800.0, "fp8_tflop_s": 1500.0}
SHAPE = latent_attention.Shape(2, 256, 3, 64)


def test_heads_in_8_bits_are_those_that_were_drawn():
    torch.manual_seed(0)
    qkv = torch.randn(SHAPE.tokens, 3, SHAPE.heads, SHAPE.channels)
    q, k, v = qkv.double().permute(1, 2, 0, 3)
    expected = scaled_dot_product_attention(q, k, v).transpose(0, 1).flatten(1)
    found = latent_attention.equation(latent_attention.quantised(qkv), SHAPE.tokens)
    assert relative_rms(found, expected) < 0.02


def test_only_the_first_tokens_are_attended_to():
    torch.manual_seed(0)
    qkv = torch.randn(2 * SHAPE.tokens, 3, SHAPE.heads, SHAPE.channels)
    both, one = latent_attention.quantised(qkv), latent_attention.quantised(qkv[: SHAPE.tokens])
    expected = latent_attention.equation(one, SHAPE.tokens)
    assert torch.equal(latent_attention.equation(both, SHAPE.tokens), expected)


def test_rows_are_of_the_form_and_a_wrong_result_has_no_figure():
    timings = dict.fromkeys(("ours-fp8", *latent_attention.SDPA), Timing(2.0, 1.9, 2.2))
    rows = latent_attention.rows_of("op/tiny", SHAPE, 0.03, timings, CEILINGS)
    made = record.new_record("test", torch.device("cpu"), {}, CEILINGS, rows)
    assert not record.problems(made)
    ours, cudnn, _ = rows
    tflop = 4 * 2 * 3 * 256**2 * 64 / 1e12
    assert ours["floor"] == pytest.approx(tflop / 1500 * 1e3, rel=1e-3)
    assert cudnn["floor"] == pytest.approx(tflop / 800 * 1e3, rel=1e-3)
    assert ours["tflop_s"] == pytest.approx(tflop / 2e-3, rel=1e-3)
    wrong, *others = latent_attention.rows_of("op/tiny", SHAPE, 0.04, timings, CEILINGS)
    assert "0.035" in wrong["gate"] and "value" not in wrong
    assert all(row["gate"] == "ok" for row in others)


def test_a_sublayer_has_the_work_of_its_projections_too():
    timings = dict.fromkeys(("ours-fp8", "eager-bf16", "eager-fp8"), Timing(2.0, 1.9, 2.2))
    rows = latent_attention.rows_of("layer/tiny", SHAPE, 0.04, timings, CEILINGS)
    tflop = SHAPE.tflop + 4 * 2 * 512 * 192 * 192 / 1e12
    assert [row["tflop"] for row in rows] == [pytest.approx(tflop, rel=1e-3)] * 3
    ours, bf16, fp8 = (row["floor"] for row in rows)
    assert ours == fp8 == pytest.approx(tflop / 1500 * 1e3, rel=1e-3)
    assert bf16 == pytest.approx(tflop / 800 * 1e3, rel=1e-3)


def test_without_the_library_it_says_so(capsys, monkeypatch):
    monkeypatch.setattr(latent_attention.extension, "refuses", lambda tensor: "there is none")
    assert latent_attention.main([]) == 1
    assert "there is none" in capsys.readouterr().err
