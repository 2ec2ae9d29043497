"""Going on with the record of a run that was cut off."""

import json

import pytest
import throughput

from snapkernels.testing import record

FLAGS = ("--mode", "infer", "--backend", "ours", "eager")


@pytest.fixture(autouse=True)
def a_clean_tree(monkeypatch):
    monkeypatch.setattr(record, "commit", lambda: ("1" * 40, False))


@pytest.fixture
def cut_off(rows, monkeypatch, tmp_path):
    """The path of a record that has the first of two variants."""
    whole = throughput.bench_variant

    def first_alone(name, variant, *others):
        if variant.backend != "ours":
            raise KeyboardInterrupt
        return whole(name, variant, *others)

    with monkeypatch.context() as one:
        one.setattr(throughput, "bench_variant", first_alone)
        with pytest.raises(KeyboardInterrupt):
            rows(*FLAGS)
    return tmp_path / "figures.json"


def test_a_run_goes_on_with_what_it_has(rows, cut_off, monkeypatch, capsys):
    before = json.loads(cut_off.read_text())
    assert record.is_cut_off(before)
    other = {name: 2 * rate for name, rate in before["ceilings"].items()}
    monkeypatch.setattr(throughput, "measure_ceilings", lambda *_: other)
    found = rows(*FLAGS, "--resume")
    assert found[:1] == before["rows"]
    assert [row["variant"] for row in found] == ["ours-fp32", "eager-fp32"]
    assert found[0]["floor"] == found[1]["floor"]  # by one set of ceilings
    assert f"tiny: ours-fp32 is in {cut_off} already" in capsys.readouterr().err
    after = json.loads(cut_off.read_text())
    assert not record.is_cut_off(after) and after["command"] + " (so far)" == before["command"]
    assert (before["processes"], after["processes"]) == (1, 2)
    assert after["ceilings"] == before["ceilings"]


def test_what_was_slowed_down_is_measured_again(rows, cut_off):
    written = json.loads(cut_off.read_text())
    (row,) = written["rows"]
    slowed = record.without_figure(row, "the GPU was slowed down: hardware slowdown")
    cut_off.write_text(json.dumps(written | {"rows": [slowed]}))
    assert [row["gate"] for row in rows(*FLAGS, "--resume")] == ["ok", "ok"]


def test_where_there_is_no_record_a_run_begins(rows):
    assert len(rows(*FLAGS, "--resume")) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"command": "python bench/throughput.py --batch 2"}, "its command is python bench/thr"),
        ({"commit": "0" * 40}, "its commit is 0000000"),
        ({"versions": {"torch": "1"}}, "its versions is {'torch': '1'}"),
        ({"device": {"name": "NVIDIA H100"}}, "it is of a NVIDIA H100"),
        ({"dirty": True}, "a tree has changes: commit them first"),
        ({"schema": 2}, "schema is 2, not 1"),
        (None, "it is no record"),
    ],
)
def test_a_run_does_not_go_on_with_a_record_of_another(cut_off, capsys, change, message):
    written = json.loads(cut_off.read_text()) | (change or {})
    before = json.dumps(written) if change else "[]"
    cut_off.write_text(before)
    arguments = ["--preset", "tiny", *FLAGS, "--json", str(cut_off), "--resume"]
    assert throughput.main(arguments) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert cut_off.read_text() == before
