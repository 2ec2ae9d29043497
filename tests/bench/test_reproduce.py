"""The one command: every record, then the report of them."""

import pytest
import reproduce
import torch

from snapkernels.testing.record import RECORDS


@pytest.fixture
def ran(monkeypatch):
    """The commands of a run, and the exit codes that they are to have, 0 where none is set."""
    commands, codes = [], {}

    def run(program, *flags):
        commands.append((program, *flags))
        return codes.get(program, 0)

    monkeypatch.setattr(reproduce, "run", run)
    return commands, codes


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


def test_on_a_gpu_the_records_go_to_its_folder_and_the_readme_tells_them(ran, monkeypatch):
    commands, _ = ran
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    assert reproduce.main([]) == 0
    assert all(command[2].startswith(str(RECORDS / "h200")) for command in commands[:3])
    assert commands[-1] == ("bench/report.py",)


def test_a_red_gate_does_not_stop_the_others_and_is_told(ran, tmp_path):
    commands, codes = ran
    codes["bench/throughput.py"] = 1
    assert reproduce.main(["--folder", str(tmp_path)]) == 1
    assert len(commands) == 4


@pytest.mark.parametrize("program", ["bench/throughput.py", "bench/report.py"])
def test_what_cannot_run_stops_it(ran, tmp_path, program):
    commands, codes = ran
    codes[program] = 2
    assert reproduce.main(["--folder", str(tmp_path)]) == 2
    assert commands[-1][0] == program


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
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stopped:
        reproduce.main(arguments)
    assert stopped.value.code == 2 and not ran[0]
    assert message in capsys.readouterr().err.splitlines()[-1]
