#!/usr/bin/env bash
# One run on a TPU VM of one host (v6e-4, v6e-8): begins it or goes on with it.
#   infra/launch/tpu/vm.sh runs/first --recipe v6e_4k_hybrid
# One process drives every chip (SPMD). On preemption the VM sends SIGTERM: the run saves and ends with 75; the same
# command then resumes, so a unit or loop that starts it again needs to know nothing. Exit status: that of fathom train.
set -euo pipefail

if [ $# -lt 1 ]; then
  echo "usage: $0 RUN_DIR [what fathom train takes...]" >&2
  exit 2
fi
run_dir=$1
shift
cd "$(dirname "${BASH_SOURCE[0]}")/../../.."
fathom=${PROGRAM:-.venv-tpu/bin/fathom}
if ! command -v "$fathom" >/dev/null; then
  echo "error: $fathom is not there: make setup-tpu (on a TPU VM with TORCH_INDEX, see infra/tpu/README.md)" >&2
  exit 2
fi

if [ -f "$run_dir/config.json" ]; then
  # What a run began with is in its directory; settings of a resumed one may only be those that it allows.
  exec "$fathom" train --resume "$run_dir"
fi
exec "$fathom" train --run-dir "$run_dir" "$@"
