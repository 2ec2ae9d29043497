"""Seeded bugs: a backend with one line of its source changed.

python -m snapkernels.testing.mutants   # build the compiled ones, for a machine that is to run them
"""

import hashlib
import importlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from snapkernels import extension
from snapkernels.dispatch import backward_of, implementation, saving
from snapkernels.registry import OPS
from snapkernels.spec import Backend, Mutant, Spec

NEEDED_TO_BUILD = ("csrc", "snapkernels", "setup.py", "pyproject.toml", "README.md", "LICENSE")


@contextmanager
def planted(spec: Spec, mutant: Mutant) -> Iterator[Backend]:
    """The backend of `mutant` with its bug, from a changed copy of the folder of its source.

    Raises:
        ValueError: the source does not have `mutant.find` exactly once.
    """
    backend = spec.backend(mutant.backend)
    functions = {"run": implementation(backend)}
    if backend.saving:
        functions["saving"] = saving(backend)
    if backend.backward:
        functions["backward"] = backward_of(backend)
    home = importlib.import_module(functions["backward" if mutant.backward else "run"].__module__)
    package, _, stem = home.__name__.rpartition(".")
    folder, copy = Path(str(home.__file__)).parent, f"{spec.name}_mutant"
    sources = {path.name: path.read_text() for path in folder.glob("*.py")}
    if mutant.file is None:
        name = f"{mutant.module or stem}.py"
        sources[name] = _changed(sources[name], f"{package}: {name}", spec, mutant)
        renamed = {package: copy}
    else:
        library = compiled(spec, mutant)
        torch.ops.load_library(library)
        renamed = {package: copy, "snapkernels_cuda": library.stem}
    # The files of a folder import each other by its name.
    for old, new in renamed.items():
        word = re.compile(rf"\b{re.escape(old)}\b")
        sources = {name: word.sub(new, text) for name, text in sources.items()}
    with _importable(sources, copy):
        changed = {}
        for role, function in functions.items():
            module = importlib.import_module(function.__module__.replace(package, copy))
            changed[role] = getattr(module, function.__name__)
        yield replace(backend, **changed)


@contextmanager
def _importable(sources: dict[str, str], package: str) -> Iterator[None]:
    """`sources`, {file name: text}, as a package; Triton reads a kernel's source from its file."""
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root) / package
        folder.mkdir()
        for name, text in sources.items():
            (folder / name).write_text(text)
        sys.path.insert(0, root)
        importlib.invalidate_caches()
        try:
            yield
        finally:
            sys.path.remove(root)
            for name in [one for one in sys.modules if one.split(".")[0] == package]:
                del sys.modules[name]


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
        if (root / "build" / "cuda").is_dir():  # of that only what the bug changes is built again
            shutil.copytree(root / "build" / "cuda", folder / "build" / "cuda")
        (folder / "csrc" / str(mutant.file)).write_text(changed)
        for bindings in (folder / "csrc").glob("*bindings.cpp"):
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


def build_all() -> None:
    """Build the library of every compiled mutant that is not there yet."""
    for op in OPS.values():
        for mutant in op.spec.mutants:
            if mutant.file is not None:
                print(f"{compiled(op.spec, mutant)}: {op.spec.name}, {mutant.name}", flush=True)


if __name__ == "__main__":
    build_all()
