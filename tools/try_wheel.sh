#!/usr/bin/env bash
# usage: try_wheel.sh PYTHON WHEEL
# Installs WHEEL into a fresh environment of PYTHON and tries it there with no compiler, no
# TensorFlow and no CUDA in sight; says how long it took from `pip install` to the first result. NumPy
# is fetched before, so that the time is not that of a download.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

directory=$(mktemp -d)
trap 'rm -rf "$directory"' EXIT
"$1" -m venv "$directory/venv"
wheel=$(realpath "$2")
cp "$here/wheel_smoke.py" "$directory"
"$directory/venv/bin/pip" download --quiet --only-binary :all: --dest "$directory/wheels" "$wheel"
begun=$(date +%s%N)
"$directory/venv/bin/pip" install --quiet --no-index --find-links "$directory/wheels" "$wheel"
cd "$directory"
env -i HOME="$directory" PATH=/nonexistent FASTCONV_SMOKE_BEGUN="$begun" \
  "$directory/venv/bin/python" -I wheel_smoke.py
