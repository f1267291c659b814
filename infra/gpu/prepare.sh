#!/bin/sh
# On a connected machine: collect the wheels of wheels.lock and the checkout into one folder to carry to a GPU machine.
#   infra/gpu/prepare.sh OUT             what wheels.lock names, every file checked against its hash
#   infra/gpu/prepare.sh OUT --relock    resolve requirements.in anew and rewrite wheels.lock
# Needs Python 3.11 with pip (PYTHON=... names another), git and tar. Nothing is installed.
set -eu

usage="usage: $0 OUT [--relock]"
out=${1:?$usage}
mode=${2:-}
case $mode in "" | --relock) ;; *) echo "error: unknown option '$mode'; $usage" >&2; exit 2 ;; esac
python=${PYTHON:-python3.11}
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
mkdir -p "$out/wheels"
out=$(cd "$out" && pwd)

# The GPU machine decides which wheels fit, not this one: pip matches the platform's number exactly, so all are named.
target="--only-binary=:all: --python-version 3.11 --implementation cp --platform manylinux2014_x86_64"
for minor in $(seq 5 39); do target="$target --platform manylinux_2_${minor}_x86_64"; done
target="$target --platform manylinux2010_x86_64 --platform manylinux1_x86_64"

# WHEEL_INDEX: the index to take wheels from, where pip's own is not the public one. Its torch must be the CUDA build,
# which some indexes hide behind a CPU one; the hashes refuse another.
download() {
    # shellcheck disable=SC2086  # $target is a list of options
    "$python" -m pip download --disable-pip-version-check ${WHEEL_INDEX:+--index-url "$WHEEL_INDEX"} \
        --dest "$out/wheels" $target "$@"
}
unset PIP_FIND_LINKS PIP_EXTRA_INDEX_URL

if [ "$mode" = --relock ]; then
    "$python" -c "
import sys, tomllib
print('\n'.join(tomllib.load(open(sys.argv[1], 'rb'))['project']['dependencies']))" "$root/pyproject.toml" >"$out/project.in"
    download -r "$out/project.in" -r "$here/requirements.in"
    "$python" "$here/lock.py" "$out/wheels" "$here/wheels.lock"
else
    download --no-deps --require-hashes -r "$here/wheels.lock"
fi

# Tracked and new files as they lie here: what is benchmarked is what was carried.
git -C "$root" ls-files -z --cached --others --exclude-standard |
    tar -C "$root" --null --files-from=- --ignore-failed-read -czf "$out/fathom.tar.gz"
git -C "$root" rev-parse HEAD >"$out/COMMIT"
git -C "$root" bundle create "$out/fathom.bundle" HEAD
cp "$here/run.sh" "$here/wheels.lock" "$out/"
(cd "$out" && sha256sum run.sh wheels.lock fathom.tar.gz fathom.bundle COMMIT wheels/*.whl >SHA256SUMS)
du -sh "$out" | sed 's/^/carry: /'
