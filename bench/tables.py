"""The tables of a throughput record as cells, for the README and for the page."""

import re
from typing import NamedTuple

from paper import PAPER_A100
from ratios import (
    Ratio,
    Record,
    Row,
    against_peers,
    fastest,
    is_ours,
    measured,
    mode_of,
    model_of,
    paper_ratios,
)

# What a reader has to know of `headline_table`.
HOW_RATIOS = (
    "Ours is the fastest row of every model and mode, and the ratio is the time of the fastest "
    "peer, of any number format and batch, over it; where the batches differ it says so. Below 1 "
    "is a loss. In brackets: from the peer's p20 over our p80 to its p80 over our p20, and wider "
    "by the drift of the GPU's clock between the two, as one fixed load before each of them told "
    "it. Where the rates of that load are more than 5 % apart there is no ratio; of some records "
    'they are not known ("no clock").'
)
LOSS = ", loss"  # what marks a ratio below 1
NO_PEER = "none in this record"


class Table(NamedTuple):
    """Column names, and as many cells a row."""

    header: tuple[str, ...]
    rows: list[list[str]]


def rows_table(record: Record) -> Table:
    """Every row with a figure or a red gate; absent peers apart, the paper's rows beside and below.

    The roof of a row is that of its number format: of fp8 that of its quantised products.
    """
    header = (
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
    rows = [_row(row, record["ceilings"]) for row in record["rows"] if not _absent(row)]
    cases = {row["case"] for row in record["rows"]}
    rows += [
        [case, "paper-a100", *[""] * (len(header) - 3), f"{value:g}"]
        for case, value in PAPER_A100.items()
        if case not in cases
    ]
    return Table(header, rows)


def absent_peers(record: Record) -> list[str]:
    """One "variant: reason" for every reason why a peer could not be had here."""
    lines = (f"{row['variant']}: {row['gate']}" for row in record["rows"] if _absent(row))
    return list(dict.fromkeys(" ".join(line.split()) for line in lines))


def headline_table(record: Record) -> Table:
    """Of every model and mode our fastest row, and the fastest peer's time over ours."""
    header = (
        "model",
        "mode",
        "ours",
        "ms/video (p20-p80)",
        "% of floor",
        "best peer",
        "its ms/video (p20-p80)",
        "ratio (low-high)",
        "paper, A100",
    )
    rows = []
    for case, ratios in against_peers(record).items():
        found = [row for row in record["rows"] if row["case"] == case]
        ours = fastest(filter(is_ours, found))
        peer = fastest(row for row in found if not is_ours(row))
        shown = next((one for one in ratios if one.under is ours), None)
        rows.append(
            [
                model_of(found[0]),
                mode_of(found[0]),
                name(ours) if ours else _no_ours(found),
                spread(ours) if ours else "",
                f"{ours['pct_of_floor']:.0f}" if ours else "",
                name(peer) if peer else NO_PEER,
                spread(peer) if peer else "",
                ratio_cell(shown) if shown else "",
                f"{PAPER_A100[case]:g}" if case in PAPER_A100 else "",
            ]
        )
    return Table(header, rows)


def paper_table(record: Record) -> Table:
    """The paper's ratios beside those of the fastest row of each model here."""
    rows = [
        [
            one.name,
            f"{one.paper:.2f}",
            ratio_cell(one.here, losses=False),
            f"{name(one.here.over)} / {name(one.here.under)}" if one.here.value else "",
        ]
        for one in paper_ratios(record)
    ]
    return Table(("ratio of ms/video", "paper, A100", "here (low-high)", "rows"), rows)


def peers_table(record: Record) -> Table:
    """Each of our rows against the fastest peer of its model and mode, of all batches."""
    rows = [
        [
            model_of(one.under),
            mode_of(one.under),
            one.under["variant"],
            str(one.under["batch"]),
            spread(one.under),
            name(one.over),
            spread(one.over),
            ratio_cell(one),
        ]
        for ratios in against_peers(record).values()
        for one in ratios
    ]
    header = (
        "model",
        "mode",
        "variant",
        "batch",
        "ms/video (p20-p80)",
        "best peer",
        "its ms/video (p20-p80)",
        "ratio (low-high)",
    )
    return Table(header, rows)


def name(row: Row) -> str:
    """Variant and batch of a row."""
    return f"{row['variant']}, batch {row['batch']}"


def figure_cell(row: Row) -> str:
    """The figure of a row, or why it has none."""
    return spread(row) if measured(row) else f"no figure: {row['gate']}"


def spread(row: Row) -> str:
    """The figure of a measured row with its p20 and p80."""
    return f"{row['value']:.4g} ({row['p20']:.4g}-{row['p80']:.4g})"


def ratio_cell(one: Ratio, *, losses: bool = True) -> str:
    """A ratio with its spread and notes, or its reason; `losses`: one below 1 is marked."""
    if one.value is None:
        return one.refused
    loss = LOSS if losses and one.value < 1 else ""
    note = f", {one.note}" if one.note else ""
    return f"{one.value:.3g} ({one.low:.3g}-{one.high:.3g}){loss}{note}"


def markdown(table: Table) -> str:
    """A table as Markdown, its columns aligned."""
    cells = [
        [re.sub(r"\s+", " ", cell).replace("|", "\\|") for cell in line]
        for line in (table.header, *table.rows)
    ]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) + " |"
        for line in cells
    ]
    lines.insert(1, "| " + " | ".join("-" * width for width in widths) + " |")
    return "\n".join(lines)


def _absent(row: Row) -> bool:
    """Whether it is of a peer that cannot be had here; one that is red was there."""
    return row.get("absent", False)


def _no_ours(rows: list[Row]) -> str:
    gates = sorted({row["gate"] for row in rows if is_ours(row)})
    return f"no figure: {', '.join(gates)}" if gates else "none"


def _row(row: Row, ceilings: dict[str, float]) -> list[str]:
    paper = PAPER_A100.get(row["case"])
    start = [row["case"], row["variant"], str(row["batch"])]
    end = [f"{row['peak_gib']:g}" if "peak_gib" in row else "", f"{paper:g}" if paper else ""]
    if not measured(row):
        return [*start, figure_cell(row), "", "", "", "", *end]
    rate = row["tflop"] / row["value"] * 1e3
    # Of fp8 that of its quantised products, which a CPU has not.
    ceiling = ceilings.get(f"{row['variant'].rsplit('-', 1)[1]}_tflop_s")
    return [
        *start,
        spread(row),
        f"{rate:.3g}",
        f"{100 * rate / ceiling:.0f}" if ceiling else "",
        f"{row['floor']:.3g}",
        f"{row['pct_of_floor']:.0f}",
        *end,
    ]
