"""Keras's own tests of convolution and pooling, which its wheel carries, on our layers."""

import ast
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import keras
import pytest

HERE = Path(__file__).parent
LAYERS = Path(keras.__file__).parent / "src" / "layers"

SUITES = {  # file: the ops that its tests must run
    "convolutional/conv_test.py": ["FastconvConv2D", "FastconvConv2DGradFilter"],
    "convolutional/conv_transpose_test.py": ["FastconvConv2DTranspose"],
    "convolutional/depthwise_conv_test.py": ["FastconvConv2D"],
    "convolutional/separable_conv_test.py": ["FastconvConv2D", "FastconvConv2DGradFilter"],
    "pooling/max_pooling_test.py": ["FastconvMaxPool2D"],
    "pooling/average_pooling_test.py": ["FastconvAveragePool2D"],
    "pooling/global_average_pooling_test.py": ["FastconvAveragePool2D"],
    "pooling/global_max_pooling_test.py": ["FastconvMaxPool2D"],
}


BACKENDS = [
    "tensorflow",
    # Minutes, in which JAX compiles hundreds of programs.
    pytest.param("jax", marks=pytest.mark.sweep),
    # A download of hundreds of MB, without which the tests must do.
    pytest.param(
        "torch",
        marks=pytest.mark.skipif(
            importlib.util.find_spec("torch") is None, reason="PyTorch is not installed"
        ),
    ),
]


@pytest.mark.parametrize("backend", BACKENDS)
def test_keras_own_suites(backend):
    paths = [LAYERS / suite for suite in SUITES]
    for path in paths:
        assert path.is_file(), f"Keras {keras.__version__} has no {path}: find its tests elsewhere"
    search_path = [str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]
    run = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-rs"),
            *("-p", "keras_suite_plugin", "-p", "no:cacheprovider"),
            # Not our pytest settings, and no conftest.py between Keras and the root.
            *("-c", os.devnull, "--rootdir", str(LAYERS), *map(str, paths)),
        ],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(search_path),
            "KERAS_BACKEND": backend,
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "true",  # compiling is what takes JAX the time
        },
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
    skipped = [line for line in run.stdout.splitlines() if line.startswith("SKIPPED")]
    # Those say of their arguments that Keras's backends disagree on them.
    expected = (
        "conv_transpose_test.py",
        "Same padding in Torch backend produces different results",
    )
    unexpected = [line for line in skipped if not any(part in line for part in expected)]
    assert not unexpected, unexpected
    for suite, ops in SUITES.items():
        found = re.search(rf"^kernels run in {Path(suite).name}: (.*)$", run.stdout, re.MULTILINE)
        counts = ast.literal_eval(found.group(1))
        assert all(counts[op] > 0 for op in ops), (suite, counts)
