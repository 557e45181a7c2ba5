"""fastconv's operations on TensorFlow tensors: eager, in ``tf.function``, differentiable.

The kernels are TensorFlow ops of the library ``libfastconv_tensorflow`` beside this package. They
compute in float32 on the CPU; importing this module loads and registers them, after which a
SavedModel that holds them can be loaded as well. They do not run inside XLA: ``inside_xla()``
tells whether the graph under construction goes there. It cannot tell of a ``tf.function`` that is
traced now and called from a compiled one later; TensorFlow refuses to compile that one.
"""

import ctypes
import functools
import os
import sys
from pathlib import Path

import tensorflow as tf
from tensorflow.python.framework import ops as framework_ops
from tensorflow.python.ops import control_flow_util

import fastconv
from fastconv._arguments import (
    normalize_activation,
    normalize_data_format,
    normalize_padding,
    normalize_pair,
)

__all__ = ["conv2d", "inside_xla", "max_pool2d", "ops_executed"]

_LIBRARY = Path(__file__).parent.parent / (
    "libfastconv_tensorflow.so" if sys.platform != "darwin" else "libfastconv_tensorflow.dylib"
)
_LARGEST_BYTE_WINDOW = 256  # taps; the argmax of a larger window does not fit uint8


def _load_ops():
    ops = tf.load_op_library(str(_LIBRARY))
    symbols = ctypes.CDLL(str(_LIBRARY))
    symbols.fastconv_tensorflow_load_error.restype = ctypes.c_char_p
    symbols.fastconv_tensorflow_op_name.restype = ctypes.c_char_p
    symbols.fastconv_tensorflow_op_name.argtypes = [ctypes.c_size_t]
    symbols.fastconv_tensorflow_op_executions.restype = ctypes.c_uint64
    symbols.fastconv_tensorflow_op_executions.argtypes = [ctypes.c_size_t]
    error = symbols.fastconv_tensorflow_load_error()
    if error is not None:
        raise ImportError(
            f"fastconv's TensorFlow ops cannot be registered: {error.decode()}. "
            f"Received: tensorflow {tf.__version__}"
        )
    return ops, symbols


_ops, _symbols = _load_ops()


def ops_executed():
    """How often each of our kernels has run in this process, by the op's name.

    Returns:
        A dict such as ``{"FastconvConv2D": 3, "FastconvMaxPool2D": 0, ...}``.
    """
    counts = {}
    while (name := _symbols.fastconv_tensorflow_op_name(len(counts))) is not None:
        counts[name.decode()] = _symbols.fastconv_tensorflow_op_executions(len(counts))
    return counts


def inside_xla():
    """Whether ops created now become part of an XLA computation, such as jit_compile=True makes."""
    if tf.executing_eagerly():
        return False
    return control_flow_util.GraphOrParentsInXlaContext(framework_ops.get_default_graph())


def conv2d(
    x,
    w,
    bias=None,
    *,
    strides=1,
    padding="valid",
    dilation_rate=1,
    activation=None,
    data_format="channels_last",
):
    """2-D convolution with bias and ReLU fused, differentiable to any order.

    Args:
        x: float32 tensor of shape (batch, height, width, channels), or (batch, channels, height,
            width) with ``data_format="channels_first"``. Any dimension may be unknown in a graph.
        w: float32 tensor of shape (rows, columns, channels / groups, filters). The number of
            groups follows from the shapes.
        bias: float32 tensor of shape (filters,), or None.
        strides: an integer, or a pair for height and width.
        padding: ``"valid"``, ``"same"`` or ``((top, bottom), (left, right))``.
        dilation_rate: an integer, or a pair for height and width.
        activation: None, ``"linear"`` or ``"relu"``.
        data_format: ``"channels_last"`` or ``"channels_first"``, of ``x`` and of the result.

    Returns:
        A float32 tensor of shape (batch, new_height, new_width, filters), or (batch, filters,
        new_height, new_width) with ``data_format="channels_first"``.

    Raises:
        TypeError, ValueError: where an option is none of those above.
        tf.errors.InvalidArgumentError: where the shapes do not fit each other. In a graph it is
            raised when the graph runs.
    """
    _follow_tensorflow_threads()
    attributes = {
        "strides": normalize_pair(strides, "strides"),
        "dilations": normalize_pair(dilation_rate, "dilation_rate"),
        "activation": normalize_activation(activation).upper(),
        "data_format": _layout(data_format),
        **_padding_attributes(padding),
    }
    x = tf.convert_to_tensor(x)
    w = tf.convert_to_tensor(w)
    return _conv2d(x, w, [] if bias is None else [tf.convert_to_tensor(bias)], attributes)


def max_pool2d(
    x,
    pool_size,
    *,
    strides=None,
    padding="valid",
    data_format="channels_last",
    keep_argmax=False,
):
    """2-D max-pooling, differentiable to any order.

    Args:
        x: float32 tensor of shape (batch, height, width, channels), or (batch, channels, height,
            width) with ``data_format="channels_first"``. Any dimension may be unknown in a graph.
        pool_size: an integer, or a pair for height and width.
        strides: an integer, a pair for height and width, or None for ``pool_size``.
        padding: ``"valid"``, ``"same"`` or ``((top, bottom), (left, right))``.
        data_format: ``"channels_last"`` or ``"channels_first"``, of ``x`` and of the result.
        keep_argmax: whether to note where each maximum was, one byte each. Say so where a gradient
            will be taken: it is right without, but then it has to search the maxima again.

    Returns:
        A float32 tensor of shape (batch, new_height, new_width, channels), or (batch, channels,
        new_height, new_width) with ``data_format="channels_first"``. The gradient goes to the first
        maximum of each window.

    Raises:
        TypeError, ValueError: where an option is none of those above.
        tf.errors.InvalidArgumentError: where the window does not fit the input. In a graph it is
            raised when the graph runs.
    """
    _follow_tensorflow_threads()
    attributes = {
        "pool_size": normalize_pair(pool_size, "pool_size"),
        "strides": normalize_pair(pool_size if strides is None else strides, "strides"),
        "data_format": _layout(data_format),
        **_padding_attributes(padding),
    }
    x = tf.convert_to_tensor(x)
    return _max_pool2d_with_argmax(x, attributes)[0] if keep_argmax else _max_pool2d(x, attributes)


# --- arguments to attributes ----------------------------------------------------------------------


def _layout(data_format):
    return "NCHW" if normalize_data_format(data_format) == "channels_first" else "NHWC"


def _padding_attributes(padding):
    kind, sides = normalize_padding(padding)
    return {"padding": kind.upper(), "explicit_paddings": sides}


@functools.cache
def _follow_tensorflow_threads():
    """Takes over TensorFlow's intra-op setting, unless fastconv was told a number of its own.

    Runs at the first call rather than at import, for until then the setting may change; after it
    TensorFlow allows no change either.
    """
    threads = tf.config.threading.get_intra_op_parallelism_threads()
    if threads > 0 and not _was_told_threads():
        fastconv.set_num_threads(threads)


def _was_told_threads():
    if os.environ.get("FASTCONV_NUM_THREADS"):
        return True
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return fastconv.get_num_threads() != usable


# --- static shapes --------------------------------------------------------------------------------
# TensorFlow's C API shows an op's shape function no attributes, so shapes are set here.


def _extent(size, window, stride, padding, before, after):
    """The output extent along one axis; None where it is unknown or where the kernel will refuse."""
    if size is None or window is None or stride < 1:
        return None
    if padding == "SAME":
        return -(-size // stride)
    room = size + before + after - window
    return room // stride + 1 if room >= 0 else None


def _output_shape(x_shape, window, channels, attributes):
    """The static shape that ``window`` (rows, columns) and ``attributes`` make of ``x_shape``."""
    if x_shape.rank != 4:
        return tf.TensorShape(None)
    channels_first = attributes["data_format"] in ("NCHW", b"NCHW")
    batch, *rest = x_shape.as_list()
    height, width = rest[1:] if channels_first else rest[:2]
    padding = tf.compat.as_str(attributes["padding"])
    top, bottom, left, right = attributes["explicit_paddings"]
    strides = attributes["strides"]
    height = _extent(height, window[0], strides[0], padding, top, bottom)
    width = _extent(width, window[1], strides[1], padding, left, right)
    shape = [batch, channels, height, width] if channels_first else [batch, height, width, channels]
    return tf.TensorShape(shape)


def _conv2d_shape(x, w, attributes):
    if w.shape.rank != 4:
        return tf.TensorShape(None)
    rows, columns, _, filters = w.shape.as_list()
    window = [
        None if taps is None else (taps - 1) * dilation + 1
        for taps, dilation in zip((rows, columns), attributes["dilations"], strict=True)
    ]
    return _output_shape(x.shape, window, filters, attributes)


def _pool_shape(x, attributes):
    if x.shape.rank != 4:
        return tf.TensorShape(None)
    channels = x.shape[1 if attributes["data_format"] in ("NCHW", b"NCHW") else 3]
    return _output_shape(x.shape, attributes["pool_size"], channels, attributes)


def _with_static_shape(tensor, shape):
    if not tf.executing_eagerly():
        tensor.set_shape(shape())
    return tensor


# --- convolution and its gradients ----------------------------------------------------------------


def _conv2d(x, w, bias, attributes):
    y = _ops.fastconv_conv2d(x, w, bias, **attributes)
    return _with_static_shape(y, lambda: _conv2d_shape(x, w, attributes))


def _attributes(op, *own):
    names = ("strides", "padding", "explicit_paddings", "data_format", *own)
    return {name: op.get_attr(name) for name in names}


def _conv2d_attributes(op):
    return _attributes(op, "dilations", "activation")


def _is_relu(attributes):
    return attributes["activation"] in ("RELU", b"RELU")


def _linear(attributes):
    return {**attributes, "activation": "LINEAR"}


def _masked(gradient, mask):
    """``gradient`` where the ReLU let the value through. The mask itself has no gradient."""
    return tf.raw_ops.ReluGrad(gradients=gradient, features=mask[0]) if mask else gradient


def _skipped(op):
    """The inputs whose gradient nobody wants. Only a tape knows; a graph prunes what is not used."""
    return getattr(op, "skip_input_indices", None) or ()


@tf.RegisterGradient("FastconvConv2D")
def _conv2d_gradient(op, dy):
    x, w, *bias = op.inputs
    attributes = _conv2d_attributes(op)
    mask = [op.outputs[0]] if _is_relu(attributes) else []
    skipped = _skipped(op)
    dx = dw = None
    dbias = [None] * len(bias)
    if 0 not in skipped:
        dx = _ops.fastconv_conv2d_grad_input(x, w, dy, mask, **attributes)
    if not set(range(1, len(op.inputs))).issubset(skipped):
        dw, dbias = _ops.fastconv_conv2d_grad_filter(
            x, w, dy, mask, num_bias=len(bias), **attributes
        )
        dbias = [_with_static_shape(d, lambda: w.shape[3:]) for d in dbias]
    return [dx, dw, *dbias]


@tf.RegisterGradient("FastconvConv2DGradInput")
def _conv2d_grad_input_gradient(op, ddx):
    # dx is linear in w and in dy; of x only the shape matters.
    _, w, dy, *mask = op.inputs
    attributes = _conv2d_attributes(op)
    dw, _ = _ops.fastconv_conv2d_grad_filter(ddx, w, dy, mask, num_bias=0, **attributes)
    ddy = _masked(_conv2d(ddx, w, [], _linear(attributes)), mask)
    return [None, dw, ddy, *[None] * len(mask)]


@tf.RegisterGradient("FastconvConv2DGradFilter")
def _conv2d_grad_filter_gradient(op, ddw, *ddbias):
    # dw is linear in x and in dy, and so is dbias in dy; of w only the shape matters.
    x, _, dy, *mask = op.inputs
    attributes = _conv2d_attributes(op)
    dx = _ops.fastconv_conv2d_grad_input(x, ddw, dy, mask, **attributes)
    ddy = _masked(_conv2d(x, ddw, list(ddbias), _linear(attributes)), mask)
    return [dx, None, ddy, *[None] * len(mask)]


# --- max-pooling and its gradients ----------------------------------------------------------------


def _max_pool2d(x, attributes):
    y = _ops.fastconv_max_pool2d(x, **attributes)
    return _with_static_shape(y, lambda: _pool_shape(x, attributes))


def _max_pool2d_with_argmax(x, attributes):
    rows, columns = attributes["pool_size"]
    argmax_type = tf.uint8 if rows * columns <= _LARGEST_BYTE_WINDOW else tf.int32
    y, argmax = _ops.fastconv_max_pool2d_with_argmax(x, Targmax=argmax_type, **attributes)
    for tensor in (y, argmax):
        _with_static_shape(tensor, lambda: _pool_shape(x, attributes))
    return y, argmax


def _pool_attributes(op):
    return _attributes(op, "pool_size")


@tf.RegisterGradient("FastconvMaxPool2D")
def _max_pool2d_gradient(op, dy):
    x = op.inputs[0]
    attributes = _pool_attributes(op)
    _, argmax = _max_pool2d_with_argmax(x, attributes)
    return _ops.fastconv_max_pool2d_grad(x, argmax, dy, **attributes)


@tf.RegisterGradient("FastconvMaxPool2DWithArgmax")
def _max_pool2d_with_argmax_gradient(op, dy, _):
    return _ops.fastconv_max_pool2d_grad(op.inputs[0], op.outputs[1], dy, **_pool_attributes(op))


@tf.RegisterGradient("FastconvMaxPool2DGrad")
def _max_pool2d_grad_gradient(op, ddx):
    # dx is linear in dy; of x only the shape matters.
    _, argmax, _ = op.inputs
    attributes = _pool_attributes(op)
    ddy = _ops.fastconv_max_pool2d_grad_grad(ddx, argmax, **attributes)
    return [None, None, _with_static_shape(ddy, lambda: argmax.shape)]


@tf.RegisterGradient("FastconvMaxPool2DGradGrad")
def _max_pool2d_grad_grad_gradient(op, dddy):
    ddx, argmax = op.inputs
    return [_ops.fastconv_max_pool2d_grad(ddx, argmax, dddy, **_pool_attributes(op)), None]
