#!/usr/bin/env bash
# What dispatch should do on this GPU, measured in some ten minutes on one card:
#   launch/gpu_dispatch.sh [--network=resnet18_cifar ...]
# writes the platform's table where `auto` reads it (advmoe_jax/routing/row_costs.json of this
# checkout, installed with `pip install -e '.[cuda]'`), then runs the benchmarks of dispatch and of
# inference with it. Arguments go to benchmarks.row_costs.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
"$python" -m benchmarks.row_costs --write "$@"
"$python" -m benchmarks.run --suite="${SUITE:-dispatch,inference}" --json="${JSON:-gpu_dispatch.json}"
