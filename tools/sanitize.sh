#!/usr/bin/env bash
# The stress test of the library under the sanitizers: `make sanitize`. Arguments go to the stress
# test, such as --problems 2000 or --seed 7.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# run NAME SANITIZERS ARGUMENTS...: builds with -fsanitize=SANITIZERS, if there are any, and runs the
# stress test.
run() {
  local name=$1 sanitizers=$2
  shift 2
  echo "== $name: building"
  cmake -S . -B "build/sanitize-$name" -DCMAKE_BUILD_TYPE=RelWithDebInfo \
    -DFASTCONV_STRESS=ON -DFASTCONV_SANITIZE="$sanitizers" >"build/sanitize-$name.log"
  cmake --build "build/sanitize-$name" --parallel "$(nproc)" >>"build/sanitize-$name.log" 2>&1 ||
    { tail -40 "build/sanitize-$name.log"; exit 1; }
  echo "== $name: running"
  "build/sanitize-$name/stress" "$@"
}

mkdir -p build
run address address,undefined "$@"
run thread thread --callers 4 "$@"
# The sanitizers bring allocators of their own, which refuse nothing.
run refused-allocations "" --fail-allocations "$@"
