#!/bin/sh
# Counters of one case, by Nsight Compute, into out/ beside this script.
#
#   profiling/ncu.sh CASE [arguments of run_case.py]
#
# PYTHON names the interpreter (python3). Exit status: 2 for a wrong call, 3 without ncu, 4 if the
# machine refuses its counters, else that of ncu.
set -eu

fail() {
    status=$1
    shift
    echo "ncu.sh: $*" >&2
    exit "$status"
}

case ${1:-} in "" | -*) fail 2 "usage: profiling/ncu.sh CASE [arguments of run_case.py]" ;; esac
command -v ncu >/dev/null 2>&1 ||
    fail 3 "ncu is not on PATH; Nsight Compute brings it (package nsight-compute)"

here=$(dirname -- "$0")
out=$here/out/$(printf %s "$1" | tr / _)
mkdir -p "$here/out"
# No report or log of an earlier run may pass for one of this run.
rm -f "$out.ncu-rep" "$out.log"

status=0
ncu --profile-from-start off --clock-control none --set full --nvtx -f -o "$out" \
    "${PYTHON:-python3}" "$here/run_case.py" "$@" >"$out.log" 2>&1 || status=$?
if grep -q ERR_NVGPUCTRPERM "$out.log"; then
    rm -f "$out.ncu-rep" "$out.log"
    fail 4 "this machine refuses its performance counters to this user (ERR_NVGPUCTRPERM)"
fi
cat "$out.log"
rm -f "$out.log"
[ "$status" -eq 0 ] || { rm -f "$out.ncu-rep"; exit "$status"; }
[ -f "$out.ncu-rep" ] || fail 1 "ncu wrote no report; what it said is above"
echo "$out.ncu-rep"
