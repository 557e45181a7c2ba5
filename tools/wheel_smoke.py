"""Tries an installed fastconv without anything else: what tools/try_wheel.sh and CI run on wheels.

Needs nothing but NumPy. Exits with status 1 where something is missing or wrong.
FASTCONV_SMOKE_BEGUN, if set, is when `pip install` began, in nanoseconds of the clock.
"""

import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time

begun = time.perf_counter()
import fastconv  # noqa: E402 - the clock comes first

imported = time.perf_counter()
import numpy as np  # noqa: E402


def convolve(x, w):
    """The sum that defines a valid convolution, in float64."""
    n, h, width, _ = x.shape
    rows, columns, _, k = w.shape
    y = np.zeros((n, h - rows + 1, width - columns + 1, k))
    for r in range(rows):
        for s in range(columns):
            y += x[:, r : r + y.shape[1], s : s + y.shape[2]].astype("float64") @ w[r, s]
    return y


rng = np.random.default_rng(0)
x = rng.standard_normal((2, 14, 13, 32)).astype("float32")
w = rng.standard_normal((3, 3, 32, 48)).astype("float32")
y = fastconv.conv2d(x, w)
computed = time.perf_counter()
first_result = time.time_ns()
right = convolve(x, w)
np.testing.assert_allclose(y, right, atol=1e-5 * np.abs(right).max())

pooled = fastconv.max_pool2d(y, 2)
np.testing.assert_array_equal(pooled, y[:, :12, :10].reshape(2, 6, 2, 5, 2, 48).max(axis=(2, 4)))
dw = fastconv.conv2d_grad_filter(x, y, w.shape)
assert dw.shape == w.shape
assert np.isfinite(dw).all()

assert importlib.metadata.version("fastconv") == fastconv.__version__
told = subprocess.run(
    [sys.executable, "-m", "fastconv", "info", "--json"], capture_output=True, check=True
)
info = json.loads(told.stdout)
assert info["version"] == fastconv.__version__
assert info["cuda"]["available"] is False

absent = [name for name in ("c++", "g++", "gcc", "clang++", "nvcc") if shutil.which(name) is None]
absent += [name for name in ("tensorflow", "keras") if importlib.util.find_spec(name) is None]
print(
    f"fastconv {fastconv.__version__} on Python {sys.version.split()[0]}, numpy {np.__version__}, "
    f"{info['isa']}: import {imported - begun:.2f} s, first conv2d after "
    f"{computed - begun:.2f} s, right; without {', '.join(absent)}"
)
if begun_to_install := os.environ.get("FASTCONV_SMOKE_BEGUN"):
    seconds = (first_result - int(begun_to_install)) / 1e9
    print(f"{seconds:.1f} s from the start of pip install to the first result")
