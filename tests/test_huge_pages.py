"""Large results of TensorFlow's operations ask for huge pages, which Linux gives for the asking."""

from pathlib import Path

import numpy as np
import pytest

tf = pytest.importorskip("tensorflow")
adapter = pytest.importorskip("fastconv.adapters.tensorflow")

pytestmark = pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage/enabled").exists()
    or not Path("/proc/self/smaps").exists(),
    reason="the system has no huge pages to give",
)


def flags_at(address):
    """Of the mapping that holds it: `hg` where huge pages have been asked for."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split()[0]
        if not first.endswith(":"):
            begin, end = (int(bound, 16) for bound in first.split("-"))
            inside = begin <= address < end
        elif inside and first == "VmFlags:":
            return line.split()[1:]
    raise AssertionError(f"no mapping holds {address:#x}")


def asks(tensor):
    values = np.frombuffer(memoryview(tensor), np.uint8)
    return "hg" in flags_at(values.ctypes.data + values.nbytes // 2)


def test_large_results():
    x = np.random.default_rng(0).standard_normal((8, 112, 112, 32), np.float32)
    w = np.ones((1, 1, 32, 32), np.float32)
    y = adapter.conv2d(tf.constant(x), tf.constant(w), padding="same")
    assert asks(y)
    normalised, _, _ = adapter.batch_norm(y, None, None, epsilon=1e-3)
    assert asks(normalised)
    np.testing.assert_allclose(np.mean(normalised, (0, 1, 2)), 0, atol=1e-5)
    # One that begins and ends within a huge page, and its neighbours' memory stays what it was.
    odd = adapter.conv2d(tf.constant(x[:3, :111]), tf.constant(w), padding="same")
    np.testing.assert_array_equal(
        odd, adapter.conv2d(tf.constant(x), tf.constant(w), padding="same")[:3, :111]
    )
