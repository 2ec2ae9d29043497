"""Who imports whom, as DESIGN.md's arrows block says."""

import ast
import re
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest

import snapkernels

ROOT = Path(__file__).resolve().parents[2]
OURS = ("snapkernels", "snapvideo_core", "bench", "profiling")
FILES = [p.relative_to(ROOT) for f in OURS for p in sorted((ROOT / f).rglob("*.py"))]


def arrows(text):
    """The block's rules, in order: (file pattern, allowed imports) inside, and of outsiders."""
    block = re.search(r"```arrows\n(.*?)```", text, re.DOTALL).group(1)
    inside, outside = [], []
    for line in block.splitlines():
        subject, allowed = re.fullmatch(r"(\S+(?: \S+)?)\s+imports\s*(.*)", line).groups()
        if subject.startswith("outside "):
            outside.append((subject.removeprefix("outside "), allowed.split()))
        else:
            inside.append((subject, allowed.split()))
    return inside, outside


def imports(path, source):
    """(module, imported names) of every import, a script's sibling as <folder>.<name>."""
    scripts = path.parts[0] if path.parts[0] in ("bench", "profiling") else None
    siblings = {p.stem for p in (ROOT / scripts).glob("*.py")} if scripts else ()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found = [(alias.name, []) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found = [(node.module, [alias.name for alias in node.names])]
        else:
            continue
        for module, names in found:
            yield (f"{scripts}.{module}" if module in siblings else module), names


def violations(path, source, inside, outside):
    allowed, outsiders = (
        next((rule for pattern, rule in rules if fnmatch(str(path), pattern)), None)
        for rules in (inside, outside)
    )
    if allowed is None:
        return [f"{path}: no arrow names it"]
    own = ".".join(path.parent.parts)
    family = ".".join(path.parts[:3])
    allowed = [re.sub(r"^family\b", family, re.sub(r"^own\b", own, name)) for name in allowed]
    wrong = []
    for module, names in imports(path, source):
        top = module.split(".")[0]
        if top in OURS:
            # `from package import module` names package.module.
            inner = [f"{module}.{name}" for name in names]
            full = [name for name in inner if is_module(name)] or [module]
            for name in full:
                public = name == "snapkernels" and set(names) <= set(snapkernels.__all__)
                if not (
                    (public and name in allowed)
                    or (name != "snapkernels" and any(fits(name, a) for a in allowed))
                ):
                    wrong.append(f"{path} may not import {name} ({', '.join(names)})")
        elif top not in sys.stdlib_module_names and top not in outsiders:
            wrong.append(f"{path} may not import {top}: it is not among its outsiders")
    return wrong


def is_module(name):
    return (ROOT / name.replace(".", "/")).with_suffix(".py").is_file()


def fits(module, allowed):
    if allowed.endswith(".*"):
        return f"{module}.".startswith(allowed[:-1])
    return module == allowed


RULES = arrows((ROOT / "DESIGN.md").read_text())


@pytest.mark.parametrize("path", FILES, ids=str)
def test_every_file_keeps_to_the_arrows(path):
    assert violations(path, (ROOT / path).read_text(), *RULES) == []


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("snapkernels/ops/patch/eager.py", "from snapkernels.ops.patch import reference"),
        ("snapkernels/ops/patch/eager.py", "from snapkernels.ops.patch.reference import patchify"),
        ("snapkernels/ops/patch/op.py", "from snapkernels.ops.group_attn.weights import DIMS"),
        ("snapkernels/ops/patch/op.py", "import snapkernels"),
        ("snapkernels/validate.py", "import snapvideo_core"),
        ("snapkernels/modules.py", "import numpy"),
        ("snapkernels/dispatch.py", "import triton"),
        ("snapkernels/testing/timing.py", "from snapkernels.modules import GroupRead"),
        ("snapvideo_core/fit.py", "from snapkernels.modules import GroupRead"),
        ("snapvideo_core/fit.py", "from snapkernels import modules"),
        ("snapvideo_core/fit.py", "import bench.report"),
        ("snapkernels/ops/patch/kernels/cuda.py", "from snapkernels.ops.patch import reference"),
        ("snapkernels/ops/patch/kernels/cuda.py", "from snapkernels.ops.patch import eager"),
        ("snapkernels/dispatch.py", "from snapkernels.testing import bench"),
        ("bench/gate.py", "from tests import conftest"),
        ("snapkernels/new.py", ""),
    ],
)
def test_a_wrong_import_is_seen(path, line):
    assert violations(Path(path), line, *RULES)
