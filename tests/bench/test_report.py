"""The page: its figures, what it says of a missing record, and how it behaves in a browser."""

import json
import re
import shutil
import subprocess
import sys
from base64 import b64decode, b64encode

import figures
import page
import pytest
import report
import torch

from snapkernels.testing import record

CEILINGS = {"copy_tb_s": 4.0, "bf16_tflop_s": 800.0, "fp8_tflop_s": 1600.0}
MODELS = {"500m": 2.0, "3.9b": 10.0}
PARTS = {"stem": (0.1, 4e-4), "read": (0.3, 0.1), "write FF": (0.5, 0.35)}  # ms and TFLOP, shares


def row(case, variant, batch, value, **more):
    return {
        "case": case,
        "variant": variant,
        "batch": batch,
        "unit": "ms/video",
        "better": "lower",
        "gate": "ok",
        "includes": "one denoiser evaluation, no guidance",
        "value": value,
        "p20": 0.95 * value,
        "p80": 1.05 * value,
        "floor": 0.6 * value,
        "pct_of_floor": 60.0,
        "tflop": 0.5 * value,
    } | more


def red(gate, case, variant, batch, **more):
    whole = row(case, variant, batch, 1.0, **more) | {"gate": gate}
    return {key: one for key, one in whole.items() if key not in record.MEASURED_FIELDS}


def throughput_rows():
    for model, ms in MODELS.items():
        for batch in (16, 64):
            for variant, factor in {"ours-bf16": 1.0, "eager-bf16": 1.4, "ours-fp8": 0.6}.items():
                yield row(f"model/{model}/infer", variant, batch, ms * factor * (1 + 1 / batch))
        yield row(f"model/{model}/train", "ours-bf16", 16, 4 * ms)
        yield row(f"model/{model}/train", "eager-bf16", 16, 3 * ms)
        yield red("te is absent", f"model/{model}/infer", "te-fp8", 16, peer=True)


def costs_rows():
    for model, ms in MODELS.items():
        for variant, factor in {"ours-bf16": 1.0, "ours-fp8": 0.6}.items():
            value = ms * factor
            parts = [
                {
                    "part": name,
                    "ops": {"linear": 2},
                    "ms": share * value,
                    "predicted_ms": 0.5 * share * value,
                    "tflop": tflop * ms,
                    "gb": value * share * 2,
                }
                for name, (share, tflop) in PARTS.items()
            ]
            yield row(f"model/{model}/infer", variant, 16, value) | {
                "explained_pct": 90.0,
                "parts": parts,
                "blocks": [{"block": 0, "ms": 0.9 * value, "predicted_ms": 0.4 * value}],
                "rest": {"between the parts": 0.1 * value},
            }


def scaling_rows():
    for axis in ("tokens", "batch", "latents"):
        for variant, factor in {"ours-bf16": 1.0, "eager-bf16": 1.5}.items():
            for size in (256, 512, 1024):
                more = {"unit": "ms", "axis": axis, "point": size}
                if variant == "eager-bf16" and size == 1024:
                    yield red("out of memory", "model/3.9b-up/infer", variant, 1, **more)
                else:
                    peak = {"peak_gib": factor * size / 100}
                    ms = factor * size / 10
                    yield row("model/3.9b-up/infer", variant, 1, ms, **more, **peak)


def make_records():
    rows = {
        "throughput": throughput_rows(),
        "costs": costs_rows(),
        "model_scaling": scaling_rows(),
    }
    load = {"sm_clock_mhz": [345.0, 1755.0], "power_w": [80.0, 690.0]}
    found = {}
    for name, some in rows.items():
        command = f"python bench/{name}.py"
        found[name] = record.new_record(command, torch.device("cpu"), load, CEILINGS, list(some))
        assert record.problems(found[name]) == []
    found["model_scaling"] |= {
        "exponents": {"infer tokens ours-bf16": 1.02},
        "memory_exponents": {"infer tokens ours-bf16": 0.77},
    }
    return found


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


@pytest.fixture(scope="module")
def text():
    whole = make_records()
    return page.render(whole, page.pictures(whole))


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


def test_the_page_says_where_when_and_of_which_commit_and_no_path(records, text):
    one = records["costs"]
    told = [one["commit"][:10], one["versions"]["torch"], "345, 1755 MHz", "80, 690 W"]
    told += ["ceiling fp8_tflop_s", "te-fp8: te is absent"]
    assert [wanted for wanted in told if wanted not in text] == []
    assert str(record.ROOT) not in text


def test_a_figure_without_a_record_is_a_line_that_says_what_makes_it(records):
    del records["costs"]
    for one in records["model_scaling"]["rows"]:
        one["gate"] = "out of memory"
    drawn = page.pictures(records)
    text = page.render(records, drawn)
    assert list(drawn) == ["table2"] and text.count("<img") == 1
    assert text.count("<code>python bench/costs.py --json FILE</code>") == 2
    assert text.count("<code>python bench/model_scaling.py --json FILE</code>") == 1


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
    assert [text.get_text() for text in axes[0].texts] == ["out of memory"]
    assert "exponent 0.77" in axes[3].get_legend().get_texts()[0].get_text()
    ours, eager, lost = axes[0].lines
    assert list(ours.get_xdata()) == [256, 512, 1024] and list(eager.get_xdata()) == [256, 512]
    assert list(lost.get_xdata()) == [1024]


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


# How an image looks to the browser: the variance of its pixels' red.
SPREAD = """
const [image, done] = arguments;
image.decode().catch(() => {}).then(() => {
  if (!image.complete || !image.naturalWidth) return done(null);
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
  const context = canvas.getContext("2d");
  context.drawImage(image, 0, 0);
  const pixels = context.getImageData(0, 0, canvas.width, canvas.height).data;
  let sum = 0, squares = 0, count = 0;
  for (let i = 0; i < pixels.length; i += 4) {
    sum += pixels[i]; squares += pixels[i] ** 2; count++;
  }
  done(squares / count - (sum / count) ** 2);
});
"""
LEFT = """
return performance.getEntriesByType("resource").map(entry => entry.name)
  .filter(name => !name.startsWith("data:"))
"""


@pytest.fixture(scope="module")
def browser():
    webdriver = pytest.importorskip("selenium.webdriver", reason="pip install selenium")
    from selenium.webdriver.chrome.service import Service

    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("no browser here: install chromium and chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in ("no-sandbox", "headless=new", "disable-gpu", "disable-dev-shm-usage"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    opened = webdriver.Chrome(options=options, service=Service(driver))
    opened.set_script_timeout(20)
    yield opened
    opened.quit()


def wrong_with(browser, path, count=4):
    """What a reader of the page at `path` would miss; empty where nothing is wrong."""
    found = [f"names {url}" for url in re.findall(r"https?://\S+", path.read_text())]
    browser.get(path.as_uri())
    images = browser.find_elements("tag name", "img")
    if len(images) != count:
        found.append(f"{len(images)} figures, not {count}")
    for number, image in enumerate(images):
        spread = browser.execute_async_script(SPREAD, image)
        if spread is None:
            found.append(f"figure {number} is broken")
        elif spread < 10:
            found.append(f"figure {number} is blank")
    found += sorting_fails(browser) + choosing_fails(browser)
    found += [f"loads {name}" for name in browser.execute_script(LEFT)]
    log = browser.get_log("browser")
    return found + [f"console: {e['message']}" for e in log if e["level"] == "SEVERE"]


def sorting_fails(browser):
    """Every table by each of its columns, up and down."""
    for table in browser.find_elements("css selector", "section > .wide > table"):
        heads = table.find_elements("css selector", "th button")
        before = sorted(texts(browser, table))
        for column, head in enumerate(heads):
            orders = []
            for _ in range(2):
                browser.execute_script("arguments[0].click()", head)
                lines = texts(browser, table)
                if sorted(lines) != before:
                    return ["sorting loses rows"]
                numbers = [re.match(r"\d+(\.\d+)?(?![\w.])", line[column]) for line in lines]
                orders.append([float(one.group()) for one in numbers if one])
            if not all(map(len, orders)):
                continue
            if orders[0] != sorted(orders[0]) or orders[1] != sorted(orders[1], reverse=True):
                return [f"column {head.text!r} does not sort"]
    return []


def texts(browser, table):
    script = (
        "return [...arguments[0].tBodies[0].rows].map(r => [...r.cells].map(c => c.textContent))"
    )
    return browser.execute_script(script, table)


def choosing_fails(browser):
    """By model and by variant: only their rows are left, and all come back."""
    rows = browser.find_elements("css selector", "table.rows tbody tr")
    seen = "return arguments[0].map(row => row.hidden ? null : {...row.dataset})"
    pick = """
    const select = document.getElementById(arguments[0]);
    select.selectedIndex = arguments[1];
    select.dispatchEvent(new Event("change"));
    return select.value;
    """
    for kind in ("model", "variant"):
        value = browser.execute_script(pick, kind, 1)
        left = [one for one in browser.execute_script(seen, rows) if one is not None]
        if {one[kind] for one in left if kind in one} != {value}:
            return [f"choosing a {kind} does not"]
        browser.execute_script(pick, kind, 0)
        if None in browser.execute_script(seen, rows):
            return [f"rows stay hidden after a {kind} was chosen"]
    return []


def written(text, tmp_path):
    path = tmp_path / "page.html"
    path.write_text(text)
    return path


def test_the_page_works_in_a_browser(browser, text, tmp_path):
    assert wrong_with(browser, written(text, tmp_path)) == []


def test_the_page_of_the_committed_records_works_in_a_browser(browser, tmp_path):
    records = report.load(None)
    drawn = page.pictures(records)
    path = written(page.render(records, drawn), tmp_path)
    assert wrong_with(browser, path, len(drawn)) == []


def blank():
    from matplotlib.figure import Figure

    return b64encode(figures.png(lambda _: Figure(), {})).decode()


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda text: re.sub(r"base64,iVBORw0KGgo", "base64,AAAAAAAAAAA", text, count=1), "broken"),
        (
            lambda text: re.sub(r"base64,[^\"]+", f"base64,{blank()}", text, count=1),
            "blank",
        ),
        (lambda text: re.sub(r"<img [^>]+>", "", text, count=1), "3 figures, not 4"),
        (lambda text: text.replace("<script>", "<script>nothing.there();"), "console"),
        (lambda text: text.replace('"click"', '"clack"'), "does not sort"),
        (lambda text: text.replace("sign * compare(text(a), text(b))", "-1"), "does not sort"),
        (lambda text: text.replace('"change"', '"changed"'), "choosing a model does not"),
        (lambda text: text.replace("<h1>", '<h1><img src="http://x.invalid/a.png">'), "names http"),
        (lambda text: text.replace("<h1>", '<h1><img src="a.png">'), "console"),  # by its policy
    ],
)
def test_a_page_with_a_bug_is_seen(break_it, message, browser, text, tmp_path):
    broken = break_it(text)
    assert broken != text
    assert message in "; ".join(wrong_with(browser, written(broken, tmp_path)))
