"""The compiled CUDA kernels: csrc/, built by setup.py beside this file, loaded at first use.

The library is torch's stable ABI alone, so one build serves every Python and every torch from 2.11.
"""

import hashlib
from functools import cache
from pathlib import Path

import torch

LIBRARY = Path(__file__).with_name("_cuda.so")
CSRC = Path(__file__).resolve().parent.parent / "csrc"
CAPABILITY = (9, 0)  # built for sm_90a, which runs on nothing else


def refuses(tensor: torch.Tensor) -> str | None:
    """Why the compiled kernels cannot run on `tensor`, or None."""
    if not tensor.is_cuda:
        return f"CUDA kernels need a CUDA tensor, this one is on {tensor.device.type}"
    return _unfit(tensor.get_device())


@cache
def load() -> str | None:
    """Load the library; returns why it cannot be, or None."""
    if not LIBRARY.is_file():
        return "the CUDA kernels are not built here: run make ext"
    try:
        torch.ops.load_library(LIBRARY)
    except OSError as error:
        return f"the CUDA kernels do not load: {error}"
    if CSRC.is_dir() and torch.ops.snapkernels_cuda.sources() != source_hash(CSRC):
        return "the CUDA kernels were built from other sources than these: run make ext"
    return None


def source_hash(csrc: Path) -> int:
    """A number that the sources in `csrc` have and others do not; the build puts it in."""
    digest = hashlib.sha256()
    for path in sorted(csrc.rglob("*")):
        if path.is_file():
            digest.update(f"{path.relative_to(csrc)}\0".encode() + path.read_bytes())
    return int.from_bytes(digest.digest()[:7], "big")


@cache
def _unfit(device: int) -> str | None:
    if reason := load():
        return reason
    capability = torch.cuda.get_device_capability(device)
    if capability == CAPABILITY:
        return None
    return f"the CUDA kernels are for compute capability 9.0, this GPU has {capability}"
