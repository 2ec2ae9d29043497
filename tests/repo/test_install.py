"""The package builds where there is no torch, and the wheel holds both packages."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_a_wheel_builds_without_torch(tmp_path):
    source, blocked = tmp_path / "source", tmp_path / "blocked"
    kept = shutil.ignore_patterns(".*", "build", "*.egg-info", "__pycache__", "tests", "bench")
    shutil.copytree(ROOT, source, ignore=kept)
    blocked.mkdir()
    (blocked / "torch.py").write_text("raise ImportError('torch is hidden from this build')")
    (blocked / "nvcc").write_text("#!/bin/sh\nexit 1\n")
    (blocked / "nvcc").chmod(0o755)
    command = ["pip", "wheel", "--verbose", "--no-deps", "--no-build-isolation", "--no-index"]
    command += ["--disable-pip-version-check", "--wheel-dir", tmp_path, source]
    done = subprocess.run(
        [sys.executable, "-m", *command],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(blocked), "PATH": f"{blocked}:/usr/bin:/bin"},
    )
    assert done.returncode == 0, done.stderr
    why = "the build cannot import torch (torch is hidden from this build)"
    assert f"snapkernels: CUDA kernels not built: {why}" in done.stdout + done.stderr
    (wheel,) = tmp_path.glob("snapkernels-*-py3-none-any.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    for package in ("snapkernels", "snapvideo_core"):
        sources = {str(path.relative_to(ROOT)) for path in (ROOT / package).rglob("*.py")}
        assert sources | {f"{package}/py.typed"} <= names
    assert not any(name.endswith(".so") for name in names)
    assert {name.split("/")[0].split("-")[0] for name in names} == {"snapkernels", "snapvideo_core"}
