"""Every path, command and symbol that the docs name exists, and their Python runs."""

import ast
import importlib
import re
from fnmatch import fnmatch

import pytest
from files import ROOT, repository_files

from snapkernels.registry import OPS
from snapkernels.testing.cases import all_ids, find
from snapvideo_core import PRESETS

FILES = repository_files()
DOCS = [path for path in FILES if path.suffix == ".md"]
# What the docs set in code style that is not ours.
OTHERS = {"pip install .", "snapkernels[video]", "pre-commit install", "--help", "own", ".*"}
OTHERS |= {"pip install --no-build-isolation .", "custom_op", "family", "snapkernels[checkpoints]"}
OTHERS |= {"snapkernels[peers]", "pytest bench --benchmark-only"}
# What stands for a placeholder.
EXAMPLES = {"<family>": "patch", "<backend>": "cuda", "<name>": "patchify"}


def identifiers():
    """What the code defines or passes: names, attributes, arguments, one-word strings."""
    found = set()
    for folder in ("snapkernels", "snapvideo_core", "bench", "profiling"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                for field in ("name", "id", "attr", "arg", "value"):
                    word = getattr(node, field, None)
                    if isinstance(word, str) and word.replace("-", "_").isidentifier():
                        found.add(word)
    for path in ("Makefile", "setup.py", "tools/setup_env.sh"):
        found |= set(re.findall(r"\b[A-Z][A-Z_]+\b", (ROOT / path).read_text()))
    return found


KNOWN = identifiers()


def spans(text):
    """Inline code and the lines of sh blocks, comments off."""
    for language, block in re.findall(r"```(\w*)\n(.*?)```", text, re.DOTALL):
        if language == "sh":
            yield from (line.split("#")[0].strip() for line in block.splitlines())
    for span in re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL)):
        yield " ".join(span.split())


def missing(span, doc):
    """Why `span` names nothing that exists, or None."""
    if not span or span in OTHERS or re.fullmatch(r"\d[\w.]*", span):
        return None
    for placeholder, example in EXAMPLES.items():
        span = span.replace(placeholder, example)
    first, *rest = span.split()
    if first == "make":
        targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
        return None if set(rest) <= targets else f"no such target: {span}"
    if span.startswith("python -m snapkernels"):
        return missing_command(rest[2:])
    if first == "python" and rest[0] != "-m":
        return missing_flags(rest[0], rest[1:])
    if first == "pytest":
        return missing_flags("tests/conftest.py", [word for word in rest if word[:2] == "--"])
    if rest:
        return f"not a form this test can check: {span}"
    return missing_name(span, doc)


def missing_command(words):
    if not words:
        return None
    name, *arguments = words
    unknown = missing_flags("snapkernels/__main__.py", arguments)
    a_part = name in ("check", "bench")  # those take a part of an id
    cases = [missing_case(word, part=a_part) for word in arguments if "/" in word]
    source = (ROOT / "snapkernels/__main__.py").read_text()
    known = f'add_parser("{name}"' in source
    return unknown or next(filter(None, cases), None) if known else f"no such command: {name}"


def missing_case(case_id, part=False):
    if part:
        return None if any(case_id in one for one in all_ids()) else f"no case has {case_id}"
    try:
        find(case_id)
    except ValueError as error:
        return str(error)
    return None


def missing_flags(script, words):
    if not (ROOT / script).is_file():
        return f"no such file: {script}"
    flags = [word for word in words if word.startswith("--")]
    source = (ROOT / script).read_text()
    unknown = [flag for flag in flags if f'"{flag}"' not in source]
    return f"{script} has no {unknown}" if unknown else None


def missing_name(name, doc):
    case = re.fullmatch(r"model/([\w.-]+)/(infer|train)", name)
    if case:
        return None if case.group(1) in PRESETS else f"no such preset: {name}"
    if re.match(r"(op|layer)/\w+/", name):
        return missing_case(name)
    if name.startswith("snapkernels::"):
        return None if name.partition("::")[2] in OPS else f"no such op: {name}"
    if "/" in name or re.search(r"\.(py|md|sh|toml|json|mp4)$", name) or name.startswith("."):
        ignored = (ROOT / ".gitignore").read_text().split()
        if f"{name}/" in ignored or any(fnmatch(name, pattern) for pattern in ignored):
            return None
        homes = (ROOT, doc.parent, *(ROOT / "snapkernels" / "ops").glob("*/"))
        wanted = [(home / name).resolve() for home in homes]
        known = any(path == w or w in path.parents for path in FILES for w in wanted)
        return None if known else f"no such path: {name}"
    folders = (ROOT, ROOT / "snapkernels/ops", *(ROOT / "snapkernels/ops").glob("*/"))
    if name in PRESETS or any((folder / name).exists() for folder in folders):
        return None
    if f'"{name}: ' in (ROOT / "pyproject.toml").read_text():  # a test tier
        return None
    if re.fullmatch(r"(snapkernels|snapvideo_core)(\.\w+)+", name):
        return missing_symbol(name)
    if re.fullmatch(r'\w+="\w+"', name):
        name = name.split("=")[0]
    if re.fullmatch(r"[a-z]+-(bf16|fp16|fp32|fp8)", name):  # a variant: backend and dtype
        name = name.replace("-", ".")
    head, *attributes = name.split(".")
    known = {head, *attributes} <= KNOWN
    return None if known else f"nothing in the code is called {name}"


def missing_symbol(name):
    module, *attributes = name.split(".")
    thing = importlib.import_module(module)
    for attribute in attributes:
        if not hasattr(thing, attribute):
            return f"no such symbol: {name}"
        thing = getattr(thing, attribute)
    return None


@pytest.mark.parametrize("doc", DOCS, ids=lambda d: str(d.relative_to(ROOT)))
def test_everything_named_exists(doc):
    found = {span: missing(span, doc) for span in spans(doc.read_text())}
    assert {span: why for span, why in found.items() if why} == {}


@pytest.mark.parametrize("doc", DOCS, ids=lambda d: str(d.relative_to(ROOT)))
def test_relative_links_exist(doc):
    for target in re.findall(r"\]\(([^)#]+)", doc.read_text()):
        assert re.match(r"https?://", target) or (doc.parent / target).exists(), target


@pytest.mark.parametrize("doc", DOCS, ids=lambda d: str(d.relative_to(ROOT)))
def test_python_blocks_run(doc, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # some write files
    for block in re.findall(r"```python\n(.*?)```", doc.read_text(), re.DOTALL):
        exec(compile(ast.parse(block), str(doc), "exec"), {})


@pytest.mark.parametrize(
    "span",
    [
        "make everything",
        "python bench/gone.py",
        "python bench/throughput.py --speed 9",
        "pytest --mark",
        "snapkernels/ops/gone.py",
        "snapkernels.group_reed",
        "model/4b/infer",
        "GroupReader",
        "SnapDiffusion.noisy",
        "some words of prose",
        "gone.md",
        "python -m snapkernels prove",
        "python -m snapkernels bench --fast",
        "python -m snapkernels bench --case patchify/down",
        "python -m snapkernels explain op/patchify/up-b9/fwd",
        "op/patchfy/up-b1/fwd",
        "snapkernels::patchfy",
    ],
)
def test_a_name_that_is_gone_is_seen(span):
    assert missing(span, ROOT / "README.md")


def test_the_docs_were_found():
    names = {str(doc.relative_to(ROOT)) for doc in DOCS}
    assert {"README.md", "DESIGN.md", "CONTRIBUTING.md", "CHANGELOG.md"} <= names
    families = {str(p.parent.relative_to(ROOT)) for p in ROOT.glob("snapkernels/ops/*/op.py")}
    assert {f"{family}/README.md" for family in families} <= names
