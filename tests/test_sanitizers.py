"""The library's stress test in C++ (csrc/tests/stress.cpp): a part of ``make sanitize``.

Between guard pages and with refused allocations it runs on the installed library, every instruction
set of the machine included. Under the sanitizers it runs on the portable kernels, whose templates
are those of the others.
"""

import os
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

import fastconv

ROOT = Path(__file__).parents[1]
COMPILER = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")


def run(*command, **options):
    result = subprocess.run(
        list(map(str, command)),
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
        cwd=ROOT,
        **options,
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-6000:]
    return result.stdout


def assert_ran(output, problems, least_calls):
    [(found, calls)] = re.findall(r"stress: (\d+) problems, (\d+) calls, .*none wrong", output)
    assert (int(found), int(calls) > least_calls) == (problems, True), output


@pytest.fixture(scope="module")
def stress(tmp_path_factory):
    """The stress test on the library that Python uses."""
    program = tmp_path_factory.mktemp("stress") / "stress"
    package = Path(fastconv.__file__).parent
    sources = ["-I", ROOT / "csrc", ROOT / "csrc/tests/stress.cpp"]
    library = ["-L", package, "-lfastconv", f"-Wl,-rpath,{package}", "-pthread"]
    run(COMPILER, "-std=c++20", "-O1", *sources, *library, "-o", program)
    return program


def test_guard_pages_and_poison_find_faults(stress):
    assert "21 faults of our making, all found" in run(stress, "--prove")


def test_nothing_is_touched_beside_any_buffer(stress):
    assert_ran(run(stress, "--guard-pages", "--problems", 300), 300, 5000)


def test_callers_at_once_between_guard_pages(stress):
    assert_ran(run(stress, "--guard-pages", "--problems", 120, "--callers", 4), 120, 1000)


@pytest.mark.parametrize("pages", [[], ["--guard-pages"]], ids=["kept", "fresh"])
def test_refused_allocations_are_survived(stress, pages):
    output = run(stress, "--fail-allocations", *pages, "--problems", 80)
    assert_ran(output, 80, 800)
    [refused] = re.findall(r"(\d+) refused allocations", output)
    assert int(refused) > (1000 if pages else 100)


def has_sanitizer(name, folder):
    """Whether the compiler brings it, and its programs start on this machine."""
    source = folder / "empty.cpp"
    source.write_text("int main() { return 0; }\n")
    program = folder / name
    command = [COMPILER, f"-fsanitize={name}", str(source), "-o", str(program)]
    if subprocess.run(command, capture_output=True, check=False).returncode != 0:
        return False
    steady = f"setarch {os.uname().machine} -R {program} || {program}"
    return subprocess.run(["sh", "-c", steady], capture_output=True, check=False).returncode == 0


@pytest.mark.parametrize("build", ["address", "thread"])
def test_under_the_sanitizers(build, tmp_path):
    if not has_sanitizer(build, tmp_path):
        pytest.skip(f"this compiler or machine has no sanitizer for {build}")
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])  # pip's cmake
    arguments = ["--only", build, "--quick", "--problems", 150]
    output = run("tools/sanitize.sh", *arguments, env={**os.environ, "PATH": path})
    assert "faults of our making, all found" in output
    assert_ran(output, 150, 800)
