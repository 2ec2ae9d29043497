"""The repository's own files: what git tracks or would, or all of a tree without git."""

import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LEFT_OUT = {".git", ".venv", "build", "__pycache__"}


def repository_files():
    command = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 0:
        return [ROOT / name for name in done.stdout.splitlines() if (ROOT / name).is_file()]
    found = (path for path in ROOT.rglob("*") if path.is_file())
    return [path for path in found if not LEFT_OUT & set(path.relative_to(ROOT).parts)]
