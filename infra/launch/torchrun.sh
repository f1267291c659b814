#!/usr/bin/env bash
# One node, one process for each GPU: begins the run or goes on with it.
#   infra/launch/torchrun.sh runs/first --recipe h200_8x_bf16
#   NPROC=2 infra/launch/torchrun.sh runs/small --recipe cpu_demo_tp2
# Relative paths are relative to the repository. Exit status: that of `fathom train`.
set -euo pipefail

if [ $# -lt 1 ]; then
  echo "usage: $0 RUN_DIR [what fathom train takes...]" >&2
  exit 2
fi
run_dir=$1
shift
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

# Tensor and context parallelism order their collectives by it on Hopper.
export CUDA_DEVICE_MAX_CONNECTIONS=1
exec python -m infra.launch.node --run-dir "$run_dir" ${NPROC:+--nproc "$NPROC"} -- "$@"
