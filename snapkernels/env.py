"""The environment variables that the package reads, all of them, and mostly when imported."""

import os

VARIABLES = {
    "SNAPKERNELS_BACKEND": "op=backend,op=backend: what runs where a call names no backend",
    "SNAPKERNELS_COMMIT": "the commit of a source tree without its git history, for records",
    "TRITON_INTERPRET": "1: Triton kernels run on the CPU, slowly, to be checked (Triton's own)",
}


def read_backends(text: str) -> dict[str, str]:
    """{op: backend} of "op=backend,op=backend".

    Raises:
        ValueError: it has another form.
    """
    pairs = [part.strip() for part in text.split(",") if part.strip()]
    for pair in pairs:
        if pair.count("=") != 1 or pair[0] == "=" or pair[-1] == "=":
            raise ValueError(f"SNAPKERNELS_BACKEND: {pair!r} is not op=backend")
    return dict(pair.split("=") for pair in pairs)


def commit() -> str | None:
    """What SNAPKERNELS_COMMIT says now."""
    return os.environ.get("SNAPKERNELS_COMMIT")


BACKENDS = read_backends(os.environ.get("SNAPKERNELS_BACKEND", ""))
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
