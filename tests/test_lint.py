"""What `make lint` asks of Python's types, and the versions that it and the pre-commit hooks use."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_pre_commit_has_the_versions_of_make_lint():
    pinned = re.findall(r'"([\w-]+==[\w.]+)"', (ROOT / ".pre-commit-config.yaml").read_text())
    assert len(pinned) == 3
    project = (ROOT / "pyproject.toml").read_text()
    for requirement in pinned:
        assert f'"{requirement}"' in project


def run_checker(*arguments):
    result = subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_types_are_strict(tmp_path):
    run_checker("mypy", "--cache-dir", str(tmp_path))


def test_stubs_are_those_of_the_compiled_module():
    """What the .pyi files say is there, and nothing else; signatures: see test_package.py."""
    options = ("--mypy-config-file", "pyproject.toml", "--allowlist", "tools/stubtest.txt")
    run_checker("mypy.stubtest", *options, "fastconv._core")
