"""A slice of what ``make fuzz`` runs, the same problems each time."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import fuzz


def test_random_problems():
    run = subprocess.run(
        [sys.executable, Path(fuzz.__file__).name, "--problems", "500", "--seed", "14"],
        cwd=Path(fuzz.__file__).parent,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    output = run.stdout + run.stderr
    assert run.returncode == 0, output
    assert re.search(r"500 problems, [\d,]+ calls, 0 wrong", output), output


def test_a_refusal_is_a_finding():
    class Refusing:
        def conv2d(self, *arrays, **options):
            raise ValueError("`algorithm` must be another.")

    case = fuzz.parse("conv mb1ic2ih3iw3oc2kh1kw1dh1dw1 --pad=same --dir=fprop")
    with pytest.raises(fuzz.Wrong, match="ValueError: `algorithm` must be another"):
        fuzz.Runner(kernels=Refusing()).run(case)
