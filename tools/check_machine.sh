#!/bin/sh
# usage: check_machine.sh PYTHON
# Says what is missing to build fastconv with this Python, and how to get it; silent if nothing is.
python=$1

fail() {
    printf 'error: %s\n' "$1" >&2
    shift
    printf '       %s\n' "$@" >&2
    exit 1
}

command -v "$python" >/dev/null ||
    fail "$python was not found." \
        "Install Python 3.10 or newer, or name one: make PYTHON=..."

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
    fail "Python 3.10 or newer is needed. Received: $("$python" --version 2>&1)" \
        "Install one, or name another: make PYTHON=python3.12"

"$python" -c 'import ensurepip, venv' 2>/dev/null ||
    fail "$python lacks the venv module." \
        "On Debian and Ubuntu: apt install python3-venv"

"$python" - <<'EOF' ||
import pathlib, sys, sysconfig
sys.exit(not pathlib.Path(sysconfig.get_path("include"), "Python.h").exists())
EOF
    fail "$python lacks its C headers (Python.h)." \
        "On Debian and Ubuntu: apt install python3-dev" \
        "On Fedora: dnf install python3-devel"

# The names that CMake tries, unless CXX is set.
for compiler in ${CXX:-c++ g++ clang++}; do
    if echo 'int main() {}' | "$compiler" -std=c++20 -fsyntax-only -x c++ - 2>/dev/null; then
        exit 0
    fi
done
fail "no compiler for C++20 was found (GCC 10 or Clang 12 at least)." \
    "On Debian and Ubuntu: apt install g++" \
    "On Fedora: dnf install gcc-c++" \
    "Or name one: CXX=... make"
