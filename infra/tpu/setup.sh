#!/usr/bin/env bash
# The environment of the TPU lane, in a folder of its own:
#   infra/tpu/setup.sh [VENV]        default .venv-tpu; PYTHON picks the interpreter (3.11)
# From PyPI alone: stub libraries stand in for CUDA (cuda_stubs.py says why; needs gcc and readelf). On a TPU VM with
# access to torch's own index, TORCH_INDEX=https://... takes the CPU build from there instead, and no stubs are made.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
venv=$(realpath -m "${1:-.venv-tpu}")
python=${PYTHON:-$(command -v python3.11 || command -v python3)}

"$python" -c "import sys; sys.exit(sys.version_info[:2] != (3, 11))" || {
  echo "error: '$python' is not Python 3.11; set PYTHON=..." >&2
  exit 2
}
test -x "$venv/bin/python" || "$python" -m venv "$venv"
pip=("$venv/bin/pip" install --quiet --no-compile --disable-pip-version-check)
if [ -n "${TORCH_INDEX:-}" ]; then
  "${pip[@]}" --no-deps --index-url "$TORCH_INDEX" torch==2.9.0
fi
echo "pip is going to list CUDA packages that are missing: they are left out on purpose"
"${pip[@]}" --no-deps --requirement infra/tpu/requirements.txt
"${pip[@]}" --requirement infra/tpu/requirements-light.txt
if [ -z "${TORCH_INDEX:-}" ]; then
  "$venv/bin/python" infra/tpu/cuda_stubs.py
fi
# The checkout is the import root; `fathom` is a console script of it, without pip's check of torch's version.
site=$("$venv/bin/python" -c "import sysconfig; print(sysconfig.get_paths()['purelib'])")
pwd >"$site/fathom.pth"
cat >"$venv/bin/fathom" <<SCRIPT
#!$venv/bin/python
from apps.cli import main
raise SystemExit(main())
SCRIPT
chmod +x "$venv/bin/fathom"
"$venv/bin/python" - <<'CHECK'
from libs.parallel.xla.pins import PINS, refuse_other_versions
refuse_other_versions(tuple(PINS), "infra/tpu/setup.sh")
import torch, torch_xla  # what is installed can be loaded
print(f"torch {torch.__version__}, torch_xla {torch_xla.__version__}")
CHECK
