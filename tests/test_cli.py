"""The ``fastconv`` command: help, info, usage errors, and what happens without TensorFlow."""

import json
import os
import subprocess
import sys

import pytest
from click.testing import CliRunner

import fastconv
from fastconv.cli import main

# Makes Python believe that the tensorflow extra was not installed, then runs the command.
WITHOUT_TENSORFLOW = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("tensorflow", "keras"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocker())
from fastconv.cli import main
main(sys.argv[1:], prog_name="fastconv")
"""


def invoke(*arguments):
    return CliRunner().invoke(main, arguments, prog_name="fastconv")


def run_python(*arguments):
    """Runs a fresh interpreter: what was imported here does not count there."""
    environment = {**os.environ, "COLUMNS": "80"}
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        env=environment,
        timeout=60,
        check=False,
    )


def test_help_names_the_commands():
    result = invoke("--help")
    assert result.exit_code == 0
    for name in ("bench", "info", "mnist"):
        assert name in result.output


def test_module_does_what_the_command_does():
    result = run_python("-m", "fastconv", "--help")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("Usage: fastconv [OPTIONS] COMMAND")


def test_info_as_json_is_what_the_function_returns():
    result = invoke("info", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.output) == json.loads(json.dumps(fastconv.info()))


def test_info_names_every_fact():
    result = invoke("info")
    assert result.exit_code == 0, result.output
    for name in fastconv.info():
        assert name.replace("_", " ") in result.output
    assert str(fastconv.info()["version"]) in result.output


def test_info_fits_a_terminal():
    result = run_python("-m", "fastconv", "info")
    assert result.returncode == 0, result.stderr
    assert max(map(len, result.stdout.splitlines())) <= 80


@pytest.mark.parametrize(
    "arguments", [["--help"], ["bench", "--help"], ["info"], ["info", "--json"]]
)
def test_works_without_tensorflow(arguments):
    result = run_python("-c", WITHOUT_TENSORFLOW, *arguments)
    assert result.returncode == 0, result.stderr
    assert result.stdout
    assert result.stderr == ""


def test_mnist_without_tensorflow_says_what_to_install():
    result = run_python("-c", WITHOUT_TENSORFLOW, "mnist")
    assert result.returncode == 1
    assert "pip install 'fastconv[tensorflow]'" in result.stderr
    assert "Traceback" not in result.stderr
