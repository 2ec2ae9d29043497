"""Ratios: which rows are compared, how wide they are, and which are refused."""

import made_records
import pytest
import tables
from paper import PAPER_A100
from ratios import against_peers, best, paper_ratios, ratio


def row(case="model/500m/infer", variant="ours-bf16", batch=16, value=2.0, **more):
    spread = {"p20": 0.9 * value, "p80": 1.2 * value, "probe_tflop_s": 800.0}
    return made_records.row(case, variant, batch, value, **(spread | more))


def red(gate="out of memory", **more):
    whole = row(**more, gate=gate)
    return {k: v for k, v in whole.items() if k not in ("value", "p20", "p80", "probe_tflop_s")}


def record(*rows):
    return {"ceilings": {"bf16_tflop_s": 800.0}, "rows": list(rows)}


def cells(table):
    return [dict(zip(table.header, line, strict=True)) for line in table.rows]


def test_best_is_the_fastest_row_whose_gate_is_ok():
    wrong = row(batch=64, value=0.1) | {"gate": "wrong"}
    unnamed = red(gate="ok", batch=128)  # no value
    rows = record(
        row(value=2.0), row(batch=32, value=1.5), wrong, unnamed, row(case="model/x/train")
    )
    assert best(rows, "model/500m/infer") is rows["rows"][1]
    eager = row(variant="eager-bf16", value=1.0)
    rows["rows"].append(eager)
    assert best(rows, "model/500m/infer") is eager
    assert best(rows, "model/500m/infer", {"ours-bf16", "ours-fp8"}) is rows["rows"][1]
    assert best(rows, "model/500m/train") is None


def test_a_ratio_is_as_wide_as_both_rows_allow():
    one = ratio(row(value=3.0, p20=2.7, p80=3.3), row(value=2.0, p20=1.8, p80=2.2))
    assert one.value == pytest.approx(1.5)
    assert one.low == pytest.approx(2.7 / 2.2) and one.high == pytest.approx(3.3 / 1.8)
    assert one.refused == "" and one.note == ""


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        (red(gate="relative rms error 0.9"), "ours-bf16 batch 16: relative rms error 0.9"),
        (row() | {"gate": "wrong"}, "wrong"),  # although it has a value
        (red(gate="ok"), "has no value, p20, p80"),
        (row(probe_tflop_s=750.0), "one load at 800 and 750 TFLOP/s"),
        (row(probe_tflop_s=850.0), "one load at 800 and 850 TFLOP/s"),
    ],
)
def test_a_ratio_that_would_not_hold_is_refused(other, reason):
    for one in (ratio(row(), other), ratio(other, row())):
        assert (one.value, one.low, one.high) == (None, None, None)
        assert tables.ratio_cell(one) == one.refused
    assert reason in ratio(row(), other).refused


def test_clocks_within_5_percent_are_one_clock_and_none_is_said():
    assert ratio(row(), row(probe_tflop_s=840.0)).value == 1.0
    told = row()
    del told["probe_tflop_s"]
    for one in (ratio(told, row()), ratio(row(), told), ratio(told, told)):
        assert one.value == 1.0 and one.note == "no clock"
        assert tables.ratio_cell(one).endswith(", no clock")


@pytest.mark.parametrize("probe", [784.0, 816.0])
def test_the_spread_reaches_to_what_equal_clocks_would_have_given(probe):
    over, under = row(value=3.0, probe_tflop_s=probe), row(value=2.0)
    one, even = ratio(over, under), ratio(over | {"probe_tflop_s": 800.0}, under)
    assert one.value == even.value == 1.5
    slow = probe < 800  # its clock, so that at an equal one it takes less time
    assert one.low == pytest.approx(even.low * (probe / 800 if slow else 1))
    assert one.high == pytest.approx(even.high * (1 if slow else probe / 800))


def test_the_papers_ratios_are_those_it_prints():
    empty = paper_ratios(record())
    assert [round(one.paper, 2) for one in empty] == [3.31, 4.49, 1.24]
    assert empty[0].paper == PAPER_A100["model/unet-284m/train"] / PAPER_A100["model/500m/train"]
    assert empty[0].here.refused == (
        "no model/unet-284m/train in this record; no model/500m/train in this record"
    )


def test_ours_beside_the_papers_are_of_the_fastest_row_of_each_model():
    rows = record(
        row(case="model/unet-284m/infer", variant="eager-bf16", value=9.0),
        row(case="model/unet-284m/infer", variant="compile-bf16", batch=64, value=6.0),
        row(value=2.0),
        row(variant="ours-fp8", batch=32, value=1.5),
        red(case="model/3.9b/infer"),
    )
    training, inference, large = paper_ratios(rows)
    assert training.here.value is None
    assert inference.here.value == pytest.approx(4.0)
    assert large.here.refused == "model/3.9b/infer: out of memory"
    assert cells(tables.paper_table(rows))[1] == {
        "ratio of ms/video": "U-Net 284M / FIT 500M, inference",
        "paper, A100": "4.49",
        "here (low-high)": "4 (3-5.33)",
        "rows": "compile-bf16, batch 64 / ours-fp8, batch 32",
    }


def test_each_of_our_rows_is_held_to_the_fastest_peer_of_any_batch_and_format():
    rows = record(
        row(batch=16, value=2.0),
        row(batch=64, value=1.5),
        row(variant="ours-fp8", batch=64, value=1.0),
        row(variant="eager-bf16", batch=16, value=2.4),
        row(variant="compile-bf16", batch=64, value=1.8),
        row(variant="torchao-fp8", batch=64, value=1.2),
        red(variant="te-fp8", batch=64),
        row(variant="eager-bf16", value=0.1) | {"gate": "wrong"},
        row(case="model/500m/train", variant="eager-bf16", value=0.2),
    )
    ratios = against_peers(rows)["model/500m/infer"]
    found = [(r.under["variant"], r.under["batch"], r.over["variant"], r.value) for r in ratios]
    assert found == [
        ("ours-bf16", 16, "torchao-fp8", pytest.approx(0.6)),  # its only peer at 16 is slower
        ("ours-bf16", 64, "torchao-fp8", pytest.approx(0.8)),
        ("ours-fp8", 64, "torchao-fp8", pytest.approx(1.2)),
    ]
    shown = cells(tables.peers_table(rows))
    assert [one["ratio (low-high)"] for one in shown] == [
        "0.6 (0.45-0.8), loss, batches differ",
        "0.8 (0.6-1.07), loss",
        "1.2 (0.9-1.6)",
    ]
    assert {one["best peer"] for one in shown} == {"torchao-fp8, batch 64"}
    assert against_peers(rows)["model/500m/train"] == []


def test_a_loss_to_a_peer_at_another_batch_is_a_loss_in_the_headline():
    rows = record(
        row(batch=16, value=2.0),
        row(batch=64, value=1.5),
        row(variant="eager-bf16", batch=64, value=2.4),
        row(variant="eager-bf16", batch=256, value=1.2),
    )
    (line,) = cells(tables.headline_table(rows))
    assert line["ours"] == "ours-bf16, batch 64"
    assert line["best peer"] == "eager-bf16, batch 256"
    assert line["ratio (low-high)"] == "0.8 (0.6-1.07), loss, batches differ"


def test_the_headline_has_our_fastest_row_and_marks_a_loss():
    rows = record(
        row(value=2.0),
        row(variant="eager-bf16", value=1.0),
        row(case="model/unet-85m/infer", variant="compile-bf16", value=5.0),
        red(case="model/3.9b/infer"),
        row(case="model/3.9b-up/train", batch=4, value=8.0),
    )
    lost, unet, failed, alone = cells(tables.headline_table(rows))
    assert lost["ours"] == "ours-bf16, batch 16" and lost["paper, A100"] == "23.4"
    assert lost["ratio (low-high)"] == "0.5 (0.375-0.667), loss"
    assert (unet["ours"], unet["best peer"]) == ("none", "compile-bf16, batch 16")
    assert failed["ours"] == "no figure: out of memory"
    assert (alone["best peer"], alone["ratio (low-high)"]) == (tables.NO_PEER, "")


def test_absent_peers_are_lines_below_and_one_that_is_red_is_a_row():
    reason = "te is absent: No module\nnamed 'transformer_engine'"
    rows = record(
        row(),
        red(variant="te-fp8", gate=reason, peer=True, absent=True),
        red(variant="te-fp8", gate=reason, batch=64, peer=True, absent=True),
        red(variant="xformers-bf16", peer=True),
        red(variant="torchao-fp8", gate="relative rms error 0.9", peer=True),
        red(variant="flash-attn-bf16", gate="software thermal slowdown", peer=True),
        red(variant="eager-bf16", gate="a | b"),
    )
    assert tables.absent_peers(rows) == ["te-fp8: " + reason.replace("\n", " ")]
    shown = cells(tables.rows_table(rows))
    why = {one["variant"]: one["ms/video (p20-p80)"] for one in shown}
    assert why["xformers-bf16"] == "no figure: out of memory"
    assert why["torchao-fp8"] == "no figure: relative rms error 0.9"
    assert why["flash-attn-bf16"] == "no figure: software thermal slowdown"
    assert "te-fp8" not in why
    # A bar would end the cell.
    assert "no figure: a \\| b" in tables.markdown(tables.rows_table(rows))
