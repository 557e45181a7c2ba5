"""The handlers that XLA calls on a GPU, called as XLA would: by a call frame made here.

XLA itself has no GPU in the tests: what is between a JAX program and the call frame is
tests/test_cuda_frameworks.py's, on machines that have one.
"""

import ctypes
from ctypes import POINTER, Structure, c_char_p, c_int, c_int64, c_size_t, c_uint32, c_void_p
from pathlib import Path

import numpy as np
import pytest

import cuda_support
import fastconv
import fastconv.cuda as gpu_functions
import oracle
import pool2d_problems
from conv2d_problems import Problem, integers, solve_by_oracle
from fastconv import _core

pytestmark = [cuda_support.EMULATOR_ONLY, pytest.mark.usefixtures("gpu")]

# --- XLA's structs, of version 0.1 (csrc/bindings/xla/ffi_api.hpp)

TYPES = {"float32": 11, "float16": 10, "int32": 4, "uint8": 6}
INVALID_ARGUMENT, INTERNAL = 3, 13


class Text(Structure):
    _fields_ = [("data", c_char_p), ("size", c_size_t)]


class Array(Structure):
    _fields_ = [("type", c_int), ("size", c_size_t), ("data", c_void_p)]


class Buffer(Structure):
    _fields_ = [
        ("struct_size", c_size_t),
        ("extensions", c_void_p),
        ("type", c_int),
        ("data", c_void_p),
        ("rank", c_int64),
        ("dims", POINTER(c_int64)),
    ]


class Buffers(Structure):
    _fields_ = [
        ("struct_size", c_size_t),
        ("extensions", c_void_p),
        ("size", c_int64),
        ("types", POINTER(c_int)),
        ("items", POINTER(c_void_p)),
    ]


class Attributes(Structure):
    _fields_ = [
        ("struct_size", c_size_t),
        ("extensions", c_void_p),
        ("size", c_int64),
        ("types", POINTER(c_int)),
        ("names", POINTER(POINTER(Text))),
        ("items", POINTER(c_void_p)),
    ]


class Version(Structure):
    _fields_ = [
        ("struct_size", c_size_t),
        ("extensions", c_void_p),
        ("major", c_int),
        ("minor", c_int),
    ]


class ErrorArguments(Structure):
    _fields_ = [
        ("struct_size", c_size_t),
        ("extensions", c_void_p),
        ("message", c_char_p),
        ("code", c_int),
    ]


class StreamArguments(Structure):
    _fields_ = [
        ("struct_size", c_size_t),
        ("extensions", c_void_p),
        ("context", c_void_p),
        ("stream", c_void_p),
    ]


CREATE_ERROR = ctypes.CFUNCTYPE(c_void_p, POINTER(ErrorArguments))
GET_STREAM = ctypes.CFUNCTYPE(c_void_p, POINTER(StreamArguments))


class Api(Structure):
    _fields_ = [
        ("struct_size", c_size_t),
        ("extensions", c_void_p),
        ("version", Version),
        ("internal", c_void_p),
        ("create_error", CREATE_ERROR),
        ("get_error_message", c_void_p),
        ("destroy_error", c_void_p),
        ("register_handler", c_void_p),
        ("get_stream", GET_STREAM),
    ]


class Metadata(Structure):
    _fields_ = [("struct_size", c_size_t), ("version", Version), ("traits", c_uint32)]


class MetadataExtension(Structure):
    _fields_ = [
        ("struct_size", c_size_t),
        ("type", c_int),
        ("next", c_void_p),
        ("metadata", POINTER(Metadata)),
    ]


class CallFrame(Structure):
    _fields_ = [
        ("struct_size", c_size_t),
        ("extensions", c_void_p),
        ("api", POINTER(Api)),
        ("context", c_void_p),
        ("stage", c_int),
        ("arguments", Buffers),
        ("results", Buffers),
        ("attributes", Attributes),
    ]


# --- XLA, played by us


def load():
    library = ctypes.CDLL(str(Path(_core.__file__).parent / "libfastconv_xla.so"))
    library.fastconv_xla_op_name.restype = c_char_p
    library.fastconv_xla_op_name.argtypes = [c_size_t]
    library.fastconv_xla_handler.restype = c_void_p
    library.fastconv_xla_handler.argtypes = [c_size_t, c_int]
    return library


def handler(name):
    library, index = load(), 0
    while (known := library.fastconv_xla_op_name(index)) is not None:
        if known.decode() == name:
            address = library.fastconv_xla_handler(index, 1)
            return ctypes.CFUNCTYPE(c_void_p, POINTER(CallFrame))(address)
        index += 1
    raise LookupError(name)


class XlaError(Exception):
    pass


class Xla:
    """Calls handlers on a stream of its own, as XLA does."""

    def __init__(self):
        self.stream = gpu_functions.Stream()
        self.errors = []
        self.kept = []

        @CREATE_ERROR
        def create_error(arguments):
            self.errors.append((arguments.contents.code, arguments.contents.message.decode()))
            return 1

        @GET_STREAM
        def get_stream(arguments):
            assert arguments.contents.context == 77
            arguments.contents.stream = self.stream.handle

        self.api = Api(struct_size=ctypes.sizeof(Api), version=Version(0, None, 0, 1))
        self.api.create_error, self.api.get_stream = create_error, get_stream

    def call(self, name, inputs, outputs, **attributes):
        """``inputs``: arrays on the device. ``outputs``: (shape, dtype) of each, or arrays."""
        results = [
            output
            if isinstance(output, gpu_functions.DeviceArray)
            else gpu_functions.array(np.full(output[0], 77, output[1]), stream=self.stream)
            for output in outputs
        ]
        self.kept = [inputs, results]
        frame = CallFrame(
            struct_size=ctypes.sizeof(CallFrame),
            api=ctypes.pointer(self.api),
            context=77,
            stage=3,
            arguments=self._buffers(inputs),
            results=self._buffers(results),
            attributes=self._attributes({**attributes, "num_inputs": (len(inputs),)}),
        )
        if handler(name)(ctypes.byref(frame)):
            raise XlaError(*self.errors.pop())
        return results

    def _keep(self, thing):
        self.kept.append(thing)
        return thing

    def _buffers(self, arrays):
        items = []
        for array in arrays:
            dims = self._keep((c_int64 * max(array.ndim, 1))(*array.shape))
            code = TYPES[array.dtype.name]
            buffer = Buffer(ctypes.sizeof(Buffer), None, code, array.pointer, array.ndim, dims)
            items.append(ctypes.addressof(self._keep(buffer)))
        types = self._keep((c_int * max(len(items), 1))(*[1] * len(items)))
        pointers = self._keep((c_void_p * max(len(items), 1))(*items))
        return Buffers(ctypes.sizeof(Buffers), None, len(items), types, pointers)

    def _attributes(self, attributes):
        types, names, items = [], [], []
        for name, value in attributes.items():
            names.append(ctypes.pointer(self._keep(Text(name.encode(), len(name)))))
            if isinstance(value, str):
                types.append(4)
                item = Text(value.encode(), len(value))
            else:
                types.append(1)
                values = self._keep((c_int64 * len(value))(*value))
                item = Array(5, len(value), ctypes.addressof(values))
            items.append(ctypes.addressof(self._keep(item)))
        count = len(items)
        return Attributes(
            ctypes.sizeof(Attributes),
            None,
            count,
            self._keep((c_int * count)(*types)),
            self._keep((POINTER(Text) * count)(*names)),
            self._keep((c_void_p * count)(*items)),
        )


@pytest.fixture
def xla():
    return Xla()


def attributes_of(problem, activation="LINEAR"):
    padding, sides = problem.padding, (0, 0, 0, 0)
    if not isinstance(padding, str):
        padding, sides = "explicit", (*problem.padding[0], *problem.padding[1])
    common = {
        "strides": problem.strides,
        "padding": padding.upper(),
        "explicit_paddings": sides,
        "data_format": "NHWC" if problem.data_format == "channels_last" else "NCHW",
    }
    if hasattr(problem, "pool_size"):
        return {**common, "pool_size": problem.pool_size}
    return {**common, "dilations": problem.dilation_rate, "activation": activation}


CONVOLUTIONS = [
    Problem((2, 7, 9, 8), 16, padding="same", strides=(2, 1)),
    Problem((1, 6, 7, 3), 5, padding=((1, 0), (2, 1)), data_format="channels_first"),
]


@pytest.mark.parametrize("problem", CONVOLUTIONS, ids=str)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_convolution(xla, problem, dtype):
    data = integers(problem)
    expected = solve_by_oracle(problem, data)
    arrays = cuda_support.to_device(data, dtype)
    relu = attributes_of(problem, "RELU")
    (y,) = xla.call(
        "FastconvConv2D",
        [arrays.x, arrays.w, arrays.bias],
        [(problem.y_shape, dtype)],
        **relu,
    )
    xla.stream.synchronize()
    np.testing.assert_array_equal(y.numpy(), expected["y_fused"].astype(dtype))
    (dx,) = xla.call(
        "FastconvConv2DGradInput",
        [arrays.x, arrays.w, arrays.dy, arrays.output],
        [(problem.x_shape, dtype)],
        **relu,
    )
    xla.stream.synchronize()
    np.testing.assert_array_equal(dx.numpy(), expected["dx_fused"].astype(dtype))


def test_pooling(xla):
    problem = pool2d_problems.Problem((1, 7, 8, 5), (3, 2), (2, 2), "same")
    x = pool2d_problems.few_values(problem)
    y_expected, argmax_expected = oracle.max_pool2d(x, problem.pool_size, **problem.options)
    array = gpu_functions.array(x)
    outputs = [(y_expected.shape, np.float32), (y_expected.shape, np.uint8)]
    y, argmax = xla.call("FastconvMaxPool2DWithArgmax", [array], outputs, **attributes_of(problem))
    average = xla.call("FastconvAveragePool2D", [array], outputs[:1], **attributes_of(problem))[0]
    dy = gpu_functions.array(np.ones(y_expected.shape, np.float32))
    dx = xla.call(
        "FastconvMaxPool2DGrad",
        [array, argmax, dy],
        [(x.shape, np.float32)],
        **attributes_of(problem),
    )[0]
    xla.stream.synchronize()
    np.testing.assert_array_equal(y.numpy(), y_expected)
    np.testing.assert_array_equal(argmax.numpy(), argmax_expected)
    np.testing.assert_allclose(
        average.numpy(), oracle.avg_pool2d(x, problem.pool_size, **problem.options), rtol=1e-6
    )
    np.testing.assert_array_equal(
        dx.numpy(),
        oracle.max_pool2d_grad(
            dy.numpy(), argmax_expected, x.shape, problem.pool_size, **problem.options
        ),
    )


@pytest.mark.parametrize(
    "problem",
    [
        pool2d_problems.Problem((2, 7, 8, 5), (3, 2), (2, 2), "same"),
        pool2d_problems.Problem((1, 6, 6, 8), (2, 2), (2, 2)),
        pool2d_problems.Problem((1, 6, 5, 4), (3, 3), (1, 2), "same", "channels_first"),
        pool2d_problems.Problem((1, 20, 18, 4), (18, 17), (2, 1), "valid"),  # argmax of int32
    ],
    ids=str,
)
def test_second_derivative_of_max_pooling(xla, problem):
    """Its transpose is the first: sum(gather(ddx) * dy) = sum(ddx * scatter(dy))."""
    x = pool2d_problems.few_values(problem)
    y, argmax = oracle.max_pool2d(x, problem.pool_size, **problem.options)
    ddx, dy = (
        problem.seed().integers(-9, 10, shape).astype(np.float32) for shape in (x.shape, y.shape)
    )
    taps = argmax.astype(problem.argmax_dtype)

    def gathered(values):
        (result,) = xla.call(
            "FastconvMaxPool2DGradGrad",
            [gpu_functions.array(values), gpu_functions.array(taps)],
            [(y.shape, np.float32)],
            **attributes_of(problem),
        )
        xla.stream.synchronize()
        return result.numpy()

    dx = oracle.max_pool2d_grad(dy, argmax, x.shape, problem.pool_size, **problem.options)
    assert (gathered(ddx) * dy).sum() == (ddx * dx).sum()
    np.testing.assert_array_equal(gathered(x), y)


@pytest.mark.parametrize("activation", ["LINEAR", "RELU"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_convolution_with_pooling(xla, activation, dtype):
    problem = Problem((2, 8, 9, 4), 8)
    data = integers(problem)
    options = {"activation": activation.lower()}
    y_host, argmax_host = fastconv.conv2d_max_pool2d(
        data.x, data.w, data.bias, **options, return_argmax=True
    )
    dy = problem.seed().integers(-3, 4, y_host.shape).astype(np.float32)
    gradients = fastconv.conv2d_max_pool2d_grad(data.x, data.w, dy, y_host, argmax_host, **options)
    arrays = cuda_support.to_device(data, dtype)
    attributes = attributes_of(problem, activation)
    y, argmax = xla.call(
        "FastconvConv2DMaxPool2D",
        [arrays.x, arrays.w, arrays.bias],
        [(y_host.shape, dtype), (y_host.shape, np.uint8)],
        **attributes,
    )
    dw, dx, dbias = xla.call(
        "FastconvConv2DMaxPool2DGrad",
        [arrays.x, arrays.w, gpu_functions.array(dy, dtype), y, argmax],
        [(problem.w_shape, dtype), (data.x.shape, dtype), ((8,), dtype)],
        wanted=(1, 1),
        **attributes,
    )
    xla.stream.synchronize()
    np.testing.assert_array_equal(y.numpy(), y_host.astype(dtype))
    np.testing.assert_array_equal(argmax.numpy(), argmax_host)
    for found, expected in zip((dx, dw, dbias), gradients, strict=True):
        np.testing.assert_array_equal(found.numpy(), expected.astype(dtype))


def test_errors(xla):
    problem = CONVOLUTIONS[0]
    arrays = cuda_support.to_device(integers(problem))
    inputs = [arrays.x, arrays.w]
    with pytest.raises(XlaError, match="`output` must have the shape") as caught:
        xla.call("FastconvConv2D", inputs, [((1, 2), np.float32)], **attributes_of(problem))
    assert caught.value.args[0] == INVALID_ARGUMENT


def test_metadata():
    metadata = Metadata()
    extension = MetadataExtension(0, 1, None, ctypes.pointer(metadata))
    frame = CallFrame(extensions=ctypes.addressof(extension))
    assert not handler("FastconvConv2D")(ctypes.byref(frame))
    assert (metadata.version.major, metadata.version.minor, metadata.traits) == (0, 1, 0)


def test_without_a_gpu(xla):
    problem = CONVOLUTIONS[0]
    arrays = cuda_support.to_device(integers(problem))
    y = gpu_functions.array(np.zeros(problem.y_shape, np.float32))
    before = _core.cuda.availability()["library"]
    try:
        _core.cuda.use_library("")
        if fastconv.cuda.is_available():
            pytest.skip("this machine has a GPU")
        with pytest.raises(XlaError, match="There is no GPU to compute on") as caught:
            xla.call(
                "FastconvConv2D",
                [arrays.x, arrays.w],
                [y],
                **attributes_of(problem),
            )
        assert caught.value.args[0] in (INTERNAL, INVALID_ARGUMENT)
    finally:
        _core.cuda.use_library(before)
