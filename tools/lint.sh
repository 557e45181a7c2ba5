#!/usr/bin/env bash
# usage: lint.sh [format|check|tidy|types|all]...   (all)
# What `make lint` runs, with the tools of the environment at $LINT_VENV (the extra `lint`).
#   format  rewrite sources as clang-format and ruff would have them
#   check   ruff, clang-format, the workflows; quick
#   types   mypy --strict, and whether the stubs are those of the compiled module
#   tidy    clang-tidy over every C++ source; minutes
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bin=$PWD/${LINT_VENV:-.venv-lint}/bin
build=build/lint

cpp_files() { # those of git, new ones included
  git ls-files --cached --others --exclude-standard -- \
    '*.cpp' '*.hpp' '*.c' '*.h' '*.cu' '*.cuh' | while read -r file; do
    if [ -e "$file" ]; then echo "$file"; fi
  done
}

run_format() {
  cpp_files | xargs "$bin/clang-format" -i
  "$bin/ruff" check --quiet --fix .
  "$bin/ruff" format --quiet .
}

run_check() {
  "$bin/ruff" check .
  "$bin/ruff" format --check --quiet . || {
    echo "The files above are not as ruff formats them: make format" >&2
    return 1
  }
  cpp_files | xargs "$bin/clang-format" --dry-run -Werror
  "$bin/check-jsonschema" --builtin-schema vendor.github-workflows .github/workflows/*.yml
}

run_types() {
  "$bin/mypy"
  "$bin/pip" install --quiet --no-deps --force-reinstall .
  "$bin/stubtest" --mypy-config-file pyproject.toml --allowlist tools/stubtest.txt fastconv._core
}

run_tidy() {
  PATH=$bin:$PATH cmake -S . -B "$build" -G Ninja -DCMAKE_EXPORT_COMPILE_COMMANDS=ON \
    -DPython_EXECUTABLE="$bin/python" -DPYBIND11_FINDPYTHON=ON \
    -Dpybind11_DIR="$("$bin/python" -m pybind11 --cmakedir)" >/dev/null
  "$bin/python" "$bin/run-clang-tidy.py" -clang-tidy-binary "$bin/clang-tidy" -p "$build" \
    -quiet -j "${LINT_JOBS:-$(nproc)}" "$PWD/csrc/(core|cpu|bindings)/.*" >"$build/tidy.txt" 2>&1 || {
    grep -E '(warning|error): ' "$build/tidy.txt" | sort -u >&2
    echo "The whole report: $build/tidy.txt" >&2
    return 1
  }
}

[ $# -gt 0 ] || set -- all
for step; do
  case $step in
    format | check | types | tidy) "run_$step" ;;
    all) # not joined by &&, under which `set -e` does not hold
      run_check
      run_types
      run_tidy
      echo "lint: nothing found"
      ;;
    *) sed -n '2,7s/^# \{0,1\}//p' "$0" >&2; exit 2 ;;
  esac
done
