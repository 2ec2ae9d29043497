"""Every record of the report anew, and the report of them: all figures of this machine.

python bench/reproduce.py                    # on a GPU; README.md then tells its figures
python bench/reproduce.py --folder figures   # anywhere, and README.md is left alone

Runs the benches one after the other, each in a process of its own, and then bench/report.py.
"""

import argparse
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import torch
from page import NAMES
from support import say

from snapkernels.testing.record import RECORDS, ROOT, record_path


def main(arguments: list[str] | None = None) -> int:
    """Run all of it.

    Returns:
        0; 1 where a gate was red, the report says which; 2 on bad input.
    """
    args = _parse(arguments)
    folder: Path = args.folder or committed_folder(torch.cuda.get_device_name())
    folder.mkdir(parents=True, exist_ok=True)
    date = datetime.now(UTC).strftime("%Y-%m-%d")
    red = False
    for name in NAMES:
        record = folder / f"{date}-{name}.json"
        status = run(f"bench/{name}.py", "--json", str(record))
        if status not in (0, 1):
            return status
        red |= status == 1
    page = ["--html", str(folder / "report.html"), "--png", str(folder)]
    reports = [["--records", str(folder), *page]]
    if args.folder is None:
        reports.append([])  # README.md
    for flags in reports:
        if status := run("bench/report.py", *flags):
            return status
    return int(red)


def run(program: str, *flags: str) -> int:
    """Run a program of this tree; returns its exit code, 2 where it was killed."""
    say(f"python {program} {' '.join(flags)}")
    done = subprocess.run([sys.executable, str(ROOT / program), *flags], check=False)
    return done.returncode if done.returncode >= 0 else 2


def committed_folder(gpu: str) -> Path:
    """Where the records of the GPU called `gpu` lie: "h100-80gb" of "NVIDIA H100 80GB HBM3"."""
    name = gpu.removeprefix("NVIDIA ").split(" HBM")[0]
    return RECORDS / name.lower().replace(" ", "-")


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--folder",
        type=Path,
        help="where records, page and figures go; default: of a GPU that in bench/records",
    )
    args = parser.parse_args(arguments)
    if args.folder is None and not torch.cuda.is_available():
        parser.error("there is no NVIDIA GPU: name a --folder for the figures of this CPU")
    if args.folder and args.folder.exists() and not args.folder.is_dir():
        parser.error(f"--folder {args.folder}: it is no folder")
    try:  # before anything is measured
        record_path(str((args.folder or RECORDS).parent / "record.json"))
    except argparse.ArgumentTypeError as error:
        parser.error(str(error))
    return args


if __name__ == "__main__":
    sys.exit(main())
