#!/usr/bin/env bash
# The paper's claim on one GPU: ResNet-18 on CIFAR-10 in the paper's settings, AdvMoE beside AT
# (Dense) and AT (MoE), then AutoAttack and the MoE suite on 1,000 images, then the benchmarks.
#   launch/gpu_claim.sh
# runs one piece of ten minutes and stops at a step that is saved. Exit code 75: there is more to do,
# the same command goes on; 0: all is done; anything else: it went wrong. So, to the end:
#   until launch/gpu_claim.sh; do [ $? -eq 75 ] || break; done
# Arguments go to advmoe_jax.compare, such as those for images without TFDS:
#   launch/gpu_claim.sh --config.run.data.source=image_folder --config.run.data.path=cifar10.tar.gz
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
workdir=${WORKDIR:-runs/gpu_claim}
limit=${LIMIT:-570} # seconds of a piece
grace=${GRACE:-25}  # seconds to save in
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$(realpath -m "$workdir")/compiled}

# Runs a command for what is left of the piece.
within_the_piece() {
  local left=$((limit - SECONDS)) code=0
  if [ "$left" -le 0 ]; then code=124; else
    timeout --signal=TERM --kill-after="$grace" "$left" "$@" || code=$?
  fi
  if [ "$code" -eq 124 ] || [ "$code" -eq 137 ]; then
    echo "the piece is over after $SECONDS s: give the same command again to go on" >&2
    exit 75
  fi
  return "$code"
}

within_the_piece "$python" -m advmoe_jax.compare --config="${CONFIG:-configs/compare_cifar10.py}" \
  --workdir="$workdir" --config.num_seeds=1 \
  --config.rows=at_dense,at_moe,advmoe_assignment,advmoe_pathway "$@"

IFS=, read -ra suites <<<"${SUITE:-dispatch,tokens,inference,training,attack}"
for suite in "${suites[@]}"; do # one file each: what is there is not measured again
  figures=$workdir/benchmarks_$suite.json
  [ -s "$figures" ] || within_the_piece "$python" -m benchmarks.run --suite="$suite" --json="$figures"
done
