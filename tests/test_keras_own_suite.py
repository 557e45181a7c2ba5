"""Keras's own tests of Conv2D and MaxPooling2D, which its wheel carries, pass on our layers."""

import os
import re
import subprocess
import sys
from pathlib import Path

import keras
import pytest

HERE = Path(__file__).parent
LAYERS = Path(keras.__file__).parent / "src" / "layers"


@pytest.mark.parametrize(
    "suite, selection, op",
    [
        ("convolutional/conv_test.py", "conv2d", "FastconvConv2D"),
        ("pooling/max_pooling_test.py", "max_pooling2d", "FastconvMaxPool2D"),
    ],
)
def test_keras_own_suite(suite, selection, op):
    path = LAYERS / suite
    assert path.is_file(), f"Keras {keras.__version__} carries no {suite}: find its tests elsewhere"
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "keras_suite_plugin", "-p", "no:cacheprovider",
         "-c", os.devnull, "--rootdir", str(path.parent), str(path), "-k", selection],
        env={**os.environ, "PYTHONPATH": str(HERE) + os.pathsep + os.environ.get("PYTHONPATH", "")},
        capture_output=True,
        text=True,
        timeout=600,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
    assert int(re.search(r"(\d+) passed", run.stdout).group(1)) >= 5
    executed = re.search(rf"'{op}\w*': ([1-9]\d*)", run.stdout)
    assert executed, run.stdout[-2000:]
