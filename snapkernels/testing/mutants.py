"""Seeded bugs: a backend with one line of its source changed."""

import hashlib
import importlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import torch

from snapkernels import extension
from snapkernels.dispatch import backward_of, implementation
from snapkernels.spec import Backend, Mutant, Spec

NEEDED_TO_BUILD = ("csrc", "snapkernels", "setup.py", "pyproject.toml", "README.md", "LICENSE")


@contextmanager
def planted(spec: Spec, mutant: Mutant) -> Iterator[Backend]:
    """The backend of `mutant` with its bug, from a changed copy of its source.

    Raises:
        ValueError: the source does not have `mutant.find` exactly once.
    """
    backend = spec.backend(mutant.backend)
    function = backward_of(backend) if mutant.backward else implementation(backend)
    module = importlib.import_module(function.__module__)
    python = Path(str(module.__file__)).read_text()
    with tempfile.TemporaryDirectory() as name:  # Triton reads a kernel's source from its file
        folder = Path(name)
        if mutant.file is None:
            python = _changed(python, module.__name__, spec, mutant)
        else:
            library = compiled(spec, mutant)
            torch.ops.load_library(library)
            python = python.replace("snapkernels_cuda", library.stem)
        path = folder / f"{spec.name}_mutant.py"
        path.write_text(python)
        changed = getattr(_load(path), function.__name__)
        yield replace(backend, **{"backward" if mutant.backward else "run": changed})


def missing() -> str | None:
    """What this machine lacks to build a compiled mutant, or None."""
    if not extension.CSRC.is_dir():
        return "csrc, which an installed package does not have"
    return None if shutil.which("nvcc") else "nvcc"


def _changed(source: str, name: str, spec: Spec, mutant: Mutant) -> str:
    if source.count(mutant.find) != 1:
        raise ValueError(
            f"mutant {mutant.name!r} of {spec.name}: {name} has {mutant.find!r} "
            f"{source.count(mutant.find)} times, not once"
        )
    return source.replace(mutant.find, mutant.replace)


def compiled(spec: Spec, mutant: Mutant) -> Path:
    """The library with the bug of a compiled `mutant`; its name is the namespace of its ops.

    It is kept beside the build of csrc, for as long as neither csrc nor the bug changes: a machine
    with a GPU can be handed what one without has built.
    """
    root = extension.CSRC.parent
    changed = _changed(
        (extension.CSRC / str(mutant.file)).read_text(), str(mutant.file), spec, mutant
    )
    digest = hashlib.sha256(f"{extension.source_hash(extension.CSRC)} {changed}".encode())
    library = root / "build" / "mutants" / f"snapkernels_cuda_{digest.hexdigest()[:16]}.so"
    if library.is_file():
        return library
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part in NEEDED_TO_BUILD:
            copy = shutil.copytree if (root / part).is_dir() else shutil.copy
            copy(root / part, folder / part)
        (folder / "csrc" / str(mutant.file)).write_text(changed)
        bindings = folder / "csrc" / "bindings.cpp"
        bindings.write_text(bindings.read_text().replace("snapkernels_cuda", library.stem))
        subprocess.run(
            [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
            cwd=folder,
            env=os.environ | {"SNAPKERNELS_BUILD": "1"},
            check=True,
            capture_output=True,
        )
        library.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(folder / "snapkernels" / extension.LIBRARY.name, library)
    return library


def _load(path: Path) -> ModuleType:
    found = importlib.util.spec_from_file_location(path.stem, path)
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module
