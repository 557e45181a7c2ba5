#!/usr/bin/env bash
# usage: try_wheel.sh PYTHON WHEEL
# Installs WHEEL into a fresh environment of PYTHON and tries it there with no compiler, no
# TensorFlow and no CUDA in sight; says how long it took from the end of the installation.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

directory=$(mktemp -d)
trap 'rm -rf "$directory"' EXIT
"$1" -m venv "$directory/venv"
"$directory/venv/bin/pip" install --quiet --only-binary :all: "$2"
cp "$here/wheel_smoke.py" "$directory"
cd "$directory"
env -i HOME="$directory" PATH=/nonexistent "$directory/venv/bin/python" -I wheel_smoke.py
