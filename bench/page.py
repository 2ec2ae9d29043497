"""The report as one HTML page that loads nothing: figures, their numbers, and a script to sort."""

from base64 import b64encode
from collections.abc import Iterable
from html import escape
from typing import Any, NamedTuple

from figures import FIGURES, png
from ratios import Record, Row, measured, mode_of, model_of
from tables import (
    HOW_RATIOS,
    LOSS,
    Table,
    absent_peers,
    figure_cell,
    headline_table,
    paper_table,
    peers_table,
    rows_table,
)

from snapkernels.testing.record import is_cut_off

NAMES = ("throughput", "costs", "model_scaling")
START = ("model", "mode", "variant", "batch")  # the first columns, as `_start` fills them


class Section(NamedTuple):
    """A figure of the page, with what stands above it."""

    figure: str
    title: str
    text: str


SECTIONS = (
    Section(
        "table2",
        "Table 2",
        "Inference is one denoiser evaluation without guidance, training a step without the "
        f"optimiser. {HOW_RATIOS}",
    ),
    Section(
        "roofline",
        "Roofline",
        "What every part computes over what it has to move, and how fast it computes it. The "
        "ceilings were measured in the same process.",
    ),
    Section(
        "ops",
        "Time of the ops",
        "All calls of a part, per video; the rest is what no part explains. Predicted is the "
        "longer of its operations at the ceiling of their format and its bytes at that of a copy.",
    ),
    Section(
        "scaling",
        "Scaling of whole models",
        "Time of a call and peak memory as one size grows. An exponent is the slope of log time, "
        "or of the log of the memory above the weights, against the log of that size.",
    ),
)

STYLE = """
:root { color-scheme: light dark; --line: #d5d9e0; --soft: #f4f5f7; --loss: #b3261e; }
@media (prefers-color-scheme: dark) {
  :root { --line: #3a3f47; --soft: #23272d; --loss: #ff8a80; }
}
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1200px; margin: 0 auto;
  padding: 0 1rem 4rem; }
h1, h2 { line-height: 1.2; } h2 { margin-top: 3rem; } h3 { margin: 1.5rem 0 .3rem; }
img { max-width: 100%; height: auto; background: white; border-radius: 6px; }
nav { position: sticky; top: 0; z-index: 1; padding: .5rem 0; background: Canvas;
  border-bottom: 1px solid var(--line); }
nav label { margin-right: 1rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .6rem; border-bottom: 1px solid var(--line); text-align: left;
  white-space: nowrap; }
th { background: var(--soft); } tbody tr:hover { background: var(--soft); }
th button { all: unset; cursor: pointer; } th button:focus-visible { outline: 2px solid; }
th[aria-sort=ascending] button::after { content: " \\2191"; }
th[aria-sort=descending] button::after { content: " \\2193"; }
.loss { color: var(--loss); font-weight: 600; }
summary { cursor: pointer; }
""".strip()

SCRIPT = """
const number = text => /^-?[\\d.]+(?![\\w.])/.test(text) ? Number.parseFloat(text) : NaN;
function compare(a, b) {
  if (a === "" || b === "") return (a === "") - (b === "");
  const difference = number(a) - number(b);
  return Number.isNaN(difference) ? a.localeCompare(b, "en", {numeric: true}) : difference;
}
for (const table of document.querySelectorAll("table.rows")) {
  const heads = [...table.tHead.rows[0].cells], body = table.tBodies[0];
  heads.forEach((head, column) => head.firstElementChild.addEventListener("click", () => {
    const order = head.ariaSort === "ascending" ? "descending" : "ascending";
    for (const other of heads) other.ariaSort = null;
    head.ariaSort = order;
    const sign = order === "ascending" ? 1 : -1;
    const text = row => row.cells[column].textContent;
    body.append(...[...body.rows].sort((a, b) => sign * compare(text(a), text(b))));
  }));
}
const chosen = [...document.querySelectorAll("nav select")];
for (const select of chosen) select.addEventListener("change", () => {
  for (const row of document.querySelectorAll("table.rows tbody tr"))
    row.hidden = chosen.some(({id, value}) => value && (row.dataset[id] ?? value) !== value);
});
""".strip()

# The page holds itself to it: nothing is loaded, whatever a record has in it.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


def pictures(records: dict[str, Record]) -> dict[str, bytes]:
    """{name of a figure: its PNG}, of those whose record is there and has a measured row."""
    return {
        name: png(draw, records[what])
        for name, (what, draw) in FIGURES.items()
        if what in records and any(map(measured, records[what]["rows"]))
    }


def render(records: dict[str, Record], drawn: dict[str, bytes]) -> str:
    """The page.

    Args:
        records: {name: record}, of `NAMES` those that there are.
        drawn: {name of a figure: its PNG}, as `pictures` makes them.
    """
    tables = {
        "table2": _table2,
        "roofline": lambda record: _html(_roofline(record)),
        "ops": _ops,
        "scaling": lambda record: _html(_scaling(record)),
    }
    parts = [f"<h1>SnapKernels: Table 2 and beyond</h1>{_html(_provenance(records), plain=True)}"]
    parts += [
        f'<p class="loss">{what} is of a run that was cut off: it has not all of its rows.</p>'
        for what, record in records.items()
        if is_cut_off(record)
    ]
    parts.append(_choices(records))
    for name, title, text in SECTIONS:
        what = FIGURES[name][0]
        parts.append(f'<section id="{name}"><h2>{title}</h2><p>{text}</p>')
        if name in drawn:
            alt = f"{title}, {records[what]['device']['name']}: the numbers are in the table below"
            data = b64encode(drawn[name]).decode()
            parts.append(f'<img alt="{escape(alt)}" src="data:image/png;base64,{data}">')
        elif what in records:
            parts.append("<p>No figure: all rows are red.</p>")
        if what in records:
            parts.append(tables[name](records[what]))
        else:
            command = f"python bench/{what}.py --json FILE"
            parts.append(f"<p>No figure: <code>{command}</code> makes the record it is of.</p>")
        parts.append("</section>")
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<link rel="icon" href="data:,"><title>SnapKernels: Table 2 and beyond</title>'
        f"<style>\n{STYLE}\n</style>"
    )
    body = "\n".join(parts)
    return (
        f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n{body}\n'
        f"<script>\n{SCRIPT}\n</script>\n</body></html>\n"
    )


def _provenance(records: dict[str, Record]) -> Table:
    """Where, when and of which commit: a column a record."""
    known = []
    for record in records.values():
        device, versions = record["device"], record["versions"]
        clocks, power = device.get("sm_clock_mhz"), device.get("power_w")
        known.append(
            {
                "device": device["name"],
                "driver": device.get("driver"),
                **{name: versions.get(name) for name in ("torch", "cuda", "triton", "cudnn")},
                "commit": record["commit"][:10] + " and changes" * record["dirty"],
                "taken": record["taken"],
                "SM clock, before and under load": clocks and "{:.0f}, {:.0f} MHz".format(*clocks),
                "power, before and under load": power and "{:.0f}, {:.0f} W".format(*power),
            }
            | {f"ceiling {name}": f"{value:g}" for name, value in record["ceilings"].items()}
        )
    names = dict.fromkeys(name for one in known for name in one)
    rows = [[name, *(str(one.get(name) or "") for one in known)] for name in names]
    return Table(("record", *records), rows)


def _choices(records: dict[str, Record]) -> str:
    """What the rows of all tables are chosen by."""
    rows = [row for record in records.values() for row in record["rows"]]
    found = {"model": map(model_of, rows), "variant": (row["variant"] for row in rows)}
    selects = (
        f'<label>{name} <select id="{name}"><option value="">all</option>'
        + "".join(f"<option>{escape(one)}</option>" for one in dict.fromkeys(values))
        + "</select></label>"
        for name, values in found.items()
    )
    return f"<nav>{''.join(selects)}</nav>"


def _table2(record: Record) -> str:
    absent = "".join(f"<li>{escape(line)}</li>" for line in absent_peers(record))
    blocks = (
        ("Ours and the fastest peer", headline_table(record)),
        ("The paper's ratios, of the fastest row of each model", paper_table(record)),
        ("Each of our rows against the fastest peer of all batches", peers_table(record)),
        ("All rows", rows_table(record)),
    )
    parts = [f"<h3>{title}</h3>{_html(table)}" for title, table in blocks if table.rows]
    return "".join(parts) + (f"<h3>Absent peers</h3><ul>{absent}</ul>" if absent else "")


def _roofline(record: Record) -> Table:
    rows = []
    for row, part in _parts(record):
        intensity = f"{part['tflop'] / part['gb'] * 1e3:.4g}" if part["gb"] else ""
        rate = f"{part['tflop'] / part['ms'] * 1e3:.4g}" if part["ms"] else ""
        speed = f"{part['gb'] / part['ms']:.3g}" if part["ms"] else ""
        sizes = [f"{part['tflop']:.4g}", f"{part['gb']:.4g}"]
        rows.append([*_start(row), part["part"], *sizes, intensity, rate, speed, _share(part)])
    header = ("TFLOP", "GB", "FLOP/byte", "TFLOP/s", "TB/s", "% of predicted")
    rows += _red(record, len(header))
    return Table((*START, "part", *header), rows)


def _ops(record: Record) -> str:
    rows = []
    for row in filter(measured, record["rows"]):
        for part in row["parts"]:
            calls = ", ".join(f"{count} {op}" for op, count in part["ops"].items())
            times = [*_time(part["ms"], row), f"{part['predicted_ms']:.4g}", _share(part)]
            rows.append([*_start(row), part["part"], *times, calls])
        for name, ms in row["rest"].items():
            rows.append([*_start(row), f"rest: {name}", *_time(ms, row), "", "", ""])
        whole = [f"{row['value']:.4g}", f"{row['explained_pct']:.1f}"]
        rows.append([*_start(row), "the evaluation, % explained by the parts", *whole, "", "", ""])
    header = ("ms/video", "% of the evaluation", "predicted ms", "% of predicted", "calls")
    rows += _red(record, len(header))
    blocks = []
    for row in filter(measured, record["rows"]):
        for one in row["blocks"]:
            times = [f"{one['ms']:.4g}", f"{one['predicted_ms']:.4g}", _share(one)]
            blocks.append([*_start(row), str(one["block"]), *times])
    per_block = Table((*START, "block", "ms/video", "predicted ms", "% of predicted"), blocks)
    return (
        f"{_html(Table((*START, 'part', *header), rows))}"
        f"<details><summary>Block by block</summary>{_html(per_block)}</details>"
    )


def _scaling(record: Record) -> Table:
    exponents = [record.get(name, {}) for name in ("exponents", "memory_exponents")]
    rows = []
    for row in record["rows"]:
        told = [figure_cell(row), f"{row['peak_gib']:.4g}" if "peak_gib" in row else ""]
        series = f"{mode_of(row)} {row.get('axis')} {row['variant']}"
        slopes = [f"{found[series]:.2f}" if series in found else "" for found in exponents]
        size = [row.get("axis", ""), str(row.get("point", ""))]
        rows.append([*_start(row), *size, *told, *slopes])
    header = ("axis", "size", "ms (p20-p80)", "peak GiB", "exponent, time", "exponent, memory")
    return Table((*START, *header), rows)


def _parts(record: Record) -> Iterable[tuple[Row, dict[str, Any]]]:
    return ((row, part) for row in filter(measured, record["rows"]) for part in row["parts"])


def _red(record: Record, cells: int) -> list[list[str]]:
    """Of every row without a figure a line that says why, with so many empty cells behind."""
    red = (row for row in record["rows"] if not measured(row))
    return [[*_start(row), figure_cell(row), *[""] * cells] for row in red]


def _start(row: Row) -> list[str]:
    return [model_of(row), mode_of(row), row["variant"], str(row["batch"])]


def _time(ms: float, row: Row) -> list[str]:
    return [f"{ms:.4g}", f"{100 * ms / row['value']:.1f}"]


def _share(part: dict[str, Any]) -> str:
    return f"{100 * part['predicted_ms'] / part['ms']:.0f}" if part["ms"] else ""


def _html(table: Table, *, plain: bool = False) -> str:
    """A table; but for a plain one a click on a header sorts it, and its rows can be chosen."""
    columns = table.header
    heads = [escape(one) if plain else f"<button>{escape(one)}</button>" for one in columns]
    lines = []
    for cells in table.rows:
        known = dict(zip(columns, cells, strict=True))
        if "case" in known:
            known["model"] = known["case"].split("/")[1]
        data = "".join(
            f' data-{key}="{escape(known[key])}"' for key in ("model", "variant") if key in known
        )
        inner = "".join(
            f"<td{' class=loss' if cell.find(LOSS) > 0 else ''}>{escape(cell)}</td>"
            for cell in cells
        )
        lines.append(f"<tr{data}>{inner}</tr>")
    head = "".join(f"<th>{one}</th>" for one in heads)
    kind = "" if plain else ' class="rows"'
    return (
        f'<div class="wide"><table{kind}><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )
