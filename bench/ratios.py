"""Ratios of the rows of a throughput record, each with its spread, or the reason why it is none.

A ratio is one row's time over another's. Its low end is the one's p20 over the other's p80, its
high end the p80 over the p20, and what the GPU's clock drifted between them. There is none of a row
without a figure, and none of two rows that the GPU ran at different clocks: that would compare the
clocks.
"""

from collections.abc import Collection, Iterable
from typing import Any, NamedTuple

from paper import PAPER_A100, PAPER_RATIOS

Row = dict[str, Any]
Record = dict[str, Any]
MOST_APART = 1.05  # the faster probe_tflop_s of two rows over the slower


class Ratio(NamedTuple):
    """The ms/video of row `over` over that of row `under`, or why that is refused.

    A row that a record does not have is empty.
    """

    over: Row
    under: Row
    value: float | None = None
    low: float | None = None
    high: float | None = None
    refused: str = ""  # the reason where there is no value
    note: str = ""  # what a reader has to know beside the value


class PaperRatio(NamedTuple):
    """A ratio that the paper speaks of: its own on A100, and that of a record."""

    name: str
    paper: float
    here: Ratio


def is_ours(row: Row) -> bool:
    """Whether a row's variant is made of our kernels; every other is a peer."""
    return row["variant"].startswith("ours-")


def model_of(row: Row) -> str:
    """ "500m" of case "model/500m/infer"."""
    return row["case"].split("/")[1]


def mode_of(row: Row) -> str:
    """ "infer" of case "model/500m/infer"."""
    return row["case"].split("/")[2]


def measured(row: Row) -> bool:
    """Whether a row has a figure that its gate lets through."""
    return row["gate"] == "ok" and "value" in row


def fastest(rows: Iterable[Row]) -> Row | None:
    """The measured row with the lowest time, or None where none is measured."""
    return min(filter(measured, rows), key=lambda row: row["value"], default=None)


def best(record: Record, case: str, variants: Collection[str] | None = None) -> Row | None:
    """The fastest row of a case over its batches and over `variants` (None: all of them)."""
    return fastest(
        row
        for row in record["rows"]
        if row["case"] == case and (variants is None or row["variant"] in variants)
    )


def ratio(over: Row, under: Row) -> Ratio:
    """The time of `over` over that of `under`, or the reason why there is no such number.

    A time goes with 1 / clock: where the clocks of both rows are known, the spread reaches from the
    ratio as measured to the one that equal clocks would have given, `probe_tflop_s` of `over` over
    that of `under` times as high.
    """
    for row in (over, under):
        name = f"{row['case']} {row['variant']} batch {row['batch']}"
        if row["gate"] != "ok":
            return Ratio(over, under, refused=f"{name}: {row['gate']}")
        if lacking := [field for field in ("value", "p20", "p80") if field not in row]:
            return Ratio(over, under, refused=f"{name} has no {', '.join(lacking)}")
    probes = [row["probe_tflop_s"] for row in (over, under) if "probe_tflop_s" in row]
    known = len(probes) == 2
    if known and max(probes) > MOST_APART * min(probes):
        return Ratio(over, under, refused="one load at {:g} and {:g} TFLOP/s".format(*probes))
    drift = probes[0] / probes[1] if known else 1.0
    return Ratio(
        over,
        under,
        value=over["value"] / under["value"],
        low=over["p20"] / under["p80"] * min(1.0, drift),
        high=over["p80"] / under["p20"] * max(1.0, drift),
        note="" if known else "no clock",
    )


def paper_ratios(record: Record) -> list[PaperRatio]:
    """The paper's ratios, beside those of the fastest row of each model in `record`."""
    return [
        PaperRatio(name, PAPER_A100[over] / PAPER_A100[under], _of_cases(record, over, under))
        for name, (over, under) in PAPER_RATIOS.items()
    ]


def against_peers(record: Record) -> dict[str, list[Ratio]]:
    """{case: of each of our rows the fastest peer's time over it}; below 1 is a loss.

    The peer is the fastest of all batches and number formats: ours is held to the best that others
    make of a model. Where it has another batch than our row, the ratio's note says so.
    """
    found = {}
    for case in dict.fromkeys(row["case"] for row in record["rows"]):
        rows = [row for row in record["rows"] if row["case"] == case and measured(row)]
        peer = fastest(row for row in rows if not is_ours(row))
        found[case] = [_held_to(peer, row) for row in filter(is_ours, rows)] if peer else []
    return found


def _held_to(peer: Row, ours: Row) -> Ratio:
    one = ratio(peer, ours)
    differ = "" if peer["batch"] == ours["batch"] else "batches differ"
    return one._replace(note=", ".join(filter(None, (one.note, differ))))


def _of_cases(record: Record, over: str, under: str) -> Ratio:
    rows = {case: best(record, case) or {} for case in (over, under)}
    if all(rows.values()):
        return ratio(rows[over], rows[under])
    reasons = (_why_none(record, case) for case, row in rows.items() if not row)
    return Ratio(rows[over], rows[under], refused="; ".join(reasons))


def _why_none(record: Record, case: str) -> str:
    gates = sorted({row["gate"] for row in record["rows"] if row["case"] == case})
    return f"{case}: {', '.join(gates)}" if gates else f"no {case} in this record"
