#!/usr/bin/env bash
# A Cloud TPU pod: the same command on every host of the slice.
#   TPU=my-pod ZONE=us-central2-b launch/tpu_pod.sh --config=configs/cifar10_resnet18.py \
#     --workdir=/mnt/runs/cifar10
# Expects this repository, installed with `pip install -e '.[tpu]'`, in ~/advmoe_jax on each host
# (gcloud compute tpus tpu-vm scp --recurse --worker=all . "$TPU":advmoe_jax), and a workdir on a
# file system that all hosts share.
set -euo pipefail
: "${TPU:?name of the TPU slice}" "${ZONE:?its zone}"
command=$(printf '%q ' "${PYTHON:-python3}" -m advmoe_jax.train --coordinator=auto "$@")
exec gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker=all \
  --command="cd advmoe_jax && $command"
