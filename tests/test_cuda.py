"""``fastconv.cuda``: arrays on the device, streams, errors; the numbers are test_cuda_kernels.py's."""

import ctypes
import gc
import inspect
import sys
import threading
import weakref

import numpy as np
import pytest

import cuda_support
import fastconv
import fastconv.cuda as gpu_functions
from cuda_support import emulating
from fastconv import _core

pytestmark = [cuda_support.EMULATOR_ONLY, pytest.mark.usefixtures("gpu")]

LEGACY, PER_THREAD = 1, 2


@pytest.fixture
def pair(draw):
    """x and w on the device, float16, and y = conv2d(x, w) in float32."""
    x, w = draw(2, 6, 7, 8), draw(3, 3, 8, 16)
    x, w = x.astype(np.float16), w.astype(np.float16)
    y = fastconv.conv2d(x.astype(np.float32), w.astype(np.float32))
    return gpu_functions.array(x), gpu_functions.array(w), y


def assert_close(result, expected):
    np.testing.assert_allclose(
        result.numpy().astype(np.float32), expected, rtol=2e-3, atol=2e-2 * abs(expected).max()
    )


# --- arrays


@pytest.mark.parametrize("dtype", ["float32", "float16", "uint8", "int32"])
@pytest.mark.parametrize("shape", [(), (3,), (2, 3, 4, 5), (0, 2)])
def test_there_and_back(dtype, shape):
    host = np.arange(np.prod(shape, dtype=int)).reshape(shape).astype(dtype)
    array = gpu_functions.array(host)
    assert (array.shape, array.ndim, array.size) == (shape, len(shape), host.size)
    assert array.nbytes == host.nbytes
    assert array.dtype == host.dtype
    assert array.device == 0
    assert repr(array) == f"DeviceArray(shape={shape}, dtype={dtype}, device=0)"
    back = array.numpy()
    assert back.dtype == host.dtype
    np.testing.assert_array_equal(back, host)


def test_strided_and_foreign_byte_order():
    host = np.arange(24, dtype=">f4").reshape(4, 6)[::2, ::-1]
    np.testing.assert_array_equal(gpu_functions.array(host).numpy(), host)
    np.testing.assert_array_equal(gpu_functions.array([1, 2], "float16").numpy(), [1, 2])


def test_bfloat16():
    ml_dtypes = pytest.importorskip("ml_dtypes")
    host = np.array([1, -2.5, 3.140625, np.inf], ml_dtypes.bfloat16)
    for array in (
        gpu_functions.array(host),
        gpu_functions.array(host.astype(np.float32), "bfloat16"),
        gpu_functions.array(host.view(np.uint16), "bfloat16"),
    ):
        assert array.dtype == ml_dtypes.bfloat16
        assert repr(array).endswith("dtype=bfloat16, device=0)")
        np.testing.assert_array_equal(array.numpy(), host)


def test_bfloat16_without_ml_dtypes(monkeypatch):
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    bits = np.array([0x3F80, 0xC020], np.uint16)
    array = gpu_functions.array(bits, "bfloat16")
    assert array.dtype == "bfloat16"
    assert array.numpy().dtype == np.uint16
    np.testing.assert_array_equal(array.numpy(), bits)
    with pytest.raises(ImportError):
        gpu_functions.array(np.float32([1]), "bfloat16")


@pytest.mark.parametrize("dtype", ["float64", "int64", "bool", "complex64"])
def test_other_types(dtype):
    with pytest.raises(TypeError, match=f"must be of float32, float16.*Received: dtype={dtype}"):
        gpu_functions.array(np.zeros(3, dtype))


def test_no_copy_behind_the_back():
    with pytest.raises(TypeError, match=r"by its method numpy\(\)"):
        np.asarray(gpu_functions.array([1.0], "float32"))


# --- other libraries


class Interface:
    """An array that offers nothing but ``__cuda_array_interface__``."""

    def __init__(self, array, **changes):
        self.array = array
        self.__cuda_array_interface__ = {**array.__cuda_array_interface__, **changes}


class Dlpack:
    """An array that offers nothing but DLPack, without versions; notes what it is asked for."""

    def __init__(self, array):
        self.array, self.streams = array, []

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()

    def __dlpack__(self, stream=None):
        self.streams.append(stream)
        return self.array.__dlpack__(stream=stream)


class VersionedDlpack(Dlpack):
    def __dlpack__(self, stream=None):
        self.streams.append(stream)
        return self.array.__dlpack__(stream=stream, max_version=(1, 0))


class ByExchange:
    """An array of a type that has DLPack's exchange API, and no other way of being taken."""

    stream = LEGACY
    requires_grad = False

    def __init__(self, array):
        self.array = array
        self.given = 0

    def __dlpack_device__(self):
        raise AssertionError("this is not how it is to be asked")

    __dlpack__ = __dlpack_device__


class Header(ctypes.Structure):
    _fields_ = [
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("previous", ctypes.c_void_p),
    ]


FROM_OBJECT = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.c_void_p)
CURRENT_STREAM = ctypes.PYFUNCTYPE(
    ctypes.c_int, ctypes.c_int32, ctypes.c_int32, ctypes.POINTER(ctypes.c_void_p)
)


class ExchangeApi(ctypes.Structure):
    _fields_ = [
        ("header", Header),
        ("allocate", ctypes.c_void_p),
        ("managed_from_object", FROM_OBJECT),
        ("object_from_managed", ctypes.c_void_p),
        ("tensor_from_object", FROM_OBJECT),
        ("current_stream", CURRENT_STREAM),
    ]


# Behind version and context; behind these, the deleter and flags.
DELETER_OFFSET, TENSOR_OFFSET, TENSOR_BYTES = 16, 32, 48


def managed(array, stream=-1):
    """The address of a managed tensor that is the caller's to give back."""
    capsule = array.__dlpack__(stream=stream, max_version=(1, 0))
    python = ctypes.pythonapi
    python.PyCapsule_GetPointer.restype = ctypes.c_void_p
    python.PyCapsule_GetPointer.argtypes = (ctypes.py_object, ctypes.c_char_p)
    python.PyCapsule_SetName.argtypes = (ctypes.py_object, ctypes.c_char_p)
    address = python.PyCapsule_GetPointer(capsule, b"dltensor_versioned")
    python.PyCapsule_SetName(capsule, b"used_dltensor_versioned")
    return address


@FROM_OBJECT
def managed_from_object(source, out):
    source.given += 1
    ctypes.c_void_p.from_address(out).value = managed(source.array)
    return 0


@FROM_OBJECT
def tensor_from_object(source, out):
    """Borrowed: that of the array, whose shape outlives the capsule."""
    capsule = source.array.__dlpack__(stream=-1, max_version=(1, 0))
    get = ctypes.pythonapi.PyCapsule_GetPointer
    get.restype, get.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
    ctypes.memmove(out, get(capsule, b"dltensor_versioned") + TENSOR_OFFSET, TENSOR_BYTES)
    return 0


@CURRENT_STREAM
def current_stream(kind, device, out):
    assert (kind, device) == (2, 0)
    out[0] = ByExchange.stream
    return 0


EXCHANGE = ExchangeApi(
    Header(1, 3, None), None, managed_from_object, None, tensor_from_object, current_stream
)
NEWER = ExchangeApi(Header(2, 0, ctypes.addressof(EXCHANGE)))
# A prototype of its own: that of ctypes.pythonapi is everybody's, and JAX sets what it takes.
NEW_CAPSULE = ctypes.PYFUNCTYPE(
    ctypes.py_object, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p
)(("PyCapsule_New", ctypes.pythonapi))


@pytest.fixture(params=[EXCHANGE, NEWER], ids=["exchange 1", "exchange 2"])
def exchange(request, monkeypatch):
    capsule = NEW_CAPSULE(ctypes.addressof(request.param), b"dlpack_exchange_api", None)
    monkeypatch.setattr(ByExchange, "__dlpack_c_exchange_api__", capsule, raising=False)


def test_exchange_api(exchange, pair):
    x, w, y = pair
    source = ByExchange(x)
    taken = gpu_functions.asarray(source)
    assert (taken.pointer, taken.shape, source.given) == (x.pointer, x.shape, 1)
    assert_close(gpu_functions.conv2d(source, ByExchange(w)), y)
    del source, x
    gc.collect()
    assert_close(gpu_functions.conv2d(taken, w), y)


def test_exchange_api_and_streams(exchange, pair, monkeypatch):
    x, w, y = pair
    producer = gpu_functions.Stream()
    monkeypatch.setattr(ByExchange, "stream", producer.handle)
    made = gpu_functions.conv2d(x, w, stream=producer)
    ones = gpu_functions.array(np.eye(16, dtype=np.float16).reshape(1, 1, 16, 16))
    assert_close(gpu_functions.conv2d(ByExchange(made), ones, stream=gpu_functions.Stream()), y)


def test_exchange_api_is_left_to_their_method_where_a_gradient_is_needed(exchange, pair):
    source = ByExchange(pair[0])
    source.requires_grad = True
    with pytest.raises(AssertionError, match="not how it is to be asked"):
        gpu_functions.asarray(source)


@pytest.mark.parametrize("foreign", [Interface, Dlpack, VersionedDlpack])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_arrays_of_others(foreign, dtype):
    array = gpu_functions.array(np.arange(6).reshape(2, 3), dtype)
    other = gpu_functions.asarray(foreign(array))
    assert (other.shape, other.dtype, other.pointer) == (array.shape, array.dtype, array.pointer)
    expected = array.numpy()
    del array
    gc.collect()
    np.testing.assert_array_equal(other.numpy(), expected)  # which keeps the first one


@pytest.mark.parametrize("foreign", [Interface, Dlpack, VersionedDlpack])
def test_functions_take_arrays_of_others(foreign, pair):
    x, w, y = pair
    assert_close(fastconv.conv2d(foreign(x), foreign(w)), y)
    assert_close(gpu_functions.conv2d(x, foreign(w)), y)
    out = gpu_functions.array(np.zeros(y.shape, np.float16))
    result = fastconv.conv2d(foreign(x), w, out=foreign(out))
    assert result.pointer == out.pointer
    assert_close(out, y)


def test_dlpack_of_bfloat16():
    array = gpu_functions.array(np.array([1, 2], np.uint16), "bfloat16")
    assert gpu_functions.asarray(Dlpack(array)).dtype == array.dtype
    assert not hasattr(array, "__cuda_array_interface__")


def test_dlpack_says_what_it_holds():
    array = gpu_functions.array(np.zeros((2, 3), np.float16))
    capsule = array.__dlpack__()

    class Tensor(ctypes.Structure):
        _fields_ = [
            ("data", ctypes.c_void_p),
            ("device_type", ctypes.c_int32),
            ("device_id", ctypes.c_int32),
            ("ndim", ctypes.c_int32),
            ("code", ctypes.c_uint8),
            ("bits", ctypes.c_uint8),
            ("lanes", ctypes.c_uint16),
            ("shape", ctypes.POINTER(ctypes.c_int64)),
            ("strides", ctypes.POINTER(ctypes.c_int64)),
            ("byte_offset", ctypes.c_uint64),
        ]

    get = ctypes.pythonapi.PyCapsule_GetPointer
    get.restype, get.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
    tensor = Tensor.from_address(get(capsule, b"dltensor"))
    assert (tensor.data, tensor.device_type, tensor.device_id) == (array.pointer, 2, 0)
    assert (tensor.code, tensor.bits, tensor.lanes) == (2, 16, 1)
    assert tensor.shape[: tensor.ndim] == [2, 3]
    assert not tensor.strides
    assert tensor.byte_offset == 0


@pytest.mark.parametrize("handle", [-1, LEGACY, PER_THREAD])
def test_let_go_by_a_thread_without_the_gil(pair, handle):
    """As a consumer's own threads do."""
    x, w, y = pair
    stream = gpu_functions.Stream()
    ended = weakref.ref(stream)
    array = gpu_functions.conv2d(x, w, stream=stream)
    assert_close(array, y)
    address = managed(array, handle)
    del array, stream
    gc.collect()
    assert ended() is not None
    deleter = ctypes.c_void_p.from_address(address + DELETER_OFFSET).value
    ctypes.CFUNCTYPE(None, ctypes.c_void_p)(deleter)(address)  # which releases the GIL
    gc.collect()
    assert ended() is None


def test_dlpack_refuses():
    array = gpu_functions.array(np.zeros(3, np.float32))
    assert array.__dlpack_device__() == (2, 0)
    with pytest.raises(BufferError, match="handed over where it is"):
        array.__dlpack__(dl_device=(1, 0))
    with pytest.raises(BufferError, match="handed over as it is"):
        array.__dlpack__(copy=True)
    with pytest.raises(ValueError, match=r"Received: stream=0"):
        array.__dlpack__(stream=0)


def test_interface_refuses():
    array = gpu_functions.array(np.zeros((2, 3), np.float32))
    with pytest.raises(ValueError, match=r"must be C-contiguous. Received: source of shape"):
        gpu_functions.asarray(Interface(array, strides=(4, 8)))
    with pytest.raises(TypeError, match="typestr '<f8'"):
        gpu_functions.asarray(Interface(array, typestr="<f8"))
    host = np.zeros((2, 3), np.float32)
    with pytest.raises(ValueError, match="whose memory is not"):
        gpu_functions.asarray(Interface(array, data=(host.ctypes.data, False)))
    gpu_functions.asarray(Interface(array, strides=(12, 4)))
    for nothing in (host, [1.0], None):
        with pytest.raises(TypeError, match=r"`source` must be an array on a CUDA device"):
            gpu_functions.asarray(nothing)


def test_read_only_out(pair):
    x, w, y = pair
    out = gpu_functions.array(np.zeros(y.shape, np.float16))
    data, _ = out.__cuda_array_interface__["data"]
    with pytest.raises(ValueError, match=r"`out` must be writeable"):
        fastconv.conv2d(x, w, out=Interface(out, data=(data, True)))


# --- arguments


def test_no_arrays_of_the_host(pair):
    x, w, _ = pair
    with pytest.raises(TypeError, match=r"`w` must be an array on a CUDA device.*ndarray"):
        fastconv.conv2d(x, w.numpy())
    with pytest.raises(TypeError, match=r"`x` must be an array on a CUDA device"):
        gpu_functions.conv2d(x.numpy(), w)
    with pytest.raises(
        TypeError, match=r"`w` must be a NumPy array. Received: w of type DeviceArr"
    ):
        fastconv.conv2d(x.numpy().astype(np.float32), w)
    with pytest.raises(TypeError, match=r"`out` must be an array on a CUDA device"):
        fastconv.conv2d(x, w, out=np.zeros(3, np.float32))


def test_checks_are_those_of_numpy(pair):
    x, w, y = pair
    with pytest.raises(ValueError, match=r"`strides` must be positive"):
        fastconv.conv2d(x, w, strides=0)
    with pytest.raises(ValueError, match=r"`bias` must have shape \(16,\). Received: bias.shape="):
        fastconv.conv2d(x, w, gpu_functions.array(np.zeros(3, np.float16)))
    with pytest.raises(ValueError, match=r"`x` must have 4 dimensions"):
        fastconv.conv2d(gpu_functions.array(np.zeros(3, np.float16)), w)
    with pytest.raises(ValueError, match="is required with activation='relu'"):
        fastconv.conv2d_grad_input(gpu_functions.array(y, "float16"), w, x.shape, activation="relu")
    with pytest.raises(ValueError, match=r"`out` must have shape"):
        fastconv.conv2d(x, w, out=x)
    with pytest.raises(ValueError, match=r"`out` must not share memory with an input"):
        fastconv.conv2d(x, gpu_functions.array(np.zeros((1, 1, 8, 8), np.float16)), out=x)
    with pytest.raises(ValueError, match=r"`algorithm` on a GPU must be one of '.*algorithm='fft'"):
        fastconv.conv2d(x, w, algorithm="fft")


def test_one_type(pair):
    x, w, _ = pair
    with pytest.raises(TypeError, match=r"dtype of the first, float16. Received: w.dtype=float32"):
        fastconv.conv2d(x, gpu_functions.array(w.numpy(), "float32"))
    with pytest.raises(TypeError, match=r"float32, float16 or bfloat16. Received: x.dtype=uint8"):
        fastconv.conv2d(gpu_functions.array(np.zeros((1, 3, 3, 1), np.uint8)), w)


def test_empty_batch(pair):
    _, w, y = pair
    x = gpu_functions.array(np.zeros((0, 6, 7, 8), np.float16))
    assert fastconv.conv2d(x, w).shape == (0, *y.shape[1:])
    dy = gpu_functions.array(np.zeros((0, *y.shape[1:]), np.float16))
    assert fastconv.conv2d_grad_input(dy, w, x.shape).shape == x.shape
    dw, dbias = fastconv.conv2d_grad_filter(x, dy, w.shape, return_bias_grad=True)
    assert not dw.numpy().any()
    assert not dbias.numpy().any()


@pytest.mark.parametrize("compute_capability", [70, 72, 87, 110, 121])
def test_a_device_that_there_are_no_kernels_for(gpu, compute_capability):
    """Machine code serves later devices of its major number, PTX of 12.0 all later ones."""
    if gpu == "cuda":
        pytest.skip("a device is what it is")
    path = cuda_support.library(gpu)
    with emulating(compute_capability=compute_capability):
        if compute_capability in (87, 121):
            _core.cuda.use_library(path)
            assert fastconv.cuda.is_available()
        else:
            reason = f"of emulated device, {compute_capability // 10}.{compute_capability % 10}"
            with pytest.raises(fastconv.cuda.CudaError, match=f"no kernels for the .*{reason}"):
                _core.cuda.use_library(path)
    _core.cuda.use_library(path)


@pytest.mark.parametrize("axis, name", [(0, "height"), (1, "width")])
def test_a_pooling_s_coordinates(axis, name):
    x = gpu_functions.array(np.ones((1, 3, 3, 1), np.float32))
    pool, strides, padding = [1, 1], [1, 1], [(0, 0), (0, 0)]
    pool[axis], strides[axis], padding[axis] = 2**30, 2**29, (2**30 - 1, 2**30 - 1)
    with pytest.raises(ValueError, match=rf"the {name} of a pooling's input must be below 2\*\*30"):
        gpu_functions.avg_pool2d(x, pool, strides=strides, padding=padding)


def test_too_large():
    x = gpu_functions.array(np.zeros((0, 1, 1, 1), np.float32))
    huge = Interface(x, shape=(2**31, 1, 1, 1), data=(x.pointer or 256, False))
    with pytest.raises((ValueError, fastconv.cuda.CudaError)):
        fastconv.max_pool2d(huge, 1)
    with pytest.raises(ValueError, match=r"must have fewer than 2\*\*31 elements. Received: `x`"):
        gpu_functions.explain((2**31, 1, 1, 1), (1, 1, 1, 1), dtype="float16")


@pytest.mark.parametrize("dtype, error", [("int8", ValueError), (1, TypeError)])
def test_explain_knows_three_types(dtype, error):
    with pytest.raises(error, match=f"`dtype` must be .*Received: dtype={dtype!r}"):
        gpu_functions.explain((2, 9, 9, 8), (3, 3, 8, 8), dtype=dtype)


def test_signatures_and_docstrings():
    for name in ("conv2d", "conv2d_grad_filter", "avg_pool2d"):
        function = getattr(gpu_functions, name)
        assert "stream" in str(inspect.signature(function))
        assert function.__doc__.startswith(f"``fastconv.{name}`` of arrays on a GPU")


# --- settings


def test_float32_math():
    assert gpu_functions.get_float32_math() == "ieee"
    try:
        gpu_functions.set_float32_math("tf32")
        assert gpu_functions.get_float32_math() == "tf32"
        names = [c["algorithm"] for c in gpu_functions.explain((2, 9, 9, 32), (3, 3, 32, 32))]
        assert "tensor_core_gemm" in names
    finally:
        gpu_functions.set_float32_math("ieee")
    with pytest.raises(ValueError, match=r"`math` must be one of 'ieee', 'tf32'"):
        gpu_functions.set_float32_math("bf16")
    with pytest.raises(TypeError, match=r"`math` must be one of 'ieee', 'tf32'"):
        gpu_functions.set_float32_math(16)


def test_explain():
    first, *_ = gpu_functions.explain((2, 9, 9, 32), (3, 3, 32, 32), dtype="float16")
    assert set(first) == {"algorithm", "blocking", "workspace_bytes", "predicted_seconds"}
    assert first["predicted_seconds"] > 0


def test_info(gpu):
    facts = fastconv.info()["cuda"]
    assert facts["available"] is True
    assert "reason" not in facts
    assert facts["devices"][0]["multiprocessors"] > 0
    if gpu != "cuda":
        assert facts["devices"][0]["name"] == "emulated device"
        assert facts["devices"][0]["compute_capability"] == "8.0"
        assert (facts["runtime"], facts["driver"]) == ("13.0", "13.0")
        assert facts["library"].endswith("libfastconv_cuda.so")


# --- streams


@pytest.fixture(params=["lazy", "eager"])
def emulated_streams(request):
    with emulating(streams=request.param):
        yield


@pytest.mark.usefixtures("emulated_streams")
def test_streams_are_respected(pair):
    x, w, y = pair
    first, second = gpu_functions.Stream(), gpu_functions.Stream()
    one = gpu_functions.conv2d(x, w, stream=first)
    assert one.stream == first.handle
    with gpu_functions.using_stream(second):
        assert _core.cuda.stream() == second.handle
        # Made by the first stream, read by the second one; its memory goes back to the first.
        two = fastconv.conv2d_grad_filter(x, one, w.shape)
        del one
    assert _core.cuda.stream() == LEGACY
    again = gpu_functions.conv2d(x, w, stream=first)  # may get that memory
    expected = fastconv.conv2d_grad_filter(
        x.numpy().astype(np.float32), y.astype(np.float16).astype(np.float32), w.shape
    )
    assert_close(two, expected)
    assert_close(again, y)
    second.synchronize()


@pytest.mark.usefixtures("emulated_streams")
@pytest.mark.parametrize("foreign", [Interface, Dlpack, VersionedDlpack])
def test_streams_of_others(pair, foreign):
    x, w, y = pair
    producer, consumer = gpu_functions.Stream(), gpu_functions.Stream()
    made = gpu_functions.conv2d(x, w, stream=producer)
    other = foreign(made)
    other.array = other.array if foreign is not Interface else None
    ones = np.eye(16, dtype=np.float16).reshape(1, 1, 16, 16)
    result = gpu_functions.conv2d(other, gpu_functions.array(ones), stream=consumer)
    if foreign is not Interface:
        assert other.streams == [consumer.handle]
    del made, other
    gc.collect()
    assert_close(result, y)


def test_arrays_keep_the_stream_they_were_made_on(pair):
    x, w, y = pair
    stream = gpu_functions.Stream()
    ended = weakref.ref(stream)
    result = gpu_functions.conv2d(x, w, stream=stream)
    host = gpu_functions.array([1.0], "float32", stream=stream)
    view = gpu_functions.asarray(Interface(x), stream=stream)
    del stream
    gc.collect()
    ones = gpu_functions.array(np.eye(16, dtype=np.float16).reshape(1, 1, 16, 16))
    assert_close(gpu_functions.conv2d(result, ones), y)  # on another stream
    assert host.numpy() == [1]
    assert_close(view, x.numpy())
    del host, view
    assert ended() is not None
    del result
    gc.collect()
    assert ended() is None


def test_a_lazy_stream_has_done_nothing_before_somebody_waits(gpu, pair):
    if gpu == "cuda":
        pytest.skip("a device does not wait to be waited for")
    x, w, y = pair
    stream = gpu_functions.Stream()
    out = gpu_functions.array(np.zeros(y.shape, np.float16), stream=stream)
    # Of the default stream, which does not wait for this one.
    view = gpu_functions.asarray(Interface(out, stream=None))
    gpu_functions.conv2d(x, w, out=out, stream=stream)
    assert not view.numpy().any()
    stream.synchronize()
    assert_close(view, y)


@pytest.mark.usefixtures("emulated_streams")
@pytest.mark.parametrize("of_stream", [False, True], ids=["of the default stream", "of a stream"])
def test_out_is_read_in_the_order_of_its_own_stream(pair, of_stream):
    x, w, y = pair
    ones = gpu_functions.array(np.eye(16, dtype=np.float16).reshape(1, 1, 16, 16))
    stream, third = gpu_functions.Stream(), gpu_functions.Stream()
    own = gpu_functions.Stream() if of_stream else None
    for read in (
        lambda out: out,
        lambda out: gpu_functions.conv2d(out, ones),
        lambda out: gpu_functions.conv2d(out, ones, stream=third),
        lambda out: gpu_functions.asarray(Interface(out), stream=third),
        lambda out: gpu_functions.asarray(Dlpack(out), stream=third),
    ):
        out = gpu_functions.array(np.zeros(y.shape, np.float16), stream=own)
        before = out.stream
        assert gpu_functions.conv2d(x, w, out=out, stream=stream) is out
        assert out.stream == before
        assert_close(read(out), y)


@pytest.mark.usefixtures("emulated_streams")
def test_out_of_another_library_is_read_in_the_order_of_its_stream(pair):
    x, w, y = pair
    producer, stream = gpu_functions.Stream(), gpu_functions.Stream()
    out = gpu_functions.array(np.zeros(y.shape, np.float16), stream=producer)
    gpu_functions.conv2d(x, w, out=Interface(out), stream=stream)
    assert_close(out, y)


@pytest.mark.usefixtures("emulated_streams")
def test_out_of_the_exchange_api_is_read_in_the_order_of_its_stream(exchange, pair, monkeypatch):
    x, w, y = pair
    producer, stream = gpu_functions.Stream(), gpu_functions.Stream()
    out = gpu_functions.array(np.zeros(y.shape, np.float16), stream=producer)
    monkeypatch.setattr(ByExchange, "stream", producer.handle)
    gpu_functions.conv2d(x, w, out=ByExchange(out), stream=stream)
    assert_close(out, y)


@pytest.mark.usefixtures("emulated_streams")
@pytest.mark.parametrize("foreign", [Interface, Dlpack])
def test_a_view_of_one_stream_used_on_another(pair, foreign):
    x, w, y = pair
    ones = gpu_functions.array(np.eye(16, dtype=np.float16).reshape(1, 1, 16, 16))
    producer, first, second = (gpu_functions.Stream() for _ in range(3))
    made = gpu_functions.conv2d(x, w, stream=producer)
    view = gpu_functions.asarray(foreign(made), stream=first)
    assert_close(gpu_functions.conv2d(view, ones, stream=second), y)


def test_a_view_outlives_its_producer_s_stream(pair):
    """It is of the stream on which it was asked for."""
    x, w, y = pair
    producer = gpu_functions.Stream()
    out = gpu_functions.asarray(
        Interface(gpu_functions.array(np.zeros(y.shape, np.float16)), stream=producer.handle)
    )
    del producer
    gc.collect()
    assert_close(gpu_functions.conv2d(x, w, out=out, stream=gpu_functions.Stream()), y)


def test_uses_on_another_stream_take_no_memory_each():
    """An array remembers the latest use alone: the one of a filter, in a loop on a stream."""
    heap = ctypes.CDLL(None)
    if not hasattr(heap, "mallinfo2"):
        pytest.skip("glibc tells how much memory is in use")

    class Mallinfo(ctypes.Structure):
        _fields_ = [(str(i), ctypes.c_size_t) for i in range(10)]

    heap.mallinfo2.restype = Mallinfo
    x = gpu_functions.array(np.ones((1, 1, 1, 1), np.float32))
    stream = gpu_functions.Stream()

    def run(times):
        for _ in range(times):
            gpu_functions.max_pool2d(x, 1, stream=stream)
            stream.synchronize()
        gc.collect()
        return getattr(heap.mallinfo2(), "7")

    before = run(100)
    assert run(2000) - before < 2000 * 24


def test_memory_of_others_is_held_until_it_has_been_read(pair):
    x, w, y = pair
    freed = []

    class Owner(Dlpack):
        def __del__(self):
            freed.append(True)

    class Producer(Interface):
        def __del__(self):
            freed.append(True)

    stream = gpu_functions.Stream()
    result = gpu_functions.conv2d(Producer(x), Owner(w), stream=stream)
    stream.synchronize()
    gc.collect()
    gpu_functions.array([1.0], "float32")  # any call lets go of what is done
    assert freed
    assert_close(result, y)


def test_streams_of_other_libraries():
    class Torch:
        cuda_stream = 7

    class Cupy:
        ptr = 8

    class Protocol:
        def __cuda_stream__(self):
            return 0, 9

    class PerThread:
        ptr = PER_THREAD

    for stream, handle in [(Torch, 7), (Cupy, 8), (Protocol(), 9), (0, LEGACY), (1, LEGACY)]:
        with gpu_functions.using_stream(stream):
            assert _core.cuda.stream() == handle
    for stream in (PER_THREAD, PerThread):
        with pytest.raises(ValueError, match=r"`stream` must not be cudaStreamPerThread"), \
                gpu_functions.using_stream(stream):  # fmt: skip
            pass
    with pytest.raises(TypeError, match=r"`stream` must be an integer"), \
            gpu_functions.using_stream("x"):  # fmt: skip
        pass
    with pytest.raises(ValueError, match=r"`stream` must be a stream or its handle"), \
            gpu_functions.using_stream(-1):  # fmt: skip
        pass


def test_the_current_stream_is_the_thread_s():
    seen = []
    with gpu_functions.using_stream(gpu_functions.Stream()):
        thread = threading.Thread(target=lambda: seen.append(_core.cuda.stream()))
        thread.start()
        thread.join()
    assert seen == [LEGACY]


def test_threads(pair):
    x, w, y = pair
    failures = []

    def work():
        try:
            stream = gpu_functions.Stream()
            for _ in range(3):
                assert_close(gpu_functions.conv2d(x, w, stream=stream), y)
        except BaseException as error:  # noqa: BLE001
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


# --- errors


def test_cuda_errors_have_cuda_s_text(gpu):
    if gpu == "cuda":
        pytest.skip("an error would be the end of the process's context")
    with pytest.raises(fastconv.cuda.CudaError, match="invalid device ordinal"):
        gpu_functions.array([1.0], "float32", device=5)
    with pytest.raises(fastconv.cuda.CudaError, match="invalid resource handle"):
        gpu_functions.array([1.0], "float32", stream=12345)
    with pytest.raises(MemoryError):
        gpu_functions.conv2d(
            gpu_functions.array(np.zeros((1, 1, 1, 1), np.float16)),
            gpu_functions.array(np.zeros((1, 1, 1, 1), np.float16)),
            padding=((2**14, 0), (2**15, 0)),
        )
    assert gpu_functions.array([1.0], "float32").numpy() == [1]
