#!/usr/bin/env bash
# usage: build_wheels.sh [PYTHON]...
# What `make wheels` runs: the source distribution, and from it a wheel for each PYTHON (default:
# every CPython 3.10 to 3.14 on the PATH or under pyenv), repaired to a manylinux tag and tried in a
# fresh environment in which there is nothing but Python. Everything ends up in dist/.
#
# Wheels to publish come from cibuildwheel (.github/workflows/wheels.yml): its image has an older
# glibc than most machines, so that they run on more of them.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

raw=build/raw-wheels
tools=$PWD/build/wheel-tools
versions="3.10 3.11 3.12 3.13 3.14"

find_pythons() { # of each version the first one
  local version candidate
  for version in $versions; do
    for candidate in "$(command -v "python$version" || true)" \
      "${PYENV_ROOT:-$HOME/.pyenv}/versions/$version".*/bin/python; do
      if [ -n "$candidate" ] && [ "$("$candidate" -c 'import sys, sysconfig
print(sys.implementation.name, sysconfig.get_config_var("Py_GIL_DISABLED") or 0,
      "%d.%d" % sys.version_info[:2])' 2>/dev/null)" = "cpython 0 $version" ]; then
        echo "$candidate"
        break
      fi
    done
  done
}

if [ $# -eq 0 ]; then
  mapfile -t pythons < <(find_pythons)
else
  pythons=("$@")
fi
[ ${#pythons[@]} -gt 0 ] || { echo "no CPython 3.10 to 3.14 was found" >&2; exit 1; }
echo "for: ${pythons[*]}"

rm -rf dist "$raw" "$tools"
mkdir -p dist "$raw"
"${PYTHON:-${pythons[-1]}}" -m venv "$tools"
"$tools/bin/python" tools/extra.py wheels --only | xargs -d '\n' "$tools/bin/pip" install --quiet
"$tools/bin/python" -m build --sdist --outdir dist . >build/sdist.log 2>&1 || {
  tail -20 build/sdist.log >&2
  exit 1
}
sdist=$(echo dist/*.tar.gz)

for python in "${pythons[@]}"; do
  echo "== $("$python" --version)"
  rm -f "$raw"/*.whl
  # Through the tools' own pip: that of an old Python knows no recent metadata.
  "$tools/bin/pip" --python "$python" wheel --quiet --no-deps --wheel-dir "$raw" "$sdist"
  PATH=$tools/bin:$PATH "$tools/bin/auditwheel" repair --wheel-dir dist "$raw"/*.whl \
    2>"$raw/auditwheel.log" || { cat "$raw/auditwheel.log" >&2; exit 1; }
  tag=$("$python" -c 'import sys; print("cp%d%d" % sys.version_info[:2])')
  tools/try_wheel.sh "$python" dist/*-"$tag"-*.whl
done
ls -l dist | awk 'NR > 1 { printf "%9.2f MB  %s\n", $5 / 1e6, $9 }'
