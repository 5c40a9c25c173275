#!/usr/bin/env bash
# Several processes on one host, each with its own devices, training one network together:
#   launch/local.sh 2 --config=configs/digits.py --workdir=runs/two
# For trying out what a cluster does; on one GPU host a single process drives all GPUs.
set -euo pipefail
processes=$1
shift
port=${PORT:-12355}
pids=()
for ((i = 0; i < processes; i++)); do
  "${PYTHON:-python}" -m advmoe_jax.train \
    --coordinator="localhost:$port" --num_processes="$processes" --process_id="$i" "$@" &
  pids+=($!)
done
trap 'kill "${pids[@]}" 2>/dev/null' INT TERM
status=0
for pid in "${pids[@]}"; do
  wait "$pid" || status=$?
done
exit "$status"
