"""Kernel launches of an Nsight Compute report, their counters in fixed units.

Sources: `ncu --import FILE --csv --page raw` (a row of names, a row of units, a row a launch), or a
.ncu-rep itself through the Python package ncu_report. What a report lacks is None.
"""

import csv
import importlib
import re
import shutil
import statistics
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass, field, fields, replace
from math import isfinite, prod
from pathlib import Path

Row = dict[str, str]

# Where names differ between versions and GPUs, the first that a report has.
SCALED = {
    "time_us": ("gpu__time_duration.sum", "gpu__time_duration.avg"),
    "read_bytes": ("dram__bytes_read.sum",),
    "written_bytes": ("dram__bytes_write.sum",),
}
PLAIN = {
    "dram_pct": (
        "dram__throughput.avg.pct_of_peak_sustained_elapsed",
        "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed",
    ),
    "l2_pct": ("lts__throughput.avg.pct_of_peak_sustained_elapsed",),
    "sm_pct": ("sm__throughput.avg.pct_of_peak_sustained_elapsed",),
    "issue_pct": (
        "smsp__issue_active.avg.pct_of_peak_sustained_active",
        "sm__inst_issued.avg.pct_of_peak_sustained_active",
        "sm__inst_executed.avg.pct_of_peak_sustained_elapsed",
    ),
    "occupancy_pct": ("sm__warps_active.avg.pct_of_peak_sustained_active",),
    "possible_pct": ("sm__maximum_warps_per_active_cycle_pct",),
    "registers": ("launch__registers_per_thread",),
    "waves": ("launch__waves_per_multiprocessor",),
}
DRAM_PARTS = [f"dram__bytes_{way}.sum.pct_of_peak_sustained_elapsed" for way in ("read", "write")]
ISSUE_RATIO = "smsp__issue_active.avg.per_cycle_active"
TENSOR = re.compile(r"smp?s?p?__[\w]*tensor[\w]*\.avg\.pct_of_peak_sustained_(active|elapsed)")
LIMIT = re.compile(r"launch__occupancy_limit_(\w+)")
STALLS = (
    re.compile(r"smsp__average_warps_issue_stalled_(\w+)_per_issue_active\.ratio"),
    re.compile(r"smsp__average_warp_latency_issue_stalled_(\w+)\.ratio"),
    re.compile(r"smsp__warp_issue_stalled_(\w+)_per_warp_active\.pct"),
    re.compile(r"smsp__pcsamp_warps_issue_stalled_(\w+)"),
)
MICROSECONDS = {"": 1e6, "n": 1e-3, "u": 1.0, "m": 1e3}
BYTES = {"": 1.0, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
UNITS = {prefix + second: us for prefix, us in MICROSECONDS.items() for second in ("second", "s")}
UNITS |= {prefix + byte: size for prefix, size in BYTES.items() for byte in ("byte", "B")}
NO_READER = (
    "to read a .ncu-rep takes ncu (NVIDIA Nsight Compute, also in the CUDA toolkit) on PATH or the "
    "Python package ncu-report; or give the CSV of `ncu --import FILE --csv --page raw`"
)


class NoReaderError(ValueError):
    """Nothing on this machine can open a .ncu-rep."""


@dataclass(frozen=True, kw_only=True)
class Launch:
    """Counters of one launch, or medians over `count` of them.

    Percentages are of the hardware's peak; `possible_pct` is the occupancy that registers, shared
    memory and block size allow, `limits` the blocks an SM holds by each of those, `stalls` the
    share of each reason in the time of the warps, in percent.
    """

    kernel: str
    grid: int | None = None
    block: int | None = None
    count: int = 1
    time_us: float | None = None
    read_bytes: float | None = None
    written_bytes: float | None = None
    dram_pct: float | None = None
    l2_pct: float | None = None
    sm_pct: float | None = None
    tensor_pct: float | None = None
    issue_pct: float | None = None
    occupancy_pct: float | None = None
    possible_pct: float | None = None
    registers: float | None = None
    waves: float | None = None
    limits: dict[str, float] = field(default_factory=dict)
    stalls: dict[str, float] = field(default_factory=dict)

    @property
    def dram_bytes(self) -> float | None:
        """Bytes read from and written to DRAM."""
        if self.read_bytes is None or self.written_bytes is None:
            return None
        return self.read_bytes + self.written_bytes

    @property
    def top_stall(self) -> str | None:
        """What the warps waited for most; "selected" is no wait."""
        waits = {reason: share for reason, share in self.stalls.items() if reason != "selected"}
        return max(waits, key=waits.__getitem__) if any(waits.values()) else None


def load(path: Path) -> list[Launch]:
    """The launches of a report, CSV or .ncu-rep, in its order.

    Raises:
        ValueError: it is no such report, or, as `NoReaderError`, nothing here can read it.
        OSError: the file cannot be read.
    """
    if path.suffix != ".ncu-rep":
        return parse(path.read_text(encoding="utf-8", errors="replace"), str(path))
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    if ncu := shutil.which("ncu"):
        command = [ncu, "--import", str(path), "--csv", "--page", "raw"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            said = (done.stderr + done.stdout).strip().splitlines()
            raise ValueError(f"{path}: ncu cannot read it: {said[-1] if said else 'no reason'}")
        return parse(done.stdout, str(path))
    try:
        reader = importlib.import_module("ncu_report")
    except ImportError:
        raise NoReaderError(f"{path}: {NO_READER}") from None
    found = []
    for span in reader.load_report(str(path)):
        for action in span:
            metrics = {name: action.metric_by_name(name) for name in action.metric_names()}
            row = {name: str(metric.value()) for name, metric in metrics.items()}
            units = {name: metric.unit() for name, metric in metrics.items()}
            found.append(_launch(row | {"Kernel Name": action.name()}, units))
    if not found:
        raise ValueError(f"{path}: no kernel launch is in it")
    return found


def parse(text: str, name: str = "the report") -> list[Launch]:
    """The launches of ncu's raw CSV; what ncu printed above its header is left out.

    Raises:
        ValueError: it is no such CSV; the message calls it `name`.
    """
    try:
        lines = [line for line in csv.reader(text.splitlines()) if line]
    except csv.Error as error:
        raise ValueError(f"{name}: not an ncu report: {error}") from None
    start = next((i for i, line in enumerate(lines) if "Kernel Name" in line), None)
    if start is None:
        raise ValueError(f"{name}: not an ncu report: no row has the column 'Kernel Name'")
    header, *rest = lines[start:]
    if "Metric Name" in header:
        raise ValueError(f"{name}: not the raw page of an ncu report; export it with --page raw")
    rows = [dict(zip(header, line, strict=False)) for line in rest]
    if not rows or rows[0]["Kernel Name"]:
        raise ValueError(f"{name}: not an ncu report: no row of units follows its header")
    launches = [_launch(row, rows[0]) for row in rows[1:] if row.get("Kernel Name")]
    if not launches:
        raise ValueError(f"{name}: no kernel launch is in it")
    return launches


def medians(launches: Iterable[Launch]) -> list[Launch]:
    """One launch for each kernel, grid and block: the median of every counter, and their count."""
    groups: dict[tuple[str, int | None, int | None], list[Launch]] = {}
    for launch in launches:
        groups.setdefault((launch.kernel, launch.grid, launch.block), []).append(launch)
    return [_median(group) for group in groups.values()]


def short_name(kernel: str) -> str:
    """A demangled name without return type, namespaces, template arguments and parameters."""
    plain = re.sub(r"\(anonymous namespace\)::|<unnamed>::", "", kernel)
    words = re.split(r"[<(]", plain)[0].split("::")[-1].split()
    return words[-1] if words else kernel


def number(text: str | None) -> float | None:
    """A number as ncu prints it, thousands apart by commas, or None."""
    try:
        value = float((text or "").replace(",", ""))
    except ValueError:
        return None
    return value if isfinite(value) else None


def _launch(row: Row, units: Row) -> Launch:
    found: dict[str, float | None] = {}
    for name, columns in SCALED.items():
        found[name] = next((v for c in columns if (v := _scaled(row, units, c)) is not None), None)
    for name, columns in PLAIN.items():
        found[name] = next((v for c in columns if (v := number(row.get(c))) is not None), None)
    parts = [number(row.get(column)) for column in DRAM_PARTS]
    if found["dram_pct"] is None and None not in parts:
        found["dram_pct"] = sum(part for part in parts if part is not None)
    ratio = number(row.get(ISSUE_RATIO))
    if found["issue_pct"] is None and ratio is not None:
        found["issue_pct"] = 100 * ratio
    tensor = _matching(row, TENSOR).values()  # of several kinds of product, the busiest
    return Launch(
        kernel=row["Kernel Name"],
        grid=_size(row, "launch__grid_size", "Grid Size"),
        block=_size(row, "launch__block_size", "Block Size"),
        tensor_pct=max(tensor, default=None),
        limits={k: v for k, v in _matching(row, LIMIT, 1).items() if v > 0},
        stalls=_stalls(row),
        **found,  # type: ignore[arg-type]
    )


def _scaled(row: Row, units: Row, column: str) -> float | None:
    value, unit = number(row.get(column)), UNITS.get(units.get(column, ""))
    return None if value is None or unit is None else value * unit


def _size(row: Row, column: str, dims: str) -> int | None:
    """Of a grid or block: its counter, or the product of dimensions such as "(32, 4, 1)"."""
    size = number(row.get(column))
    if size is not None:
        return int(size)
    found = re.findall(r"\d+", row.get(dims, ""))
    return prod(map(int, found)) if found else None


def _matching(row: Row, pattern: re.Pattern[str], group: int = 0) -> dict[str, float]:
    matches = ((pattern.fullmatch(name), number(text)) for name, text in row.items())
    return {found[group]: value for found, value in matches if found and value is not None}


def _stalls(row: Row) -> dict[str, float]:
    """By the first family of counters that the report has; they differ in unit, not in shares."""
    for family in STALLS:
        found = _matching(row, family, 1)
        found = {k: v for k, v in found.items() if not k.endswith("_not_issued")}
        if total := sum(found.values()):
            return {reason: 100 * value / total for reason, value in found.items()}
    return {}


def _median(group: list[Launch]) -> Launch:
    merged: dict[str, float | None] = {}
    for one in fields(Launch):
        if one.type in (float | None, "float | None"):
            values = [v for launch in group if (v := getattr(launch, one.name)) is not None]
            merged[one.name] = statistics.median(values) if values else None
    reasons = {reason for launch in group for reason in launch.stalls}
    stalls = {r: statistics.median(one.stalls.get(r, 0.0) for one in group) for r in reasons}
    return replace(group[0], count=len(group), stalls=stalls, **merged)  # type: ignore[arg-type]
