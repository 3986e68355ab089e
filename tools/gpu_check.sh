#!/usr/bin/env bash
# The first contact with a GPU in twelve minutes: stages with limits of their own, worst first, results as they come.
#
#   tools/gpu_check.sh [--rehearse] [OUT]
#
# OUT (default gpu_check/) gets rows.jsonl, one log per stage and summary.md. Exits with 1 if a stage failed; what a
# machine lacks is "not run", with the reason. PYTHON names the interpreter (default python3); wheels in WHEELS (default
# wheels/) are installed without a network, see docs/gpu_check.md. --rehearse: the same stages on a CPU, small.
set -u
cd "$(dirname "$0")/.."
device=cuda patience=1
if [ "${1:-}" = --rehearse ]; then device=cpu patience=5; shift; fi # a CPU compiles and interprets
out=${1:-gpu_check} python=${PYTHON:-python3} wheels=${WHEELS:-wheels}
mkdir -p "$out"
rm -f "$out"/*.log "$out/rows.jsonl"
export PYTHONUNBUFFERED=1 OMP_NUM_THREADS="${OMP_NUM_THREADS:-4}" PYTHONPATH="$PWD:$PWD/tests${PYTHONPATH:+:$PYTHONPATH}"
if [ -d "$wheels" ]; then "$python" -m pip install --quiet --no-index --no-deps "$wheels"/*.whl; fi

failed=0
stage() { # NAME SECONDS: tools/gpu_stages.py NAME, cut off after SECONDS
  local began=$SECONDS limit=$(($2 * patience)) code result
  timeout --kill-after=5 $limit "$python" tools/gpu_stages.py "$1" --device $device --rows "$out/rows.jsonl" >"$out/$1.log" 2>&1
  code=$?
  case $code in
    0) result=passed ;;
    77) result="not run: $(tail -n 1 "$out/$1.log")" ;;
    124 | 137) result="FAILED: cut off after $limit s" failed=1 ;;
    *) result="FAILED: $(tail -n 1 "$out/$1.log")" failed=1 ;;
  esac
  printf '%-10s %4d s  %s\n' "$1" $((SECONDS - began)) "$result" | tee -a "$out/stages.log"
}

stage machine 20
stage kernels 100
stage head 120
stage fp8 90
stage ipc 50
stage step 170
stage bench 120
stage swap 50
"$python" tools/gpu_stages.py summary --device $device --rows "$out/rows.jsonl" >"$out/summary.md" && cat "$out/summary.md"
exit $failed
