"""The README's figure table, made from the newest committed record.

python bench/report.py            # rewrite the table in README.md
python bench/report.py --check    # fail if it is not what the record says
"""

import argparse
import sys
from typing import Any

from paper import PAPER_A100

from snapkernels.testing.record import ROOT, newest

BEGIN, END = "<!-- figures: begin -->", "<!-- figures: end -->"
COLUMNS = (
    "case",
    "variant",
    "batch",
    "ms/video (p20-p80)",
    "TFLOP/s",
    "% of ceiling",
    "floor ms",
    "% of floor",
    "peak GiB",
    "paper, A100",
)


def figure_table(record: dict[str, Any]) -> str:
    """A Markdown table of a throughput record, the paper's rows beside and below ours."""
    rows = [_row(row, record["ceilings"]) for row in record["rows"]]
    measured = {row["case"] for row in record["rows"]}
    rows += [
        [case, "paper-a100", *[""] * (len(COLUMNS) - 3), f"{value:g}"]
        for case, value in PAPER_A100.items()
        if case not in measured
    ]
    cells = [list(COLUMNS), *rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(COLUMNS))]
    lines = [
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) + " |"
        for line in cells
    ]
    lines.insert(1, "| " + " | ".join("-" * width for width in widths) + " |")
    return "\n".join(lines)


def section() -> str:
    """What stands between the README's markers."""
    found = newest("throughput")
    if found is None:
        return "No GPU record is committed yet."
    path, record = found
    ceilings = ", ".join(f"{name} {value:g}" for name, value in record["ceilings"].items())
    return (
        f"{record['device']['name']}, torch {record['versions']['torch']}, commit "
        f"{record['commit'][:10]}; ceilings measured in the same process: {ceilings}. From "
        f"`{path.relative_to(ROOT)}` by `python bench/report.py`.\n\n{figure_table(record)}"
    )


def rendered(readme: str) -> str:
    """`readme` with the section between its markers made anew.

    Raises:
        ValueError: the markers are not there, once each and in order.
    """
    before, _, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end or readme.count(BEGIN) != 1 or readme.count(END) != 1:
        raise ValueError(f"README.md needs {BEGIN} and, after it, {END}, once each")
    return f"{before}{BEGIN}\n{section()}\n{END}{after}"


def main() -> int:
    """Rewrite or check README.md."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    readme = ROOT / "README.md"
    current = readme.read_text()
    try:
        wanted = rendered(current)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if args.check:
        if current != wanted:
            print("README.md is not what the records say: run python bench/report.py")
        return int(current != wanted)
    readme.write_text(wanted)
    return 0


def _row(row: dict[str, Any], ceilings: dict[str, float]) -> list[str]:
    paper = PAPER_A100.get(row["case"])
    start = [row["case"], row["variant"], str(row["batch"])]
    end = [f"{row['peak_gib']:g}" if "peak_gib" in row else "", f"{paper:g}" if paper else ""]
    if row["gate"] != "ok":
        return [*start, "no figure", "", "", "", "", *end]
    rate = row["tflop"] / row["value"] * 1e3
    # Of fp8 that of its quantised products, which a CPU has not.
    ceiling = ceilings.get(f"{row['variant'].rsplit('-', 1)[1]}_tflop_s")
    return [
        *start,
        f"{row['value']:.4g} ({row['p20']:.4g}-{row['p80']:.4g})",
        f"{rate:.3g}",
        f"{100 * rate / ceiling:.0f}" if ceiling else "",
        f"{row['floor']:.3g}",
        f"{row['pct_of_floor']:.0f}",
        *end,
    ]


if __name__ == "__main__":
    sys.exit(main())
