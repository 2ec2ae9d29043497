"""setup.py builds the CUDA library where it can, and elsewhere says why it does not."""

import os
import shutil
import subprocess
import sys
import zipfile

import pytest
from files import ROOT

from snapkernels.extension import source_hash

KEPT = ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE")
KEPT_OF_PACKAGES = {"__init__.py", "extension.py", "py.typed"}
NVCC = shutil.which(os.path.expandvars("$CUDA_HOME/bin/nvcc")) or shutil.which("nvcc")
needs_nvcc = pytest.mark.skipif(not NVCC, reason="no nvcc on PATH or in CUDA_HOME/bin")
LOAD = """
import sys, torch
torch.ops.load_library(sys.argv[1])
print(torch.ops.snapkernels_cuda.sources())
"""


def copy_tree(target):
    shutil.copytree(ROOT / "csrc", target / "csrc")
    for name in KEPT:
        shutil.copy(ROOT / name, target)
    for package in ("snapkernels", "snapvideo_core"):
        (target / package).mkdir()
        for path in (ROOT / package).iterdir():
            if path.name in KEPT_OF_PACKAGES:
                shutil.copy(path, target / package)
    return target


def build(tree, command=("build_ext", "--inplace"), **environment):
    clean = {k: v for k, v in os.environ.items() if k != "SNAPKERNELS_BUILD"}
    return subprocess.run(
        [sys.executable, "setup.py", *command],
        cwd=tree,
        env=clean | environment,
        capture_output=True,
        text=True,
        timeout=180,
    )


def machine(folder, tools=(), torch="2.11.0"):
    """Environment of a machine with these tools on its PATH, and this version of torch."""
    for tool in tools:
        path = folder / "bin" / tool
        path.parent.mkdir(exist_ok=True)
        path.write_text("#!/bin/sh\nexit 1\n")
        path.chmod(0o755)
    (folder / "torch.py").write_text(f"__version__ = {torch!r}\n" if torch else "import nothing\n")
    return {"PATH": str(folder / "bin"), "CUDA_HOME": "", "PYTHONPATH": str(folder)}


def libraries(tree):
    return [path for path in tree.rglob("*.so") if path.name == "_cuda.so"]


@pytest.mark.parametrize(
    ("tools", "torch", "why"),
    [
        ([], "2.11.0", "no nvcc on PATH or in CUDA_HOME/bin"),
        (["nvcc", "ninja", "g++"], "2.10.1+cu130", "torch 2.10.1+cu130 is older than 2.11"),
        (["nvcc", "ninja", "g++"], None, "pip install --no-build-isolation ."),
        (["nvcc", "ninja"], "2.11.0", "no g++ on PATH"),
    ],
)
def test_what_is_missing_is_named_and_no_error(tmp_path, tools, torch, why):
    tree = copy_tree(tmp_path / "tree")
    done = build(tree, **machine(tmp_path, tools, torch))
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("snapkernels:")]
    assert line.startswith("snapkernels: CUDA kernels not built: ") and why in line
    assert libraries(tree) == []


@pytest.mark.parametrize(
    ("mode", "fails", "why"),
    [
        ("0", False, "not built: SNAPKERNELS_BUILD=0"),
        ("1", True, "SNAPKERNELS_BUILD=1, but no nvcc"),
        ("yes", True, "SNAPKERNELS_BUILD='yes': must be 0, 1 or unset"),
    ],
)
def test_snapkernels_build_decides(tmp_path, mode, fails, why):
    tree = copy_tree(tmp_path / "tree")
    done = build(tree, **machine(tmp_path), SNAPKERNELS_BUILD=mode)
    assert (done.returncode != 0) == fails
    assert why in done.stderr
    assert libraries(tree) == []


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    tree = copy_tree(tmp_path_factory.mktemp("built") / "tree")
    done = build(tree, SNAPKERNELS_BUILD="1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "snapkernels: CUDA kernels built" in done.stderr
    return tree


@needs_nvcc
def test_the_library_loads_and_knows_its_sources(built):
    library = built / "snapkernels" / "_cuda.so"
    command = [sys.executable, "-c", LOAD, library]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout.strip() == str(source_hash(built / "csrc")), done.stderr


@needs_nvcc
def test_a_touched_header_rebuilds_and_nothing_else_does(built):
    assert "no work to do" in build(built).stdout
    next((built / "csrc").rglob("*.cuh")).touch()
    again = build(built).stdout
    assert ".cu.o" in again and "-shared" in again


@needs_nvcc
def test_the_wheel_is_for_any_python_of_this_platform(built):
    done = build(built, ["--quiet", "bdist_wheel"])
    assert done.returncode == 0, done.stderr
    (wheel,) = (built / "dist").glob("*.whl")
    assert "-py3-none-linux_" in wheel.name
    names = set(zipfile.ZipFile(wheel).namelist())
    assert "snapkernels/_cuda.so" in names and not any("csrc" in name for name in names)


@needs_nvcc
def test_a_compile_error_is_shown_and_leaves_no_library(tmp_path):
    tree = copy_tree(tmp_path / "tree")
    source = next((tree / "csrc").rglob("*.cu"))
    source.write_text(source.read_text() + "#error this cannot be compiled\n")
    done = build(tree)
    assert done.returncode != 0
    assert "this cannot be compiled" in done.stdout + done.stderr
    assert "do not compile" in done.stderr
    assert libraries(tree) == []


def test_the_source_distribution_has_the_sources(tmp_path):
    tree = copy_tree(tmp_path / "tree")
    (tree / "snapkernels" / "_cuda.so").touch()
    done = build(tree, ["--quiet", "sdist", "--formats=zip"], SNAPKERNELS_BUILD="0")
    assert done.returncode == 0, done.stderr
    (archive,) = (tree / "dist").glob("*.zip")
    names = {name.partition("/")[2] for name in zipfile.ZipFile(archive).namelist()}
    sources = {str(p.relative_to(tree)) for p in (tree / "csrc").rglob("*") if p.is_file()}
    assert sources <= names and not any(name.endswith(".so") for name in names)
