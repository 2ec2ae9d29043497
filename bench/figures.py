"""The report's figures, each a function of a record. matplotlib draws them, without a screen."""

import math
from collections.abc import Callable, Iterable
from io import BytesIO
from itertools import product
from typing import TYPE_CHECKING, Any

from paper import PAPER_A100
from ratios import Record, Row, best, is_ours, measured, mode_of, model_of
from support import OUT_OF_MEMORY

if TYPE_CHECKING:  # else imported where it draws: the README's tables do without matplotlib
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# {backend: (colour of bf16 and wider, colour of fp8)}, in the order of the bars.
COLOURS = {
    "ours": ("#5b9bf0", "#1546a0"),
    "eager": ("#9aa0a6", "#4a4f55"),
    "compile": ("#f2b04a", "#c0700a"),
    "torchao": ("#84cb8b", "#2a7d3a"),
    "flash-attn": ("#c3a2e8", "#7540a8"),
    "xformers": ("#d9a58f", "#8c4a30"),
    "te": ("#f29c9c", "#bf2a2a"),
}
OTHER = ("#7fc8c8", "#1f7a7a")
MODES = {"infer": "inference", "train": "training"}
AXES = {"tokens": "patch tokens", "batch": "videos a call", "latents": "latents"}
DPI = 144
LEGEND_WIDTH = 1.6  # inches of an entry
STYLE: dict[Any, Any] = {
    "font.size": 9.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e6ea",
    "legend.frameon": False,
    "hatch.linewidth": 0.6,
}
CLEAR = {"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 0.4}
HATCHED: dict[str, Any] = {
    "facecolor": "white",
    "edgecolor": "#555",
    "hatch": "////",
    "linewidth": 0.5,
}


def table2(record: Record) -> "Figure":
    """Bars of ms/video, of each variant its fastest batch, a set of axes a model and mode.

    The paper's A100 stands beside, hatched, and is cut where it is much higher; a tick across one
    of our bars is its floor.

    Args:
        record: of throughput, with at least one measured row.
    """
    cases = {row["case"] for row in record["rows"] if measured(row)}
    models = list(dict.fromkeys(case.split("/")[1] for case in [*PAPER_A100, *_cases(record)]))
    models = [one for one in models if any(f"model/{one}/{mode}" in cases for mode in MODES)]
    modes = [mode for mode in MODES if any(case.endswith(mode) for case in cases)]
    variants = _ordered(row["variant"] for row in record["rows"] if measured(row))
    figure = _figure(max(6.5, 2.9 * len(models)), 0.9 + 2.9 * len(modes))
    axes = figure.subplots(len(modes), len(models), squeeze=False)
    for line, mode in zip(axes, modes, strict=True):
        for axis, model in zip(line, models, strict=True):
            case = f"model/{model}/{mode}"
            rows = [row for one in variants if (row := best(record, case, {one}))]
            if not rows:
                axis.set_axis_off()
                continue
            _bars_of_case(axis, rows, PAPER_A100.get(case))
            axis.set_title(f"{model}, {MODES[mode]}", fontsize=10)
        line[0].set_ylabel("ms/video")
    handles = [_patch(one, facecolor=colour(one)) for one in variants]
    handles.append(_patch("paper, A100 (cut)", **HATCHED))
    handles.append(_line("floor of ours", color="black", linewidth=2))
    columns = max(2, int(figure.get_figwidth() / LEGEND_WIDTH))
    figure.legend(handles=handles, loc="outside lower center", ncols=min(columns, len(handles)))
    figure.suptitle(f"{record['device']['name']}: fastest batch of each variant, lower is better")
    return figure


def ops(record: Record) -> "Figure":
    """Stacked bars of where an evaluation's time goes: its parts, and on top the rest, hatched.

    Args:
        record: of costs, with at least one measured row.
    """
    rows = [row for row in record["rows"] if measured(row)]
    parts = list(dict.fromkeys(part["part"] for row in rows for part in row["parts"]))
    cases = _cases({"rows": rows})
    figure = _figure(3.2 + sum(1.1 + 0.8 * _count(rows, case) for case in cases), 6.2)
    widths = [1.0 + _count(rows, case) for case in cases]
    axes = figure.subplots(1, len(cases), squeeze=False, width_ratios=widths)[0]
    shades = dict(zip(parts, _shades(len(parts)), strict=True))
    for axis, case in zip(axes, cases, strict=True):
        found = [row for row in rows if row["case"] == case]
        for place, row in enumerate(found):
            _stack(axis, place, row, shades)
        names = [f"{row['variant']}\nbatch {row['batch']}" for row in found]
        axis.set_xticks(range(len(found)), names, fontsize=8)
        axis.set_title(f"{model_of(found[0])}, {MODES[mode_of(found[0])]}", fontsize=10)
        axis.grid(axis="x", visible=False)
        axis.set_xlim(-0.6, len(found) - 0.4)
        axis.margins(y=0.06)
    axes[0].set_ylabel("ms/video")
    handles = [_patch("rest", **HATCHED)]
    handles += [_patch(part, facecolor=shades[part]) for part in reversed(parts)]
    handles.append(_line("measured as a whole", color="black", linewidth=1.5))
    figure.legend(handles=handles, loc="outside right center")
    return figure


def roofline(record: Record) -> "Figure":
    """TFLOP/s against FLOP/byte of every part, below the ceilings that the record measured.

    A part is labelled once, and a line joins its variants. One without products has no place here.

    Args:
        record: of costs, with at least one measured row.
    """
    rows = [row for row in record["rows"] if measured(row)]
    cases = _cases({"rows": rows})
    figure = _figure(10.0, 0.7 + 4.8 * len(cases))
    axes = figure.subplots(len(cases), 1, squeeze=False)[:, 0]
    points = [_point(part) for row in rows for part in row["parts"] if _has_place(part)]
    ceilings = record["ceilings"]
    roofs = {name: rate for name, rate in ceilings.items() if name.endswith("_tflop_s")}
    ridge = max(roofs.values()) / ceilings["copy_tb_s"]
    left, right = _wide([x for x, _ in points] + [ridge], 2, 4)
    bottom, top = _wide([y for _, y in points] + list(roofs.values()), 1.6, 1.6)
    for axis, case in zip(axes, cases, strict=True):
        axis.set(xscale="log", yscale="log", xlim=(left, right), ylim=(bottom, top))
        axis.set(xlabel="FLOP/byte", ylabel="TFLOP/s")
        axis.xaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_major_formatter("{x:g}")
        _draw_ceilings(axis, roofs, ceilings["copy_tb_s"], left, right)
        found = [row for row in rows if row["case"] == case]
        axis.set_title(f"{model_of(found[0])}, {MODES[mode_of(found[0])]}", fontsize=10)
        for row in found:
            places = [_point(part) for part in row["parts"] if _has_place(part)]
            axis.scatter(*zip(*places, strict=True), s=34, color=colour(row["variant"]), zorder=3)
    variants = _ordered(row["variant"] for row in rows)
    handles = [_line(one, color=colour(one), marker="o", linestyle="") for one in variants]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    figure.draw_without_rendering()  # labels are placed in pixels: the layout has to be final
    for axis, case in zip(axes, cases, strict=True):
        _label_parts(axis, [row for row in rows if row["case"] == case])
    return figure


def scaling(record: Record) -> "Figure":
    """Time and peak memory of whole models against tokens, batch and latents, on log axes.

    Where a variant ran out of memory, or its gate is red, an x at the top says which.
    Exponents are those of the record.

    Args:
        record: of model_scaling, with at least one measured row.
    """
    rows = record["rows"]
    columns = [axis for axis in AXES if any(row.get("axis") == axis for row in rows)]
    modes = [mode for mode in MODES if any(mode_of(row) == mode for row in rows)]
    kinds = [("value", "time", "ms a call", "exponents")]
    if any("peak_gib" in row for row in rows):
        kinds.append(("peak_gib", "peak memory", "GiB", "memory_exponents"))
    figure = _figure(4.6 * len(columns), 0.4 + 2.9 * len(modes) * len(kinds))
    axes = figure.subplots(len(modes) * len(kinds), len(columns), squeeze=False)
    for line, (mode, (key, what, label, exponents)) in zip(
        axes, product(modes, kinds), strict=True
    ):
        line[0].set_ylabel(label)
        for axis, along in zip(line, columns, strict=True):
            found = [row for row in rows if mode_of(row) == mode and row.get("axis") == along]
            if not found:
                axis.remove()
                continue
            _curves(axis, found, key, record.get(exponents, {}))
            axis.set_xlabel(AXES[along])
            models = ", ".join(dict.fromkeys(map(model_of, found)))
            axis.set_title(f"{models}, {MODES[mode]}: {what}", fontsize=10)
    return figure


def png(draw: Callable[[Record], "Figure"], record: Record) -> bytes:
    """What `draw` makes of `record`, as a PNG file: the same bytes every time."""
    from matplotlib import rc_context

    file = BytesIO()
    with rc_context(STYLE):
        draw(record).savefig(file, format="png", dpi=DPI, metadata={"Software": None})
    return file.getvalue()


# {name: (the name of its record, what draws it)}
FIGURES: dict[str, tuple[str, Callable[[Record], "Figure"]]] = {
    "table2": ("throughput", table2),
    "roofline": ("costs", roofline),
    "ops": ("costs", ops),
    "scaling": ("model_scaling", scaling),
}


def colour(variant: str) -> str:
    """Of a variant, the same in every figure."""
    backend, _, numbers = variant.rpartition("-")
    return COLOURS.get(backend, OTHER)[numbers == "fp8"]


def _figure(width: float, height: float) -> "Figure":
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained", facecolor="white")


def _patch(label: str, **style: Any) -> Any:
    from matplotlib.patches import Patch

    return Patch(label=label, **style)


def _line(label: str, **style: Any) -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], label=label, **style)


def _cases(record: Record) -> list[str]:
    return list(dict.fromkeys(row["case"] for row in record["rows"]))


def _count(rows: list[Row], case: str) -> int:
    return sum(row["case"] == case for row in rows)


def _ordered(variants: Iterable[str]) -> list[str]:
    """Each once: ours first, then the peers as in `COLOURS`, fp8 last of each."""
    backends = list(COLOURS)

    def place(variant: str) -> tuple[int, bool, str]:
        backend, _, numbers = variant.rpartition("-")
        known = backends.index(backend) if backend in backends else len(backends)
        return known, numbers == "fp8", variant

    return sorted(set(variants), key=place)


def _shades(count: int) -> list[Any]:
    """So many colours, neighbours apart."""
    from matplotlib import colormaps

    rank = [*range(0, 20, 2), *range(1, 20, 2)]  # the ten strong ones, then the ten light ones
    return [
        tuple(0.25 + 0.75 * channel for channel in colormaps["tab20"](rank[number % 20])[:3])
        for number in range(count)
    ]


def _bars_of_case(axis: "Axes", rows: list[Row], paper: float | None) -> None:
    """Bars of one model and mode, with their values above."""
    heights = [row["value"] for row in rows]
    top = 1.3 * max(heights)
    for place, row in enumerate(rows):
        axis.bar(place, row["value"], color=colour(row["variant"]), width=0.8)
        if is_ours(row):
            axis.hlines(row["floor"], place - 0.4, place + 0.4, color="black", linewidth=2)
    if paper is not None:
        place = len(rows)
        heights.append(min(paper, 0.86 * top))
        axis.bar(place, heights[-1], width=0.8, **HATCHED)
        if paper > heights[-1]:  # a gap in the bar, at a slant
            cut = ([place - 0.5, place + 0.5], [0.72 * top, 0.76 * top])
            axis.plot(*cut, color="white", linewidth=5, solid_capstyle="butt")
    values = [row["value"] for row in rows] + ([paper] if paper is not None else [])
    for place, (height, value) in enumerate(zip(heights, values, strict=True)):
        axis.annotate(
            f"{value:.3g}",
            (place, height),
            (0, 2),
            textcoords="offset points",
            ha="center",
            va="bottom",
            fontsize=7.5,
            rotation=90 if len(values) > 6 else 0,
        )
    axis.set_ylim(0, top)
    axis.set_xticks([])
    axis.set_xlim(-0.6, max(len(values), 3) - 0.4)


def _stack(axis: "Axes", place: int, row: Row, shades: dict[str, Any]) -> None:
    """One evaluation as a stack of its parts; those of 5 % or more have their ms inside."""
    base = 0.0
    for part in row["parts"]:
        ms = part["ms"]
        axis.bar(place, ms, bottom=base, color=shades[part["part"]], width=0.72)
        if ms >= 0.05 * row["value"]:
            middle = base + ms / 2
            axis.text(place, middle, f"{ms:.3g}", ha="center", va="center", fontsize=7.5)
        base += ms
    rest = sum(row["rest"].values())
    if rest > 0:
        axis.bar(place, rest, bottom=base, width=0.72, **HATCHED)
    axis.hlines(row["value"], place - 0.44, place + 0.44, color="black", linewidth=1.5)
    axis.annotate(
        f"{row['value']:.4g}",
        (place, max(row["value"], base)),
        (0, 3),
        textcoords="offset points",
        ha="center",
        va="bottom",
        fontsize=8.5,
        fontweight="bold",
    )


def _has_place(part: dict[str, Any]) -> bool:
    return all(part[key] > 0 for key in ("tflop", "gb", "ms"))


def _point(part: dict[str, Any]) -> tuple[float, float]:
    """(FLOP/byte, TFLOP/s)."""
    return part["tflop"] / part["gb"] * 1e3, part["tflop"] / part["ms"] * 1e3


def _wide(values: list[float], below: float, above: float) -> tuple[float, float]:
    """Limits of a log axis, with room around `values`."""
    return min(values) / below, max(values) * above


def _draw_ceilings(
    axis: "Axes", roofs: dict[str, float], copy: float, left: float, right: float
) -> None:
    """The slope of the copy up to the highest roof, and every roof from there on."""
    highest = max(roofs.values())
    axis.plot([left, highest / copy], [left * copy, highest], color="#444", linewidth=1.2)
    for name, rate in roofs.items():
        axis.plot([rate / copy, right], [rate, rate], color="#444", linewidth=1.2)
        kind = name.removesuffix("_tflop_s")
        axis.annotate(
            f"{kind} {rate:.4g} TFLOP/s", (right, rate), (-3, 3), textcoords="offset points",
            ha="right", fontsize=8, color="#444",
        )  # fmt: skip
    # Along its slope, which is `copy` in the axes' own units.
    axis.text(
        left * 1.3, left * 1.3 * copy * 1.12, f"copy {copy:.3g} TB/s", fontsize=8, color="#444",
        rotation=math.degrees(math.atan(copy)), rotation_mode="anchor", transform_rotates_text=True,
    )  # fmt: skip


def _label_parts(axis: "Axes", rows: list[Row]) -> None:
    """Join the points of a part, and write its name where nothing stands yet."""
    places: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        for part in filter(_has_place, row["parts"]):
            places.setdefault(part["part"], []).append(_point(part))
    for points in places.values():
        axis.plot(*zip(*points, strict=True), color="#b5bac2", linewidth=1, zorder=2)
    scale = 72 / axis.figure.dpi
    spots = axis.transData.transform([one for points in places.values() for one in points]) * scale
    taken = [(x - 4, y - 4, x + 4, y + 4) for x, y in spots]
    inside = [edge * scale for edge in axis.bbox.extents]
    for name, points in sorted(places.items(), key=lambda item: -item[1][0][1]):
        x, y = axis.transData.transform(points[0]) * scale
        width, height = 4.5 * len(name), 10.0  # points, at 8 of the font
        dx, dy = _free(x, y, width, height, taken, inside)
        taken.append((x + dx, y + dy, x + dx + width, y + dy + height))
        gap = math.hypot(max(dx, 0.0, -dx - width), max(dy, 0.0, -dy - height))
        axis.annotate(
            name,
            points[0],
            (dx + width / 2, dy + height / 2),
            textcoords="offset points",
            ha="center",
            va="center",
            fontsize=8,
            zorder=4,
            bbox=CLEAR,
            arrowprops={"arrowstyle": "-", "color": "#888", "linewidth": 0.6} if gap > 9 else None,
        )


def _free(
    x: float,
    y: float,
    width: float,
    height: float,
    taken: list[tuple[float, float, float, float]],
    inside: list[float],
) -> tuple[float, float]:
    """The offset of a label's lower left corner, in points, nearest to (x, y) among the free."""
    offsets = []
    for radius in (8, 14, 22, 32, 44, 58, 74, 92):
        for step in range(16):
            angle = 2 * math.pi * step / 16
            side = math.cos(angle)
            dx = radius * side - width * (1 - side) / 2
            offsets.append((dx, radius * math.sin(angle) - height / 2))
    for dx, dy in offsets:
        box = (x + dx, y + dy, x + dx + width, y + dy + height)
        within = (
            box[0] > inside[0] and box[1] > inside[1] and box[2] < inside[2] and box[3] < inside[3]
        )
        if within and not any(_meet(box, other) for other in taken):
            return dx, dy
    return offsets[0]


def _meet(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _curves(axis: "Axes", rows: list[Row], key: str, exponents: dict[str, float]) -> None:
    """One curve a variant, and an x at the top where it has no figure."""
    from matplotlib.ticker import LogLocator

    points = sorted({row["point"] for row in rows})
    for number, variant in enumerate(_ordered(row["variant"] for row in rows)):
        own = sorted((r for r in rows if r["variant"] == variant), key=lambda r: r["point"])
        shown = [row for row in own if measured(row) and key in row]
        exponent = exponents.get(f"{mode_of(own[0])} {own[0]['axis']} {variant}")
        axis.plot(
            [row["point"] for row in shown],
            [row[key] for row in shown],
            color=colour(variant),
            marker="os^"[number % 3],
            markersize=4.5,
            label=variant if exponent is None else f"{variant}: exponent {exponent:.2f}",
        )
        _mark_lost(axis, number, [row for row in own if not measured(row)])
    axis.set_xscale("log")
    axis.set_xticks(points, [_short(point) for point in points], rotation=40, fontsize=7.5)
    if any(measured(row) and key in row for row in rows):
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.margins(y=0.18)
        if not all(map(measured, rows)):  # marks need room at the top
            bottom, top = axis.get_ylim()
            axis.set_ylim(bottom, top * (top / bottom) ** 0.4)
    else:  # marks alone, at no height
        axis.set_yticks([])
    axis.minorticks_off()
    axis.legend(fontsize=8)


def _mark_lost(axis: "Axes", number: int, rows: list[Row]) -> None:
    """An x at the top, and why, for each of the `rows`; lower for every further variant."""
    at_top, height = axis.get_xaxis_transform(), 0.97 - 0.17 * number
    for row in rows:
        style: dict[str, Any] = {"color": colour(row["variant"]), "zorder": 4}
        axis.plot([row["point"]], [height], "x", transform=at_top, clip_on=False, **style)
        axis.annotate(
            "out of\nmemory" if row["gate"] == OUT_OF_MEMORY else "red",  # points may stand close
            (row["point"], height),
            (0, -4),
            xycoords=at_top,
            textcoords="offset points",
            ha="center",
            va="top",
            fontsize=6.5,
            **style,
        )


def _short(number: float) -> str:
    """1048576 as 1.05M, 36864 as 36.9k, 1536 as it is."""
    for size, letter in ((10**6, "M"), (10**3, "k")):
        if number >= max(size, 10**4):
            return f"{number / size:.3g}{letter}"
    return f"{number:g}"
