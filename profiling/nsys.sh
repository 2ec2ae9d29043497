#!/bin/sh
# Timeline of one case, by Nsight Systems, into out/ beside this script.
#
#   profiling/nsys.sh CASE [arguments of run_case.py]
#
# PYTHON names the interpreter (python3). Exit status: 2 for a wrong call, 3 without nsys, else that
# of nsys.
set -eu

fail() {
    status=$1
    shift
    echo "nsys.sh: $*" >&2
    exit "$status"
}

case ${1:-} in "" | -*) fail 2 "usage: profiling/nsys.sh CASE [arguments of run_case.py]" ;; esac
command -v nsys >/dev/null 2>&1 ||
    fail 3 "nsys is not on PATH; Nsight Systems brings it (package nsight-systems)"

here=$(dirname -- "$0")
out=$here/out/$(printf %s "$1" | tr / _)
mkdir -p "$here/out"
# No report of an earlier run may pass for one of this run.
rm -f "$out.nsys-rep"

# By default nsys ends the process where the capture ends.
nsys profile -c cudaProfilerApi --capture-range-end stop -t cuda,nvtx -f true -o "$out" \
    "${PYTHON:-python3}" "$here/run_case.py" "$@"
[ -f "$out.nsys-rep" ] || fail 1 "nsys wrote no report; what it said is above"
echo "$out.nsys-rep"
