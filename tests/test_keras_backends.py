"""keras_backend_checks.py, in a process for each of Keras's backends but TensorFlow."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.parametrize(
    ("backend", "outcome"),
    [
        ("jax", "10 passed, 1 skipped"),
        # A download of hundreds of MB, without which the tests must do.
        pytest.param(
            "torch",
            "9 passed, 2 skipped",
            marks=pytest.mark.skipif(
                importlib.util.find_spec("torch") is None, reason="PyTorch is not installed"
            ),
        ),
    ],
)
def test_layers_on(backend, outcome):
    run = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"),
            # Not our pytest settings, nor conftest.py, which asks for TensorFlow's ops.
            *("-c", os.devnull, "--rootdir", str(HERE), "--noconftest"),
            str(HERE / "keras_backend_checks.py"),
        ],
        # Compiling is what takes JAX the time.
        env={**os.environ, "KERAS_BACKEND": backend, "JAX_DISABLE_MOST_OPTIMIZATIONS": "true"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
    assert outcome in run.stdout, run.stdout[-2000:]
