"""Processors that this machine is not, in QEMU's user mode: a part of ``make other-cpus``."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TOOLS = {
    "aarch64": ["qemu-aarch64", "aarch64-linux-gnu-g++"],
    "nehalem": ["qemu-x86_64"],
    "haswell": ["qemu-x86_64"],
}
ISAS = {"aarch64": "scalar", "nehalem": "scalar", "haswell": "avx2, scalar"}
RUNS = {"aarch64": 3, "nehalem": 3, "haswell": 2}
REFUSED = {"aarch64": 1, "nehalem": 6, "haswell": 4}


@pytest.mark.parametrize("cpu", TOOLS)
def test_stress_and_settings(cpu):
    missing = [tool for tool in TOOLS[cpu] if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"the machine has no {' and no '.join(missing)}")
    if cpu != "aarch64" and os.uname().machine != "x86_64":
        pytest.skip("the library here is not for x86-64")
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])  # pip's cmake
    result = subprocess.run(
        ["tools/check_other_cpus.sh", "--only", cpu, "--brief", "--problems", "12"],
        cwd=ROOT,
        env={**os.environ, "PATH": path, "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-6000:]
    assert "faults of our making, all found" in result.stdout
    assert result.stdout.count(f"stress: on {ISAS[cpu]}\n") == RUNS[cpu]
    assert (
        len(re.findall(r"stress: 12 problems, \d+ calls, .*none wrong", result.stdout)) == RUNS[cpu]
    )
    assert len(re.findall(r"FASTCONV_ISA=\w+ is refused", result.stdout)) == REFUSED[cpu]
