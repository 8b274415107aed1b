#!/usr/bin/env bash
# N processes on one machine, each with one GPU, or with JAX_NUM_CPU_DEVICES virtual CPU devices:
#   launch/local.sh 2 python -m pi_jax.train --config configs/tiny.py
# Edit: nothing. PORT chooses the coordinator's port.
set -euo pipefail
if [[ $# -lt 2 || ! $1 =~ ^[1-9][0-9]*$ ]]; then
    echo "usage: launch/local.sh N COMMAND ..." >&2
    exit 2
fi
n=$1
shift
export PI_JAX_COORDINATOR=127.0.0.1:${PORT:-$((20000 + RANDOM % 20000))} PI_JAX_NUM_PROCESSES=$n
gpus=$( (nvidia-smi --list-gpus 2>/dev/null || true) | wc -l)
pids=()
for ((i = 0; i < n; i++)); do
    if ((gpus)); then export PI_JAX_LOCAL_DEVICE_IDS=$i; fi
    PI_JAX_PROCESS_ID=$i "$@" &
    pids+=($!)
done
trap 'kill -TERM "${pids[@]}" 2>/dev/null' TERM INT
status=0
for _ in "${pids[@]}"; do
    code=0
    wait -n || code=$?
    # A signal for us ends `wait` too (above 128): the processes save and end by themselves, with 75.
    while ((code > 128)) && [[ -n $(jobs -pr) ]]; do code=0; wait -n || code=$?; done
    if ((code)); then status=$code; fi
    if ((code && code != 75)); then
        kill -KILL "${pids[@]}" 2>/dev/null || true
        break
    fi
done
exit "$status"
