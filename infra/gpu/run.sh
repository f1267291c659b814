#!/bin/sh
# On the offline GPU machine, in the folder that prepare.sh filled: install, check, benchmark, collect. Ten minutes.
#   sh run.sh [WORK]       WORK (default ./work) takes the checkout, the environment and the results; 6 GB.
# Needs a Hopper GPU with a driver for CUDA 13, Python 3.11 (PYTHON=... names another), a C++ compiler and tar; no network.
# MINUTES=... changes the limit of the whole. AGAINST=mamba_ssm also times upstream, where its wheels lie in ./extra.
set -eu

here=$(cd "$(dirname "$0")" && pwd)
work=${1:-$here/work}
python=${PYTHON:-python3.11}
minutes=${MINUTES:-10}
started=$(date +%s)
deadline=$((started + minutes * 60))
mkdir -p "$work/results"
work=$(cd "$work" && pwd)
results=$work/results
left() { echo $((deadline - $(date +%s))); }
say() { printf '%4d s  %s\n' $(($(date +%s) - started)) "$*" | tee -a "$results/timeline.txt"; }
need() { command -v "$1" >/dev/null || { echo "error: '$1' is not on this machine; $2" >&2; exit 2; }; }

need "$python" "PYTHON=... names a Python 3.11"
need g++ "TileLang's compiler needs a host C++ compiler"
"$python" -c "import sys; sys.exit(sys.version_info[:2] != (3, 11))" || { echo "error: $python is not Python 3.11; the wheels are for CPython 3.11" >&2; exit 2; }
[ -f "$here/fathom.tar.gz" ] || { echo "error: no fathom.tar.gz beside $0; run infra/gpu/prepare.sh on a connected machine" >&2; exit 2; }

# Everything that was written is collected, whichever step fails.
collect() {
    status=$?
    say "exit status $status"
    tar -C "$work" -czf "$work/results.tar.gz" results
    echo "results: $work/results.tar.gz"
}
trap collect EXIT

say "checksums"
(cd "$here" && sha256sum --quiet --check SHA256SUMS)
if command -v nvidia-smi >/dev/null; then nvidia-smi -q >"$results/nvidia-smi.txt" || say "nvidia-smi failed"; fi

say "checkout"
rm -rf "$work/fathom"
if command -v git >/dev/null; then
    git -c advice.detachedHead=false clone --quiet "$here/fathom.bundle" "$work/fathom"
else
    mkdir "$work/fathom"
fi
tar -C "$work/fathom" -xzf "$here/fathom.tar.gz"

say "install"
[ -x "$work/venv/bin/python" ] || "$python" -m venv "$work/venv"
bin=$work/venv/bin
# A find-links or an index of the machine's own must not come between: hashes would refuse what it offers.
unset PIP_FIND_LINKS PIP_EXTRA_INDEX_URL PIP_INDEX_URL
pip() { PIP_CONFIG_FILE=/dev/null "$bin/python" -m pip --disable-pip-version-check "$@"; }
pip install --quiet --no-index --no-deps --no-compile --find-links "$here/wheels" -r "$here/wheels.lock"
pip install --quiet --no-index --no-deps --no-build-isolation --editable "$work/fathom"
if [ -d "$here/extra" ]; then pip install --quiet --no-index --no-deps "$here"/extra/*.whl; fi
pip freeze >"$results/packages.txt"

cd "$work/fathom"
say "check the parts that need no kernel"
OMP_NUM_THREADS=1 "$bin/python" -m pytest tests/apps/eval/bench/cuda/test_parts.py tests/rules/test_receipts.py -q \
    >"$results/tests.txt" 2>&1 || { tail -40 "$results/tests.txt" >&2; exit 1; }

# Correctness comes first in there: a red gate prints no speed and exits 1.
say "benchmark, $(left) s left"
remaining=$(left)
[ "$remaining" -ge 60 ] || { echo "error: $remaining s are left for the benchmark; allow more with MINUTES=..." >&2; exit 2; }
set -- --device cuda --minutes "$(awk "BEGIN { printf \"%.2f\", ($remaining - 20) / 60 }")" --receipt-dir "$results/receipts"
if [ -n "${AGAINST:-}" ]; then set -- "$@" --against "$AGAINST"; fi
"$bin/python" -m apps.cli bench ops "$@" >"$results/bench.txt" 2>"$results/bench.log" || {
    status=$?
    tail -60 "$results/bench.log" >&2
    exit "$status"
}
cat "$results/bench.txt"
