"""fastconv's operations on TensorFlow tensors: eager, in ``tf.function``, differentiable.

The kernels are TensorFlow ops of the library ``libfastconv_tensorflow`` beside this package. They
compute on the CPU, in float32; importing this module loads and registers them, after which a
SavedModel that holds them can be loaded as well. Where a docstring says float32, tensors may be of
float16 or bfloat16 as well, all of a call of one of them, and so is the result, which is rounded
once; batch normalisation and what XLA compiles for a GPU are of float32 alone. In a graph that XLA
will compile, the same kernels are called as ``fastconv.adapters.xla`` does it. ``inside_xla()`` tells
whether the graph under construction goes there. It cannot tell of a ``tf.function`` that is traced now and called from a
compiled one later; TensorFlow refuses to compile that one.
"""

from __future__ import annotations

import abc
import ctypes
import dataclasses
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
from fastconv.adapters import _operations, xla
from fastconv.adapters._extents import static_extents

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from fastconv._arguments import IntegerOrPair, Padding
    from fastconv.adapters._extents import Attributes, Outputs

__all__ = [
    "activated_in_one",
    "added_in_one",
    "avg_pool2d",
    "batch_norm",
    "batch_norm_inference",
    "conv2d",
    "conv2d_int8",
    "conv2d_max_pool2d",
    "conv2d_transpose",
    "global_avg_pool2d",
    "global_max_pool2d",
    "inside_xla",
    "kept_filters",
    "makes_graph",
    "mark_padded",
    "max_pool2d",
    "normalized_in_one",
    "ops_executed",
    "pooled_in_one",
    "scaled_in_one",
    "squeezed",
]

_LIBRARY = Path(__file__).parent.parent / (
    "libfastconv_tensorflow.so" if sys.platform != "darwin" else "libfastconv_tensorflow.dylib"
)


def _load_ops() -> tuple[Any, ctypes.CDLL]:
    ops = tf.load_op_library(str(_LIBRARY))
    symbols = ctypes.CDLL(str(_LIBRARY))
    symbols.fastconv_tensorflow_load_error.restype = ctypes.c_char_p
    symbols.fastconv_tensorflow_op_name.restype = ctypes.c_char_p
    symbols.fastconv_tensorflow_op_name.argtypes = [ctypes.c_size_t]
    symbols.fastconv_tensorflow_op_executions.restype = ctypes.c_uint64
    symbols.fastconv_tensorflow_op_executions.argtypes = [ctypes.c_size_t]
    symbols.fastconv_tensorflow_kept_filters.restype = ctypes.c_uint64
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


def kept_filters() -> int:
    """How many runs of convolutions so far found their filter as an earlier run had laid it out."""
    return int(_symbols.fastconv_tensorflow_kept_filters())


def makes_graph() -> bool:
    """Whether ops created now become part of a graph."""
    return not tf.executing_eagerly()


def inside_xla() -> bool:
    """Whether ops created now become part of an XLA computation, such as jit_compile=True makes."""
    if tf.executing_eagerly():
        return False
    graph = framework_ops.get_default_graph()
    return bool(control_flow_util.GraphOrParentsInXlaContext(graph))


def supports_jit() -> bool:
    """Whether models with our kernels may be compiled by XLA."""
    return bool(_gpus()) or xla.available()


def dtypes() -> tuple[str, ...]:
    """The data types that the layers may leave to us."""
    return ("float32",) if _gpus() else _operations.DTYPES


def reason_against_kind(x: object) -> str | None:
    """Why the kernels cannot take ``x``, whatever its shape and data type; None if they can."""
    if not isinstance(x, tf.Tensor):
        return f"the input is a {type(x).__name__}, not a dense tensor of TensorFlow's"
    return None


def reason_against_place(x: object) -> str | None:
    """Why the kernels cannot run where ``x`` is; None if they can."""
    del x
    reason = reason_against_all()
    if reason is not None:
        return reason
    if _gpus() and not inside_xla():
        return "TensorFlow sees a GPU, where the kernels run inside XLA alone (jit_compile=True)"
    if inside_xla() and not xla.available():
        return (
            "the graph is compiled by XLA, inside which the kernels cannot run here: "
            f"{xla.reason_unavailable()}"
        )
    return None


def reason_against_all() -> str | None:
    """Why the kernels serve nothing in this process, as far as it is known; None if they may."""
    reason = xla.reason_against_gpus() if _gpus() else None
    if reason is not None:
        return f"TensorFlow sees a GPU, on which the kernels cannot run here: {reason}"
    return None


def place() -> str:
    """Where the kernels compute, in words."""
    return "the GPU, inside XLA" if _gpus() else "the CPU"


def _gpus() -> list[Any]:
    gpus: list[Any] = tf.config.get_visible_devices("GPU")
    return gpus


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
    attributes = _operations.conv2d_attributes(
        strides, padding, dilation_rate, activation, data_format
    )
    return _conv2d(_tensors(x, w, bias), attributes)


def conv2d_int8(
    x: tf.Tensor,
    w: tf.Tensor,
    w_scale: tf.Tensor,
    bias: tf.Tensor | None = None,
    *,
    strides: IntegerOrPair = 1,
    padding: Padding = "valid",
    dilation_rate: IntegerOrPair = 1,
    activation: str | None = None,
    data_format: str = "channels_last",
) -> tf.Tensor:
    """2-D convolution of int8, for inference: ``fastconv.conv2d_int8`` of tensors, on the CPU.

    Its gradients by ``x`` and ``bias`` are those of the convolution of float32 with the filters that
    ``w`` and ``w_scale`` stand for; ``w`` and ``w_scale`` have none.

    Args:
        x: float32 tensor as of ``conv2d``.
        w, w_scale: int8 tensor of shape (rows, columns, channels / groups, filters), and float32 tensor
            of shape (filters,): filters and scales as ``fastconv.quantize_filter`` returns them.
        bias, strides, padding, dilation_rate, activation, data_format: as for ``conv2d``.

    Returns:
        A float32 tensor as ``conv2d`` returns it.

    Raises:
        TypeError, ValueError: where an option is none of those above.
        tf.errors.InvalidArgumentError: where the shapes do not fit each other, or a filter has more than
            131072 taps times channels. In a graph it is raised when the graph runs.
    """
    attributes = _operations.conv2d_attributes(
        strides, padding, dilation_rate, activation, data_format
    )
    return _framework.run_one(_operations.CONV2D_INT8, _tensors(x, w, w_scale, bias), attributes)


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
    attributes = _operations.conv2d_attributes(
        strides, padding, dilation_rate, activation, data_format
    )
    return _conv2d_max_pool2d(_tensors(x, w, bias), attributes, keep_argmax)


def pooled_in_one(y: tf.Tensor, *, keep_argmax: bool = False) -> tf.Tensor | None:
    """What ``max_pool2d(y, 2)`` gives, by ``conv2d_max_pool2d``, where that can take y's place.

    Args:
        y: a tensor. Only of a result of ``conv2d`` in a graph under construction can the convolution
            still be replaced: it is left out of the graph's execution if nothing else reads it.
        keep_argmax: as for ``max_pool2d``.

    Returns:
        A tensor as ``conv2d_max_pool2d`` returns it, or None.
    """
    call = _replaceable(y)
    if call is None or call.epsilon is not None or call.squeezed is not None:
        return None
    return _conv2d_max_pool2d(call.inputs, call.attributes, keep_argmax)


def normalized_in_one(
    y: tf.Tensor,
    mean: tf.Tensor,
    variance: tf.Tensor,
    *,
    scale: tf.Tensor | None = None,
    offset: tf.Tensor | None = None,
    epsilon: float,
) -> tf.Tensor | None:
    """``(y - mean) / sqrt(variance + epsilon) * scale + offset``, as ``scaled_in_one``.

    Args:
        y: a tensor; see ``scaled_in_one``.
        mean, variance, scale, offset: float32 tensors of shape (filters,), or variables; the last two
            may be None.
        epsilon: a number above 0.

    Returns:
        A tensor of ``y``'s shape, or None.
    """
    call = _scalable(y)
    if call is None:
        return None
    _, _, *bias = call.inputs
    return call.scaled([*_normalization(mean, variance, scale, offset), *bias], epsilon)


def scaled_in_one(y: tf.Tensor, scale: tf.Tensor, offset: tf.Tensor) -> tf.Tensor | None:
    """``y * scale + offset`` by the convolution that made ``y``, where that can take its place.

    The filters are scaled as the kernel packs them, so that it costs nothing. Differentiable to any
    order.

    Args:
        y: a tensor. Only a result of ``conv2d`` without an activation, in a graph under construction
            outside XLA, can be replaced; the convolution is left out of the graph's execution if
            nothing else reads it.
        scale, offset: float32 tensors of shape (filters,).

    Returns:
        A tensor of ``y``'s shape, or None.
    """
    call = _scalable(y)
    if call is None:
        return None
    _, _, *bias = call.inputs
    if bias:
        offset += bias[0] * scale
    return call.scaled([scale, offset])


def added_in_one(y: tf.Tensor, residual: tf.Tensor) -> tf.Tensor | None:
    """``y + residual`` by the op that made ``y``, where that can take its place.

    Args:
        y: a tensor. Only a result of ``conv2d`` without an activation, outside XLA, of
            ``scaled_in_one``, ``batch_norm`` or ``batch_norm_inference`` can be replaced.
        residual: a float32 tensor of ``y``'s shape.

    Returns:
        A tensor of ``y``'s shape, or None.
    """
    call = _extensible(y)
    plain = _replaceable(y) if call is None else None
    if plain is not None:
        filters = tf.shape(plain.inputs[1])[3]
        scaled = scaled_in_one(y, tf.ones(filters), tf.zeros(filters))
        call = None if scaled is None else _made_by(scaled)
    if call is None or call.residual is not None:
        return None
    if call.squeezed is not None:
        residual = tf.expand_dims(residual, call.squeezed)
    return call.replaced(residual=residual)


def activated_in_one(y: tf.Tensor, activation: str = "relu") -> tf.Tensor | None:
    """An activation of ``y`` by the op that made ``y``, where that can take its place.

    Args:
        y: a tensor. Only a result of ``scaled_in_one``, ``batch_norm``, ``batch_norm_inference`` or
            ``added_in_one`` can be replaced; of a sum with ``batch_norm``'s, by a ReLU alone.
        activation: ``"relu"``, ``"relu6"``, ``"silu"`` or ``"hard_silu"``.

    Returns:
        A tensor of ``y``'s shape, or None.
    """
    call = _extensible(y)
    if call is None or not call.can_be_activated(activation.upper()):
        return None
    return call.replaced(attributes={**call.attributes, "activation": activation.upper()})


def squeezed(y: tf.Tensor, axis: int) -> tf.Tensor:
    """``y`` without its axis ``axis``, of extent 1, which can be replaced as ``y`` could."""
    call = _made_by(y)
    return tf.squeeze(y, [axis]) if call is None else call.without(axis).marked(y)


def batch_norm(
    x: tf.Tensor, gamma: tf.Tensor | None, beta: tf.Tensor | None, *, epsilon: float
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """Batch normalisation by ``x``'s own moments, differentiable to any order; not inside XLA.

    In a graph under construction the result can still be replaced by one to which ``added_in_one``
    adds and that ``activated_in_one`` activates.

    Args:
        x: float32 tensor of shape (batch, height, width, channels).
        gamma, beta: float32 tensors of shape (channels,), or variables; None for 1 and 0.
        epsilon: a number above 0.

    Returns:
        ``(x - mean) / sqrt(variance + epsilon) * gamma + beta``, and the mean and variance of each
        channel, of shape (channels,).

    Raises:
        tf.errors.InvalidArgumentError: where the shapes do not fit each other. In a graph it is
            raised when the graph runs.
    """
    (x,) = _tensors(x)
    mean, variance = _framework.run(_operations.BATCH_NORM_MOMENTS, [x], {})
    y = _batch_norm(_operations.BATCH_NORM, x, mean, variance, gamma, beta, epsilon)
    return y, mean, variance


def batch_norm_inference(
    x: tf.Tensor,
    mean: tf.Tensor,
    variance: tf.Tensor,
    gamma: tf.Tensor | None,
    beta: tf.Tensor | None,
    *,
    epsilon: float,
) -> tf.Tensor:
    """Batch normalisation by given moments, in one pass, differentiable to any order; not inside XLA.

    In a graph under construction the result can still be replaced, as that of ``batch_norm``.

    Args:
        x: float32 tensor of shape (batch, height, width, channels).
        mean, variance: float32 tensors of shape (channels,), or variables.
        gamma, beta: likewise; None for 1 and 0.
        epsilon: a number above 0.

    Returns:
        ``(x - mean) / sqrt(variance + epsilon) * gamma + beta``.

    Raises:
        tf.errors.InvalidArgumentError: where the shapes do not fit each other. In a graph it is
            raised when the graph runs.
    """
    return _batch_norm(_operations.BATCH_NORM_INFERENCE, x, mean, variance, gamma, beta, epsilon)


def _normalization(
    mean: tf.Tensor, variance: tf.Tensor, gamma: tf.Tensor | None, beta: tf.Tensor | None
) -> list[tf.Tensor]:
    gamma = tf.ones_like(mean) if gamma is None else gamma
    beta = tf.zeros_like(mean) if beta is None else beta
    return _tensors(mean, variance, gamma, beta)


def _batch_norm(
    name: str,
    x: tf.Tensor,
    mean: tf.Tensor,
    variance: tf.Tensor,
    gamma: tf.Tensor | None,
    beta: tf.Tensor | None,
    epsilon: float,
) -> tf.Tensor:
    return _BatchNormCall(
        graph=None if tf.executing_eagerly() else tf.compat.v1.get_default_graph(),
        inputs=[*_tensors(x), *_normalization(mean, variance, gamma, beta)],
        attributes={"epsilon": epsilon, "activation": "LINEAR"},
        name=name,
    ).run()


def mark_padded(
    y: tf.Tensor, x: tf.Tensor, padding: Sequence[Sequence[int]], data_format: str
) -> None:
    """Notes that ``y`` is ``x`` with zeros around: a convolution of ``y`` may read ``x`` instead.

    ``conv2d`` without padding of its own does so, in a graph under construction, and so does
    ``max_pool2d`` where ``x`` comes of a ReLU: no maximum is below zero then. The padding is left out of
    the graph's execution if nothing else reads it.

    Args:
        y, x: tensors of a graph.
        padding: ``((top, bottom), (left, right))``.
        data_format: ``"channels_last"`` or ``"channels_first"``.
    """
    if not tf.executing_eagerly():
        attributes = _operations.conv2d_attributes(1, padding, 1, None, data_format)
        setattr(y, _PADDED, _Padded(tf.compat.v1.get_default_graph(), x, attributes))


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
    attributes = _operations.pool2d_attributes(pool_size, strides, padding, data_format)
    name = _operations.MAX_POOL2D_WITH_ARGMAX if keep_argmax else _operations.MAX_POOL2D
    (x,) = _tensors(x)
    padded = _padded(x, attributes)
    if padded is not None and padded.serves_max_pool(attributes):
        x, attributes = padded.x, padded.joined(attributes)
    return _framework.run(name, [x], attributes)[0]


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
    attributes = _operations.pool2d_attributes(pool_size, strides, padding, data_format)
    return _framework.run_one(_operations.AVERAGE_POOL2D, _tensors(x), attributes)


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
    attributes = _operations.global_pool2d_attributes(data_format)
    return _framework.run_one(_operations.AVERAGE_POOL2D, _tensors(x), attributes)


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
    attributes = _operations.global_pool2d_attributes(data_format)
    return _framework.run_one(_operations.MAX_POOL2D, _tensors(x), attributes)


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
    x, w = _tensors(x, w)
    filter_shape = None if w.shape.rank is None else tuple(w.shape)
    attributes = _operations.conv2d_transpose_attributes(
        filter_shape, strides, padding, output_padding, dilation_rate, data_format
    )
    return _framework.run_one(_operations.CONV2D_TRANSPOSE, [x, w], attributes)


# --- ops, and XLA's calls of the same kernels -----------------------------------------------------


class _TensorFlow(_operations.Framework):
    def run(
        self, name: str, inputs: Sequence[tf.Tensor], attributes: Attributes
    ) -> list[tf.Tensor]:
        _follow_tensorflow_threads()
        inputs = list(inputs)
        shape = inputs[1].shape if len(inputs) > 1 else None
        filter_shape = None if shape is None or shape.rank is None else tuple(shape)
        outputs = _operations.outputs(name, filter_shape, attributes, inputs[0].dtype.name)
        if inside_xla() and xla.available():
            return _run_inside_xla(name, inputs, attributes, outputs)
        return _run_op(name, inputs, attributes, outputs)

    def where_positive(self, gradient: tf.Tensor, output: tf.Tensor) -> tf.Tensor:
        return tf.raw_ops.ReluGrad(gradients=gradient, features=output)

    def shared_by_maxima(
        self, x: tf.Tensor, y: tf.Tensor, dy: tf.Tensor, axes: tuple[int, int]
    ) -> tf.Tensor:
        """As tf.reduce_max, the stock layer's op, has it."""
        chosen = tf.cast(tf.equal(x, y), x.dtype)
        return chosen / tf.reduce_sum(chosen, axis=axes, keepdims=True) * dy


_framework = _TensorFlow()


@functools.cache
def _follow_tensorflow_threads() -> None:
    """Takes over TensorFlow's intra-op setting, unless fastconv was told a number of its own.

    Runs at the first call rather than at import, for until then the setting may change; after it
    TensorFlow allows no change either.
    """
    threads = tf.config.threading.get_intra_op_parallelism_threads()
    if threads > 0 and _core.num_threads_is_default():
        fastconv.set_num_threads(threads)


# Ops whose last input is a list of none or one, by the number of inputs before it.
_INPUTS_BEFORE_THE_LIST = {
    _operations.CONV2D: 2,
    _operations.CONV2D_INT8: 3,
    _operations.CONV2D_GRAD_INPUT: 3,
    _operations.CONV2D_GRAD_FILTER: 3,
    _operations.CONV2D_MAX_POOL2D: 2,
    _operations.BATCH_NORM: 5,
    _operations.BATCH_NORM_INFERENCE: 5,
    _operations.BATCH_NORM_GRAD: 6,
}


_COUNTS = ("num_coefficients", "num_output")  # attributes that TensorFlow counts by itself

# Ops that may keep what they made of their filter, input 1, from run to run.
_KEEPS_ITS_FILTER = (
    _operations.CONV2D,
    _operations.CONV2D_SCALED,
    _operations.CONV2D_GRAD_INPUT,
    _operations.CONV2D_TRANSPOSE,
    _operations.CONV2D_MAX_POOL2D,
)
_SAME_MEMORY = ("Identity", "Reshape", "ExpandDims", "Squeeze")  # ops of TensorFlow's, of input 0


def _is_of_a_variable(tensor: tf.Tensor) -> bool:
    """Whether a tensor of a graph is a resource variable's value or a constant, perhaps of another shape.

    Nobody writes to the memory of these while an op holds on to it. What is fed to a graph or captured by it
    may be an array's that NumPy changes in place.
    """
    if tf.executing_eagerly():
        return False
    while tensor.op.type in _SAME_MEMORY:
        tensor = tensor.op.inputs[0]
    return tensor.op.type in ("ReadVariableOp", "Const")


def _run_op(
    name: str, inputs: list[tf.Tensor], attributes: Attributes, outputs: Outputs
) -> list[tf.Tensor]:
    """The outputs of the op ``name``.

    TensorFlow's C API shows an op's shape function no attributes, so shapes are set here.
    """
    arguments: list[Any] = inputs
    if name == _operations.CONV2D_SCALED:
        end = 2 + attributes["num_coefficients"]
        arguments = [*inputs[:2], inputs[2:end], inputs[end:]]
    count = _INPUTS_BEFORE_THE_LIST.get(name)
    if count is not None:
        arguments = [*inputs[:count], inputs[count:]]
    # What follows from the number of inputs.
    attributes = {key: value for key, value in attributes.items() if key not in _COUNTS}
    own: dict[str, Any] = {}
    if name in _KEEPS_ITS_FILTER:
        own["keep_filter"] = _is_of_a_variable(inputs[1])
    if name == _operations.MAX_POOL2D_WITH_ARGMAX:
        own["Targmax"] = tf.as_dtype(outputs[1][0])
    results: list[tf.Tensor] = tf.nest.flatten(
        _op_functions[name.lower()](*arguments, **attributes, **own)
    )
    if not tf.executing_eagerly():
        for result, (_, extents) in zip(results, outputs, strict=True):
            result.set_shape(tf.TensorShape(static_extents(extents, inputs)))
    return results


def _run_inside_xla(
    name: str, inputs: Sequence[tf.Tensor], attributes: Attributes, outputs: Outputs
) -> list[tf.Tensor]:
    @tf.custom_gradient
    def run(*inputs: tf.Tensor) -> tuple[list[tf.Tensor], Any]:
        results = xla.call(name, inputs, attributes, outputs)

        def gradient(*upstream: tf.Tensor) -> list[tf.Tensor | None]:
            call = _operations.Call(inputs, results, attributes)
            rule = _conv2d_int8_rule if name == _operations.CONV2D_INT8 else _operations.RULES[name]
            return rule(_framework, call, *upstream)

        return results, gradient

    results: list[tf.Tensor] = tf.nest.flatten(run(*inputs))
    return results


# --- gradients ------------------------------------------------------------------------------------


def _attributes_of(name: str, op: tf.Operation) -> dict[str, Any]:
    attributes: dict[str, Any] = {}
    for key in _operations.attribute_names(name):
        value = op.get_attr(key)
        if isinstance(value, bytes):
            value = value.decode()
        attributes[key] = tuple(value) if isinstance(value, list) else value
    return attributes


def _register_gradient(name: str, rule: _operations.Rule) -> None:
    @tf.RegisterGradient(name)
    def gradient(op: tf.Operation, *upstream: tf.Tensor) -> list[tf.Tensor | None]:
        # Only a tape knows which gradients nobody wants; a graph prunes what is not used.
        skipped = frozenset(getattr(op, "skip_input_indices", None) or ())
        call = _operations.Call(op.inputs, op.outputs, _attributes_of(name, op), skipped)
        return rule(_framework, call, *upstream)


for _name, _rule in _operations.RULES.items():
    _register_gradient(_name, _rule)


# --- convolution, which may still become one op with the pooling behind it ------------------------


# Attributes of a tensor in a graph: the _Call that made it, and the _Padded that it is.
_CALL, _PADDED = "_fastconv_call", "_fastconv_padded"
_GATED = ("SILU", "HARD_SILU")  # activations whose output does not tell their derivative


@dataclass(frozen=True)
class _Call(abc.ABC):
    """How a tensor of a graph was made."""

    graph: Any
    inputs: list[tf.Tensor]
    attributes: Attributes
    residual: tf.Tensor | None = None
    squeezed: int | None = None  # the axis, of extent 1, that the tensor lacks of the op's output

    @property
    def is_activated(self) -> bool:
        return bool(self.attributes["activation"] != "LINEAR")

    def can_be_activated(self, activation: str) -> bool:
        """Whether ``activation`` can be part of the op."""
        del activation
        return True

    @abc.abstractmethod
    def run(self) -> tf.Tensor:
        """The tensor that the call makes, which remembers the call where a graph is made."""

    def without(self, axis: int) -> _Call:
        return dataclasses.replace(self, squeezed=axis)

    def replaced(self, **changes: Any) -> tf.Tensor:
        return dataclasses.replace(self, **changes).run()

    def marked(self, y: tf.Tensor) -> tf.Tensor:
        """The call's tensor, of its op's output."""
        if self.squeezed is not None:
            y = tf.squeeze(y, [self.squeezed])
        if not tf.executing_eagerly():
            setattr(y, _CALL, self)
        return y


@dataclass(frozen=True)
class _Conv2dCall(_Call):
    """Of a convolution: x, filter and perhaps bias; where scaled, x, filter and the coefficients."""

    epsilon: float | None = None  # where scaled

    def scaled(self, coefficients: list[tf.Tensor], epsilon: float = 0.0) -> tf.Tensor:
        """By scale and offset; or by mean, variance, gamma, beta and perhaps bias."""
        return self.replaced(inputs=[*self.inputs[:2], *coefficients], epsilon=epsilon)

    def run(self) -> tf.Tensor:
        if self.epsilon is None:
            return self.marked(_framework.run_one(_operations.CONV2D, self.inputs, self.attributes))
        own = {"epsilon": self.epsilon, "num_coefficients": len(self.inputs) - 2}
        inputs = [*self.inputs, *([] if self.residual is None else [self.residual])]
        attributes = {**self.attributes, **own}
        return self.marked(_framework.run_one(_operations.CONV2D_SCALED, inputs, attributes))


@dataclass(frozen=True)
class _BatchNormCall(_Call):
    """Of a batch normalisation: x, mean, variance, gamma, beta."""

    name: str = _operations.BATCH_NORM

    def can_be_activated(self, activation: str) -> bool:
        # The gradient by x's own moments, with a residual, knows the output alone.
        own = self.name == _operations.BATCH_NORM
        return not (own and self.residual is not None and activation in _GATED)

    def run(self) -> tf.Tensor:
        residual = [] if self.residual is None else [self.residual]
        inputs = [*self.inputs, *residual]
        return self.marked(_framework.run_one(self.name, inputs, self.attributes))


@dataclass(frozen=True)
class _Padded:
    """What a tensor of a graph is: ``x`` with zeros around, as the attributes of a convolution say."""

    graph: Any
    x: tf.Tensor
    attributes: Attributes

    def joined(self, attributes: Attributes) -> dict[str, Any]:
        """``attributes``, without padding, of an operation that reads ``x`` instead."""
        sides = {key: self.attributes[key] for key in ("padding", "explicit_paddings")}
        return {**attributes, **sides}

    def serves_max_pool(self, attributes: Attributes) -> bool:
        """Whether the zeros are no maximum that ``x`` has not, and no window sees them alone."""
        call = _made_by(self.x)
        rows, columns = attributes["pool_size"]
        top, bottom, left, right = self.attributes["explicit_paddings"]
        return (
            call is not None
            and call.attributes["activation"] in ("RELU", "RELU6")
            and max(top, bottom) < rows
            and max(left, right) < columns
        )


def _padded(x: tf.Tensor, attributes: Attributes) -> _Padded | None:
    """What ``x`` was padded from, if an operation of these attributes may read that instead."""
    padded: _Padded | None = None if tf.executing_eagerly() else getattr(x, _PADDED, None)
    if padded is None or padded.graph is not tf.compat.v1.get_default_graph():
        return None
    alike = padded.attributes["data_format"] == attributes["data_format"]
    return padded if alike and attributes["padding"] == "VALID" else None


def _made_by(y: tf.Tensor) -> _Call | None:
    """The call that made ``y``, if the graph that it is part of is still under construction."""
    call: _Call | None = None if tf.executing_eagerly() else getattr(y, _CALL, None)
    if call is None or call.graph is not tf.compat.v1.get_default_graph():
        return None
    return call


def _replaceable(y: tf.Tensor) -> _Conv2dCall | None:
    """The convolution that made ``y``, if it may still be replaced."""
    call = _made_by(y)
    return call if isinstance(call, _Conv2dCall) else None


def _scalable(y: tf.Tensor) -> _Conv2dCall | None:
    """The convolution that made ``y``, if it may still scale its filters and move its bias."""
    call = _replaceable(y)
    if call is None or call.epsilon is not None or call.is_activated or inside_xla():
        return None
    return call


def _extensible(y: tf.Tensor) -> _Call | None:
    """The call that made ``y``, if it may still add and activate as well."""
    call = _made_by(y)
    if call is None or call.is_activated:
        return None
    return None if isinstance(call, _Conv2dCall) and call.epsilon is None else call


def _conv2d(inputs: list[tf.Tensor], attributes: Attributes) -> tf.Tensor:
    graph = None if tf.executing_eagerly() else tf.compat.v1.get_default_graph()
    padded = _padded(inputs[0], attributes)
    if padded is not None:
        inputs, attributes = [padded.x, *inputs[1:]], padded.joined(attributes)
    return _Conv2dCall(graph, inputs, attributes).run()


def _through_activation(
    activation: str, dy: tf.Tensor, y: tf.Tensor, value: Callable[[], tf.Tensor]
) -> tf.Tensor:
    """The gradient before an activation that gave ``y``; ``value()`` is what it was given."""
    if activation == "LINEAR":
        return dy
    if activation == "RELU":
        return tf.raw_ops.ReluGrad(gradients=dy, features=y)
    if activation == "RELU6":
        return tf.raw_ops.Relu6Grad(gradients=dy, features=y)
    z = value()
    if activation == "SILU":
        gate = tf.sigmoid(z)
        return dy * gate * (1 + z * (1 - gate))
    gate = tf.clip_by_value(z / 6 + 0.5, 0, 1)
    return dy * (gate + tf.where(tf.abs(z) <= 3, z / 6, tf.zeros_like(z)))


_GradientsOfScale: TypeAlias = "Callable[[tf.Tensor, tf.Tensor], list[tf.Tensor]]"


def _scale_of_moments(
    variance: tf.Tensor, gamma: tf.Tensor, epsilon: float
) -> tuple[tf.Tensor, _GradientsOfScale]:
    """By what batch normalisation multiplies ``x - mean`` before it adds beta.

    And, of the gradients of that and of beta, those of mean, variance, gamma and beta.
    """
    factor = tf.math.rsqrt(variance + epsilon)
    scale = gamma * factor

    def gradients(dscale: tf.Tensor, dbeta: tf.Tensor) -> list[tf.Tensor]:
        return [-dbeta * scale, -0.5 * dscale * scale * factor**2, dscale * factor, dbeta]

    return scale, gradients


def _scale_of(coefficients: list[tf.Tensor], epsilon: float) -> tuple[tf.Tensor, _GradientsOfScale]:
    """By what filters are scaled; and the coefficients' gradients, of those of scale and offset."""
    if len(coefficients) == 2:
        return coefficients[0], lambda dscale, doffset: [dscale, doffset]
    mean, variance, gamma, _, *bias = coefficients
    scale, of_moments = _scale_of_moments(variance, gamma, epsilon)

    def gradients(dscale: tf.Tensor, doffset: tf.Tensor) -> list[tf.Tensor]:
        # offset = beta + (bias - mean) * scale
        dscale += doffset * (bias[0] - mean if bias else -mean)
        return [*of_moments(dscale, doffset), *[doffset * scale for _ in bias]]

    return scale, gradients


def _conv2d_scaled_rule(
    framework: _operations.Framework, call: _operations.Call, dy: tf.Tensor
) -> list[tf.Tensor | None]:
    x, w, *others = call.inputs
    own = {key: call.attributes[key] for key in ("num_coefficients", "epsilon")}
    attributes = {key: value for key, value in call.attributes.items() if key not in own}
    coefficients, residual = others[: own["num_coefficients"]], others[own["num_coefficients"] :]
    (y,) = call.outputs
    is_relu = attributes["activation"] == "RELU"
    if not is_relu:  # which the kernels of the gradients know
        linear = {**attributes, "activation": "LINEAR"}
        dy = _through_activation(
            attributes["activation"],
            dy,
            y,
            lambda: framework.run_one(_operations.CONV2D_SCALED, call.inputs, {**linear, **own}),
        )
        attributes = linear
    scale, gradients = _scale_of(coefficients, own["epsilon"])
    mask = [y] if is_relu else []
    dx = framework.run_one(_operations.CONV2D_GRAD_INPUT, [x, w * scale, dy, *mask], attributes)
    # Of the filter its gradient takes the shape alone.
    dscaled, doffset = framework.run(
        _operations.CONV2D_GRAD_FILTER, [x, w, dy, *mask], {**attributes, "num_bias": 1}
    )
    dscale = tf.reduce_sum(dscaled * w, axis=[0, 1, 2])
    through = framework.where_positive(dy, y) if is_relu else dy
    return [dx, dscaled * scale, *gradients(dscale, doffset), *[through for _ in residual]]


_register_gradient(_operations.CONV2D_SCALED, _conv2d_scaled_rule)


# --- convolution of int8 --------------------------------------------------------------------------


def _conv2d_int8_rule(
    framework: _operations.Framework, call: _operations.Call, dy: tf.Tensor
) -> list[tf.Tensor | None]:
    x, w, scale, *bias = call.inputs
    attributes = call.attributes
    if attributes["activation"] == "RELU":
        dy = framework.where_positive(dy, call.outputs[0])
        attributes = {**attributes, "activation": "LINEAR"}
    filters = tf.cast(w, x.dtype) / scale
    dx = framework.run_one(_operations.CONV2D_GRAD_INPUT, [x, filters, dy], attributes)
    channel = _operations.channel_axis(attributes)
    others = [axis for axis in range(4) if axis != channel]
    return [dx, None, None, *[tf.reduce_sum(dy, axis=others) for _ in bias]]


_register_gradient(_operations.CONV2D_INT8, _conv2d_int8_rule)


# --- batch normalisation --------------------------------------------------------------------------


def _batch_norm_moments_rule(
    framework: _operations.Framework, call: _operations.Call, dmean: tf.Tensor, dvariance: tf.Tensor
) -> list[tf.Tensor | None]:
    del framework
    (x,) = call.inputs
    mean, _ = call.outputs
    rows = tf.cast(tf.reduce_prod(tf.shape(x)[:3]), x.dtype)
    return [(dmean + 2 * (x - mean) * dvariance) / rows]


def _batch_norm_rule(
    framework: _operations.Framework, call: _operations.Call, dy: tf.Tensor
) -> list[tf.Tensor | None]:
    residual = call.inputs[5:]
    activated = call.attributes["activation"] != "LINEAR"
    output = list(call.outputs) if residual and activated else []
    # dx counts what x does to the moments, which thus get none.
    dx, dgamma, dbeta, *dresidual = framework.run(
        _operations.BATCH_NORM_GRAD,
        [*call.inputs[:5], dy, *output],
        {**call.attributes, "num_output": len(output)},
    )
    return [dx, None, None, dgamma, dbeta, *(dresidual or [dy for _ in residual])]


def _batch_norm_inference_rule(
    framework: _operations.Framework, call: _operations.Call, dy: tf.Tensor
) -> list[tf.Tensor | None]:
    """By stock ops, of which a graph runs those alone that something reads."""
    x, mean, variance, gamma, _, *residual = call.inputs
    linear = {**call.attributes, "activation": "LINEAR"}
    dz = _through_activation(
        call.attributes["activation"],
        dy,
        call.outputs[0],
        lambda: framework.run_one(_operations.BATCH_NORM_INFERENCE, call.inputs, linear),
    )
    dbeta, dscale = (tf.reduce_sum(each, [0, 1, 2]) for each in (dz, dz * (x - mean)))
    scale, gradients = _scale_of_moments(variance, gamma, call.attributes["epsilon"])
    return [dz * scale, *gradients(dscale, dbeta), *[dz for _ in residual]]


def _batch_norm_grad_rule(
    framework: _operations.Framework, call: _operations.Call, *upstream: tf.Tensor
) -> list[tf.Tensor | None]:
    """By stock ops, for which speed does not matter."""
    del framework
    x, _, _, gamma, beta, dy, *output = call.inputs
    with tf.GradientTape() as tape:
        tape.watch([x, gamma, beta, dy])
        # Not tf.nn.moments, whose gradient leaves out what the mean does in orders above the first.
        mean = tf.reduce_mean(x, [0, 1, 2])
        variance = tf.reduce_mean((x - mean) ** 2, [0, 1, 2])
        factor = tf.math.rsqrt(variance + call.attributes["epsilon"])
        normalized = (x - mean) * factor
        value = output[0] if output else normalized * gamma + beta
        dz = _through_activation(
            call.attributes["activation"], dy, tf.stop_gradient(value), lambda: value
        )
        dbeta, dgamma = (tf.reduce_sum(each, [0, 1, 2]) for each in (dz, dz * normalized))
        rows = tf.cast(tf.reduce_prod(tf.shape(x)[:3]), x.dtype)
        dx = gamma * factor * (dz - (dbeta + normalized * dgamma) / rows)
        gradients = [dx, dgamma, dbeta, *([dz] if output else [])]
    ddx, ddgamma, ddbeta, ddy = tape.gradient(gradients, [x, gamma, beta, dy], list(upstream))
    return [ddx, None, None, ddgamma, ddbeta, ddy, *[None for _ in output]]


_register_gradient(_operations.BATCH_NORM_MOMENTS, _batch_norm_moments_rule)
_register_gradient(_operations.BATCH_NORM, _batch_norm_rule)
_register_gradient(_operations.BATCH_NORM_INFERENCE, _batch_norm_inference_rule)
_register_gradient(_operations.BATCH_NORM_GRAD, _batch_norm_grad_rule)


def _conv2d_max_pool2d(
    inputs: list[tf.Tensor], attributes: Attributes, keep_argmax: bool
) -> tf.Tensor:
    attributes = {**attributes, "num_argmax": int(keep_argmax)}
    return _framework.run(_operations.CONV2D_MAX_POOL2D, inputs, attributes)[0]


def _tensors(*tensors: tf.Tensor | None) -> list[tf.Tensor]:
    return [tf.convert_to_tensor(tensor) for tensor in tensors if tensor is not None]
