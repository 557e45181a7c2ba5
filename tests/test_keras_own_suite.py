"""Keras's own tests of convolution and max-pooling, which its wheel carries, on our layers."""

import ast
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
    "suite, ops",
    [
        ("convolutional/conv_test.py", ["FastconvConv2D", "FastconvConv2DGradFilter"]),
        ("pooling/max_pooling_test.py", ["FastconvMaxPool2D"]),
    ],
)
def test_keras_own_suite(suite, ops):
    path = LAYERS / suite
    assert path.is_file(), f"Keras {keras.__version__} carries no {suite}: find its tests elsewhere"
    search_path = [str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]
    run = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q"),
            *("-p", "keras_suite_plugin", "-p", "no:cacheprovider"),
            # Not our pytest settings, and no conftest.py between Keras and the root.
            *("-c", os.devnull, "--rootdir", str(path.parent), str(path)),
        ],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(search_path)},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
    assert re.search(r"^[1-9]\d* passed(, \d+ warnings?)? in ", run.stdout, re.MULTILINE), (
        "all tests must pass and none be skipped:\n" + run.stdout[-2000:]
    )
    counts = ast.literal_eval(re.search(r"^kernels run: (.*)$", run.stdout, re.MULTILINE).group(1))
    assert all(counts[op] > 0 for op in ops), counts
