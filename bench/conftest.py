"""One number of threads for both sides: FASTCONV_NUM_THREADS, else all this process may use."""

import pytest

import fastconv


def pytest_addoption(parser):
    parser.addoption(
        "--suites",
        default="mnist,pooling",
        help="suites of `fastconv bench` for test_suites_bench.py, with commas",
    )


@pytest.fixture(scope="session")
def tensorflow():
    tf = pytest.importorskip("tensorflow", reason="stock TensorFlow is what we compare with")
    tf.config.threading.set_intra_op_parallelism_threads(fastconv.get_num_threads())
    return tf


@pytest.fixture(params=["fastconv", "tensorflow"])
def library(request):
    """Who computes; for TensorFlow the module is loaded by then."""
    if request.param == "tensorflow":
        request.getfixturevalue("tensorflow")
    return request.param
