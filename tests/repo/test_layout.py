"""What the repository promises of itself: file sizes, packaging, no paths of one machine."""

import re
import tomllib
from pathlib import Path

from files import ROOT, repository_files

import snapkernels

TRACKED = repository_files()
TEXT = [p for p in TRACKED if p.suffix in (".py", ".md", ".sh", ".toml", ".yaml", ".json", "")]


def test_no_file_is_long():
    long = {
        str(path): lines
        for path in TRACKED
        if path.suffix == ".py" and (lines := len(path.read_text().splitlines())) > 500
    }
    assert long == {}


def test_the_clip_is_small():
    clips = [path for path in TRACKED if path.suffix == ".mp4"]
    assert clips and all(path.stat().st_size < 500_000 for path in clips)


def test_nothing_names_a_home_or_a_work_folder():
    machine = re.compile(r"(?<![\w.])/(home|root|work|Users)/\w")
    named = [str(p) for p in TEXT if p != Path(__file__) and machine.search(p.read_text())]
    assert named == []


def test_the_ops_need_torch_and_triton_alone_and_every_public_name_exists():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["dependencies"] == ["torch>=2.11", "triton>=3.6; platform_system == 'Linux'"]
    assert project["requires-python"] == ">=3.11"
    for name in snapkernels.__all__:
        assert getattr(snapkernels, name).__doc__, name
