#!/usr/bin/env bash
# Several processes on one host, each with its own devices, training one network together:
#   launch/local.sh 2 --config=configs/digits.py --workdir=runs/two
#   launch/local.sh 2 --restarts=3 --config=configs/digits.py --workdir=runs/two
# For trying out what a cluster does; on one GPU host a single process drives all GPUs.
# When one is lost the others end by themselves, and with --restarts=N all are started again, up to
# N times: they go on from the last checkpoint. A mistake in the command (exit code 2) is not tried
# again, nor is a run that was told to stop.
set -euo pipefail
processes=$1
shift
restarts=0
arguments=()
for argument in "$@"; do
  case "$argument" in
    --restarts=*) restarts=${argument#*=} ;;
    *) arguments+=("$argument") ;;
  esac
done
port=${PORT:-12355}
grace=${GRACE:-60} # seconds that the others have to end once one has failed
pids=()
told_to_stop=false

stop() {
  told_to_stop=true
  kill -TERM "${pids[@]}" 2>/dev/null || true
}
trap stop INT TERM

start() {
  pids=()
  local index
  for ((index = 0; index < processes; index++)); do
    "${PYTHON:-python}" -m advmoe_jax.train --coordinator="localhost:$port" \
      --num_processes="$processes" --process_id="$index" "${arguments[@]}" &
    pids+=($!)
  done
}

# Sets status: 0 if all processes have ended well, 2 if one was given a mistake.
wait_for_all() {
  status=0
  local deadline="" code pid running
  while ((${#pids[@]})); do
    sleep 0.2
    running=()
    for pid in "${pids[@]}"; do
      if kill -0 "$pid" 2>/dev/null; then
        running+=("$pid")
        continue
      fi
      code=0
      wait "$pid" || code=$?
      if ((code)); then
        ((status == 2)) || status=$code
        [[ -n "$deadline" ]] || deadline=$((SECONDS + grace))
      fi
    done
    pids=("${running[@]+"${running[@]}"}")
    if [[ -n "$deadline" ]] && ((SECONDS >= deadline && ${#pids[@]})); then
      kill -KILL "${pids[@]}" 2>/dev/null || true
    fi
  done
}

for ((attempt = 0; ; attempt++)); do
  start
  wait_for_all
  if ((status == 0 || status == 2 || attempt >= restarts)) || $told_to_stop; then
    exit "$status"
  fi
  echo "a process has ended with code $status: start $((attempt + 1)) of $restarts again" >&2
done
