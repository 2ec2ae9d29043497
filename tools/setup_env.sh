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
say "installing this package and its tools"
pip install --quiet --editable '.[dev]'

cuda=$("$venv/bin/python" -c 'import torch; print(torch.version.cuda or "no")')
case $gpu-$cuda in
    yes-no) fail "this machine has an NVIDIA GPU, but a CPU build of torch was installed;" \
        "set TORCH_INDEX_URL to the index of a CUDA build and run the same command again" ;;
    no-no | yes-*) ;;
    no-*) say "this is a CUDA build of torch on a machine without an NVIDIA GPU; it works, but" \
        "TORCH_INDEX_URL set to PyTorch's CPU index saves gigabytes (make clean first)" ;;
esac
