"""The tests of the CUDA kernels once more, in a process with the ``asan`` build of the emulator.

What is about values alone is left out: it takes minutes, and touches no memory that the others do not.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import cuda_builds
import cuda_support

HERE = Path(__file__).parent


@cuda_support.EMULATOR_ONLY
@pytest.mark.skipif(cuda_support.ASAN_PROCESS in os.environ, reason="this is that process")
def test_kernels_under_asan():
    cuda_support.library("asan")  # compiled out here: there the compiler would run under ASan too
    files = [HERE / "test_cuda_kernels.py", HERE / "test_cuda.py"]
    run = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"),
            *("-k", "not rounding and not same_bits and not awkward_values"),
            *map(str, files),
        ],
        env=os.environ | cuda_builds.asan_environment() | {cuda_support.ASAN_PROCESS: "1"},
        cwd=HERE.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-6000:]
