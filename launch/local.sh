#!/usr/bin/env bash
# N processes on one machine, each with one GPU, or with JAX_NUM_CPU_DEVICES virtual CPU devices:
#   launch/local.sh 2 python -m pi_jax.train --config configs/tiny.py
# Edit: nothing. PORT chooses the coordinator's port, GRACE the seconds from SIGTERM or Ctrl-C to SIGKILL.
set -o pipefail
if [[ $# -lt 2 || ! $1 =~ ^[1-9][0-9]*$ || ! ${GRACE:=300} =~ ^[0-9]+$ ]]; then
    echo "usage: [PORT=NUMBER] [GRACE=SECONDS] launch/local.sh N COMMAND ..." >&2
    exit 2
fi
n=$1
shift
export PI_JAX_COORDINATOR=127.0.0.1:${PORT:-$((20000 + RANDOM % 20000))} PI_JAX_NUM_PROCESSES=$n
gpus=$( (nvidia-smi --list-gpus 2>/dev/null || true) | wc -l)

set -m # what is started in the background leads a process group, which Ctrl-C does not reach

# Only this script can write to the pipe. When it has ended, even by SIGKILL, the reader kills what it left running.
kill_leftovers() {
    trap '' HUP INT TERM
    exec >/dev/null 2>&1
    groups=()
    while read -ra line; do groups=("${line[@]}"); done
    kill -KILL -- "${groups[@]}"
}
exec 3> >(set -m; kill_leftovers <&0 &)

pids=()
for ((i = 0; i < n; i++)); do
    if ((gpus)); then export PI_JAX_LOCAL_DEVICE_IDS=$i; fi
    PI_JAX_PROCESS_ID=$i "$@" 3>&- &
    pids+=($!)
    echo "${pids[@]/#/-}" >&3
done
set +m

end= # of the grace period, in seconds since the start
# shellcheck disable=SC2317 # called by trap
stop() {
    if [[ $end && $1 == INT ]]; then end=-1; fi # a second Ctrl-C
    end=${end:-$((SECONDS + GRACE))}
    kill -TERM "${pids[@]}" # the processes save and exit with 75
}
trap 'stop INT' INT
trap 'stop TERM' HUP TERM

exec 4>&2 2>/dev/null # bash would report killed jobs
status=0
while ((${#pids[@]} && (status == 0 || status == 75))); do
    sleep 0.2
    for i in "${!pids[@]}"; do
        if ! kill -0 "${pids[i]}"; then
            code=0
            wait "${pids[i]}" || code=$?
            if ((code && code != 75)); then echo "local.sh: process $i ended with status $code" >&4; fi
            if ((status == 0 || code && status == 75)); then status=$code; fi
            unset "pids[i]"
        fi
    done
    if [[ $end ]] && ((${#pids[@]} && SECONDS > end)); then status=137; fi
done
exec 3>&-
wait
exit "$status"
