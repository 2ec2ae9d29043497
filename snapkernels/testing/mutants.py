"""Seeded bugs: a backend with one line of its source changed."""

import importlib
import importlib.util
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import torch

from snapkernels.dispatch import implementation
from snapkernels.spec import Backend, Mutant, Spec


@contextmanager
def planted(spec: Spec, mutant: Mutant) -> Iterator[Backend]:
    """The backend of `mutant` with its bug, from a changed copy of its module.

    Raises:
        ValueError: the module does not have `mutant.find` exactly once.
    """
    backend = spec.backend(mutant.backend)
    function = implementation(backend)
    module = importlib.import_module(function.__module__)
    source = Path(str(module.__file__)).read_text()
    if source.count(mutant.find) != 1:
        raise ValueError(
            f"mutant {mutant.name!r} of {spec.name}: {module.__name__} has {mutant.find!r} "
            f"{source.count(mutant.find)} times, not once"
        )
    with tempfile.TemporaryDirectory() as folder:  # Triton reads a kernel's source from its file
        path = Path(folder) / f"{spec.name}_mutant.py"
        path.write_text(source.replace(mutant.find, mutant.replace))
        run: Callable[..., torch.Tensor] = getattr(_load(path), function.__name__)
        yield replace(backend, run=run)


def _load(path: Path) -> ModuleType:
    found = importlib.util.spec_from_file_location(path.stem, path)
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module
