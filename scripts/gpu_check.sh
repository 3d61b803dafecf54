#!/usr/bin/env bash
# Everything that only a GPU can tell, in one command and one budget of time, the most valuable first.
#
#   scripts/gpu_check.sh [OUT]      OUT (default bench/results/gpu) gets at most eight files, each as soon as it has something to say:
#                                   summary.txt (one screen), check.json (versions, stages), log.txt, tests.jsonl,
#                                   ops_<gpu>.json, steps_<gpu>.json
#   BUDGET=420                      seconds in all, start to summary; a stage gets its own limit or what is left
#   PRECISIONS="bfloat16 float32"   of stage d
#   CACHE=DIR                       keeps what was compiled, for a later call (default: it goes with this one)
#   STAGES="a b c d e f"            in the order a b e c d f
#                                   a: versions, the extension (loaded; built where that fails), every kernel against float64
#                                   b: tests that only a GPU can run (pytest -m gpu)
#                                   c: the kernels' times      d: a whole ReTrack step's times, in bf16 and float32
#                                   e: compute-sanitizer       f: SISS, then the CIFAR-10 and the CelebA-HQ network
#   PYTHON=python3                  the Python whose torch sees the GPU; nothing is downloaded
#   WHEELS=.wheels                  what scripts/gpu_wheels.sh fetched; used where it is there
#   DRY=1                           a rehearsal on a CPU: every stage, limit, file and table; no number means anything
#
# On a machine that is lent for minutes: scripts/gpu_wheels.sh there beforehand, and carry what it names.
# Exit status: 0 where every stage passed.
set -euo pipefail

export GPU_CHECK_STARTED
GPU_CHECK_STARTED=$(date +%s)
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
wheels=${WHEELS:-.wheels}

if compgen -G "$wheels/*.whl" >/dev/null; then
  site=$(mktemp -d)
  trap 'rm -rf "$site"' EXIT
  install=("$python" -m pip --disable-pip-version-check install --quiet --no-index --no-deps --no-compile --target "$site")
  # One by one where all together fail: a wheel for another Python costs itself alone.
  "${install[@]}" "$wheels"/*.whl 2>/dev/null || for wheel in "$wheels"/*.whl; do
    "${install[@]}" "$wheel" 2>/dev/null || echo "gpu_check: left out $wheel, which this Python cannot install"
  done
  export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}
fi

# A signal to this shell ends the check in an orderly way, and its wheels stay until it is over.
"$python" scripts/gpu_check.py "$@" &
check=$!
trap 'kill -TERM "$check" 2>/dev/null || true' TERM INT HUP
status=0
wait "$check" || status=$?
while kill -0 "$check" 2>/dev/null; do
  wait "$check" || status=$?
done
exit "$status"
