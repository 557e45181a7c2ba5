"""fastconv.jax beside jax.lax: values, gradients, vmap, two devices, registration, errors."""

import ctypes
import re

import numpy as np
import pytest

jax = pytest.importorskip("jax", reason="JAX is not installed")
if not jax._src.xla_bridge.backends_are_initialized():
    jax.config.update("jax_num_cpu_devices", 2)  # before JAX makes its devices
    jax.config.update("jax_disable_most_optimizations", True)  # compiling is what takes the time

import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import fastconv
import fastconv.jax as ops
from fastconv.adapters import _xla_library
from fastconv.adapters import jax as adapter


def assert_all_close(actual, wanted, tolerance=3e-5):
    """Element-wise, relative to the largest value of each array."""
    actual, wanted = jax.tree.leaves(actual), jax.tree.leaves(wanted)
    for a, w in zip(actual, wanted, strict=True):
        a, w = np.asarray(a), np.asarray(w)
        assert (a.shape, a.dtype) == (w.shape, w.dtype)
        np.testing.assert_allclose(a, w, rtol=0, atol=tolerance * np.abs(w).max(initial=1e-30))


def two_orders(function):
    """function(*inputs), and its gradients by every input of first and second order."""

    def loss(*inputs):
        return jnp.sin(function(*inputs)).sum()

    def penalty(*inputs):
        numbers = tuple(range(len(inputs)))
        return sum(jnp.sin(dx).sum() for dx in jax.grad(loss, numbers)(*inputs))

    def orders(*inputs):
        numbers = tuple(range(len(inputs)))
        return (
            function(*inputs),
            jax.grad(loss, numbers)(*inputs),
            jax.grad(penalty, numbers)(*inputs),
        )

    return jax.jit(orders)  # operation by operation, JAX would compile each


@pytest.fixture
def executed():
    """How often each kernel has run since the test began; those that have not are left out."""
    assert adapter.reason_unavailable() is None  # which runs one the first time
    before = ops.ops_executed()
    return lambda: {
        name: count - before[name]
        for name, count in ops.ops_executed().items()
        if count > before[name]
    }


def images(draw, data_format, n, h, w, c):
    return draw(n, c, h, w) if data_format == "channels_first" else draw(n, h, w, c)


def lax_conv2d(x, w, bias, *, strides, padding, dilation_rate, activation, data_format):
    layout = "NCHW" if data_format == "channels_first" else "NHWC"
    channels = x.shape[layout.index("C")]
    y = jax.lax.conv_general_dilated(
        x,
        w,
        strides,
        padding if isinstance(padding, tuple) else padding.upper(),
        rhs_dilation=dilation_rate,
        dimension_numbers=(layout, "HWIO", layout),
        feature_group_count=channels // w.shape[2],
    )
    y += bias.reshape([-1 if axis == "C" else 1 for axis in layout])
    return jax.nn.relu(y) if activation == "relu" else y


@pytest.mark.parametrize(
    "activation, strides, padding, dilation_rate, groups, data_format",
    [
        (None, (1, 1), "valid", (1, 1), 1, "channels_last"),
        ("relu", (2, 1), "same", (1, 1), 2, "channels_last"),
        ("relu", (1, 3), ((1, 0), (2, 1)), (1, 1), 4, "channels_first"),
        (None, (1, 1), "same", (2, 1), 1, "channels_first"),
    ],
)
def test_conv2d(activation, strides, padding, dilation_rate, groups, data_format, draw, executed):
    x, w = images(draw, data_format, 2, 9, 8, 4), draw(3, 2, 4 // groups, 8)
    options = {
        "strides": strides,
        "padding": padding,
        "dilation_rate": dilation_rate,
        "activation": activation,
        "data_format": data_format,
    }
    bias = draw(8)

    def fast(x, w, bias):
        return ops.conv2d(x, w, bias, **options)

    def stock(x, w, bias):
        return lax_conv2d(x, w, bias, **options)

    y = jax.block_until_ready(fast(x, w, bias))
    groups_given = {"groups": groups, **options}
    np.testing.assert_array_equal(y, fastconv.conv2d(x, w, bias, **groups_given))
    assert executed() == {"FastconvConv2D": 1}
    assert_all_close(two_orders(fast)(x, w, bias), two_orders(stock)(x, w, bias))
    assert set(executed()) == {
        "FastconvConv2D",
        "FastconvConv2DGradInput",
        "FastconvConv2DGradFilter",
    }


@pytest.mark.parametrize(
    "pool_size, strides, padding, data_format",
    [
        (2, None, "valid", "channels_last"),
        ((3, 2), (2, 3), "same", "channels_first"),
        (3, 1, "valid", "channels_last"),
    ],
)
def test_pooling(pool_size, strides, padding, data_format, draw):
    x = images(draw, data_format, 2, 7, 8, 5)
    options = {"strides": strides, "padding": padding, "data_format": data_format}
    layout = "NCHW" if data_format == "channels_first" else "NHWC"
    window = np.broadcast_to(pool_size, 2)
    step = window if strides is None else np.broadcast_to(strides, 2)
    shapes = [
        tuple(int({"H": pair[0], "W": pair[1]}.get(axis, 1)) for axis in layout)
        for pair in (window, step)
    ]

    def reduced(x, initial, operation):
        return jax.lax.reduce_window(x, initial, operation, *shapes, padding.upper())

    def stock_max(x):
        return reduced(x, -jnp.inf, jax.lax.max)

    def stock_average(x):
        return reduced(x, 0.0, jax.lax.add) / reduced(jnp.ones_like(x), 0.0, jax.lax.add)

    def fast_max(x):
        return ops.max_pool2d(x, pool_size, **options)

    def fast_average(x):
        return ops.avg_pool2d(x, pool_size, **options)

    # JAX has no second derivative of the maximum by which it could be compared.
    first = jax.jit(jax.value_and_grad(lambda x: jnp.sin(fast_max(x)).sum()))
    stock = jax.jit(jax.value_and_grad(lambda x: jnp.sin(stock_max(x)).sum()))
    assert_all_close(first(x), stock(x))
    assert_all_close(two_orders(fast_average)(x), two_orders(stock_average)(x))


def test_second_derivative_of_max_pooling(draw):
    x = draw(2, 6, 6, 3)

    def by_reshaping(x):
        return x.reshape(2, 3, 2, 3, 2, 3).max(axis=(2, 4))

    fast = two_orders(lambda x: ops.max_pool2d(x, 2))
    assert_all_close(fast(x), two_orders(by_reshaping)(x))


def test_argmax_is_kept_for_gradients_alone(draw, executed):
    x = draw(2, 6, 6, 3)
    jax.block_until_ready(jax.jit(lambda x: ops.max_pool2d(x, 2))(x))
    assert executed() == {"FastconvMaxPool2D": 1}
    jax.block_until_ready(jax.jit(jax.grad(lambda x: ops.max_pool2d(x, 2).sum()))(x))
    assert executed() == {
        "FastconvMaxPool2D": 1,
        "FastconvMaxPool2DWithArgmax": 1,
        "FastconvMaxPool2DGrad": 1,
    }


def test_global_pooling(draw):
    x = draw(2, 5, 6, 3)
    x[0, 1, 2] = x[0, 3, 3] = 9.0  # equal maxima
    for fast, stock in [(ops.global_avg_pool2d, jnp.mean), (ops.global_max_pool2d, jnp.max)]:

        def wanted(x, stock=stock):
            return stock(x, axis=(1, 2), keepdims=True)

        assert_all_close(two_orders(fast)(x), two_orders(wanted)(x))
        turned = fast(x.transpose(0, 3, 1, 2), data_format="channels_first")
        assert_all_close(turned, wanted(x).transpose(0, 3, 1, 2))


def test_convolution_with_pooling(draw, executed):
    x, w, bias = draw(2, 8, 9, 4), draw(3, 3, 4, 8), draw(8)

    def fused(x, w, bias):
        return ops.conv2d_max_pool2d(x, w, bias, activation="relu", padding="same")

    def apart(x, w, bias):
        return ops.max_pool2d(ops.conv2d(x, w, bias, activation="relu", padding="same"), 2)

    actual = jax.block_until_ready(two_orders(fused)(x, w, bias))
    assert {"FastconvConv2DMaxPool2D", "FastconvConv2DMaxPool2DGrad"} < set(executed())
    assert_all_close(actual, two_orders(apart)(x, w, bias))


def test_transposed_convolution(draw):
    x, w = draw(2, 5, 6, 4), draw(3, 2, 3, 4)

    def fast(x, w):
        return ops.conv2d_transpose(x, w, strides=2, padding="valid")

    def stock(x, w):
        return jax.lax.conv_transpose(x, w, (2, 2), "VALID", transpose_kernel=True)

    assert_all_close(two_orders(fast)(x, w), two_orders(stock)(x, w))


def test_vmap(draw, executed):
    xs, ws, bias = draw(3, 2, 6, 6, 4), draw(3, 3, 3, 4, 5), draw(5)

    def fast(x, w):
        return ops.max_pool2d(ops.conv2d(x, w, bias, activation="relu"), 2)

    def one_by_one(function, xs, ws):
        return jax.tree.map(lambda *a: jnp.stack(a), *map(function, xs, ws))

    shared = [ws[0]] * 3
    actual = jax.block_until_ready(jax.vmap(fast, (0, None))(xs, ws[0]))
    assert executed() == {"FastconvConv2D": 1, "FastconvMaxPool2D": 1}, "one larger batch"
    assert_all_close(actual, one_by_one(fast, xs, shared), 0)
    assert_all_close(jax.vmap(fast)(xs, ws), one_by_one(fast, xs, ws), 0)
    assert_all_close(
        jax.vmap(fast, (1, 2), 1)(xs.swapaxes(0, 1), np.moveaxis(ws, 0, 2)),
        one_by_one(fast, xs, ws).swapaxes(0, 1),
        0,
    )
    assert jax.vmap(fast, (0, None))(xs[:0], ws[0]).shape == (0, *actual.shape[1:])
    assert_all_close(jax.vmap(jax.vmap(fast, (0, None)), (0, None))(xs[None], ws[0])[0], actual, 0)

    # Gradients for each, and the gradient through the map.
    slopes = jax.grad(lambda x, w: jnp.sin(fast(x, w)).sum(), (0, 1))
    assert_all_close(jax.vmap(slopes, (0, None))(xs, ws[0]), one_by_one(slopes, xs, shared), 1e-6)
    through = jax.grad(lambda w: jnp.sin(jax.vmap(fast, (0, None))(xs, w)).sum())(ws[0])
    assert_all_close(through, one_by_one(slopes, xs, shared)[1].sum(0), 1e-5)


@pytest.fixture
def mesh():
    if len(jax.devices()) < 2:
        pytest.skip("JAX was started with one device before these tests")
    return Mesh(np.array(jax.devices()[:2]), ("batch",))


def network_loss(weights, x):
    y = ops.max_pool2d(ops.conv2d(x, weights[0], weights[1], activation="relu"), 2)
    y = ops.conv2d_max_pool2d(y, weights[2], weights[1], activation="relu")
    y = ops.avg_pool2d(y, 2, padding="same")
    return jnp.sin(y).sum()


def test_two_devices(mesh, draw, executed):
    x, weights = draw(4, 14, 14, 4), [draw(3, 3, 4, 4), draw(4), draw(3, 3, 4, 4)]
    step = jax.jit(jax.value_and_grad(network_loss, (0, 1)))
    wanted = jax.block_until_ready(step(weights, x))
    on_one = executed()
    sharding = NamedSharding(mesh, PartitionSpec("batch"))
    parts = jax.device_put(x, sharding)
    actual = jax.block_until_ready(step(weights, parts))
    assert_all_close(actual, wanted, 1e-5)
    assert executed() == {name: 3 * count for name, count in on_one.items()}, "each did its part"
    assert actual[1][1].sharding.is_equivalent_to(sharding, 4)
    text = step.lower(weights, parts).compile().as_text()
    assert re.search(r"f32\[2,14,14,4\]\S* parameter\(", text)
    assert "all-reduce" in text  # of the filters' gradients
    for collective in ("all-gather", "all-to-all", "collective-permute"):
        assert collective not in text


def test_two_devices_by_shard_map(mesh, draw):
    if not hasattr(jax, "shard_map"):
        pytest.skip(f"JAX {jax.__version__} has no jax.shard_map")
    x, w = draw(4, 6, 6, 4), draw(3, 3, 4, 4)
    batch = PartitionSpec("batch")
    each = jax.shard_map(lambda x: ops.conv2d(x, w), mesh=mesh, in_specs=batch, out_specs=batch)
    np.testing.assert_array_equal(jax.jit(each)(x), ops.conv2d(x, w))


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda x, w: ops.conv2d(x, w[:, :, :3]), ValueError, "third dimension.*Received"),
        (lambda x, w: ops.conv2d(x[0], w), ValueError, "`x` must have 4 dimensions. Received"),
        (lambda x, w: ops.conv2d(x[:, :2], w), ValueError, "Received"),
        (lambda x, w: ops.conv2d(x, w, w), ValueError, "`bias` must have shape"),
        (
            lambda x, w: ops.conv2d(x.astype("int8"), w),
            TypeError,
            "`x` must be of float32, float16 or",
        ),
        (lambda x, w: ops.conv2d(x.astype("float16"), w), TypeError, "`w` must be of float16, as"),
        (lambda x, w: ops.conv2d(x, w, strides="2"), TypeError, "`strides` must be an integer"),
        (lambda x, w: ops.conv2d(x, w, padding="full"), ValueError, "`padding` must be"),
        (lambda x, w: ops.conv2d_transpose(x, w[0]), ValueError, "`w` must have 4 dimensions"),
        (lambda x, w: ops.max_pool2d(x, 9), ValueError, "`pool_size` must not be larger"),
        (lambda x, w: ops.avg_pool2d(x, 0), ValueError, "must be positive"),
    ],
)
def test_errors(call, error, message):
    x, w = np.zeros((1, 6, 6, 4), np.float32), np.zeros((3, 3, 4, 4), np.float32)
    for function in (call, jax.jit(call)):
        with pytest.raises(error, match=message):
            function(x, w)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_sixteen_bits(dtype, draw, executed):
    """Each operation as of float32, and rounded; its gradients too."""
    x, w, bias = (jnp.asarray(draw(*s)).astype(dtype) for s in [(2, 8, 8, 4), (3, 3, 4, 8), (8,)])

    def value_and_gradients(function):
        def run(dy, *inputs):
            y, gradient = jax.vjp(function, *inputs)
            return y, *gradient(dy.astype(y.dtype))

        return jax.jit(run)

    for function, inputs, shape in [
        (lambda *i: ops.conv2d(*i, activation="relu"), [x, w, bias], (2, 6, 6, 8)),
        (ops.conv2d_max_pool2d, [x, w, bias], (2, 3, 3, 8)),
        (lambda x: ops.max_pool2d(x, 3, strides=1), [x], (2, 6, 6, 4)),
        (lambda x: ops.avg_pool2d(x, 2), [x], (2, 4, 4, 4)),
    ]:
        dy = jnp.asarray(draw(*shape)).astype(dtype)
        both = value_and_gradients(function)
        found = both(dy, *inputs)
        wanted = both(*[array.astype("float32") for array in (dy, *inputs)])
        for array, exact in zip(found, wanted, strict=True):
            assert array.dtype == dtype
            np.testing.assert_array_equal(array, exact.astype(dtype))
    assert len(executed()) == 9
    many = jax.vmap(lambda x: ops.conv2d(x, w, bias))(x[:, None])
    np.testing.assert_array_equal(many[:, 0], ops.conv2d(x, w, bias))


def test_forward_mode_is_refused(draw):
    x, w = draw(1, 4, 4, 1), draw(2, 2, 1, 1)
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(lambda x: ops.conv2d(x, w), (x,), (x,))


# --- registration ---------------------------------------------------------------------------------


@pytest.fixture
def no_reason():
    """The reason is found anew, in the test and after it."""
    for function in (adapter.reason_unavailable, adapter.platforms):
        function.cache_clear()
    yield
    for function in (adapter.reason_unavailable, adapter.platforms):
        function.cache_clear()


def test_self_test_within_a_trace(no_reason):
    reasons = []
    jax.jit(lambda x: reasons.append(adapter.reason_unavailable()) or x)(1.0)
    assert reasons == [None]


def test_a_failed_self_test_is_told(no_reason, monkeypatch):
    monkeypatch.setattr(adapter, "conv2d", lambda x, w: x[:, :1, :1] * 3)
    assert adapter.reason_unavailable() == (
        "the self-test gave [[[[3.0]]], [[[3.0]]], [[[3.0]]]], not ones times 4"
    )


def test_registration_on_gpus(no_reason, monkeypatch):
    """Played: on this machine JAX has no GPU. tests/test_cuda_frameworks.py is for one that has."""
    registered = {}

    def register(name, capsule, platform, api_version):
        address = ctypes.pythonapi.PyCapsule_GetPointer
        address.restype, address.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
        label = ctypes.pythonapi.PyCapsule_GetName
        label.restype, label.argtypes = ctypes.c_char_p, [ctypes.py_object]
        registered[name] = (address(capsule, label(capsule)), platform, api_version)

    monkeypatch.setattr(jax.ffi, "register_ffi_target", register)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(_xla_library, "gpu_is_available", lambda: False)
    assert adapter.platforms() == ("cpu",)
    assert registered == {}
    assert "JAX computes on gpu, for which there are no kernels" in adapter.reason_unavailable()

    adapter.platforms.cache_clear()
    monkeypatch.setattr(_xla_library, "gpu_is_available", lambda: True)
    assert adapter.platforms() == ("cpu", "gpu")
    on_gpu, on_host = _xla_library.handlers(on_gpu=True), _xla_library.handlers(on_gpu=False)
    assert registered == {name: (address, "CUDA", 1) for name, address in on_gpu.items()}
    assert len(on_gpu) == 13
    assert not set(on_gpu.values()) & set(on_host.values())
