#!/usr/bin/env bash
# A Cloud TPU slice: the same command on all its hosts. Edit: name, zone, the folder on the hosts, the config.
#   launch/tpu_vm.sh --config configs/7b_32k.py
set -euo pipefail
NAME=${NAME:-my-v5p}
ZONE=${ZONE:-us-east5-a}
printf -v words '%q ' "$@"
exec gcloud compute tpus tpu-vm ssh "$NAME" --zone "$ZONE" --worker=all \
    --command "cd ~/pi_jax && .venv/bin/python -m pi_jax.train $words"
