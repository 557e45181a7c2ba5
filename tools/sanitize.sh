#!/usr/bin/env bash
# The stress test of the library (csrc/tests/stress.cpp) under the sanitizers and between guard
# pages: `make sanitize`. Arguments go to the stress test, such as --problems 2000 or --seed 7.
#
#   tools/sanitize.sh [--only BUILD[,BUILD...]] [--quick] [ARGUMENTS...]
#
# BUILD is address (ASan and UBSan), thread (TSan) or guard (no sanitizer: guard pages, refused
# allocations). --quick leaves out the vector instruction sets, and of UBSan's checks those of
# alignment and of pointers' arithmetic: most of the compiler's work. It has address unoptimised, which
# halves what is left; a test of few problems is slower by less.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

builds=address,thread,guard
scalar=OFF
unchecked=
address_level=1
while [ $# -gt 0 ]; do
  case $1 in
    --only) builds=$2; shift 2 ;;
    --quick) scalar=ON; unchecked=alignment,pointer-overflow; address_level=0; shift ;;
    *) break ;;
  esac
done

# build NAME SANITIZERS [LEVEL]: build/sanitize-NAME/stress with -fsanitize=SANITIZERS, if there are any,
# and then -OLEVEL.
build() {
  local folder=build/sanitize-$1
  echo "== $1: building"
  mkdir -p build
  { cmake -S . -B "$folder" -DCMAKE_BUILD_TYPE=RelWithDebInfo -DFASTCONV_STRESS=ON \
    -DFASTCONV_SANITIZE="$2" -DFASTCONV_SANITIZE_LEVEL="${3:-1}" \
    -DFASTCONV_NO_SANITIZE="$unchecked" -DFASTCONV_SCALAR_ONLY="$scalar" &&
    cmake --build "$folder" --parallel "${CMAKE_BUILD_PARALLEL_LEVEL:-$(nproc)}"; } \
    >"$folder.log" 2>&1 || { tail -40 "$folder.log"; exit 1; }
}

# run NAME ARGUMENTS...
run() {
  local stress=build/sanitize-$1/stress
  shift
  echo "== $stress $*"
  "${steady[@]}" "$stress" "$@"
}

# TSan needs its addresses where it expects them, which newer kernels randomise too far.
steady=()
if setarch "$(uname -m)" -R true 2>/dev/null; then steady=(setarch "$(uname -m)" -R); fi

suffix=
[ $scalar = ON ] && suffix=-quick
for name in ${builds//,/ }; do
  here=$name$suffix
  case $name in
    address)
      build "$here" address,undefined $address_level
      run "$here" --prove
      run "$here" "$@"
      ;;
    thread)
      build "$here" thread
      run "$here" --prove
      run "$here" --callers 4 "$@"
      ;;
    guard)
      build "$here" ""
      run "$here" --prove
      run "$here" --guard-pages "$@"
      # The sanitizers bring allocators of their own, which refuse nothing.
      run "$here" --fail-allocations "$@"
      run "$here" --fail-allocations --guard-pages "$@"
      ;;
    *) sed -n '2,10s/^# \{0,1\}//p' "$0" >&2; exit 2 ;;
  esac
done
