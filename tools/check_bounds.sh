#!/usr/bin/env bash
# usage: check_bounds.sh [PYTEST-ARGUMENT]...
# What `make bounds` runs: the tests of the doors with the oldest and with the newest release of each
# dependency that pyproject.toml allows (NumPy, click, rich; TensorFlow and Keras), each in an
# environment of its own. PYTHON must be one that both ends exist for: 3.10 to 3.12 today. BOUNDS=newest
# or BOUNDS=lowest leaves the other out.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
tests=(tests/test_package.py tests/test_out.py tests/test_errors.py tests/test_cli.py
  tests/test_tensorflow_ops.py tests/test_keras_layers.py tests/test_keras_pooling.py
  tests/test_keras_accelerate.py tests/test_mnist.py)

"$python" - <<'EOF' || exit 1
import sys
if not (3, 10) <= sys.version_info[:2] <= (3, 12):
    sys.exit("Python 3.10 to 3.12 is needed: PYTHON=python3.12 make bounds. "
             f"Received: {sys.version.split()[0]}")
EOF

# Python compiles the modules that are imported, and keeps them: pip need not compile all.
unset PYTHONDONTWRITEBYTECODE

mkdir -p build/bounds
echo "building the wheel"
rm -rf build/bounds/wheel
"$python" -m venv --clear build/bounds/build
build/bounds/build/bin/pip wheel --quiet --no-deps --wheel-dir build/bounds/wheel .

for bound in ${BOUNDS:-lowest newest}; do
  venv=build/bounds/$bound
  "$python" -m venv --clear "$venv"
  requirements=$("$venv/bin/python" tools/extra.py tensorflow)
  if [ "$bound" = lowest ]; then # name>=1.2,<2 becomes name==1.2
    requirements=$(echo "$requirements" | sed -E 's/>=([0-9.]+).*/==\1/')
  fi
  tools=$("$venv/bin/python" tools/extra.py test --only | grep -v '^fastconv')
  printf '%s\n' "$requirements" "$tools" matplotlib | xargs -d '\n' "$venv/bin/pip" install --quiet --no-compile
  "$venv/bin/pip" install --quiet --no-deps build/bounds/wheel/*.whl
  echo "== $bound: $("$venv/bin/pip" list --format=freeze 2>/dev/null |
    grep -iE '^(numpy|click|rich|tensorflow|keras)==' | tr '\n' ' ')"
  "$venv/bin/python" -m pytest -q -n 2 --dist loadfile -p no:cacheprovider "${tests[@]}" "$@"
done
