"""fastconv's operations on TensorFlow tensors: eager, in ``tf.function``, differentiable.

The kernels are TensorFlow ops of the library ``libfastconv_tensorflow`` beside this package. They
compute in float32 on the CPU; importing this module loads and registers them, after which a
SavedModel that holds them can be loaded as well. In a graph that XLA will compile, the same kernels
are called as ``fastconv.adapters.xla`` does it. ``inside_xla()`` tells whether the graph under
construction goes there. It cannot tell of a ``tf.function`` that is traced now and called from a
compiled one later; TensorFlow refuses to compile that one.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import tensorflow as tf
from tensorflow.python.framework import ops as framework_ops
from tensorflow.python.ops import control_flow_util

import fastconv
from fastconv import _core
from fastconv._arguments import (
    normalize_activation,
    normalize_data_format,
    normalize_padding,
    normalize_pair,
)
from fastconv.adapters import xla
from fastconv.adapters._extents import Attributes, Extent, like, static_extents

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Sequence

    from fastconv._arguments import IntegerOrPair, Padding
    from fastconv.adapters._extents import Extents, Outputs

__all__ = [
    "avg_pool2d",
    "conv2d",
    "conv2d_max_pool2d",
    "conv2d_transpose",
    "global_avg_pool2d",
    "global_max_pool2d",
    "inside_xla",
    "max_pool2d",
    "ops_executed",
    "pooled_in_one",
]

_LIBRARY = Path(__file__).parent.parent / (
    "libfastconv_tensorflow.so" if sys.platform != "darwin" else "libfastconv_tensorflow.dylib"
)
_WHOLE_IMAGE = (0, 0)  # the window of global pooling
_LARGEST_BYTE_WINDOW = 256  # taps; the argmax of a larger window does not fit uint8


def _load_ops() -> tuple[Any, ctypes.CDLL]:
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
# The op's function by the op's name in lower case, as TensorFlow adds underscores to names.
_op_functions = {name.replace("_", ""): getattr(_ops, name) for name in dir(_ops)}


def ops_executed() -> dict[str, int]:
    """How often each of our kernels has run as a TensorFlow op in this process, by the op's name.

    Returns:
        A dict such as ``{"FastconvConv2D": 3, "FastconvMaxPool2D": 0, ...}``.
    """
    counts: dict[str, int] = {}
    while (name := _symbols.fastconv_tensorflow_op_name(len(counts))) is not None:
        counts[name.decode()] = _symbols.fastconv_tensorflow_op_executions(len(counts))
    return counts


def inside_xla() -> bool:
    """Whether ops created now become part of an XLA computation, such as jit_compile=True makes."""
    if tf.executing_eagerly():
        return False
    graph = framework_ops.get_default_graph()
    return bool(control_flow_util.GraphOrParentsInXlaContext(graph))


def conv2d(
    x: tf.Tensor,
    w: tf.Tensor,
    bias: tf.Tensor | None = None,
    *,
    strides: IntegerOrPair = 1,
    padding: Padding = "valid",
    dilation_rate: IntegerOrPair = 1,
    activation: str | None = None,
    data_format: str = "channels_last",
) -> tf.Tensor:
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
    attributes = _conv2d_options(strides, padding, dilation_rate, activation, data_format)
    return _conv2d(*_tensors(x, w, bias), attributes)


def conv2d_max_pool2d(
    x: tf.Tensor,
    w: tf.Tensor,
    bias: tf.Tensor | None = None,
    *,
    strides: IntegerOrPair = 1,
    padding: Padding = "valid",
    dilation_rate: IntegerOrPair = 1,
    activation: str | None = None,
    data_format: str = "channels_last",
    keep_argmax: bool = False,
) -> tf.Tensor:
    """``max_pool2d(conv2d(...), 2)`` in one op, which keeps no more than is pooled.

    Differentiable to any order.

    Args:
        x, w, bias, strides, padding, dilation_rate, activation, data_format: as for ``conv2d``,
            whose output must be 2 x 2 pixels or larger.
        keep_argmax: as for ``max_pool2d``.

    Returns:
        A float32 tensor of shape (batch, new_height // 2, new_width // 2, filters), or (batch,
        filters, new_height // 2, new_width // 2) with ``data_format="channels_first"``, of which
        new_height and new_width are those of the convolution.

    Raises:
        TypeError, ValueError: where an option is none of those above.
        tf.errors.InvalidArgumentError: where the shapes do not fit each other. In a graph it is
            raised when the graph runs.
    """
    attributes = _conv2d_options(strides, padding, dilation_rate, activation, data_format)
    return _conv2d_max_pool2d(*_tensors(x, w, bias), attributes, int(keep_argmax))[0]


def pooled_in_one(y: tf.Tensor, *, keep_argmax: bool = False) -> tf.Tensor | None:
    """What ``max_pool2d(y, 2)`` gives, by ``conv2d_max_pool2d``, where that can take y's place.

    Args:
        y: a tensor. Only of a result of ``conv2d`` in a graph under construction can the convolution
            still be replaced: it is left out of the graph's execution if nothing else reads it.
        keep_argmax: as for ``max_pool2d``.

    Returns:
        A tensor as ``conv2d_max_pool2d`` returns it, or None.
    """
    call = None if tf.executing_eagerly() else getattr(y, _CALL, None)
    if call is None or call.graph is not tf.compat.v1.get_default_graph():
        return None
    return _conv2d_max_pool2d(call.x, call.w, call.bias, call.attributes, int(keep_argmax))[0]


def max_pool2d(
    x: tf.Tensor,
    pool_size: IntegerOrPair,
    *,
    strides: IntegerOrPair | None = None,
    padding: Padding = "valid",
    data_format: str = "channels_last",
    keep_argmax: bool = False,
) -> tf.Tensor:
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
    attributes = _pool_options(pool_size, strides, padding, data_format)
    x = tf.convert_to_tensor(x)
    return _max_pool2d_with_argmax(x, attributes)[0] if keep_argmax else _max_pool2d(x, attributes)


def avg_pool2d(
    x: tf.Tensor,
    pool_size: IntegerOrPair,
    *,
    strides: IntegerOrPair | None = None,
    padding: Padding = "valid",
    data_format: str = "channels_last",
) -> tf.Tensor:
    """2-D average-pooling, in which padding is not counted, differentiable to any order.

    Args:
        x: float32 tensor of shape (batch, height, width, channels), or (batch, channels, height,
            width) with ``data_format="channels_first"``. Any dimension may be unknown in a graph.
        pool_size, strides, padding, data_format: as for ``max_pool2d``.

    Returns:
        A float32 tensor of shape (batch, new_height, new_width, channels), or (batch, channels,
        new_height, new_width) with ``data_format="channels_first"``.

    Raises:
        TypeError, ValueError: where an option is none of those above.
        tf.errors.InvalidArgumentError: where the window does not fit the input. In a graph it is
            raised when the graph runs.
    """
    attributes = _pool_options(pool_size, strides, padding, data_format)
    return _avg_pool2d(tf.convert_to_tensor(x), attributes)


def global_avg_pool2d(x: tf.Tensor, *, data_format: str = "channels_last") -> tf.Tensor:
    """The average of each channel of each image, differentiable to any order.

    Args:
        x: float32 tensor of shape (batch, height, width, channels), or (batch, channels, height,
            width) with ``data_format="channels_first"``. Any dimension may be unknown in a graph.
        data_format: ``"channels_last"`` or ``"channels_first"``, of ``x`` and of the result.

    Returns:
        A float32 tensor of shape (batch, 1, 1, channels), or (batch, channels, 1, 1) with
        ``data_format="channels_first"``.

    Raises:
        TypeError, ValueError: where ``data_format`` is none of those above.
        tf.errors.InvalidArgumentError: where ``x`` has no such shape.
    """
    return _avg_pool2d(tf.convert_to_tensor(x), _global_pool_options(data_format))


def global_max_pool2d(x: tf.Tensor, *, data_format: str = "channels_last") -> tf.Tensor:
    """The maximum of each channel of each image, differentiable to any order.

    Args:
        x: float32 tensor of shape (batch, height, width, channels), or (batch, channels, height,
            width) with ``data_format="channels_first"``. Any dimension may be unknown in a graph.
        data_format: ``"channels_last"`` or ``"channels_first"``, of ``x`` and of the result.

    Returns:
        A float32 tensor of shape (batch, 1, 1, channels), or (batch, channels, 1, 1) with
        ``data_format="channels_first"``. Equal maxima share the gradient, as in ``tf.reduce_max``.

    Raises:
        TypeError, ValueError: where ``data_format`` is none of those above.
        tf.errors.InvalidArgumentError: where ``x`` has no such shape.
    """
    return _max_pool2d(tf.convert_to_tensor(x), _global_pool_options(data_format))


def conv2d_transpose(
    x: tf.Tensor,
    w: tf.Tensor,
    *,
    strides: IntegerOrPair = 1,
    padding: Padding = "valid",
    output_padding: IntegerOrPair | None = None,
    dilation_rate: IntegerOrPair = 1,
    data_format: str = "channels_last",
) -> tf.Tensor:
    """Transposed 2-D convolution as ``keras.ops.conv_transpose``, differentiable to any order.

    Args:
        x: float32 tensor of shape (batch, height, width, channels), or (batch, channels, height,
            width) with ``data_format="channels_first"``. Any dimension may be unknown in a graph.
        w: float32 tensor of shape (rows, columns, filters, channels).
        strides: an integer, or a pair for height and width.
        padding: ``"valid"`` or ``"same"``.
        output_padding: None, an integer, or a pair for height and width, below the strides: what
            Keras adds to the output's height and width.
        dilation_rate: an integer, or a pair for height and width.
        data_format: ``"channels_last"`` or ``"channels_first"``, of ``x`` and of the result.

    Returns:
        A float32 tensor of shape (batch, new_height, new_width, filters), or (batch, filters,
        new_height, new_width) with ``data_format="channels_first"``.

    Raises:
        TypeError, ValueError: where an option is none of those above.
        tf.errors.InvalidArgumentError: where the shapes do not fit each other. In a graph it is
            raised when the graph runs.
    """
    x, w, _ = _tensors(x, w, None)
    attributes = _conv2d_options(strides, padding, dilation_rate, None, data_format)
    if attributes["padding"] == "EXPLICIT":
        raise ValueError(f"`padding` must be 'valid' or 'same'. Received: padding={padding!r}")
    if w.shape.rank != 4 or None in w.shape[:2]:
        raise ValueError(
            "The filter `w` must have 4 dimensions, of which the first two are known. "
            f"Received: w.shape={w.shape}"
        )
    added: tuple[int | None, int | None] = (None, None)
    if output_padding is not None:
        added = normalize_pair(output_padding, "output_padding")
    attributes["output_offset"] = [
        _transpose_offset((taps - 1) * dilation + 1, stride, attributes["padding"], extra)
        for taps, dilation, stride, extra in zip(
            w.shape[:2], attributes["dilations"], attributes["strides"], added, strict=True
        )
    ]
    return _conv2d_transpose(x, w, attributes)


def _transpose_offset(window: int, stride: int, padding: str, output_padding: int | None) -> int:
    """What Keras's rule for the output's extent adds to the input's extent times the stride."""
    if padding == "VALID":
        return (
            max(window - stride, 0)
            if output_padding is None
            else (window - stride + output_padding)
        )
    return 0 if output_padding is None else window % 2 - stride + output_padding


# --- arguments to attributes ----------------------------------------------------------------------


def _layout(data_format: str) -> str:
    return "NCHW" if normalize_data_format(data_format) == "channels_first" else "NHWC"


def _padding_attributes(padding: Padding) -> Attributes:
    kind, sides = normalize_padding(padding)
    return {"padding": kind.upper(), "explicit_paddings": sides}


def _conv2d_options(
    strides: IntegerOrPair,
    padding: Padding,
    dilation_rate: IntegerOrPair,
    activation: str | None,
    data_format: str,
) -> Attributes:
    _follow_tensorflow_threads()
    return {
        "strides": normalize_pair(strides, "strides"),
        "dilations": normalize_pair(dilation_rate, "dilation_rate"),
        "activation": normalize_activation(activation).upper(),
        "data_format": _layout(data_format),
        **_padding_attributes(padding),
    }


def _tensors(
    x: tf.Tensor, w: tf.Tensor, bias: tf.Tensor | None
) -> tuple[tf.Tensor, tf.Tensor, list[tf.Tensor]]:
    x, w = tf.convert_to_tensor(x), tf.convert_to_tensor(w)
    return x, w, [] if bias is None else [tf.convert_to_tensor(bias)]


def _pool_options(
    pool_size: IntegerOrPair, strides: IntegerOrPair | None, padding: Padding, data_format: str
) -> Attributes:
    _follow_tensorflow_threads()
    return {
        "pool_size": normalize_pair(pool_size, "pool_size"),
        "strides": normalize_pair(pool_size if strides is None else strides, "strides"),
        "data_format": _layout(data_format),
        **_padding_attributes(padding),
    }


def _global_pool_options(data_format: str) -> Attributes:
    """The window (0, 0) is all of the image."""
    _follow_tensorflow_threads()
    return {
        "pool_size": _WHOLE_IMAGE,
        "strides": (1, 1),
        "data_format": _layout(data_format),
        **_padding_attributes("valid"),
    }


@functools.cache
def _follow_tensorflow_threads() -> None:
    """Takes over TensorFlow's intra-op setting, unless fastconv was told a number of its own.

    Runs at the first call rather than at import, for until then the setting may change; after it
    TensorFlow allows no change either.
    """
    threads = tf.config.threading.get_intra_op_parallelism_threads()
    if threads > 0 and _core.num_threads_is_default():
        fastconv.set_num_threads(threads)


# --- output shapes --------------------------------------------------------------------------------
# TensorFlow's C API shows an op's shape function no attributes, so shapes are set here.


def _spatial_axes(attributes: Attributes) -> tuple[int, int]:
    return (2, 3) if attributes["data_format"] in ("NCHW", b"NCHW") else (1, 2)


def _channel_axis(attributes: Attributes) -> int:
    return 1 if attributes["data_format"] in ("NCHW", b"NCHW") else 3


def _windowed(
    axis: int, window: int | None, stride: int, padding: str, before: int, after: int
) -> Extent | None:
    """The output extent of a window that slides along one axis of input 0; None if unknown."""
    if window is None or stride < 1:
        return None
    if padding == "SAME":
        return Extent(0, axis, plus=stride - 1, over=stride)
    return Extent(0, axis, plus=before + after - window, over=stride, then=1)


def _arranged(
    batch: Extent, channels: Extent, extents: Iterable[Extent | int | None], attributes: Attributes
) -> list[Extent | int | None]:
    """(batch, *extents, channels), in the layout of ``attributes``."""
    if _channel_axis(attributes) == 1:
        return [batch, channels, *extents]
    return [batch, *extents, channels]


def _windows_of(
    window: Sequence[int | None], channels: Extent, attributes: Attributes
) -> list[Extent | int | None]:
    """The extents that windows of (rows, columns) make of input 0."""
    top, bottom, left, right = attributes["explicit_paddings"]
    padding = tf.compat.as_str(attributes["padding"])
    axes = zip(
        _spatial_axes(attributes),
        window,
        attributes["strides"],
        ((top, bottom), (left, right)),
        strict=True,
    )
    extents = [_windowed(axis, taps, stride, padding, *sides) for axis, taps, stride, sides in axes]
    return _arranged(Extent(0, 0), channels, extents, attributes)


def _conv2d_extents(w: tf.Tensor, attributes: Attributes) -> Extents:
    if w.shape.rank != 4:
        return None
    window = [
        None if taps is None else (taps - 1) * dilation + 1
        for taps, dilation in zip(w.shape[:2], attributes["dilations"], strict=True)
    ]
    return _windows_of(window, Extent(1, 3), attributes)


def _transpose_extents(attributes: Attributes) -> Extents:
    rows, columns = (
        Extent(0, axis, times=stride, plus=offset)
        for axis, stride, offset in zip(
            _spatial_axes(attributes),
            attributes["strides"],
            attributes["output_offset"],
            strict=True,
        )
    )
    return _arranged(Extent(0, 0), Extent(1, 2), (rows, columns), attributes)


def _pool_extents(attributes: Attributes) -> Extents:
    channels = Extent(0, _channel_axis(attributes))
    if tuple(attributes["pool_size"]) == _WHOLE_IMAGE:
        return _arranged(Extent(0, 0), channels, (1, 1), attributes)
    return _windows_of(attributes["pool_size"], channels, attributes)


# --- ops, and XLA's calls of the same kernels -----------------------------------------------------


def _run(
    name: str,
    inputs: Sequence[tf.Tensor | list[tf.Tensor]],
    attributes: Attributes,
    outputs: Outputs,
    **own_attributes: Any,
) -> list[tf.Tensor]:
    """The outputs of the op ``name``, a list.

    ``outputs`` holds the data type and the extents of each; no extents where not even the rank is
    known. ``own_attributes`` are those that TensorFlow alone asks for.
    """
    flat = tf.nest.flatten(inputs)
    if inside_xla() and xla.available():
        return _run_inside_xla(name, flat, attributes, outputs)
    function = _op_functions[name.lower()]
    results: list[tf.Tensor] = tf.nest.flatten(function(*inputs, **attributes, **own_attributes))
    if not tf.executing_eagerly():
        for result, (_, extents) in zip(results, outputs, strict=True):
            result.set_shape(tf.TensorShape(static_extents(extents, flat)))
    return results


@dataclass(frozen=True)
class _Call:
    """A call inside XLA, as the gradient functions below see an op."""

    inputs: Sequence[tf.Tensor]
    outputs: list[tf.Tensor]
    attributes: Attributes

    def get_attr(self, name: str) -> Any:
        return self.attributes[name]


# What the gradient functions below are given and give.
Op: TypeAlias = "tf.Operation | _Call"
Gradients: TypeAlias = "list[tf.Tensor | None]"
Gradient: TypeAlias = "Callable[..., tf.Tensor | Gradients]"


def _run_inside_xla(
    name: str, inputs: Sequence[tf.Tensor], attributes: Attributes, outputs: Outputs
) -> list[tf.Tensor]:
    @tf.custom_gradient
    def run(*inputs: tf.Tensor) -> tuple[list[tf.Tensor], Gradient]:
        results = xla.call(name, inputs, attributes, outputs)

        def gradient(*upstream: tf.Tensor) -> Gradients:
            return _gradients[name](_Call(inputs, results, attributes), *upstream)

        return results, gradient

    results: list[tf.Tensor] = tf.nest.flatten(run(*inputs))
    return results


_gradients: dict[str, Gradient] = {}


def _gradient_of(name: str) -> Callable[[Gradient], Gradient]:
    """Decorator: the function is the gradient of the op ``name``, in TensorFlow and in XLA."""

    def register(function: Gradient) -> Gradient:
        _gradients[name] = function
        tf.RegisterGradient(name)(function)
        return function

    return register


# --- convolution and its gradients ----------------------------------------------------------------


_CALL = "_fastconv_call"  # attribute of a tensor in a graph: the _Conv2dCall that made it


@dataclass(frozen=True)
class _Conv2dCall:
    graph: Any
    x: tf.Tensor
    w: tf.Tensor
    bias: list[tf.Tensor]
    attributes: Attributes


def _conv2d(x: tf.Tensor, w: tf.Tensor, bias: list[tf.Tensor], attributes: Attributes) -> tf.Tensor:
    outputs = [(tf.float32, _conv2d_extents(w, attributes))]
    y = _run("FastconvConv2D", (x, w, bias), attributes, outputs)[0]
    if not tf.executing_eagerly():
        graph = tf.compat.v1.get_default_graph()
        setattr(y, _CALL, _Conv2dCall(graph, x, w, bias, attributes))
    return y


def _conv2d_grad_input(
    x: tf.Tensor, w: tf.Tensor, dy: tf.Tensor, mask: list[tf.Tensor], attributes: Attributes
) -> tf.Tensor:
    outputs = [(tf.float32, like(0))]
    return _run("FastconvConv2DGradInput", (x, w, dy, mask), attributes, outputs)[0]


def _conv2d_grad_filter(
    x: tf.Tensor,
    w: tf.Tensor,
    dy: tf.Tensor,
    mask: list[tf.Tensor],
    attributes: Attributes,
    num_bias: int = 0,
) -> list[tf.Tensor]:
    """The gradients of the filter and of each bias."""
    filters: Extents = [Extent(1, 3)]
    outputs = [(tf.float32, like(1)), *[(tf.float32, filters)] * num_bias]
    return _run(
        "FastconvConv2DGradFilter", (x, w, dy, mask), attributes, outputs, num_bias=num_bias
    )


def _conv2d_transpose(x: tf.Tensor, w: tf.Tensor, attributes: Attributes) -> tf.Tensor:
    outputs = [(tf.float32, _transpose_extents(attributes))]
    return _run("FastconvConv2DTranspose", (x, w), attributes, outputs)[0]


def _attributes(op: Op, *own: str) -> Attributes:
    names = ("strides", "padding", "explicit_paddings", "data_format", *own)
    return {name: op.get_attr(name) for name in names}


def _conv2d_attributes(op: Op) -> Attributes:
    return _attributes(op, "dilations", "activation")


def _is_relu(attributes: Attributes) -> bool:
    return attributes["activation"] in ("RELU", b"RELU")


def _linear(attributes: Attributes) -> Attributes:
    return {**attributes, "activation": "LINEAR"}


def _masked(gradient: tf.Tensor, mask: list[tf.Tensor]) -> tf.Tensor:
    """``gradient`` where the ReLU let the value through. The mask itself has no gradient."""
    return tf.raw_ops.ReluGrad(gradients=gradient, features=mask[0]) if mask else gradient


def _skipped(op: Op) -> Collection[int]:
    """The inputs whose gradient nobody wants. Only a tape knows; a graph prunes what is not used."""
    return getattr(op, "skip_input_indices", None) or ()


@_gradient_of("FastconvConv2D")
def _conv2d_gradient(op: Op, dy: tf.Tensor) -> Gradients:
    x, w, *bias = op.inputs
    attributes = _conv2d_attributes(op)
    mask = [op.outputs[0]] if _is_relu(attributes) else []
    skipped = _skipped(op)
    dx = dw = None
    dbias = [None] * len(bias)
    if 0 not in skipped:
        dx = _conv2d_grad_input(x, w, dy, mask, attributes)
    if not set(range(1, len(op.inputs))).issubset(skipped):
        dw, *dbias = _conv2d_grad_filter(x, w, dy, mask, attributes, num_bias=len(bias))
    return [dx, dw, *dbias]


@_gradient_of("FastconvConv2DGradInput")
def _conv2d_grad_input_gradient(op: Op, ddx: tf.Tensor) -> Gradients:
    # dx is linear in w and in dy; of x only the shape matters.
    _, w, dy, *mask = op.inputs
    attributes = _conv2d_attributes(op)
    (dw,) = _conv2d_grad_filter(ddx, w, dy, mask, attributes)
    ddy = _masked(_conv2d(ddx, w, [], _linear(attributes)), mask)
    return [None, dw, ddy, *[None] * len(mask)]


@_gradient_of("FastconvConv2DGradFilter")
def _conv2d_grad_filter_gradient(op: Op, ddw: tf.Tensor, *ddbias: tf.Tensor) -> Gradients:
    # dw is linear in x and in dy, and so is dbias in dy; of w only the shape matters.
    x, _, dy, *mask = op.inputs
    attributes = _conv2d_attributes(op)
    dx = _conv2d_grad_input(x, ddw, dy, mask, attributes)
    ddy = _masked(_conv2d(x, ddw, list(ddbias), _linear(attributes)), mask)
    return [dx, None, ddy, *[None] * len(mask)]


@_gradient_of("FastconvConv2DTranspose")
def _conv2d_transpose_gradient(op: Op, dy: tf.Tensor) -> Gradients:
    # The transpose of the transpose is the convolution that it was named after.
    x, w = op.inputs
    attributes = _conv2d_attributes(op)
    (dw,) = _conv2d_grad_filter(dy, w, x, [], attributes)
    return [_conv2d(dy, w, [], attributes), dw]


# --- pooling and its gradients --------------------------------------------------------------------


def _max_pool2d(x: tf.Tensor, attributes: Attributes) -> tf.Tensor:
    outputs = [(tf.float32, _pool_extents(attributes))]
    return _run("FastconvMaxPool2D", (x,), attributes, outputs)[0]


def _max_pool2d_with_argmax(x: tf.Tensor, attributes: Attributes) -> list[tf.Tensor]:
    rows, columns = attributes["pool_size"]
    argmax_type = tf.uint8 if rows * columns <= _LARGEST_BYTE_WINDOW else tf.int32
    extents = _pool_extents(attributes)
    outputs = [(tf.float32, extents), (argmax_type, extents)]
    return _run("FastconvMaxPool2DWithArgmax", (x,), attributes, outputs, Targmax=argmax_type)


def _max_pool2d_grad(
    x: tf.Tensor, argmax: tf.Tensor, dy: tf.Tensor, attributes: Attributes
) -> tf.Tensor:
    outputs = [(tf.float32, like(0))]
    return _run("FastconvMaxPool2DGrad", (x, argmax, dy), attributes, outputs)[0]


def _max_pool2d_grad_grad(ddx: tf.Tensor, argmax: tf.Tensor, attributes: Attributes) -> tf.Tensor:
    outputs = [(tf.float32, like(1))]
    return _run("FastconvMaxPool2DGradGrad", (ddx, argmax), attributes, outputs)[0]


def _pool_attributes(op: Op) -> Attributes:
    return _attributes(op, "pool_size")


@_gradient_of("FastconvMaxPool2D")
def _max_pool2d_gradient(op: Op, dy: tf.Tensor) -> tf.Tensor:
    x = op.inputs[0]
    attributes = _pool_attributes(op)
    if tuple(attributes["pool_size"]) == _WHOLE_IMAGE:
        return _global_max_pool2d_grad(x, op.outputs[0], dy, attributes)
    _, argmax = _max_pool2d_with_argmax(x, attributes)
    return _max_pool2d_grad(x, argmax, dy, attributes)


@_gradient_of("FastconvMaxPool2DWithArgmax")
def _max_pool2d_with_argmax_gradient(op: Op, dy: tf.Tensor, _: tf.Tensor) -> tf.Tensor:
    return _max_pool2d_grad(op.inputs[0], op.outputs[1], dy, _pool_attributes(op))


@_gradient_of("FastconvMaxPool2DGrad")
def _max_pool2d_grad_gradient(op: Op, ddx: tf.Tensor) -> Gradients:
    # dx is linear in dy; of x only the shape matters.
    _, argmax, _ = op.inputs
    return [None, None, _max_pool2d_grad_grad(ddx, argmax, _pool_attributes(op))]


@_gradient_of("FastconvMaxPool2DGradGrad")
def _max_pool2d_grad_grad_gradient(op: Op, dddy: tf.Tensor) -> Gradients:
    ddx, argmax = op.inputs
    return [_max_pool2d_grad(ddx, argmax, dddy, _pool_attributes(op)), None]


def _global_max_pool2d_grad(
    x: tf.Tensor, y: tf.Tensor, dy: tf.Tensor, attributes: Attributes
) -> tf.Tensor:
    """As tf.reduce_max, the stock layer's op, has it: equal maxima get equal shares."""
    chosen = tf.cast(tf.equal(x, y), x.dtype)
    number = tf.reduce_sum(chosen, axis=_spatial_axes(attributes), keepdims=True)
    return chosen / number * dy


def _avg_pool2d(x: tf.Tensor, attributes: Attributes) -> tf.Tensor:
    outputs = [(tf.float32, _pool_extents(attributes))]
    return _run("FastconvAveragePool2D", (x,), attributes, outputs)[0]


def _avg_pool2d_grad(x: tf.Tensor, dy: tf.Tensor, attributes: Attributes) -> tf.Tensor:
    outputs = [(tf.float32, like(0))]
    return _run("FastconvAveragePool2DGrad", (x, dy), attributes, outputs)[0]


@_gradient_of("FastconvAveragePool2D")
def _avg_pool2d_gradient(op: Op, dy: tf.Tensor) -> tf.Tensor:
    return _avg_pool2d_grad(op.inputs[0], dy, _pool_attributes(op))


@_gradient_of("FastconvAveragePool2DGrad")
def _avg_pool2d_grad_gradient(op: Op, ddx: tf.Tensor) -> Gradients:
    # dx is linear in dy; of x only the shape matters.
    return [None, _avg_pool2d(ddx, _pool_attributes(op))]


# --- convolution and pooling in one ---------------------------------------------------------------


def _halved(extent: Extent | int | None) -> Extent | int | None:
    if isinstance(extent, Extent):
        # (a // over + then) // 2 is (a + then * over) // (2 * over)
        return extent._replace(
            plus=extent.plus + extent.then * extent.over, over=2 * extent.over, then=0
        )
    return None if extent is None else extent // 2


def _conv2d_pool_extents(w: tf.Tensor, attributes: Attributes) -> Extents:
    extents = _conv2d_extents(w, attributes)
    if extents is None:
        return None
    spatial = _spatial_axes(attributes)
    return [_halved(e) if axis in spatial else e for axis, e in enumerate(extents)]


def _conv2d_max_pool2d(
    x: tf.Tensor, w: tf.Tensor, bias: list[tf.Tensor], attributes: Attributes, num_argmax: int
) -> list[tf.Tensor]:
    """[y], or [y, argmax]."""
    extents = _conv2d_pool_extents(w, attributes)
    outputs = [(tf.float32, extents), *[(tf.uint8, extents)] * num_argmax]
    return _run("FastconvConv2DMaxPool2D", (x, w, bias), attributes, outputs, num_argmax=num_argmax)


def _conv2d_max_pool2d_grad(
    x: tf.Tensor,
    w: tf.Tensor,
    dy: tf.Tensor,
    y: tf.Tensor,
    argmax: tf.Tensor,
    attributes: Attributes,
    num_dx: int,
    num_bias: int,
) -> tuple[list[tf.Tensor], tf.Tensor, list[tf.Tensor]]:
    """([dx], dw, [dbias])"""
    filters: Extents = [Extent(1, 3)]
    outputs = [
        (tf.float32, like(1)),
        *[(tf.float32, like(0))] * num_dx,
        *[(tf.float32, filters)] * num_bias,
    ]
    dw, *others = _run(
        "FastconvConv2DMaxPool2DGrad",
        (x, w, dy, y, argmax),
        {**attributes, "wanted": (num_dx, num_bias)},
        outputs,
        num_dx=num_dx,
        num_bias=num_bias,
    )
    return others[:num_dx], dw, others[num_dx:]


@_gradient_of("FastconvConv2DMaxPool2D")
def _conv2d_max_pool2d_gradient(op: Op, dy: tf.Tensor, *_: tf.Tensor) -> Gradients:
    x, w, *bias = op.inputs
    attributes = _conv2d_attributes(op)
    y, *argmax = op.outputs
    if not argmax:
        y, *argmax = _conv2d_max_pool2d(x, w, bias, attributes, 1)
    dx, dw, dbias = _conv2d_max_pool2d_grad(
        x, w, dy, y, argmax[0], attributes, int(0 not in _skipped(op)), len(bias)
    )
    return [*(dx or [None]), dw, *dbias]


@_gradient_of("FastconvConv2DMaxPool2DGrad")
def _conv2d_max_pool2d_grad_gradient(op: Op, *upstream: tf.Tensor) -> Gradients:
    # Once more by the ops that it is made of, each of which knows its own gradient.
    x, w, dy, y, argmax = op.inputs
    attributes = _conv2d_attributes(op)
    num_dx, num_bias = op.get_attr("wanted")
    window = {
        "pool_size": (2, 2),
        "strides": (2, 2),
        "data_format": attributes["data_format"],
        **_padding_attributes("valid"),
    }
    with tf.GradientTape() as tape:
        tape.watch([x, w, dy])
        through = _masked(dy, [y] if _is_relu(attributes) else [])
        # Of the convolution's output the pooling's gradient takes the shape alone.
        whole = tf.stop_gradient(_conv2d(x, w, [], _linear(attributes)))
        dz = _max_pool2d_grad(whole, argmax, through, window)
        linear = _linear(attributes)
        dw, *dbias = _conv2d_grad_filter(x, w, dz, [], linear, num_bias=num_bias)
        dx = [_conv2d_grad_input(x, w, dz, [], linear)] * num_dx
    outputs = [dw, *dx, *dbias]
    gradients = tape.gradient(
        outputs, [x, w, dy], list(upstream), unconnected_gradients=tf.UnconnectedGradients.ZERO
    )
    return [*gradients, None, None]
