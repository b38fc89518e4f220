#!/usr/bin/env bash
# The GPU tests and the benchmark's figures for one GPU: figures as JSON, and a table with hardware and date in gpu.md.
# Needs no network, and of the requirements neither ray, datasets, lm-eval nor beartype.
#
#   jobs/gpu.sh OUTPUT [CHECKPOINTS]
#   STEPS="tests kernels search-7b job-7b" jobs/gpu.sh OUTPUT    # some of them, where time is short; the table has all
#
# CHECKPOINTS holds random weights while they are needed: 27 GB free for 7B and its pruned copy, as much for 13B, and
# 140 GB, on disk and in the host's memory, for the whole 70B, of which else the first blocks are searched. PYTHON is
# the interpreter to use (python3); BLOCKS="--blocks 2" tries the script out on shapes cut short, DEVICE=cpu anywhere.
set -euo pipefail

output=$(realpath -m "${1:?usage: jobs/gpu.sh OUTPUT [CHECKPOINTS]}")
checkpoints=$(realpath -m "${2:-$output/checkpoints}")
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
device=${DEVICE:-cuda}
read -r -a blocks <<<"${BLOCKS:-}"
export HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
all="tests kernels search-7b job-7b offload-7b offload-13b offload-70b"
steps=" ${STEPS:-$all} "
for step in $steps; do
    if [[ " $all " != *" $step "* ]]; then
        echo "STEPS: unknown step $step, expected some of: $all" >&2
        exit 2
    fi
done
mkdir -p "$output" "$checkpoints"
failures=0

# run NAME COMMAND...: its output is shown and kept; what fails is said, and what follows runs all the same.
run() {
    local name=$1
    shift
    if [[ $steps != *" $name "* ]]; then
        return
    fi
    echo "== $name"
    if ! "$@" 2>&1 | tee "$output/$name.txt"; then
        echo "== $name FAILED"
        failures=$((failures + 1))
        return 1
    fi
}

# measure NAME PART SHAPE OPTIONS...
measure() {
    local name=$1 part=$2 shape=$3
    shift 3
    run "$name" "$python" -m neuronal_ray.benchmark "$part" --shape "$shape" --dtype bfloat16 --device "$device" \
        --checkpoints "$checkpoints" --output "$output/$name.json" "$@"
}

forget() {
    rm -rf "$checkpoints"/llama-"$1"-*
}

run tests "$python" -m pytest -o addopts= -q -m gpu tests/gpu tests/core/kernels tests/models/formats/test_semi_structured.py || true
run kernels "$python" -m neuronal_ray.benchmark kernels --device "$device" || true
measure search-7b search 7b --literal-candidates 2 "${blocks[@]}" || true
measure job-7b job 7b "${blocks[@]}" || true
measure offload-7b search 7b --offload --repeats 2 "${blocks[@]}" || true
forget 7b
measure offload-13b search 13b --offload --repeats 2 "${blocks[@]}" || true
forget 13b
room=$(df --output=avail -B1G "$checkpoints" | tail -n 1)
memory=$(awk '/^MemAvailable/ {print int($2 / 1048576)}' /proc/meminfo)
if ((room < 145 || memory < 150)) && ((${#blocks[@]} == 0)); then
    echo "== 70B whole needs 145 GB on disk and 150 GB of memory; there are $room and $memory: the first 16 blocks"
    blocks=(--blocks 16)
fi
measure offload-70b search 70b --offload --repeats 2 "${blocks[@]}" || true
forget 70b
rmdir "$checkpoints" 2>/dev/null || true

if [[ $steps == *-* ]]; then # something was measured
    "$python" -m neuronal_ray.benchmark table "$output"/*.json | tee "$output/gpu.md"
fi
echo "$failures failed; figures, logs and gpu.md are in $output"
((failures == 0))
