"""Build script: csrc/ becomes snapkernels/_cuda.so; the metadata is in pyproject.toml.

The CUDA kernels are built where nvcc, g++, ninja and torch are at hand, and left out elsewhere: the
package then installs as pure Python. SNAPKERNELS_BUILD=0 leaves them out anywhere; with 1, a
missing tool is an error.
"""

import importlib.util
import os
import runpy
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, PlatformError

CSRC = Path("csrc")
MODE = os.environ.get("SNAPKERNELS_BUILD") or "auto"


def nvcc() -> str | None:
    """The CUDA compiler, CUDA_HOME's first."""
    in_home = os.path.expandvars("$CUDA_HOME/bin/nvcc")
    return shutil.which(in_home) or shutil.which("nvcc")


def ninja() -> list[str]:
    """The command that runs ninja, or nothing."""
    if found := shutil.which("ninja"):
        return [found]
    return [sys.executable, "-m", "ninja"] if importlib.util.find_spec("ninja") else []


def why_not() -> str | None:
    """Why the kernels are not built here, or None."""
    if MODE == "0":
        return "SNAPKERNELS_BUILD=0"
    if not nvcc():
        return "no nvcc on PATH or in CUDA_HOME/bin"
    try:
        import torch
    except (ImportError, OSError) as error:
        return f"the build cannot import torch ({error}): pip install --no-build-isolation ."
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 11):
        return f"torch {torch.__version__} is older than 2.11"
    if not ninja():
        return "no ninja on PATH or among Python's packages: pip install ninja"
    return None if shutil.which("g++") else "no g++ on PATH"


def build_file(sources: list[str], folder: Path, library: Path) -> str:
    """The build.ninja that compiles `sources` into `folder` and links them into `library`."""
    import torch

    def shell(*words: object) -> str:
        return shlex.join(map(str, words)).replace("$", "$$")

    torch_folder = Path(torch.__path__[0])
    # The package itself may not import yet.
    source_hash = runpy.run_path("snapkernels/extension.py")["source_hash"]
    # -arch=sm_90a would add a pass for plain compute_90, which has no wgmma.
    compiler = shell(nvcc(), "-std=c++17", "-O3", "-Xcompiler", "-fPIC", "-I", CSRC)
    cu = shell("-gencode=arch=compute_90a,code=sm_90a")
    # Of the stable ABI only what torch 2.11 has.
    macros = ["USE_CUDA", "TORCH_TARGET_VERSION=0x020b000000000000"]
    macros += [f"SNAPKERNELS_SOURCES={source_hash(CSRC)}LL"]
    cpp = shell(*(f"-D{macro}" for macro in macros), "-isystem", torch_folder / "include")
    # Nothing here calls libtorch.so itself, only what it brings: keep it all the same.
    link = shell(nvcc(), "-shared", "-cudart", "static", "-Xlinker", "--no-as-needed")
    torch_libraries = shell("-L", torch_folder / "lib", "-ltorch", "-ltorch_cpu", "-lc10")
    lines = [f"builddir = {folder}"]
    for kind, flags in (("cu", cu), ("cpp", cpp)):
        lines += [f"rule {kind}", "  depfile = $out.d", "  deps = gcc"]
        lines += [f"  command = {compiler} {flags} -MD -MF $out.d -c $in -o $out"]
    lines += ["rule link", f"  command = {link} $in {torch_libraries} -o $out"]
    lines += [f"build {folder / name}.o: {Path(name).suffix[1:]} {name}" for name in sources]
    lines += [f"build {library}: link {' '.join(f'{folder / name}.o' for name in sources)}"]
    return "\n".join([*lines, ""])


def say(text: str) -> None:
    """One line to whoever builds."""
    print(f"snapkernels: {text}", file=sys.stderr, flush=True)


class Build(build):
    """Runs build_ext also where it has nothing to build, to say why."""

    def get_sub_commands(self) -> list[str]:
        names = super().get_sub_commands()
        return names if "build_ext" in names else [*names, "build_ext"]


class BuildCuda(build_ext):
    """Builds a plain shared library, which torch loads and Python does not import."""

    def finalize_options(self) -> None:
        super().finalize_options()
        # One folder for every Python, and not pip's passing one: each build goes on from the last.
        self.build_temp = str(Path(self.get_finalized_command("build").build_base, "cuda"))
        self.force = True  # copy the library over a newer one too

    def run(self) -> None:
        if WHY_NOT and MODE == "1":
            raise PlatformError(f"snapkernels: SNAPKERNELS_BUILD=1, but {WHY_NOT}")
        if WHY_NOT:
            say(f"CUDA kernels not built: {WHY_NOT}")
        super().run()

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", "/") + ".so"

    def build_extension(self, ext: Extension) -> None:
        folder, began = Path(self.build_temp), time.monotonic()
        script, library = folder / "build.ninja", folder / "_cuda.so"
        folder.mkdir(parents=True, exist_ok=True)
        script.write_text(build_file(ext.sources, folder, library))
        if subprocess.run([*ninja(), "-f", script]).returncode:
            raise CompileError("snapkernels: the CUDA kernels do not compile, see above")
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        self.copy_file(str(library), str(target))
        say(f"CUDA kernels built for sm_90a with {nvcc()} in {time.monotonic() - began:.0f} s")


class Wheel(bdist_wheel):
    """A wheel with the library is for one platform and any Python."""

    def get_tag(self) -> tuple[str, str, str]:
        python, abi, platform = super().get_tag()
        return (python, abi, platform) if self.root_is_pure else ("py3", "none", platform)


if MODE not in ("auto", "0", "1"):
    sys.exit(f"snapkernels: SNAPKERNELS_BUILD={MODE!r}: must be 0, 1 or unset")
WHY_NOT = why_not()
SOURCES = sorted(str(path) for kind in ("*.cu", "*.cpp") for path in CSRC.rglob(kind))
setup(
    ext_modules=[] if WHY_NOT else [Extension("snapkernels._cuda", SOURCES)],
    cmdclass={"build": Build, "build_ext": BuildCuda, "bdist_wheel": Wheel},
)
