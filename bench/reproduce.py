"""Every record of the report anew, and the report of them: all figures of this machine.

python bench/reproduce.py                    # on a GPU; README.md then tells its figures
python bench/reproduce.py --folder figures   # anywhere, and README.md is left alone

Runs the benches one after the other, each in a process of its own, and then bench/report.py.
"""

import argparse
import json
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

from page import NAMES
from support import say

from snapkernels.testing.record import RECORDS, ROOT, is_cut_off, record_path


def main(arguments: list[str] | None = None) -> int:
    """Run all of it.

    Returns:
        0; 1 where a gate was red, the report says which; 2 on bad input, or where a program did
        not come to its end.
    """
    args = _parse(arguments)
    folder: Path = args.folder or committed_folder(args.gpu)
    folder.mkdir(parents=True, exist_ok=True)
    date = datetime.now(UTC).strftime("%Y-%m-%d")
    red = False
    for name in NAMES:
        record = folder / f"{date}-{name}.json"
        before = _when_written(record)
        status = run(f"bench/{name}.py", "--json", str(record))
        if status not in (0, 1):
            return status
        # What Python itself ends with on an exception is 1 too.
        if _when_written(record) in (None, before):
            return _stopped(f"bench/{name}.py wrote no record")
        if is_cut_off(json.loads(record.read_text())):
            return _stopped(f"bench/{name}.py was cut off: {record} has what it had measured")
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


def gpu_name() -> str:
    """What CUDA calls this machine's GPU, empty where there is none.

    It is asked in a process of its own: in this one its context would hold memory of the GPU that
    the benches are to have for themselves.
    """
    ask = "import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else '')"
    done = subprocess.run([sys.executable, "-c", ask], stdout=subprocess.PIPE, text=True)
    return done.stdout.strip()


def committed_folder(gpu: str) -> Path:
    """Where the records of the GPU called `gpu` lie: "h100-80gb" of "NVIDIA H100 80GB HBM3"."""
    name = gpu.removeprefix("NVIDIA ").split(" HBM")[0]
    return RECORDS / name.lower().replace(" ", "-")


def _when_written(path: Path) -> int | None:
    return path.stat().st_mtime_ns if path.exists() else None


def _stopped(why: str) -> int:
    say(f"error: {why}")
    return 2


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--folder",
        type=Path,
        help="where records, page and figures go; default: of a GPU that in bench/records",
    )
    args = parser.parse_args(arguments)
    args.gpu = "" if args.folder else gpu_name()
    if not args.folder and not args.gpu:
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
