#!/usr/bin/env bash
# Builds, tests and measures on a machine with a GPU and without a network, from a plain copy of the repository.
#   scripts/gpu_check.sh [--dry-run] [STAGE...]
# Stages: build (and all tests that use the GPU), sanitize (compute-sanitizer on the solver), measure (the benchmarks).
# Each ends within eight minutes, may run on a machine of its own, and leaves a few files in $OUT, or gpu_results/.
# --dry-run goes through all of it on a machine without a GPU, with small settings.
# PYTHON names the Python that has torch, triton, pybind11, cmake, ninja, pytest, pytest-benchmark and scipy. Without
# Pillow the post-processing of masks and the loading of data are not measured.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

dry_run=
[ "${1:-}" = --dry-run ] && dry_run=yes && shift
stages=("${@:-build}")
[ $# -gt 0 ] || stages=(build sanitize measure)
python=${PYTHON:-python3}
export PYTHONPATH=$PWD
results=$(realpath -m "${OUT:-gpu_results}")
mkdir -p "$results"
# Seconds a stage may take; the commands of a stage share them.
stage_seconds=${STAGE_SECONDS:-450}
if [ -n "$dry_run" ]; then
    device=cpu cuda=off test_filter="(triton or native) and small"
    measure_options=(--benchmark-quick --benchmark-max-time=0.01 
        -k "coco-2- or 100x7 or test_postprocess or test_optimizer or test_inference and one and not encoder")
else
    device=cuda cuda=on test_filter=""
    measure_options=(--benchmark-max-time=0.2)
    "$python" -c "import torch; torch.zeros(1, device='cuda')" || { echo "no GPU: try --dry-run" >&2; exit 1; }
fi
failed=()

# step NAME SECONDS COMMAND...: at most SECONDS and what the stage has left; its output goes to the stage's log.
step() {
    local name=$1 limit=$2 left=$((deadline - SECONDS)) status start=$SECONDS
    shift 2
    [ "$left" -lt "$limit" ] && limit=$left
    if [ "$limit" -lt 1 ]; then
        echo "-- $name: not run, the stage's time is used up" | tee -a "$log"
        failed+=("$name")
        return 1
    fi
    printf '== %s: %s\n' "$name" "$*" | tee -a "$log"
    timeout -k 10 "$limit" "$@" >"$results/.step" 2>&1
    status=$?
    # The end of a long output has what matters, and the folder stays small.
    tail -c 300000 "$results/.step" >>"$log" && rm "$results/.step"
    echo "-- $name: exit code $status after $((SECONDS - start)) s" | tee -a "$log"
    [ "$status" -eq 0 ] || failed+=("$name")
    return "$status"
}

install_package() {
    # For the GPU that is here alone, which is quicker than for all.
    [ -n "$dry_run" ] || architectures=$("$python" -c \
        "import torch; print('%d%d' % torch.cuda.get_device_capability())")
    step install 240 env DETR_FAST_CUDA="$cuda" ${architectures:+DETR_FAST_CUDA_ARCHITECTURES=$architectures-real} \
        "$python" -m pip install --no-build-isolation --no-deps -e .
}

# The stages may run on different machines, so each makes sure that the package is there.
installed() {
    "$python" -c "
import sys
from detr_fast.ops import _native
module = _native.load().module
sys.exit(0 if module is not None and (module.cuda or '$cuda' == 'off') else 1)" 2>/dev/null
}

build() {
    install_package || return
    # The command line needs Typer, which the tests below do not.
    if "$python" -c "import typer" 2>/dev/null; then step info 60 "$python" -m detr_fast info; fi
    # A process for each file, several at a time: Triton compiles each configuration anew, and a fault ends one file.
    printf '%s\n' tests/ops/test_*.py tests/test_{no_waits,cuda_graphs,target_batch,matcher,criterion}.py \
        tests/test_{mask_losses,segmentation}.py >"$results/.files"
    # shellcheck disable=SC2016  # expanded by the inner shell; pytest's 5 says that the filter left no test
    step tests 380 xargs -a "$results/.files" -P "${TEST_PROCESSES:-6}" -I FILE bash -c \
        'output=$("$0" -m pytest "$1" -q -ra -p no:cacheprovider -k "$2" 2>&1)
        code=$?
        printf "%s\n" "== $1" "$output"
        [ "$code" -eq 0 ] || [ "$code" -eq 5 ]' "$python" FILE "$test_filter"
    rm "$results/.files"
}

sanitize() {
    installed || install_package || return
    local tool
    for tool in memcheck racecheck synccheck initcheck; do
        if [ -n "$dry_run" ]; then
            step "$tool, without it" 100 "$python" scripts/solver_check.py cpu
            break
        fi
        step "$tool" 110 compute-sanitizer --tool "$tool" --error-exitcode 9 --print-limit 20 \
            "$python" scripts/solver_check.py cuda
    done
}

measure() {
    installed || install_package || return
    local piece files
    # A fault of a kernel ends its process: the others' numbers are kept. The most important come first.
    for piece in "matching matching_cost loss" assignment attention transformer train_step \
        "add_layer_norm feed_forward" masks; do
        files=()
        for name in $piece; do files+=("benchmarks/bench_$name.py"); done
        step "measure $piece" 150 "$python" -m pytest "${files[@]}" -q -p no:cacheprovider -p no:xdist \
            --benchmark --benchmark-device="$device" "${measure_options[@]}" \
            --benchmark-results "$results/$device-${piece%% *}.json"
    done
}

for stage in "${stages[@]}"; do
    case $stage in
        build | sanitize | measure) ;;
        *) echo "no such stage: $stage" >&2 && exit 1 ;;
    esac
    deadline=$((SECONDS + stage_seconds)) log=$results/$stage.log
    { date && "$python" -VV && (nvidia-smi -L || true); } >"$log" 2>&1
    "$stage"
    echo "== $stage: $((SECONDS - deadline + stage_seconds)) s" | tee -a "$log"
done

if [ ${#failed[@]} -gt 0 ]; then
    printf 'failed: %s\n' "${failed[@]}" | tee -a "$log" >&2
    exit 1
fi
echo "results: $results"
