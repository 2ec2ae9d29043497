"""What the newest records say: the README's tables, and a page of figures.

python bench/report.py                                # rewrite the tables in README.md
python bench/report.py --check                        # fail if they are not what the record says
python bench/report.py --html FILE.html --png FOLDER  # also the page, and its figures
"""

import argparse
import json
import os
import sys
from importlib.util import find_spec
from pathlib import Path
from textwrap import fill
from typing import Any

from page import NAMES, pictures, render
from tables import HOW_RATIOS, absent_peers, headline_table, markdown, paper_table, rows_table

from snapkernels.testing.record import (
    ROOT,
    file_path,
    is_cut_off,
    newest,
    problems,
    replace_file,
)

BEGIN, END = "<!-- figures: begin -->", "<!-- figures: end -->"
# What a measured row has beside the form of every record.
ROW_FIELDS: dict[str, tuple[str, ...]] = {
    "throughput": (),
    "costs": ("explained_pct", "parts", "blocks", "rest"),
    "model_scaling": ("axis", "point"),
}
PART_FIELDS = ("part", "ops", "ms", "predicted_ms", "tflop", "gb")


def figure_table(record: dict[str, Any]) -> str:
    """A Markdown table of a throughput record, and below it the peers that are absent."""
    absent = "".join(f"\n- {line}" for line in absent_peers(record))
    return markdown(rows_table(record)) + (f"\n\nAbsent peers:\n{absent}" if absent else "")


def section() -> str:
    """What stands between the README's markers.

    Raises:
        ValueError: the newest record is of a run that was cut off.
    """
    found = newest("throughput")
    if found is None:
        return "No GPU record is committed yet."
    path, record = found
    if is_cut_off(record):
        raise ValueError(f"{path.name} is of a run that was cut off: go on with it by --resume")
    ceilings = ", ".join(f"{name} {value:g}" for name, value in record["ceilings"].items())
    processes = record.get("processes", 1)
    where = "the same process" if processes == 1 else f"the first of its {processes} processes"
    return (
        f"{record['device']['name']}, torch {record['versions']['torch']}, commit "
        f"{record['commit'][:10]}; ceilings measured in {where}: {ceilings}. From "
        f"`{path.relative_to(ROOT)}` by `python bench/report.py`.\n\n"
        f"{fill(HOW_RATIOS, 100)}\n\n{markdown(headline_table(record))}\n\n"
        "The paper's own ratios, of the fastest row of each model here:\n\n"
        f"{markdown(paper_table(record))}\n\nAll rows:\n\n{figure_table(record)}"
    )


def rendered(readme: str) -> str:
    """`readme` with the section between its markers made anew.

    Raises:
        ValueError: the markers are not there, once each and in order, or `section` raises it.
    """
    before, _, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end or readme.count(BEGIN) != 1 or readme.count(END) != 1:
        raise ValueError(f"README.md needs {BEGIN} and, after it, {END}, once each")
    return f"{before}{BEGIN}\n{section()}\n{END}{after}"


def load(folder: Path | None) -> dict[str, dict[str, Any]]:
    """The newest record of each name in `NAMES` that there is one of.

    Args:
        folder: where to look, its folders included; None for the committed records.

    Raises:
        ValueError: a record is not in form, or the folder has none.
    """
    records = {}
    for what in NAMES:
        found = newest(what) if folder is None else _newest_in(folder, what)
        if found is None:
            continue
        path, records[what] = found
        wrong = problems(records[what])
        for index, row in enumerate(records[what].get("rows", [])):
            if row.get("gate") == "ok":
                wrong += [f"row {index}: {lacks!r} is missing" for lacks in _lacking(what, row)]
        if wrong:
            raise ValueError(f"{path.name}: {'; '.join(wrong)}")
    if folder and not records:
        raise ValueError(f"{folder}: no file in it is named <date>-{' or -'.join(NAMES)}.json")
    return records


def main(arguments: list[str] | None = None) -> int:
    """Rewrite or check README.md, or make the page; 1 where a check fails, 2 on bad input."""
    args = _parse(arguments)
    try:
        if not args.records:
            status = _readme(check=args.check)
            if status:
                return status
        if args.html or args.png:
            _write_page(load(args.records), args.html, args.png)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _readme(*, check: bool) -> int:
    readme = ROOT / "README.md"
    current = readme.read_text()
    wanted = rendered(current)
    if check and current != wanted:
        print("README.md is not what the records say: run python bench/report.py")
        return 1
    if not check:
        replace_file(readme, wanted)
    return 0


def _write_page(records: dict[str, dict[str, Any]], html: Path | None, folder: Path | None) -> None:
    drawn = pictures(records)
    if html:
        replace_file(html, render(records, drawn))
        print(f"page written to {html}")
    if not folder:
        return
    for name, png in drawn.items():
        path = folder / f"{name}.png"
        partial = path.with_name(path.name + ".partial")
        partial.write_bytes(png)
        os.replace(partial, path)
        print(f"figure written to {path}")


def _lacking(what: str, row: dict[str, Any]) -> list[str]:
    """The fields that a measured row of a record named `what` should have and has not."""
    lacking = [field for field in ROW_FIELDS[what] if field not in row]
    for part in row.get("parts", []):
        lacking += [f"parts: {field}" for field in PART_FIELDS if field not in part]
    return lacking


def _newest_in(folder: Path, what: str) -> tuple[Path, dict[str, Any]] | None:
    found = []
    for path in folder.rglob(f"*-{what}.json"):
        try:
            record = json.loads(path.read_text())
        except ValueError as error:
            raise ValueError(f"{path.name}: not JSON: {error}") from None
        if not isinstance(record, dict) or "taken" not in record:
            raise ValueError(f"{path.name}: field 'taken' is missing: it is no record")
        found.append((path, record))
    return max(found, key=lambda pair: pair[1]["taken"], default=None)


def _folder(text: str) -> Path:
    path = Path(text)
    if not path.is_dir():
        raise argparse.ArgumentTypeError(f"{path}: no such folder")
    return path


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing, compare")
    parser.add_argument("--html", type=file_path, metavar="FILE.html", help="write the page here")
    parser.add_argument("--png", type=_folder, metavar="FOLDER", help="write the figures here")
    parser.add_argument(
        "--records",
        type=_folder,
        metavar="FOLDER",
        help="make page and figures of the records in here, and leave README.md alone",
    )
    args = parser.parse_args(arguments)
    pages = args.html or args.png
    if args.records and (args.check or not pages):
        parser.error("--records needs --html or --png: README.md tells the committed records alone")
    if pages and find_spec("matplotlib") is None:
        parser.error("--html and --png need the package matplotlib: pip install matplotlib")
    return args


if __name__ == "__main__":
    sys.exit(main())
