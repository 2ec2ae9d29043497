"""Records: their form, the committed ones, and the README table made from them."""

import argparse
import copy
import json
import subprocess
import time

import pytest
import report
import torch

from snapkernels.testing import load, record

ROW = {
    "case": "model/500m/infer",
    "variant": "eager-bf16",
    "batch": 16,
    "unit": "ms/video",
    "better": "lower",
    "value": 2.0,
    "p20": 1.9,
    "p80": 2.1,
    "floor": 1.0,
    "pct_of_floor": 50.0,
    "tflop": 0.7,
    "gate": "ok",
    "includes": "one denoiser evaluation, no guidance",
}
COMMITTED = sorted(record.RECORDS.glob("*/*.json"))


@pytest.fixture
def figures():
    ceilings = {"copy_tb_s": 3.0, "bf16_tflop_s": 700.0}
    return record.new_record(
        "python bench/throughput.py", torch.device("cpu"), {}, ceilings, [copy.deepcopy(ROW)]
    )


def test_a_record_says_where_when_and_of_which_commit(figures, tmp_path):
    assert record.problems(figures) == []
    record.write(figures, tmp_path / "r.json")
    assert json.loads((tmp_path / "r.json").read_text()) == figures
    assert list(tmp_path.iterdir()) == [tmp_path / "r.json"]
    assert figures["versions"]["torch"] == torch.__version__
    assert figures["commit"] and figures["device"]["name"].startswith("CPU")


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda r: r.pop("ceilings"), "field 'ceilings' is missing"),
        (lambda r: r.update(schema=2), "schema is 2, not 1"),
        (lambda r: r["rows"][0].pop("floor"), "row 0: 'floor' is missing"),
        (lambda r: r["rows"][0].pop("includes"), "row 0: 'includes' is missing"),
        (lambda r: r["rows"][0].update(gate="red"), "row 0: 'value' beside gate 'red'"),
    ],
)
def test_a_record_out_of_form_is_not_written(break_it, message, figures, tmp_path):
    break_it(figures)
    with pytest.raises(ValueError, match=message):
        record.write(figures, tmp_path / "r.json")
    assert list(tmp_path.iterdir()) == []


def test_the_newest_record_is_found_by_when_it_was_taken(figures, tmp_path, monkeypatch):
    monkeypatch.setattr(record, "RECORDS", tmp_path)
    assert record.newest("throughput") is None
    for folder, taken in (("h200", "2026-01-02T00:00:00Z"), ("h100", "2026-01-03T00:00:00Z")):
        (tmp_path / folder).mkdir()
        record.write(figures | {"taken": taken}, tmp_path / folder / "2026-01-01-throughput.json")
        record.write(figures, tmp_path / folder / "2026-01-04-other.json")
    path, found = record.newest("throughput")
    assert path.parent.name == "h100" and found["taken"] == "2026-01-03T00:00:00Z"


def test_the_table_shows_ours_the_ceiling_the_floor_and_the_paper(figures):
    header, _, first, *rest = report.figure_table(figures).splitlines()
    names, values = ([c.strip() for c in line.split("|")[1:-1]] for line in (header, first))
    cells = dict(zip(names, values, strict=True))
    assert cells == {
        "case": "model/500m/infer",
        "variant": "eager-bf16",
        "batch": "16",
        "ms/video (p20-p80)": "2 (1.9-2.1)",
        "TFLOP/s": "350",
        "% of ceiling": "50",
        "floor ms": "1",
        "% of floor": "50",
        "peak GiB": "",
        "paper, A100": "23.4",
    }
    assert sum("paper-a100" in line for line in rest) == 7
    figures["rows"][0] = {k: v for k, v in ROW.items() if k != "value"} | {"gate": "wrong"}
    assert "no figure" in report.figure_table(figures)


def test_fp8_is_held_to_its_own_ceiling_and_to_none_where_there_is_none(figures):
    def of_ceiling():
        header, _, first, *_ = report.figure_table(figures).splitlines()
        cells = (line.split("|") for line in (header, first))
        return {name.strip(): value.strip() for name, value in zip(*cells, strict=True)}[
            "% of ceiling"
        ]

    figures["rows"][0]["variant"] = "ours-fp8"
    assert of_ceiling() == ""
    figures["ceilings"]["fp8_tflop_s"] = 1400.0
    assert of_ceiling() == "25"


def test_every_committed_record_is_in_form_and_clean():
    assert COMMITTED
    for path in COMMITTED:
        found = json.loads(path.read_text())
        assert record.problems(found) == [], path
        assert found["dirty"] is False and len(found["commit"]) == 40, path


def test_readme_table_is_what_the_records_say():
    readme = (record.ROOT / "README.md").read_text()
    assert report.rendered(readme) == readme
    assert report.rendered(readme.replace("| model/", "| model/x")) == readme


def test_a_run_that_was_cut_off_is_not_told_in_the_readme(figures, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(record, "RECORDS", tmp_path)
    monkeypatch.setattr(report, "ROOT", tmp_path)
    (tmp_path / "h200").mkdir()
    path = tmp_path / "h200" / "2026-01-01-throughput.json"
    readme = tmp_path / "README.md"
    before = f"{report.BEGIN} old {report.END}"
    readme.write_text(before)
    figures["command"] = record.command_so_far("python bench/throughput.py", done=False)
    record.write(figures, path)
    for arguments in ([], ["--check"]):
        assert report.main(arguments) == 2
        assert capsys.readouterr().err == (
            f"error: {path.name} is of a run that was cut off: go on with it by --resume\n"
        )
    assert readme.read_text() == before
    figures["command"] = record.command_so_far("python bench/throughput.py", done=True)
    record.write(figures, path)
    assert report.main([]) == 0 and "eager-bf16" in readme.read_text()


def test_a_readme_without_markers_is_refused():
    section = f"{report.BEGIN} {report.END}"
    for readme in (f"{report.END} {report.BEGIN}", section * 2, report.BEGIN, ""):
        with pytest.raises(ValueError, match=r"README\.md needs"):
            report.rendered(readme)


def test_the_commit_is_heads_or_the_one_named(monkeypatch, tmp_path):
    def git(*arguments):
        identity = ("-c", "user.name=x", "-c", "user.email=x@example.org")
        subprocess.run(["git", "-C", tmp_path, *identity, *arguments], check=True)

    monkeypatch.setattr(record, "ROOT", tmp_path)
    monkeypatch.delenv("SNAPKERNELS_COMMIT", raising=False)
    assert record.commit() == ("unknown", True)
    monkeypatch.setenv("SNAPKERNELS_COMMIT", "0" * 40)
    assert record.commit() == ("0" * 40, False)
    git("init", "-q")
    (tmp_path / "a.py").write_text("a")
    git("add", "a.py")
    git("commit", "-qm", "a")
    head, dirty = record.commit()
    assert len(head) == 40 and head != "0" * 40 and not dirty
    target = str(tmp_path / "record.json")
    with pytest.raises(argparse.ArgumentTypeError, match=f"is {'0' * 40}, but HEAD of"):
        record.record_path(target)  # a copy with an older history
    monkeypatch.setenv("SNAPKERNELS_COMMIT", head)
    assert str(record.record_path(target)) == target
    (tmp_path / "figures.json").write_text("{}")
    assert record.commit() == (head, False)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "new_kernel.py").write_text("b")
    assert record.commit() == (head, True)
    (tmp_path / "folder" / "new_kernel.py").unlink()
    (tmp_path / "a.py").write_text("c")
    assert record.commit() == (head, True)


@pytest.fixture
def gpu_that_tells(monkeypatch):
    """A function of answers of nvidia-smi, each a list of strings or None: a Load that hears them.

    The last is given again and again.
    """

    def loaded(*answers):
        said = list(answers)
        monkeypatch.setattr(load, "query_gpu", lambda *_: said.pop(0) if len(said) > 1 else said[0])
        monkeypatch.setattr(load, "FIRST_S", 0.01)
        return load.Load(torch.device("cuda"))

    return loaded


def watched_for_a_while(told):
    with told.watched() as window:
        time.sleep(0.3)
    return window


def test_load_is_what_the_gpu_tells(gpu_that_tells):
    told = gpu_that_tells(["345", "70.5", "0x0"], ["1980", "[N/A]", "0x0000000000000004"])
    window = watched_for_a_while(told)
    assert window.medians() == {"sm_clock_mhz": 1980.0}
    assert told.fields() == {"sm_clock_mhz": [345.0, 1980.0]}
    assert window.slowdowns == set()  # a power cap is a figure's own doing
    assert load.Load(torch.device("cpu")).fields() == {}


@pytest.mark.parametrize(
    ("bits", "slowdown"),
    [
        ("0x0000000000000008", "hardware slowdown"),
        ("0x0000000000000024", "software thermal slowdown"),
        ("0x0000000000000040", "hardware thermal slowdown"),
        ("0x0000000000000080", "hardware power brake"),
    ],
)
def test_slowdowns_are_seen(gpu_that_tells, bits, slowdown):
    told = gpu_that_tells(["345", "70.5", "0x0"], ["1980", "700", bits])
    assert watched_for_a_while(told).slowdowns == {slowdown}


def test_an_old_driver_that_does_not_know_reasons_still_tells_the_clock(gpu_that_tells):
    told = gpu_that_tells(None, ["345", "70.5"], None, ["1980", "700"])
    assert told.before == {"sm_clock_mhz": 345.0, "power_w": 70.5}
    assert told._sample() == ({"sm_clock_mhz": 1980.0, "power_w": 700.0}, set())


@pytest.mark.parametrize(
    ("held_gib", "busy", "reason"),
    [
        (0.6, "0", None),  # a context of our own
        (9.0, "0", "the GPU is shared: others hold 9.0 GiB of it"),
        (0.6, "97", "the GPU is shared: it is 97 % busy before anything of ours runs"),
        (0.6, "[N/A]", None),
    ],
)
def test_a_shared_gpu_is_found_by_memory_or_by_work(
    gpu_that_tells, monkeypatch, held_gib, busy, reason
):
    told = gpu_that_tells(["345", "70.5", "0x0"], [busy])
    total = 80 * 2**30
    monkeypatch.setattr(
        torch.cuda, "mem_get_info", lambda _: (total - int(held_gib * 2**30), total)
    )
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 0)
    assert told.shared() == reason
    assert load.Load(torch.device("cpu")).shared() is None


def test_without_a_figure_a_row_keeps_what_was_not_measured():
    whole = ROW | {"peak_gib": 1.0, "tb_s": 1.0, "pct_of_copy": 9.0, "saved_gib": 0.1, "batch": 2}
    row = record.without_figure(whole, "wrong")
    names = ("case", "variant", "batch", "unit", "better", "floor", "tflop", "includes")
    assert row == {name: whole[name] for name in names} | {"gate": "wrong"}
    form = {"schema": 1} | dict.fromkeys(record.FIELDS[1:-1])
    assert record.problems(form | {"rows": [row]}) == []
    assert record.problems(form | {"rows": [row | {"tb_s": 1.0}]}) == [
        "row 0: 'tb_s' beside gate 'wrong'"
    ]


def test_a_run_that_is_not_done_is_cut_off(figures):
    assert not record.is_cut_off(figures)
    command = record.command_so_far(figures["command"], done=False)
    assert record.is_cut_off(figures | {"command": command})


def test_what_was_over_before_the_first_sample_has_one(gpu_that_tells):
    told = gpu_that_tells(["345", "70.5", "0x0"], ["1980", "700", "0x0000000000000008"])
    with told.watched() as window:
        pass
    assert window.medians() == {"sm_clock_mhz": 1980.0, "power_w": 700.0}
    assert window.refusal == "the GPU was slowed down: hardware slowdown"
