"""The page in a headless browser: figures drawn, no error, what its script does."""

import re
import shutil
from base64 import b64encode

import figures
import page
import pytest
import report

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
