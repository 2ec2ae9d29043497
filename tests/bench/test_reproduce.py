"""The one command: every record, then the report of them."""

import json
import os
from pathlib import Path

import pytest
import reproduce
import torch

from snapkernels.testing.record import SO_FAR


@pytest.fixture
def ran(monkeypatch):
    """The commands of a run, and what programs are to do, else end with 0 and a whole record."""
    commands, doings = [], {}

    def run(program, *flags):
        commands.append((program, *flags))
        code, wrote = doings.get(program, (0, ""))
        if "--json" in flags and wrote is not None:
            Path(flags[-1]).write_text(json.dumps({"command": f"python {program}{wrote}"}))
        return code

    monkeypatch.setattr(reproduce, "run", run)
    return commands, doings


def test_every_record_of_the_page_is_measured_and_then_the_page_made(ran, tmp_path):
    commands, _ = ran
    assert reproduce.main(["--folder", str(tmp_path / "figures")]) == 0
    programs = [command[0] for command in commands]
    measured = ["bench/throughput.py", "bench/costs.py", "bench/model_scaling.py"]
    assert programs == [*measured, "bench/report.py"]
    for program, flag, path in commands[:3]:
        name = program.removeprefix("bench/").removesuffix(".py")
        assert flag == "--json" and path.endswith(f"-{name}.json")
    assert (tmp_path / "figures").is_dir()
    assert {"--records", "--html", "--png"} <= set(commands[3])


def test_on_a_gpu_the_records_go_to_its_folder_and_the_readme_tells_them(
    ran, monkeypatch, tmp_path
):
    commands, _ = ran
    monkeypatch.setattr(reproduce, "RECORDS", tmp_path)
    monkeypatch.setattr(reproduce, "gpu_name", lambda: "NVIDIA H200")
    assert reproduce.main([]) == 0
    assert all(command[2].startswith(str(tmp_path / "h200")) for command in commands[:3])
    assert commands[-1] == ("bench/report.py",)


def test_the_gpu_is_asked_for_in_another_process(monkeypatch):
    expected = torch.cuda.get_device_name() if torch.cuda.is_available() else ""

    def in_this_one(*_):
        raise AssertionError("a context of ours is made while the benches run")

    for call in ("is_available", "get_device_name", "_lazy_init"):
        monkeypatch.setattr(torch.cuda, call, in_this_one)
    assert reproduce.gpu_name() == expected


def test_a_red_gate_does_not_stop_the_others_and_is_told(ran, tmp_path):
    commands, doings = ran
    doings["bench/throughput.py"] = (1, "")
    assert reproduce.main(["--folder", str(tmp_path)]) == 1
    assert len(commands) == 4


@pytest.mark.parametrize("program", ["bench/throughput.py", "bench/report.py"])
def test_what_cannot_run_stops_it(ran, tmp_path, program):
    commands, doings = ran
    doings[program] = (2, "")
    assert reproduce.main(["--folder", str(tmp_path)]) == 2
    assert commands[-1][0] == program


@pytest.mark.parametrize("code", [0, 1])
@pytest.mark.parametrize(
    ("wrote", "message"),
    [(None, "bench/costs.py wrote no record"), (SO_FAR, "bench/costs.py was cut off")],
)
@pytest.mark.parametrize("older", [False, True])
def test_a_program_that_did_not_come_to_its_end_stops_it(
    ran, tmp_path, capsys, code, wrote, message, older
):
    commands, doings = ran
    if older:  # the whole record of a run before it
        assert reproduce.main(["--folder", str(tmp_path)]) == 0
        for path in tmp_path.iterdir():
            os.utime(path, (0, 0))
    doings["bench/costs.py"] = (code, wrote)  # an exception ends Python with 1, as a red gate
    assert reproduce.main(["--folder", str(tmp_path)]) == 2
    assert commands[-1][0] == "bench/costs.py"
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and told.startswith(f"error: {message}")


def test_the_folder_of_a_gpu():
    names = [
        reproduce.committed_folder(gpu).name for gpu in ("NVIDIA H100 80GB HBM3", "NVIDIA H200")
    ]
    assert names == ["h100-80gb", "h200"]


def test_a_program_is_run_and_its_code_returned(tmp_path):
    assert reproduce.run("bench/report.py", "--check") == 0
    assert reproduce.run("bench/report.py", "--html", str(tmp_path)) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "there is no NVIDIA GPU: name a --folder"),
        (["--folder", "README.md"], "--folder README.md: it is no folder"),
        (["--folder", "no/such/place/figures"], "it must be a file in a folder that exists"),
    ],
)
def test_bad_input_is_refused_before_anything_is_measured(
    ran, monkeypatch, capsys, arguments, message
):
    monkeypatch.setattr(reproduce, "gpu_name", lambda: "")
    with pytest.raises(SystemExit) as stopped:
        reproduce.main(arguments)
    assert stopped.value.code == 2 and not ran[0]
    assert message in capsys.readouterr().err.splitlines()[-1]
