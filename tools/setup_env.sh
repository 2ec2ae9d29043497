#!/bin/sh
# Make the virtual environment that the Makefile's targets run in: Python, torch, this package.
#
#   VENV             where the environment goes                         (.venv)
#   PYTHON           the interpreter to make it with, 3.11 or newer     (the first found)
#   TORCH_INDEX_URL  package index to take torch from                   (pip's default)
set -eu
cd "$(dirname "$0")/.."

venv=${VENV:-.venv}
torch=torch==2.13.0

say() { printf 'setup: %s\n' "$*" >&2; }
fail() { say "$*"; exit 1; }
new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

python=${PYTHON:-}
if [ -z "$python" ]; then
    for candidate in python3.12 python3.11 python3; do
        if new_enough "$candidate"; then python=$candidate; break; fi
    done
fi
[ -n "$python" ] || fail "no Python 3.11 or newer found; install one or name it in PYTHON"
new_enough "$python" || fail "PYTHON=$python is not Python 3.11 or newer"

# Debian and Ubuntu keep ensurepip in a package of its own.
if ! "$python" -c 'import ensurepip' 2>/dev/null; then
    package=$("$python" -c 'import sys; print("python3.%d-venv" % sys.version_info[1])')
    [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null ||
        fail "$python has no ensurepip; install it first: sudo apt-get install $package"
    say "installing $package"
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -qq -y "$package" >/dev/null
fi

say "making $venv with $("$python" --version)"
"$python" -m venv --clear "$venv"
pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }

if nvidia-smi -L >/dev/null 2>&1; then gpu=yes; else gpu=no; fi
say "installing $torch (NVIDIA GPU: $gpu)"
pip install --quiet ${TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL"} "$torch"
cuda=$("$venv/bin/python" -W ignore -c 'import torch; print(torch.version.cuda or "no")')
case $gpu-$cuda in
    yes-no) fail "this machine has an NVIDIA GPU, but a CPU build of torch was installed;" \
        "set TORCH_INDEX_URL to the index of a CUDA build and run the same command again" ;;
esac

# Before the package, for which pip would take the newest Triton, a larger download that then had to
# go. A CUDA build of torch brings the Triton it was made with. Beside a CPU build kernels run in
# Triton's interpreter: snapkernels/interpreter.py mends it by private names, which 3.6.0 has, and
# on NumPy 2.4 its loops fail.
pins=
[ "$cuda" = no ] && pins="triton==3.6.0 numpy<2.4"
say "installing the build's tools${pins:+, $pins}"
# shellcheck disable=SC2086
pip install --quiet 'setuptools>=77' $pins

say "installing this package and its tools"
SNAPKERNELS_BUILD=0 pip install --quiet --no-build-isolation --editable '.[dev]'
# Not by pip, which is silent on what was built and why not.
"$venv/bin/python" setup.py --quiet build_ext --inplace

case $gpu-$cuda in
    no-no | yes-*) ;;
    no-*) say "this is a CUDA build of torch on a machine without an NVIDIA GPU; it works, but" \
        "TORCH_INDEX_URL set to PyTorch's CPU index saves gigabytes (make clean first)" ;;
esac
