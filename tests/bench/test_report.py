"""The page: its figures, what it says of a missing record, and the command that makes it."""

import json
import re
import shutil
import subprocess
import sys
from base64 import b64decode

import figures
import page
import pytest
import report
from made_records import PARTS, as_red, make_records, red, row

from snapkernels.testing import record


@pytest.fixture
def records():
    return make_records()


@pytest.fixture
def folder(records, tmp_path):
    home = tmp_path / "records" / "h200"
    home.mkdir(parents=True)
    for name, one in records.items():
        record.write(one, home / f"2026-01-01-{name}.json")
    return home


def test_the_command_writes_page_and_figures_and_leaves_the_readme(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "ROOT", tmp_path)  # where no README.md is
    pngs = tmp_path / "pngs"
    pngs.mkdir()
    html = tmp_path / "page.html"
    assert report.main(["--records", str(folder), "--html", str(html), "--png", str(pngs)]) == 0
    assert {one.name for one in pngs.iterdir()} == {f"{name}.png" for name in figures.FIGURES}
    embedded = re.findall(r'src="data:image/png;base64,([^"]+)"', html.read_text())
    drawn = [(pngs / f"{one.figure}.png").read_bytes() for one in page.SECTIONS]
    assert [b64decode(one) for one in embedded] == drawn
    assert all(one.startswith(b"\x89PNG") for one in drawn)


def test_the_readme_is_rewritten_and_checked(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(report, "ROOT", tmp_path)
    monkeypatch.setattr(report, "section", lambda: "figures")
    readme = tmp_path / "README.md"
    readme.write_text(f"a {report.BEGIN} old {report.END} z\n")
    assert report.main(["--check"]) == 1
    assert "run python bench/report.py" in capsys.readouterr().out
    assert report.main([]) == 0 == report.main(["--check"])
    assert readme.read_text() == f"a {report.BEGIN}\nfigures\n{report.END} z\n"
    readme.write_text("no markers")
    assert report.main([]) == 2
    assert readme.read_text() == "no markers"


@pytest.mark.parametrize(
    ("processes", "where"), [(1, "in the same process"), (3, "in the first of its 3 processes")]
)
def test_the_readme_says_of_which_process_the_ceilings_are(records, monkeypatch, processes, where):
    path = record.RECORDS / "h200" / "2026-01-01-throughput.json"
    taken = records["throughput"] | {"processes": processes}
    monkeypatch.setattr(report, "newest", lambda _: (path, taken))
    assert f"ceilings measured {where}: copy_tb_s" in report.section()


def test_the_page_says_where_when_and_of_which_commit_and_no_path(records, text):
    one = records["costs"]
    told = [one["commit"][:10], one["versions"]["torch"], "345, 1755 MHz", "80, 690 W"]
    told += ["ceiling fp8_tflop_s", "te-fp8: te is absent"]
    assert [wanted for wanted in told if wanted not in text] == []
    assert str(record.ROOT) not in text


def test_a_figure_without_a_record_is_a_line_that_says_what_makes_it(records):
    del records["costs"]
    drawn = page.pictures(records)
    text = page.render(records, drawn)
    assert list(drawn) == ["table2", "scaling"] and text.count("<img") == 2
    assert text.count("<code>python bench/costs.py --json FILE</code>") == 2
    assert "is of a run that was cut off" not in text


def test_a_record_of_a_run_that_was_cut_off_says_so_above_all_figures(records):
    records["costs"]["command"] = record.command_so_far("python bench/costs.py", done=False)
    head, _ = page.render(records, {}).split("<section", 1)
    assert head.count("is of a run that was cut off") == 1
    assert '<p class="loss">costs is of a run that was cut off' in head


@pytest.mark.parametrize("count", [1, 4])
def test_rows_without_a_figure_are_in_the_tables_with_their_reasons(records, count):
    costs = records["costs"]["rows"]
    for index, one in enumerate(costs[:count]):
        costs[index] = as_red(one, f"wrong by {index}")
    text = page.render(records, page.pictures(records))
    sections = {name: text.split(f'<section id="{name}">')[1] for name in ("roofline", "ops")}
    for section in sections.values():
        rows = section.split("</table>")[0]
        assert [rows.count(f"<td>no figure: wrong by {k}</td>") for k in range(count)] == [
            1
        ] * count
    # All of them are red in the second case: no figure, but not for want of a record.
    assert text.count("<p>No figure: all rows are red.</p>") == (2 if count == len(costs) else 0)
    assert "--json FILE" not in text


def test_what_a_record_says_is_text_on_the_page(records):
    records["throughput"]["rows"][0] |= {"variant": 'ours-bf16"><script>alert(1)</script>'}
    text = page.render({"throughput": records["throughput"]}, {"table2": b"x"})
    assert text.count("<script>") == 1 and "&lt;script&gt;" in text


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda home: (home / "2026-01-02-costs.json").write_text("{"), "costs.json: not JSON"),
        (lambda home: (home / "2026-01-02-costs.json").write_text("[]"), "it is no record"),
        (lambda home: shutil.rmtree(home), "no file in it is named <date>-throughput or"),
        (lambda home: _change(home, "costs", "parts"), "row 0: 'parts' is missing"),
        (lambda home: _change(home, "model_scaling", "axis"), "row 0: 'axis' is missing"),
        (lambda home: _change(home, "throughput", "p80"), "row 0: 'p80' is missing"),
    ],
)
def test_bad_records_give_one_line_and_no_page(break_it, message, folder, tmp_path, capsys):
    break_it(folder)
    html = tmp_path / "page.html"
    assert report.main(["--records", str(folder.parent), "--html", str(html)]) == 2
    told = capsys.readouterr()
    assert told.out == "" and told.err.count("\n") == 1 and message in told.err
    assert not html.exists()


def _change(home, name, field):
    path = home / f"2026-01-01-{name}.json"
    whole = json.loads(path.read_text())
    del whole["rows"][0][field]
    path.write_text(json.dumps(whole))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--records", "gone", "--html", "a.html"], "gone: no such folder"),
        (["--html", "gone/a.html"], "a folder that exists"),
        (["--png", "gone"], "gone: no such folder"),
        (["--records", "."], "--records needs --html or --png"),
        (["--records", ".", "--html", "a.html", "--check"], "README.md tells the committed"),
    ],
)
def test_bad_arguments_are_refused(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        report.main(arguments)
    assert stopped.value.code == 2 and message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_readme_needs_no_matplotlib_and_the_page_says_that_it_does():
    lines = (
        "import sys; sys.modules['matplotlib'] = None",
        "import report; print(report.section())",
        "report.main(['--html', 'a.html'])",
    )
    bench = str(record.ROOT / "bench")
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)],
        env={"PYTHONPATH": f"{bench}:{record.ROOT}"},
        capture_output=True,
        text=True,
    )
    assert "The paper's own ratios" in done.stdout
    assert done.returncode == 2 and "need the package matplotlib" in done.stderr


def test_points_of_the_roofline_are_the_parts(records):
    axes = figures.roofline(records["costs"]).axes
    assert [axis.get_title() for axis in axes] == ["500m, inference", "3.9b, inference"]
    wide, narrow = axes[1].collections
    intensity, rate = zip(*wide.get_offsets(), strict=True)
    assert intensity == pytest.approx((2.0, 1e3 / 6, 350.0))
    assert rate == pytest.approx((4.0, 1e3 / 3, 700.0))
    assert tuple(narrow.get_offsets()[2]) == pytest.approx((3.5e3 / 6, 3.5e3 / 3))
    labels = [text.get_text() for text in axes[1].texts]
    assert {*PARTS, "bf16 800 TFLOP/s", "fp8 1600 TFLOP/s", "copy 4 TB/s"} == set(labels)


def test_the_stack_of_an_evaluation_ends_where_it_was_measured(records):
    axis = figures.ops(records["costs"]).axes[1]
    ends = [bar.get_y() + bar.get_height() for bar in axis.patches]
    assert ends[3] == pytest.approx(10.0) and ends[-1] == pytest.approx(6.0)
    hatched = [bar.get_height() for bar in axis.patches if bar.get_hatch()]
    assert hatched == pytest.approx([1.0, 0.6])


def test_a_curve_says_its_exponent_and_where_memory_ran_out(records):
    axes = figures.scaling(records["model_scaling"]).axes
    assert len(axes) == 6
    told = [text.get_text() for text in axes[0].get_legend().get_texts()]
    assert told == ["ours-bf16: exponent 1.02", "eager-bf16"]
    assert [text.get_text() for text in axes[0].texts] == ["out of\nmemory"]
    assert "exponent 0.77" in axes[3].get_legend().get_texts()[0].get_text()
    ours, eager, lost = axes[0].lines
    assert list(ours.get_xdata()) == [256, 512, 1024] and list(eager.get_xdata()) == [256, 512]
    assert list(lost.get_xdata()) == [1024]


def test_every_x_has_the_reason_of_its_own_row_and_axes_of_red_rows_are_drawn(records):
    rows = records["model_scaling"]["rows"]
    for index, one in enumerate(rows):
        if one["axis"] == "batch" or (one["variant"], one["point"]) == ("eager-bf16", 512):
            rows[index] = as_red(one, "relative rms error 0.9")
    axis = figures.scaling(records["model_scaling"]).axes[0]
    found = [(text.xy[0], text.get_text()) for text in axis.texts]
    assert found == [(512, "red"), (1024, "out of\nmemory")]
    assert figures.png(figures.scaling, records["model_scaling"]).startswith(b"\x89PNG")


def test_bars_are_of_the_fastest_batch_beside_the_papers(records):
    axis = figures.table2(records["throughput"]).axes[0]
    assert axis.get_title() == "500m, inference"
    heights = [bar.get_height() for bar in axis.patches]
    fastest = [2.0 * 65 / 64, 1.2 * 65 / 64, 2.8 * 65 / 64]
    assert heights[:3] == pytest.approx(fastest) and axis.patches[3].get_hatch()
    assert heights[3] < 23.4 and "23.4" in [text.get_text() for text in axis.texts]  # it is cut
    (first, second) = axis.collections  # floors, of ours alone
    assert [first.get_segments()[0][0][1], second.get_segments()[0][0][1]] == pytest.approx(
        [0.6 * fastest[0], 0.6 * fastest[1]]
    )


def test_a_model_of_which_one_mode_has_no_figure_leaves_its_place_empty(records):
    rows = records["throughput"]["rows"]
    case = "model/unet-85m/infer"
    rows += [
        row(case, "eager-bf16", 16, 5.0),
        red("out of memory", case[:-5] + "train", "eager", 16),
    ]
    drawn = figures.table2(records["throughput"])
    shown = {axis.get_title(): axis.axison for axis in drawn.axes}
    assert shown["unet-85m, inference"] and not shown[""] and "unet-85m, training" not in shown
    assert figures.png(figures.table2, records["throughput"]).startswith(b"\x89PNG")
