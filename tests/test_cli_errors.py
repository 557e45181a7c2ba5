"""Every wrong argument of every command: the exit status and the message, never a traceback."""

import os
import subprocess
import sys

import click
import pytest
from click.testing import CliRunner

from fastconv import _core
from fastconv.cli import main

USAGE, FAILURE = 2, 1

# (command, option or argument): what to give it, the exit status, a part of the message. {file} is a
# file of random bytes, {directory} an empty directory, {missing} is not there.
TABLE = {
    ("", "nonsense"): [(["nonsense"], USAGE, "No such command 'nonsense'")],
    ("", "--version"): [(["--version=1"], USAGE, "does not take a value")],
    ("", "--help"): [(["--help=1"], USAGE, "does not take a value")],
    ("info", "--json"): [(["--json=1"], USAGE, "does not take a value")],
    ("info", "surplus"): [
        (["surplus"], USAGE, "unexpected extra argument (surplus)"),
        (["--nonsense"], USAGE, "--nonsense"),
    ],
    ("mnist", "--epochs"): [
        (["--epochs", "0"], USAGE, "0 is not in the range x>=1"),
        (["--epochs", "many"], USAGE, "'many' is not a valid integer range"),
        (["--epochs"], USAGE, "requires an argument"),
    ],
    ("mnist", "--batch-size"): [
        (["--batch-size", "0"], USAGE, "0 is not in the range x>=1"),
        (["--batch-size", "1.5"], USAGE, "is not a valid integer range"),
    ],
    ("mnist", "--layers"): [(["--layers", "faster"], USAGE, "'faster' is not one of 'stock'")],
    ("mnist", "--data"): [
        (["--data", "{missing}"], USAGE, "Received: "),
        (["--data", "{file}"], USAGE, "Received: "),
        (["--data", "{directory}"], USAGE, "Received: "),
    ],
    ("mnist", "--seed"): [
        (["--seed", "-1"], USAGE, "-1 is not in the range 0<=x<=4294967295"),
        (["--seed", "4294967296"], USAGE, "is not in the range"),
    ],
    ("mnist", "--limit"): [(["--limit", "0"], USAGE, "0 is not in the range x>=1")],
    ("mnist", "--plot"): [(["--plot", "{file}"], USAGE, "is a file")],
    ("mnist", "surplus"): [(["surplus"], USAGE, "unexpected extra argument (surplus)")],
    ("roofline", "--suite"): [(["--suite", "nonsense"], USAGE, "nonsense")],
    ("roofline", "--gpu"): [(["--gpu", "abacus"], USAGE, "'abacus' is not one of")],
    ("roofline", "--dtype"): [(["--dtype", "int8"], USAGE, "'int8' is not one of")],
    ("roofline", "--dir"): [(["--dir", "sideways"], USAGE, "Received: 'sideways'")],
    ("roofline", "--batch"): [(["--batch", "0"], USAGE, "0 is not in the range x>=1")],
    ("bench", "problems"): [
        (["nonsense"], USAGE, "nonsense"),
        (["mb1ic0ih5oc5kh3"], USAGE, "ic0"),
        (["mb1ic8ih5oc5kh9"], USAGE, "kh9"),
        (["mb2147483648ic1ih5oc5kh3"], USAGE, "mb must be below 2**31"),
        ([f"mb{'9' * 5000}ic1ih5oc5kh3"], USAGE, "mb must be below 2**31"),
        (["g3ic8ih5oc5kh3"], USAGE, "g3"),
    ],
    ("bench", "--suite"): [
        (["--suite", "nonsense"], USAGE, "nonsense"),
        (["--suite", "random:1:0"], USAGE, "no problem in what was asked for"),
        (["--suite", "pooling", "--dir", "wgrad"], USAGE, "no problem of direction wgrad"),
    ],
    ("bench", "--file"): [
        (["--file", "{missing}"], USAGE, "does not exist"),
        (["--file", "{directory}"], USAGE, "is a directory"),
        (["--file", "{file}"], USAGE, "cannot be read"),
    ],
    ("bench", "--dir"): [(["--dir", "sideways"], USAGE, "sideways")],
    ("bench", "--impl"): [
        (["--impl", "no_such_module"], FAILURE, "no_such_module"),
        (["--impl", ""], USAGE, "must list names of modules"),
        (["--impl", "fastconv,"], USAGE, "must list names of modules"),
        (["--impl", ".x"], USAGE, "must list names of modules"),
    ],
    ("bench", "--batch"): [(["--batch", "0"], USAGE, "0 is not in the range")],
    ("bench", "--threads"): [
        (["--threads", "0"], USAGE, "0 is not in the range 1<=x<=1024"),
        (["--threads", "1025"], USAGE, "1025 is not in the range"),
    ],
    ("bench", "--layout"): [(["--layout", "chwn"], USAGE, "'chwn' is not one of")],
    ("bench", "--dtype"): [(["--dtype", "float64"], USAGE, "'float64' is not")],
    ("bench", "--isa"): [(["--isa", "sse"], USAGE, "'sse' is not one of")],
    ("bench", "--algorithm"): [
        (["--algorithm", "fft", "mb1ic1ih5oc1kh3"], USAGE, "must be one of 'auto', "),
    ],
    ("bench", "--accuracy"): [(["--accuracy", "exact"], USAGE, "'exact' is not one of")],
    ("bench", "--filter"): [(["--filter", "folded"], USAGE, "'folded' is not one of")],
    ("bench", "--cache"): [(["--cache", "hot"], USAGE, "'hot' is not one of")],
    ("bench", "--rounds"): [(["--rounds", "0"], USAGE, "0 is not in the range x>=1")],
    ("bench", "--seconds"): [
        (["--seconds", "0"], USAGE, "is not in the range x>0"),
        (["--seconds", "soon"], USAGE, "'soon' is not a valid float range"),
        (["--seconds", "nan"], USAGE, "nan is not a finite number"),
        (["--seconds", "inf"], USAGE, "inf is not a finite number"),
    ],
    ("bench", "--seed"): [(["--seed", "-1"], USAGE, "-1 is not in the range x>=0")],
    ("bench", "--json"): [
        (["--json", "{directory}"], USAGE, "is a directory"),
        (["--json", "{missing}/run.json"], FAILURE, "cannot be written"),
    ],
    ("bench", "--csv"): [
        (["--csv", "{directory}"], USAGE, "is a directory"),
        (["--csv", "{missing}/run.csv"], FAILURE, "cannot be written"),
    ],
    ("bench", "--compare"): [
        (["--compare", "{missing}", "{missing}"], USAGE, "does not exist"),
        (["--compare", "{file}"], USAGE, "requires 2 arguments"),
        (["--compare", "{file}", "{file}"], FAILURE, "cannot be read"),
    ],
    ("bench", "--threshold"): [
        (["--threshold", "-0.1"], USAGE, "is not in the range x>=0"),
        (["--threshold", "nan"], USAGE, "nan is not a finite number"),
    ],
    ("bench", "--plot"): [(["--plot", "{file}"], USAGE, "is a file")],
    ("bench", "--from"): [
        (["--from", "{missing}"], USAGE, "does not exist"),
        (["--from", "{file}"], FAILURE, "cannot be read"),
    ],
    ("bench", "--report"): [
        (["--report", "{directory}"], USAGE, "is a directory"),
        (["--report", "{file}/page.md"], FAILURE, "cannot be written"),
    ],
    ("bench", "--brief"): [(["--brief=1"], USAGE, "does not take a value")],
}
ROWS = [(command, option, *row) for (command, option), rows in TABLE.items() for row in rows]


def test_the_table_has_every_command_and_option():
    found = {("", "--version"), ("", "--help")}
    for name, command in main.commands.items():
        for parameter in command.params:
            option = isinstance(parameter, click.Option)
            found.add((name, parameter.opts[-1] if option else parameter.name))
    surplus = {("", "nonsense"), ("info", "surplus"), ("mnist", "surplus")}
    assert found == set(TABLE) - surplus


@pytest.mark.parametrize(
    ("command", "option", "arguments", "status", "message"),
    ROWS,
    ids=[f"{row[0]} {' '.join(row[2])}".strip() for row in ROWS],
)
def test_wrong_argument(command, option, arguments, status, message, tmp_path, monkeypatch):
    if command == "mnist":
        pytest.importorskip("tensorflow")
    monkeypatch.setenv("COLUMNS", "500")
    (tmp_path / "file").write_bytes(bytes(range(255, 0, -1)) * 9)
    (tmp_path / "directory").mkdir()
    places = {name: tmp_path / name for name in ("file", "directory", "missing")}
    words = [word.format(**places) for word in arguments]
    result = CliRunner().invoke(main, [command] * bool(command) + words, prog_name="fastconv")
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == status, result.output
    assert "Error: " in result.output
    assert message in result.output
    assert "Traceback" not in result.output


ENVIRONMENT = [
    ("FASTCONV_ISA", "sse9", "must name an instruction set that this CPU and this build have"),
    ("FASTCONV_NUM_THREADS", "many", "must be an integer from 1 to 1024"),
    ("FASTCONV_ACCURACY", "exact", "must be one of 'strict', 'default', 'fast'"),
    ("FASTCONV_ALGORITHM", "fft", "must be one of 'auto', "),
]
LACKING = sorted({"avx512", "avx2"} - set(_core.available_isas()))
ENVIRONMENT += [("FASTCONV_ISA", isa, ENVIRONMENT[0][2]) for isa in LACKING]


@pytest.mark.parametrize("arguments", [["info"], ["bench", "mb1ic1ih5oc1kh3"]], ids=" ".join)
@pytest.mark.parametrize(("name", "value", "rule"), ENVIRONMENT)
def test_wrong_environment(name, value, rule, arguments):
    result = subprocess.run(
        [sys.executable, "-m", "fastconv", *arguments],
        env={**os.environ, name: value},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.returncode == FAILURE
    assert result.stdout == ""
    assert result.stderr.startswith(f"Error: {name} {rule}")
    assert f"Received: {name}=" in result.stderr
    assert value in result.stderr
