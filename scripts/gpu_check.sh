#!/usr/bin/env bash
# Everything that needs a GPU, in one command: builds the extension with CUDA, runs the tests on the device, compute-sanitizer, the benchmarks.
#
#   scripts/gpu_check.sh [FOLDER]     FOLDER (default bench/results) gets ops_<gpu>.json and steps_<gpu>_<cases>.json (the benchmarks),
#                                     gpu_check_<gpu>.txt (the summary) and gpu_check_<gpu>.log (all output)
#   PYTHON=python3                    the Python whose torch sees the GPU; needs no network: nothing is downloaded. Stages `step` and `bench_step` need
#                                     diffusers
#   STAGES="build tests sanitizer bench"     what runs; a stage that fails or outlasts its limit does not stop the later ones
#   TESTS="tests/triton ..."          the tests of stage `tests`; default: those of the kernels
#   STEP_TESTS="tests/test_replay.py ..."    those of stage `step`; default: host syncs, replay, compilation, feeds, precision
#   STEP_CASES="mnist and (retrack or siss)"    what stage `bench_step` times, as pytest's -k; celeba and sd need BENCH_ARGS=--full. What its limit cuts
#                                     off is lost, what was timed before is written
#   STEP_SECONDS=6                    how long the contestants of one case take turns
#   LIMIT_build=110 LIMIT_tests=110 LIMIT_calls=45 (what the sanitizer watches, run without it) LIMIT_sanitizer=40 (each of four tools)
#   LIMIT_bench=165 LIMIT_step=180 LIMIT_bench_step=280     seconds
#   BENCH_ARGS=--full                 further arguments of the benchmarks
#
# Calls of less than ten minutes each:
#
#   scripts/gpu_check.sh                                                           the kernels
#   STAGES="build step bench_step" scripts/gpu_check.sh                            the step, and its times on the MNIST network
#   STAGES="build bench_step" STEP_CASES="cifar and siss" LIMIT_bench_step=460 scripts/gpu_check.sh      the times on another network
#
# Exit status: 0 where every stage passed.
set -euo pipefail

cd "$(dirname "$0")/.."
root=$PWD
python=${PYTHON:-python3}
stages=${STAGES:-build tests sanitizer bench}
limit_build=${LIMIT_build:-110}
limit_tests=${LIMIT_tests:-110}
limit_calls=${LIMIT_calls:-45}
limit_sanitizer=${LIMIT_sanitizer:-40}
limit_bench=${LIMIT_bench:-165}
limit_step=${LIMIT_step:-180}
limit_bench_step=${LIMIT_bench_step:-280}
step_cases=${STEP_CASES:-mnist and (retrack or siss)}
step_seconds=${STEP_SECONDS:-6}
tests=${TESTS:-tests/triton tests/cuda tests/ops tests/test_functional.py tests/test_backends.py tests/golden/test_losses.py tests/golden/test_losses_functional.py}
step_tests=${STEP_TESTS:-tests/test_no_host_sync.py tests/test_replay.py tests/test_compile.py tests/test_feeds.py tests/test_precision.py}
for name in $stages; do
  [[ " build tests sanitizer bench step bench_step " == *" $name "* ]] || {
    echo "STAGES: expected build, tests, sanitizer, bench, step or bench_step, got $name"
    exit 2
  }
done
read -r -a bench_args <<<"${BENCH_ARGS:-}"

export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
export PYTHONUNBUFFERED=1
export TRITON_INTERPRET=0
export FASTUNLEARN_COMMIT=${FASTUNLEARN_COMMIT:-$(git describe --always --dirty --abbrev=40 2>/dev/null || echo unknown)}

"$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || {
  echo "gpu_check: expected a GPU that torch sees, got none (PYTHON=$python)"
  exit 1
}
# for file names, and without the dot
gpu=$("$python" -c 'import re, torch; print(re.sub(r"[^a-z0-9]+", "_", torch.cuda.get_device_name().lower()))')
capability=$("$python" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())')
mkdir -p "${1:-bench/results}"
output=$(cd "${1:-bench/results}" && pwd)
log=$output/gpu_check_$gpu.log
summary=$output/gpu_check_$gpu.txt
: >"$log"
{
  nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader --id=0
  "$python" -c 'import platform, torch, triton; print("python", platform.python_version(), "torch", torch.__version__, "triton", triton.__version__)'
  echo "commit $FASTUNLEARN_COMMIT"
} | tee "$summary"

failed=0

# stage NAME SECONDS COMMAND...: runs it within its limit, notes the outcome; SIGINT first, on which pytest still writes what it has.
stage() {
  local name=$1 limit=$2 began=$SECONDS outcome=passed status=0
  shift 2
  printf '\n=== %s: %s\n' "$name" "$*" >>"$log"
  timeout --signal=INT --kill-after=20 "$limit" "$@" >>"$log" 2>&1 || status=$?
  if ((status != 0)); then
    failed=1
    outcome="failed ($status)"
    ((status != 124 && status != 137)) || outcome="stopped at its limit of $limit s"
    tail -n 25 "$log"
  fi
  printf '%-22s %-32s %4d s\n' "$name" "$outcome" "$((SECONDS - began))" | tee -a "$summary"
}

wanted() { [[ " $stages " == *" $1 "* ]]; }

# shellcheck disable=SC2329 # these three are called through `stage`, in a bash of their own
build() {
  FASTUNLEARN_CUDA=auto FASTUNLEARN_EXTENSION=require FASTUNLEARN_CUDA_ARCHS=$capability MAX_JOBS=$(nproc) \
    "$python" -m pip install --no-index --no-build-isolation --no-deps -e .
  ls -l fastunlearn/_C.abi3.so fastunlearn/_C_cuda.abi3.so # `auto` goes without CUDA where nvcc is missing
}

# shellcheck disable=SC2329
run_tests() {
  local paths options=(-q -p no:cacheprovider)
  read -r -a paths <<<"$1"
  ! "$python" -c 'import xdist' 2>/dev/null || options+=(-n 8)
  "$python" -m pytest "${options[@]}" "${paths[@]}"
}

# shellcheck disable=SC2329
sanitize() {
  local tool=$1 sanitizer
  sanitizer=$(PATH=$PATH:/usr/local/cuda/bin command -v compute-sanitizer) || {
    echo "compute-sanitizer: not on the PATH and not in /usr/local/cuda/bin"
    return 1
  }
  # Without torch's caching every tensor is an allocation of its own, so that no access beyond its end hits another tensor.
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$sanitizer" --tool "$tool" --error-exitcode 9 "$python" scripts/sanitizer_calls.py
}

export -f build run_tests sanitize
export python capability

! wanted build || stage build "$limit_build" bash -euo pipefail -c build
! wanted tests || stage tests "$limit_tests" bash -euo pipefail -c 'run_tests "$1"' tests "$tests"
! wanted step || stage step "$limit_step" bash -euo pipefail -c 'run_tests "$1"' step "$step_tests"
if wanted sanitizer; then
  stage "sanitizer: plain run" "$limit_calls" "$python" scripts/sanitizer_calls.py # fills Triton's cache
  for tool in memcheck racecheck initcheck synccheck; do
    stage "sanitizer: $tool" "$limit_sanitizer" bash -euo pipefail -c "sanitize $tool"
  done
fi
! wanted bench || stage bench "$limit_bench" "$python" -m pytest bench --benchmark-only --device cuda --results "$output/ops_$gpu" \
  --ignore bench/bench_neighbors.py --ignore bench/bench_step.py -p no:cacheprovider "${bench_args[@]}"
! wanted bench_step || stage bench_step "$limit_bench_step" "$python" -m pytest bench/bench_step.py --benchmark-only --device cuda -k "$step_cases" \
  --step-seconds "$step_seconds" --results "$output/steps_${gpu}_$(tr -cs a-z0-9 _ <<<"$step_cases" | sed "s/_*$//")" -p no:cacheprovider "${bench_args[@]}"

echo
cat "$summary"
exit "$failed"
