"""tools/gpu_benchmark.py, with a peer that computes in NumPy in cuDNN's place."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

import cuda_support
import fastconv.cuda as gpu_functions
import oracle
from fastconv.bench.problem import DIRECTIONS, parse

pytestmark = cuda_support.EMULATOR_ONLY


class Peer:
    def prepare(self, dtype):
        self.dtype = "float32" if dtype == "tf32" else dtype

    def array(self, host):
        return gpu_functions.array(host, self.dtype)

    def host(self, array):
        return cuda_support.to_host(array) if hasattr(array, "numpy") else array

    def convolution(self, problem, direction, x, w, dy):
        x, w, dy = (self.host(array) for array in (x, w, dy))
        geometry = {
            "strides": problem.strides,
            "padding": problem.sides,
            "dilation_rate": problem.dilations,
            "groups": problem.groups,
        }
        result = {
            "fprop": lambda: oracle.conv2d(x, w, **geometry),
            "dgrad": lambda: oracle.conv2d_grad_input(dy, w, x.shape, **geometry),
            "wgrad": lambda: oracle.conv2d_grad_filter(x, dy, w.shape, **geometry)[0],
        }[direction]
        return result, lambda values: values

    def seconds(self, call, calls):
        call()
        return calls * 1e-6

    def kernel_seconds(self, call, calls):
        return calls * 1e-7


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("dtype", ["float32", "tf32", "float16"])
def test_measure(monkeypatch, direction, dtype):
    path = Path(__file__).parents[1] / "tools" / "gpu_benchmark.py"
    spec = importlib.util.spec_from_file_location("gpu_benchmark", path)
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    monkeypatch.setattr(benchmark, "ROUNDS", 1)
    problem = parse('mb2ic8ih7iw6oc16kh3kw2ph1pw0sh2sw1n"small"')
    with cuda_support.using_library(cuda_support.library("fast")):
        row = benchmark.measure(Peer(), problem, direction, dtype)
        assert gpu_functions.get_float32_math() == ("tf32" if dtype == "tf32" else "ieee")
        gpu_functions.set_float32_math("ieee")
    assert row["name"] == "small"
    assert row["largest_difference"] < (1e-6 if dtype == "float32" else 4e-3)
    assert np.isclose(row["seconds_fastconv"], benchmark.CALLS * 1e-6)
    assert np.isclose(row["kernel_seconds_cuDNN"], benchmark.CALLS * 1e-7)
    assert row["algorithm"] != "tensor_core_gemm" or dtype != "float32"
