"""metrics.py on a committed report, and its units and verdicts on rows made here."""

import csv
import io
import sys
from pathlib import Path

import pytest
from launches import medians, parse, short_name
from metrics import COLUMNS, describe, main
from verdict import verdict

REPORT = Path(__file__).parent / "report.csv"
NAME = "Kernel Name"
TIME = "gpu__time_duration.sum"
READ = "dram__bytes_read.sum"
WRITTEN = "dram__bytes_write.sum"
DRAM = "dram__throughput.avg.pct_of_peak_sustained_elapsed"
L2 = "lts__throughput.avg.pct_of_peak_sustained_elapsed"
SM = "sm__throughput.avg.pct_of_peak_sustained_elapsed"
TENSOR = "sm__inst_executed_pipe_tensor_op_hmma.avg.pct_of_peak_sustained_active"
ISSUE = "sm__inst_issued.avg.pct_of_peak_sustained_active"
WAVES = "launch__waves_per_multiprocessor"
STALL = "smsp__average_warps_issue_stalled_{}_per_issue_active.ratio"
QUIET = {DRAM: "20", L2: "15", SM: "10", TENSOR: "0", ISSUE: "8"}


def report(*launches, **units):
    """An ncu raw CSV of `launches`, {column: cell}; `units` by what a column's name ends in."""
    header = list(launches[0])
    text = io.StringIO()
    writer = csv.writer(text, quoting=csv.QUOTE_ALL)
    writer.writerow(header)
    writer.writerow(next((u for end, u in units.items() if end in one), "") for one in header)
    writer.writerows(one.values() for one in launches)
    return text.getvalue()


def kernel(**columns):
    return parse(report({NAME: "k", **columns}))[0]


def test_the_committed_report(capsys):
    kernels = medians(parse(REPORT.read_text()))
    assert main([str(REPORT), "--case", "op/patchify/up-b1/fwd"]) == 0
    printed, *verdicts = capsys.readouterr().out.split("\n\n")
    lines = printed.splitlines()
    assert lines[0].split() == " ".join(COLUMNS).split()
    for one, line, words in zip(kernels, lines[1:], verdicts, strict=False):
        name = short_name(one.kernel)
        assert "transpose" in name and line.startswith(name) and words.startswith(name)
        assert one.time_us > 0 and one.registers > 0 and one.dram_bytes > 0
        assert "DRAM" in words
    assert len(verdicts) == len(kernels)


@pytest.mark.parametrize(
    ("text", "unit", "us"),
    [
        ("18,050", "ns", 18.05),
        ("18,050.00", "nsecond", 18.05),
        ("18.05", "us", 18.05),
        ("18.05", "usecond", 18.05),
        ("1.5", "ms", 1500),
        ("1.5", "msecond", 1500),
        ("2", "second", 2e6),
        ("n/a", "us", None),
        ("nan", "us", None),
        ("", "us", None),
        ("1", "fortnight", None),
    ],
)
def test_units_of_time(text, unit, us):
    (found,) = parse(report({NAME: "k", TIME: text}, time=unit))
    assert found.time_us == (us if us is None else pytest.approx(us))


@pytest.mark.parametrize(
    ("text", "unit", "size"),
    [
        ("1,024", "byte", 1024),
        ("1.5", "Kbyte", 1500),
        ("28.34", "Mbyte", 28.34e6),
        ("1.25", "Gbyte", 1.25e9),
    ],
)
def test_units_of_size(text, unit, size):
    columns = {NAME: "k", READ: text, WRITTEN: text}
    (found,) = parse(report(columns, dram=unit))
    assert found.dram_bytes == pytest.approx(2 * size)


@pytest.mark.parametrize(
    ("signature", "name"),
    [
        ("cell_transpose_kernel", "cell_transpose_kernel"),
        ("void copy<float, 4>(const T1 *, T1 *)", "copy"),
        ("void at::(anonymous namespace)::cat<(int)2>(int, f(int))", "cat"),
        ("<lambda>", "<lambda>"),
    ],
)
def test_names_are_short(signature, name):
    assert short_name(signature) == name


def test_medians_of_each_kernel_below_what_ncu_said():
    times = [("a", "3"), ("b", "5"), ("a", "4"), ("a", "9")]
    made = report(*({NAME: name, TIME: us} for name, us in times), time="us")
    a, b = medians(parse(f"==PROF== Connected\n\n{made}"))
    assert (a.kernel, a.count, a.time_us) == ("a", 3, 4)
    assert (b.kernel, b.count, b.time_us) == ("b", 1, 5)


def rows_of(launches, compulsory=None):
    """The cells of the table below its titles."""
    lines = describe(launches, compulsory, 3.0).split("\n\n")[0].splitlines()
    return [line.split() for line in lines[1:]]


def test_the_floor_is_a_copy_of_the_compulsory_bytes():
    launches = parse(report({NAME: "k", TIME: "40"}, time="us"))
    expected = ["k", "1", "40.00", "50", "-", "60.00", "-", "-", "-", "-", "-"]
    assert rows_of(launches, 60_000_000) == [expected]


def test_the_floor_of_several_kernels_is_that_of_their_sum():
    launches = parse(report({NAME: "a", TIME: "30"}, {NAME: "b", TIME: "5"}, time="us"))
    launches = medians([*launches, launches[1]])  # b twice in a call
    a, b, call = rows_of(launches, 60_000_000)
    assert a[3] == b[3] == "-"
    assert call[:8] == ["sum", "of", "a", "call", "3", "40.00", "50", "-"]


def test_what_is_missing_is_a_dash():
    assert rows_of([kernel()]) == [["k", "1", *["-"] * 9]]
    assert "no verdict" in verdict(kernel())
    assert kernel(**{READ: "1"}).dram_bytes is None


@pytest.mark.parametrize(
    ("columns", "binds"),
    [
        ({DRAM: "91"}, "bound by DRAM bandwidth"),
        ({DRAM: "91", WAVES: "0.5"}, "bound by DRAM bandwidth"),
        ({DRAM: "75", L2: "80"}, "bound by DRAM bandwidth"),
        ({DRAM: "62", L2: "80"}, "bound by L2"),
        ({L2: "85"}, "bound by L2"),
        ({TENSOR: "88", SM: "89"}, "bound by tensor pipe"),
        ({ISSUE: "77", SM: "80"}, "bound by issue slots"),
        ({SM: "77"}, "bound by another pipe of the SM"),
        ({WAVES: "0.25"}, "launch too small to fill the GPU"),
        ({WAVES: "1"}, "bound by latency"),
        ({}, "bound by latency"),
    ],
)
def test_verdicts(columns, binds):
    made = QUIET | columns
    said = verdict(kernel(**made))
    assert said.startswith(f"k: {binds}.")
    assert f"DRAM {made[DRAM]} %" in said and f"L2 {made[L2]} %" in said


def test_columns_of_other_versions():
    newer = kernel(
        **{
            "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed": "70",
            "smsp__issue_active.avg.per_cycle_active": "0.25",
            "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active": "40",
            TENSOR: "30",
            "smsp__average_warp_latency_issue_stalled_barrier.ratio": "3",
        }
    )
    assert (newer.dram_pct, newer.issue_pct, newer.tensor_pct) == (70, 25, 40)
    assert newer.stalls == {"barrier": 100}


def test_the_top_stall_is_a_wait():
    found = {"selected": "6", "long_scoreboard": "3", "wait_not_issued": "7", "wait": "1"}
    stalled = kernel(**QUIET, **{STALL.format(reason): one for reason, one in found.items()})
    assert stalled.stalls == {"selected": 60, "long_scoreboard": 30, "wait": 10}
    assert stalled.top_stall == "long_scoreboard"
    said = verdict(stalled)
    assert "top stall long_scoreboard (30 %)" in said and "the warps wait for loads" in said


def test_few_warps_name_what_limits_them():
    few = {"sm__warps_active.avg.pct_of_peak_sustained_active": "12"}
    limits = {"launch__occupancy_limit_registers": "2", "launch__occupancy_limit_shared_mem": "5"}
    assert "registers limits their number" in verdict(kernel(**QUIET, **few, **limits))


@pytest.mark.parametrize(
    ("compulsory", "says"),
    [(100, "1.00 x"), (50, "50 % of them are not compulsory"), (400, "stayed in the caches")],
)
def test_bytes_are_held_against_the_compulsory_ones(compulsory, says):
    moved = kernel(**QUIET | {DRAM: "90", READ: "60", WRITTEN: "40"})
    assert says not in verdict(moved)
    units = {"dram__bytes": "byte"}
    (moved,) = parse(report({NAME: "k", **QUIET, DRAM: "90", READ: "60", WRITTEN: "40"}, **units))
    assert says in verdict(moved, compulsory)


def test_at_its_floor_a_kernel_is_done():
    columns = {NAME: "k", **QUIET, DRAM: "92", TIME: "10"}
    (fast,) = parse(report(columns, time="us"))
    assert "nothing in this kernel" in verdict(fast, 100, floor_us=9.5)
    assert "fewer bytes" in verdict(fast, 100, floor_us=5.0)


def test_all_shows_every_launch(capsys):
    assert main([str(REPORT), "--all"]) == 0
    printed = capsys.readouterr().out.split("\n\n")[0].splitlines()
    launches = parse(REPORT.read_text())
    assert len(printed) >= 1 + len(launches)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "not an ncu report"),
        (b"\x00\xff\xfe binary\n" * 9, "not an ncu report"),
        (b"some,table\n1,2\n", "not an ncu report"),
        (b'"ID","Kernel Name"\n', "not an ncu report"),
        (b'"ID","Kernel Name"\n"",""\n', "no kernel launch"),
        (b'"ID","Kernel Name","Metric Name"\n"0","k","m"\n', "--page raw"),
    ],
)
def test_a_file_that_is_no_report(tmp_path, capsys, content, why):
    path = tmp_path / "report.csv"
    path.write_bytes(content)
    assert main([str(path)]) == 2
    said = capsys.readouterr()
    assert said.out == "" and why in said.err and len(said.err.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["gone.csv"], "gone.csv"),
        ([str(REPORT), "--case", "op/patchify/gone/fwd"], "no case is called"),
    ],
)
def test_a_wrong_call(capsys, arguments, why):
    assert main(arguments) == 2
    assert why in capsys.readouterr().err


@pytest.mark.parametrize("value", ["0", "-1", "fast", "nan"])
def test_a_wrong_bandwidth(value):
    with pytest.raises(SystemExit) as stopped:
        main([str(REPORT), f"--copy-tb-s={value}"])
    assert stopped.value.code == 2


def fake_ncu(folder, monkeypatch, source):
    (folder / "ncu").write_text(f"#!/bin/sh\n{source}\n")
    (folder / "ncu").chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")


def test_ncu_opens_a_report_of_its_own(tmp_path, monkeypatch, capsys):
    fake_ncu(tmp_path, monkeypatch, f'echo "$@" >"{tmp_path}/arguments"; cat "{REPORT}"')
    path = tmp_path / "case.ncu-rep"
    path.touch()
    assert main([str(path)]) == 0
    from_ncu = capsys.readouterr().out
    assert (tmp_path / "arguments").read_text() == f"--import {path} --csv --page raw\n"
    assert main([str(REPORT)]) == 0
    assert capsys.readouterr().out == from_ncu


def test_a_report_that_ncu_cannot_open(tmp_path, monkeypatch, capsys):
    fake_ncu(tmp_path, monkeypatch, "echo '==ERROR== Failed to load report file'; exit 1")
    path = tmp_path / "case.ncu-rep"
    assert main([str(path)]) == 2
    assert "no such file" in capsys.readouterr().err
    path.touch()
    assert main([str(path)]) == 2
    assert "Failed to load" in capsys.readouterr().err


def test_without_ncu(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setitem(sys.modules, "ncu_report", None)
    path = tmp_path / "case.ncu-rep"
    path.touch()
    assert main([str(path)]) == 3
    (said,) = capsys.readouterr().err.splitlines()
    assert "takes ncu" in said and "Nsight Compute" in said
