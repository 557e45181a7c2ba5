#!/usr/bin/env bash
# fastconv in a Python without a global lock: `make free-threaded PYTHON=python3.13t`.
#
#   tools/check_free_threaded.sh PYTHON [ARGUMENTS...]
#
# Builds and installs a wheel for PYTHON (CPython 3.13 or newer, built with --disable-gil) in an
# environment of its own, build/free-threaded, and runs tests/free_threaded.py, to which the arguments
# go, with PYTHON_GIL=0; then the tests of threads, functions, errors and arrays, if pytest and
# hypothesis can be had for it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

[ $# -gt 0 ] || { sed -n '2,10s/^# \{0,1\}//p' "$0" >&2; exit 2; }
python=$1
shift
venv=build/free-threaded/venv

"$python" -c 'import sysconfig, sys; sys.exit(not sysconfig.get_config_var("Py_GIL_DISABLED"))' || {
  echo "error: $python has a global lock. Name a Python built without one:" >&2
  echo "       make free-threaded PYTHON=python3.14t" >&2
  exit 1
}
tools/check_machine.sh "$python"
export PYTHON_GIL=0

"$python" -m venv --clear "$venv"
echo "== building for $("$python" --version), free-threaded"
"$venv/bin/python" -m pip wheel --quiet --no-deps --wheel-dir build/free-threaded/wheels .
"$venv/bin/python" -m pip install --quiet --only-binary :all: build/free-threaded/wheels/*.whl
cd tests
"../$venv/bin/python" free_threaded.py "$@"

echo "== tests"
tools=(pytest hypothesis)
if ! "../$venv/bin/python" -m pip install --quiet --only-binary :all: "${tools[@]}" 2>/dev/null; then
  echo "skipped: ${tools[*]} cannot be installed for this Python"
  exit 0
fi
"../$venv/bin/python" -m pytest -q -p no:cacheprovider test_threads.py test_conv2d.py \
  test_max_pool2d.py test_avg_pool2d.py test_arrays.py test_determinism.py \
  -k "not tensorflow and not keras and not gil_is_released"
"../$venv/bin/python" -c '
import sys, fastconv
fastconv.info()
assert not sys._is_gil_enabled()
print("the global lock stayed off")'
