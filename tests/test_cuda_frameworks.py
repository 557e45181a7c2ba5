"""The CUDA kernels under JAX, PyTorch and CuPy on a GPU, as far as these are installed and see one."""

import numpy as np
import pytest

import cuda_support
import fastconv
import fastconv.cuda as gpu_functions
import oracle
from conv2d_problems import Problem, integers, normals

PROBLEMS = [
    Problem((2, 13, 11, 32), 48, strides=(2, 1), padding="same"),
    Problem((3, 9, 8, 3), 32),
    Problem((2, 9, 10, 16), 16, groups=16, padding="same"),
    Problem((2, 10, 7, 8), 12, data_format="channels_first", dilation_rate=(2, 1)),
]


@pytest.fixture(scope="module", autouse=True)
def device():
    """Skips what follows where fastconv has no GPU: here is nothing for the emulator to do."""
    cuda_support.library("cuda")


# --- JAX


@pytest.fixture(scope="module")
def jax():
    jax = pytest.importorskip("jax", reason="JAX is not installed")
    if jax.default_backend() != "gpu":
        pytest.skip(f"JAX computes on {jax.default_backend()}")
    return jax


@pytest.fixture(scope="module")
def in_jax(jax):
    from fastconv.adapters import jax as adapter

    assert adapter.reason_unavailable() is None
    assert "gpu" in adapter.platforms()
    import fastconv.jax

    return fastconv.jax


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_jax_conv2d(problem, dtype, jax, in_jax):
    data = integers(problem)
    options = {name: value for name, value in problem.geometry.items() if name != "groups"}

    @jax.jit
    def run(x, w, bias, dy):
        def function(*inputs):
            return in_jax.conv2d(*inputs, activation="relu", **options)

        y, backward = jax.vjp(function, x, w, bias)
        return y, *backward(dy)

    before = in_jax.ops_executed()
    inputs = [jax.numpy.asarray(a, dtype) for a in (data.x, data.w, data.bias, data.dy)]
    y, dx, dw, dbias = run(*inputs)
    assert {array.dtype.name for array in (y, dx, dw, dbias)} == {dtype}

    def rounded(array):  # once, from the sum of float32
        return np.asarray(jax.numpy.asarray(array, dtype), np.float32)

    assert {device.platform for device in y.devices()} == {"gpu"}
    expected = oracle.conv2d(data.x, data.w, data.bias, activation="relu", **problem.geometry)
    masked = {"mask": expected, **problem.geometry}
    np.testing.assert_array_equal(np.asarray(y, np.float32), rounded(expected))
    np.testing.assert_array_equal(
        np.asarray(dx, np.float32),
        rounded(oracle.conv2d_grad_input(data.dy, data.w, problem.x_shape, **masked)),
    )
    wanted = oracle.conv2d_grad_filter(data.x, data.dy, problem.w_shape, **masked)
    np.testing.assert_array_equal(np.asarray(dw, np.float32), rounded(wanted[0]))
    np.testing.assert_array_equal(np.asarray(dbias, np.float32), rounded(wanted[1]))
    ran = {k for k, v in in_jax.ops_executed().items() if v > before[k]}
    assert ran == {
        "FastconvConv2D",
        "FastconvConv2DGradInput",
        "FastconvConv2DGradFilter",
    }


def test_jax_pooling(jax, in_jax):
    x = np.random.default_rng(0).integers(-3, 3, (2, 9, 7, 5)).astype(np.float32)
    options = {"strides": (2, 2), "padding": "same"}

    @jax.jit
    def run(x):
        y, backward = jax.vjp(lambda x: in_jax.max_pool2d(x, 3, **options), x)
        return y, *backward(y)

    y, dx = run(x)
    expected, argmax = oracle.max_pool2d(x, (3, 3), **options)
    np.testing.assert_array_equal(y, expected)
    np.testing.assert_array_equal(
        dx, oracle.max_pool2d_grad(expected, argmax, x.shape, (3, 3), **options)
    )


def test_jax_memory_is_reused_between_calls(jax, in_jax):
    """Workspaces and streams are XLA's: a thousand calls of one program give the same bits."""
    problem = PROBLEMS[0]
    data = normals(problem)
    options = {name: value for name, value in problem.geometry.items() if name != "groups"}
    step = jax.jit(jax.grad(lambda w, x: (in_jax.conv2d(x, w, **options) ** 2).sum()))
    first = step(data.w, data.x)
    results = [step(data.w, data.x) for _ in range(1000)]
    assert all(bool((result == first).all()) for result in results[::50])
    assert bool((results[-1] == first).all())


# --- arrays of PyTorch and CuPy, by DLPack and __cuda_array_interface__


class Torch:
    def __init__(self):
        self.torch = pytest.importorskip("torch", reason="PyTorch is not installed")
        if not self.torch.cuda.is_available():
            pytest.skip("PyTorch sees no GPU")

    def array(self, host):
        return self.torch.from_numpy(host).cuda()

    def empty(self, shape):
        return self.torch.full(shape, float("nan"), device="cuda")

    def host(self, array):
        return self.torch.from_dlpack(array).cpu().numpy()

    def stream(self):
        stream = self.torch.cuda.Stream()
        return self.torch.cuda.stream(stream), stream

    def pointer(self, array):
        return array.data_ptr()


class CuPy:
    def __init__(self):
        self.cupy = pytest.importorskip("cupy", reason="CuPy is not installed")

    def array(self, host):
        return self.cupy.asarray(host)

    def empty(self, shape):
        return self.cupy.full(shape, np.nan, np.float32)

    def host(self, array):
        return self.cupy.from_dlpack(array).get()

    def stream(self):
        stream = self.cupy.cuda.Stream(non_blocking=True)
        return stream, stream

    def pointer(self, array):
        return array.data.ptr


@pytest.fixture(scope="module", params=[Torch, CuPy])
def library(request):
    return request.param()


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_arrays_of_others(problem, library):
    data = integers(problem)
    x, w, dy = (library.array(array) for array in (data.x, data.w, data.dy))
    geometry = problem.geometry
    out = library.empty(problem.y_shape)
    y = fastconv.conv2d(x, w, out=out, **geometry)
    assert y.pointer == library.pointer(out)
    dx = fastconv.conv2d_grad_input(dy, w, problem.x_shape, **geometry)
    dw = fastconv.conv2d_grad_filter(x, dy, problem.w_shape, **geometry)
    np.testing.assert_array_equal(library.host(out), oracle.conv2d(data.x, data.w, **geometry))
    np.testing.assert_array_equal(
        library.host(dx), oracle.conv2d_grad_input(data.dy, data.w, problem.x_shape, **geometry)
    )
    np.testing.assert_array_equal(
        library.host(dw), oracle.conv2d_grad_filter(data.x, data.dy, problem.w_shape, **geometry)[0]
    )


def test_streams_of_others(library):
    """Work queued on their stream before ours is finished when ours begins, and the other way round."""
    problem = Problem((8, 56, 56, 64), 64, padding="same")
    data = integers(problem)
    expected = 2 * oracle.conv2d(data.x, data.w, **problem.geometry)
    w = library.array(data.w)
    context, stream = library.stream()
    x = library.array(data.x)
    library.host(x)  # what was queued elsewhere is done
    with context:
        for _ in range(20):
            twice = x * 2
            y = gpu_functions.conv2d(twice, w, stream=stream, **problem.geometry)
            np.testing.assert_array_equal(library.host(y), expected)
