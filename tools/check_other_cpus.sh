#!/usr/bin/env bash
# The library on processors that this machine is not, in QEMU's user mode: `make other-cpus`.
#
#   tools/check_other_cpus.sh [--only CPU[,CPU...]] [--brief] [ARGUMENTS...]
#
# CPU is aarch64 (Arm, 64 bits; cross-compiled), nehalem (x86-64 without AVX: the scalar kernels) or
# haswell (x86-64 with AVX2 and without AVX-512). Each runs the stress test of csrc/tests/stress.cpp,
# to which the arguments go, such as --problems 2000 or --seed 7. nehalem and haswell then see that a
# FASTCONV_ISA that such a processor lacks, or that nobody knows, is an error, and run tests of the
# Python package of $PYTHON (default: .venv's), which --brief leaves out, as it does the run of four
# callers.
#
# On Debian and Ubuntu: apt install qemu-user g++-aarch64-linux-gnu
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

cpus=aarch64,nehalem,haswell
python=${PYTHON:-.venv/bin/python}
brief=
while [ $# -gt 0 ]; do
  case $1 in
    --only) cpus=$2; shift 2 ;;
    --brief) brief=yes; shift ;;
    *) break ;;
  esac
done

fail() {
  printf 'error: %s\n' "$@" >&2
  exit 1
}

need() {
  command -v "$1" >/dev/null || fail "$1 was not found. On Debian and Ubuntu: apt install $2"
}

mkdir -p build/other-cpus

build_aarch64() {
  local folder=build/other-cpus/aarch64
  echo "== $folder: building"
  { cmake -S . -B "$folder" -DCMAKE_BUILD_TYPE=Release -DFASTCONV_STRESS=ON \
    -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
    -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ &&
    cmake --build "$folder" --parallel "${CMAKE_BUILD_PARALLEL_LEVEL:-$(nproc)}"; } \
    >"$folder.log" 2>&1 || { tail -40 "$folder.log"; exit 1; }
}

# With the library that Python uses.
build_x86() {
  local program=build/other-cpus/stress package
  [ -x "$program" ] && [ "$program" -nt csrc/tests/stress.cpp ] && return
  echo "== $program: building"
  package=$("$python" -c 'import fastconv, os; print(os.path.dirname(fastconv.__file__))')
  "${CXX:-c++}" -std=c++20 -O1 -Icsrc csrc/tests/stress.cpp -L"$package" -lfastconv \
    -Wl,-rpath,"$package" -pthread -o "$program"
}

# QEMU says of each feature of the CPU that it cannot emulate; none of them is ours.
emulate() {
  "${qemu[@]}" "$@" 2> >(grep -v "TCG doesn't support requested feature" >&2)
}

stress() {
  local program=$1
  shift
  echo "== ${qemu[*]} $program $*"
  emulate "$program" "$@"
}

stress_all() { # PROGRAM ISAS ARGUMENTS...
  local program=$1 isas=$2 output
  shift 2
  stress "$program" --prove
  output=$(stress "$program" "$@")
  echo "$output"
  grep -q "stress: on $isas\$" <<<"$output" || fail "the instruction sets must be: $isas"
  # A masked load of AVX2 reads all of its lanes in QEMU, 7.2 at least, and would meet the pages.
  [[ $* == *--no-guards* ]] || stress "$program" --guard-pages "$@"
  stress "$program" --fail-allocations "$@"
  # Threads that wait by spinning make little headway in an emulator.
  [ -n "$brief" ] || stress "$program" --callers 4 "$@"
}

# refuses ISA ISAS COMMAND...: whether the command, under FASTCONV_ISA=ISA, says that ISAS are there.
refuses() {
  local isa=$1 isas=$2 output
  shift 2
  if output=$(FASTCONV_ISA=$isa emulate "$@" 2>&1); then fail "FASTCONV_ISA=$isa was taken"; fi
  grep -q "FASTCONV_ISA must name an instruction set that this CPU and this build have: $isas. \
Received: FASTCONV_ISA=$isa" <<<"$output" || fail "FASTCONV_ISA=$isa:" "$output"
  echo "== FASTCONV_ISA=$isa is refused: there are $isas"
}

x86() { # ISAS ISAS-IT-LACKS STRESS-ARGUMENTS...
  local isas=$1 lacking=$2 isa
  shift 2
  need qemu-x86_64 qemu-user
  build_x86
  stress_all build/other-cpus/stress "$isas" "$@"
  for isa in $lacking sse9; do
    refuses "$isa" "$isas" build/other-cpus/stress --problems 1
    refuses "$isa" "$isas" "$python" -c 'import fastconv; fastconv.info()'
  done
  [ -z "$brief" ] || return 0
  # Without TensorFlow, which needs AVX, and without tests that start processes: those would run on
  # the machine's own processor.
  echo "== ${qemu[*]} $python -m pytest"
  emulate "$python" -m pytest -q -p no:cacheprovider tests/test_out.py tests/test_selection.py \
    tests/test_winograd.py -k "not clock and not environment"
}

for cpu in ${cpus//,/ }; do
  case $cpu in
    aarch64)
      need aarch64-linux-gnu-g++ g++-aarch64-linux-gnu
      need qemu-aarch64 qemu-user
      build_aarch64
      qemu=(qemu-aarch64 -L /usr/aarch64-linux-gnu)
      stress_all build/other-cpus/aarch64/stress scalar "$@"
      refuses avx2 scalar build/other-cpus/aarch64/stress --problems 1
      ;;
    nehalem)
      qemu=(qemu-x86_64 -cpu Nehalem)
      x86 scalar "avx512 avx2" "$@"
      ;;
    haswell)
      qemu=(qemu-x86_64 -cpu Haswell)
      x86 "avx2, scalar" avx512 --no-guards "$@"
      ;;
    *) sed -n '2,12s/^# \{0,1\}//p' "$0" >&2; exit 2 ;;
  esac
done
