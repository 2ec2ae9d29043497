"""Models in files: safetensors with the sizes, the recipe and the dtype of a FIT in its header.

A file is read against the model that its header describes, built without memory: names, shapes and
dtypes are compared before anything is loaded, and an fp8 model never passes through its bf16 form.
"""

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from snapkernels import RECIPES, Recipe, quantise
from snapvideo_core.config import FITConfig
from snapvideo_core.fit import FIT

FORMAT, VERSION = "snapvideo_core.FIT", "1"
# As safetensors calls them, and we its dtype.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
Forms = dict[str, tuple[str, tuple[int, ...]]]  # {name of a tensor: (its dtype, its shape)}


class CheckpointError(ValueError):
    """A file that is not written or read; the message names it and what is wrong."""


@dataclass(frozen=True)
class Header:
    """What is written beside the tensors."""

    config: FITConfig
    recipe: Recipe
    dtype: str

    def model(self, backend: str | None) -> FIT:
        """The model in evaluation mode, on the meta device."""
        with torch.device("meta"):
            model = FIT(self.config, backend=backend)
        model.to(DTYPES[self.dtype]).eval()
        quantise(model, self.recipe)
        return model


def save_model(model: FIT, path: str | os.PathLike[str]) -> None:
    """Write `model`, quantised or not, to the file `path`: whole, or not at all.

    A file that was there is replaced when the new one is complete. Needs the extra
    snapkernels[checkpoints].

    Raises:
        CheckpointError: its tensors are not those of its sizes, recipe and dtype, as of a model of
            which a part was quantised alone, or two of them share memory; or the file cannot be
            written.
    """
    path, safetensors = Path(path), _import_safetensors()
    header = Header(model.config, model.recipe, NAMES.get(model.positions.dtype, "no such"))
    if header.dtype not in DTYPES:
        raise CheckpointError(f"{path}: not written: no dtype for {model.positions.dtype}")
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    held = {name: (NAMES.get(t.dtype, str(t.dtype)), (*t.shape,)) for name, t in state.items()}
    if wrong := _difference(held, _forms(header.model(None))):
        raise CheckpointError(f"{path}: not written: {wrong}")
    try:
        # A name of its own: another process may write to the same path.
        with tempfile.NamedTemporaryFile(
            dir=path.parent, prefix=f"{path.name}.", suffix=".partial", delete=False
        ) as file:
            partial = Path(file.name)
    except OSError as error:
        raise CheckpointError(f"{path}: not written: {error}") from error
    try:
        safetensors.torch.save_file(state, partial, _written(header))
        partial.chmod(0o666 & ~_umask())
        os.replace(partial, path)
    except (safetensors.SafetensorError, OSError, RuntimeError, NotImplementedError) as error:
        raise CheckpointError(f"{path}: not written: {error}") from error
    finally:
        partial.unlink(missing_ok=True)


def load_model(
    path: str | os.PathLike[str],
    device: torch.device | str = "cpu",
    *,
    recipe: str | Recipe | None = None,
    backend: str | None = None,
) -> FIT:
    """The model in the file `path`, in evaluation mode on `device`: whole, or not at all.

    Needs the extra snapkernels[checkpoints].

    Args:
        path: a file that `save_model` wrote. On the CPU the tensors are a mapping of it: replace
            it, as `save_model` does, but do not write into it.
        device: where the tensors go, each straight from the file.
        recipe: that the file must have, by name or whole; None takes any of `RECIPES`.
        backend: of every op, None for the default.

    Raises:
        CheckpointError: the file is cut off or foreign, its recipe is not the one asked for, is
            unknown or has changed since, or a tensor's name, shape or dtype is not the model's.
        FileNotFoundError: there is no such file.
        ValueError: there is no such device here.
    """
    path = Path(path)
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"load_model: device {device!r} is not here: {error}") from error
    with _opened(path, device) as file:
        header = _read(file.metadata() or {}, recipe, path)
        model = header.model(backend)
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        found = {name: (s.get_dtype(), (*s.get_shape(),)) for name, s in slices.items()}
        if wrong := _difference(found, _forms(model)):
            raise CheckpointError(f"{path}: {wrong}")
        state = {name: file.get_tensor(name) for name in found}
    model.load_state_dict(state, assign=True)
    return model


def _written(header: Header) -> dict[str, str]:
    """The header as safetensors takes it, texts by name."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "config": json.dumps(asdict(header.config)),
        "recipe": json.dumps(asdict(header.recipe)),
        "dtype": header.dtype,
    }


def _read(texts: dict[str, str], asked: str | Recipe | None, path: Path) -> Header:
    """The header of a file that may be loaded."""
    if texts.get("format") != FORMAT:
        raise CheckpointError(f"{path}: its format is {texts.get('format')!r}, not {FORMAT!r}")
    if texts.get("version") != VERSION:
        raise CheckpointError(f"{path}: version {texts.get('version')!r} is not {VERSION!r}")
    try:
        config = FITConfig(**_tuples(json.loads(texts["config"])))
        recipe = _tuples(json.loads(texts["recipe"]))
        dtype = texts["dtype"]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: its header cannot be read: {error}") from error
    if dtype not in DTYPES:
        raise CheckpointError(f"{path}: dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    return Header(config, _known(recipe, asked, path), dtype)


def _known(written: dict[str, Any], asked: str | Recipe | None, path: Path) -> Recipe:
    """The recipe of a file, which must be the one asked for, or of `RECIPES`, in every field."""
    name = written.get("name")
    wanted = asked if isinstance(asked, Recipe) else RECIPES.get(asked or str(name))
    if wanted is None:
        known = ", ".join(map(repr, RECIPES))
        what = f"{asked!r} was asked for" if asked else f"the file has {name!r}"
        raise CheckpointError(f"{path}: recipe must be one of {known}, but {what}")
    if name != wanted.name:
        raise CheckpointError(f"{path}: its recipe is {name!r}, asked for was {wanted.name!r}")
    now = asdict(wanted)
    parts = [
        f"{field} is {written.get(field)!r}, not {now.get(field)!r}"
        for field in sorted(now.keys() | written.keys())
        if written.get(field) != now.get(field)
    ]
    if parts:
        raise CheckpointError(
            f"{path}: recipe {name!r} has changed since the file was written: {'; '.join(parts)}"
        )
    return wanted


def _difference(found: Forms, wanted: Forms) -> str | None:
    """The first tensor of `found` that is not as in `wanted`, or None."""
    for name in sorted(found.keys() | wanted.keys()):
        if name not in found:
            return f"the tensor {name} is missing"
        if name not in wanted:
            return f"the tensor {name} is not of such a model"
        if found[name] != wanted[name]:
            (dtype, shape), (its_dtype, its_shape) = wanted[name], found[name]
            return f"the tensor {name} must be {dtype} {shape}, but is {its_dtype} {its_shape}"
    return None


def _forms(model: FIT) -> Forms:
    return {name: (NAMES[t.dtype], (*t.shape,)) for name, t in model.state_dict().items()}


def _tuples(fields: dict[str, Any]) -> dict[str, Any]:
    """`fields` with the lists that JSON makes of tuples as tuples."""
    return {name: tuple(v) if isinstance(v, list) else v for name, v in fields.items()}


@contextmanager
def _opened(path: Path, device: torch.device | str) -> Iterator[Any]:
    safetensors = _import_safetensors()
    try:
        with safetensors.safe_open(path, framework="pt", device=str(device)) as file:
            yield file
    except FileNotFoundError:
        raise
    except (safetensors.SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: no safetensors file, or cut off: {error}") from error


def _umask() -> int:
    """What new files are not allowed, which can be read only by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _import_safetensors() -> ModuleType:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError(
            'a checkpoint needs safetensors: pip install "snapkernels[checkpoints]"'
        ) from error
    return safetensors
