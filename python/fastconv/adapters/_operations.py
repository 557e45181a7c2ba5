"""What fastconv's operations are to any framework of tensors: attributes, shapes, derivatives.

An operation has a name, a flat list of inputs, attributes (names, integers and tuples of them) and a
list of outputs; csrc/bindings/framework_ops.hpp says what each computes. A framework's adapter
brings ``Framework``: how an operation is run there, and two of the framework's own functions. The
rules of differentiation below are made of operations, so that they can be differentiated in turn.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from fastconv._arguments import (
    normalize_activation,
    normalize_data_format,
    normalize_padding,
    normalize_pair,
)
from fastconv.adapters._extents import Attributes, Extent, Extents, like

Tensor: TypeAlias = Any
_Extents: TypeAlias = "list[Extent | int | None]"  # of an output whose rank is known
FilterShape: TypeAlias = "Sequence[int | None] | None"
Gradients: TypeAlias = "list[Tensor | None]"

DTYPES = ("float32", "float16", "bfloat16")  # of an operation's tensors, all of them of one

CONV2D = "FastconvConv2D"
CONV2D_SCALED = "FastconvConv2DScaled"  # TensorFlow's alone: x, w, coefficients, residual
CONV2D_GRAD_INPUT = "FastconvConv2DGradInput"
CONV2D_GRAD_FILTER = "FastconvConv2DGradFilter"
CONV2D_TRANSPOSE = "FastconvConv2DTranspose"
MAX_POOL2D = "FastconvMaxPool2D"
MAX_POOL2D_WITH_ARGMAX = "FastconvMaxPool2DWithArgmax"
MAX_POOL2D_GRAD = "FastconvMaxPool2DGrad"
MAX_POOL2D_GRAD_GRAD = "FastconvMaxPool2DGradGrad"
AVERAGE_POOL2D = "FastconvAveragePool2D"
AVERAGE_POOL2D_GRAD = "FastconvAveragePool2DGrad"
CONV2D_MAX_POOL2D = "FastconvConv2DMaxPool2D"
CONV2D_MAX_POOL2D_GRAD = "FastconvConv2DMaxPool2DGrad"
CONV2D_INT8 = "FastconvConv2DInt8"  # TensorFlow's alone so far: x, w, scale, bias
# TensorFlow's alone, NHWC; the inputs of a value a channel are mean, variance, gamma, beta.
BATCH_NORM_MOMENTS = "FastconvBatchNormMoments"
BATCH_NORM = "FastconvBatchNorm"  # x, those, residual
BATCH_NORM_INFERENCE = "FastconvBatchNormInference"  # the same, by moments that are not x's own
BATCH_NORM_GRAD = "FastconvBatchNormGrad"  # x, those, dy, output

WHOLE_IMAGE = (0, 0)  # the window of global pooling
_LARGEST_BYTE_WINDOW = 256  # taps; the argmax of a larger window does not fit uint8


# --- arguments to attributes ----------------------------------------------------------------------


def conv2d_attributes(
    strides: Any, padding: Any, dilation_rate: Any, activation: Any, data_format: Any
) -> dict[str, Any]:
    return {
        "strides": normalize_pair(strides, "strides"),
        "dilations": normalize_pair(dilation_rate, "dilation_rate"),
        "activation": normalize_activation(activation).upper(),
        "data_format": _layout(data_format),
        **_padding_attributes(padding),
    }


def pool2d_attributes(
    pool_size: Any, strides: Any, padding: Any, data_format: Any
) -> dict[str, Any]:
    return {
        "pool_size": normalize_pair(pool_size, "pool_size"),
        "strides": normalize_pair(pool_size if strides is None else strides, "strides"),
        "data_format": _layout(data_format),
        **_padding_attributes(padding),
    }


def global_pool2d_attributes(data_format: Any) -> dict[str, Any]:
    return {
        "pool_size": WHOLE_IMAGE,
        "strides": (1, 1),
        "data_format": _layout(data_format),
        **_padding_attributes("valid"),
    }


def conv2d_transpose_attributes(
    filter_shape: FilterShape,
    strides: Any,
    padding: Any,
    output_padding: Any,
    dilation_rate: Any,
    data_format: Any,
) -> dict[str, Any]:
    attributes = conv2d_attributes(strides, padding, dilation_rate, None, data_format)
    if attributes["padding"] == "EXPLICIT":
        raise ValueError(f"`padding` must be 'valid' or 'same'. Received: padding={padding!r}")
    if filter_shape is None or len(filter_shape) != 4 or None in filter_shape[:2]:
        raise ValueError(
            "The filter `w` must have 4 dimensions, of which the first two are known. "
            f"Received: w.shape={filter_shape}"
        )
    added: tuple[int | None, int | None] = (None, None)
    if output_padding is not None:
        added = normalize_pair(output_padding, "output_padding")
    attributes["output_offset"] = tuple(
        _transpose_offset((taps - 1) * dilation + 1, stride, attributes["padding"], extra)
        for taps, dilation, stride, extra in zip(
            (taps for taps in filter_shape[:2] if taps is not None),
            attributes["dilations"],
            attributes["strides"],
            added,
            strict=True,
        )
    )
    return attributes


def _layout(data_format: Any) -> str:
    return "NCHW" if normalize_data_format(data_format) == "channels_first" else "NHWC"


def _padding_attributes(padding: Any) -> dict[str, Any]:
    kind, sides = normalize_padding(padding)
    return {"padding": kind.upper(), "explicit_paddings": sides}


def _transpose_offset(window: int, stride: int, padding: str, output_padding: int | None) -> int:
    """What Keras's rule for the output's extent adds to the input's extent times the stride."""
    if padding == "VALID":
        return (
            max(window - stride, 0)
            if output_padding is None
            else (window - stride + output_padding)
        )
    return 0 if output_padding is None else window % 2 - stride + output_padding


# --- outputs --------------------------------------------------------------------------------------


def spatial_axes(attributes: Attributes) -> tuple[int, int]:
    return (2, 3) if attributes["data_format"] == "NCHW" else (1, 2)


def channel_axis(attributes: Attributes) -> int:
    return 1 if attributes["data_format"] == "NCHW" else 3


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
    channels: Extent, extents: Sequence[Extent | int | None], attributes: Attributes
) -> _Extents:
    """(batch, *extents, channels), in the layout of ``attributes``."""
    batch = Extent(0, 0)
    if channel_axis(attributes) == 1:
        return [batch, channels, *extents]
    return [batch, *extents, channels]


def _windows_of(window: Sequence[int | None], channels: Extent, attributes: Attributes) -> _Extents:
    """The extents that windows of (rows, columns) make of input 0."""
    top, bottom, left, right = attributes["explicit_paddings"]
    axes = zip(
        spatial_axes(attributes),
        window,
        attributes["strides"],
        ((top, bottom), (left, right)),
        strict=True,
    )
    extents = [
        _windowed(axis, taps, stride, attributes["padding"], *sides)
        for axis, taps, stride, sides in axes
    ]
    return _arranged(channels, extents, attributes)


def _conv2d_extents(filter_shape: FilterShape, attributes: Attributes) -> _Extents | None:
    if filter_shape is None or len(filter_shape) != 4:
        return None
    window = [
        None if taps is None else (taps - 1) * dilation + 1
        for taps, dilation in zip(filter_shape[:2], attributes["dilations"], strict=True)
    ]
    return _windows_of(window, Extent(1, 3), attributes)


def _transpose_extents(attributes: Attributes) -> _Extents:
    extents = [
        Extent(0, axis, times=stride, plus=offset)
        for axis, stride, offset in zip(
            spatial_axes(attributes),
            attributes["strides"],
            attributes["output_offset"],
            strict=True,
        )
    ]
    return _arranged(Extent(1, 2), extents, attributes)


def is_global(attributes: Attributes) -> bool:
    return tuple(attributes["pool_size"]) == WHOLE_IMAGE


def _pool_extents(attributes: Attributes) -> _Extents:
    channels = Extent(0, channel_axis(attributes))
    if is_global(attributes):
        return _arranged(channels, (1, 1), attributes)
    return _windows_of(attributes["pool_size"], channels, attributes)


def _halved(extent: Extent | int | None) -> Extent | int | None:
    if isinstance(extent, Extent):
        # (a // over + then) // 2 is (a + then * over) // (2 * over)
        return extent._replace(
            plus=extent.plus + extent.then * extent.over, over=2 * extent.over, then=0
        )
    return None if extent is None else extent // 2


def _conv2d_pool_extents(filter_shape: FilterShape, attributes: Attributes) -> _Extents | None:
    extents = _conv2d_extents(filter_shape, attributes)
    if extents is None:
        return None
    spatial = spatial_axes(attributes)
    return [_halved(e) if axis in spatial else e for axis, e in enumerate(extents)]


def outputs(
    name: str, filter_shape: FilterShape, attributes: Attributes, dtype: str = "float32"
) -> list[tuple[str, Extents]]:
    """The data type and the extents of each output of the operation ``name``.

    Args:
        name: the operation.
        filter_shape: the shape of input 1 where that is a filter, as far as it is known.
        attributes: the operation's.
        dtype: that of the inputs.

    Returns:
        A list; the extents are None where not even the rank is known.
    """
    biases: list[Any] = [(dtype, [Extent(1, 3)])] * attributes.get("num_bias", 0)
    if name in (CONV2D, CONV2D_SCALED, CONV2D_INT8):
        return [(dtype, _conv2d_extents(filter_shape, attributes))]
    if name == CONV2D_TRANSPOSE:
        return [(dtype, _transpose_extents(attributes))]
    if name == CONV2D_GRAD_FILTER:
        return [(dtype, like(1)), *biases]
    if name in (CONV2D_GRAD_INPUT, MAX_POOL2D_GRAD, AVERAGE_POOL2D_GRAD):
        return [(dtype, like(0))]
    if name in (MAX_POOL2D, AVERAGE_POOL2D):
        return [(dtype, _pool_extents(attributes))]
    if name == MAX_POOL2D_WITH_ARGMAX:
        extents = _pool_extents(attributes)
        return [(dtype, extents), (argmax_dtype(attributes), extents)]
    if name == MAX_POOL2D_GRAD_GRAD:
        return [(dtype, like(1))]
    if name == CONV2D_MAX_POOL2D:
        pooled = _conv2d_pool_extents(filter_shape, attributes)
        return [(dtype, pooled), *[("uint8", pooled)] * attributes["num_argmax"]]
    if name == CONV2D_MAX_POOL2D_GRAD:
        inputs: list[Any] = [(dtype, like(0))] * attributes["num_dx"]
        return [(dtype, like(1)), *inputs, *biases]
    channels: Any = (dtype, [Extent(0, 3)])
    if name == BATCH_NORM_MOMENTS:
        return [channels, channels]
    if name in (BATCH_NORM, BATCH_NORM_INFERENCE):
        return [(dtype, like(0))]
    if name == BATCH_NORM_GRAD:
        residuals: list[Any] = [(dtype, like(0))] * attributes["num_output"]
        return [(dtype, like(0)), channels, channels, *residuals]
    raise LookupError(name)


_GEOMETRY = ("strides", "padding", "explicit_paddings", "data_format")
_OWN_ATTRIBUTES = {
    CONV2D_SCALED: ("num_coefficients", "epsilon"),
    CONV2D_GRAD_FILTER: ("num_bias",),
    CONV2D_TRANSPOSE: ("output_offset",),
    CONV2D_MAX_POOL2D: ("num_argmax",),
    CONV2D_MAX_POOL2D_GRAD: ("num_dx", "num_bias", "wanted"),
}


def attribute_names(name: str) -> tuple[str, ...]:
    """The attributes of the operation ``name``."""
    if name == BATCH_NORM_MOMENTS:
        return ()
    if name in (BATCH_NORM, BATCH_NORM_INFERENCE, BATCH_NORM_GRAD):
        return ("epsilon", "activation")
    kind = ("dilations", "activation") if "Conv2D" in name else ("pool_size",)
    return (*_GEOMETRY, *kind, *_OWN_ATTRIBUTES.get(name, ()))


def input_dtypes(name: str, num_inputs: int, attributes: Attributes) -> list[str]:
    """The data type of each input of the operation ``name``."""
    dtypes = ["float32"] * num_inputs
    if name in (MAX_POOL2D_GRAD, MAX_POOL2D_GRAD_GRAD):
        dtypes[1] = argmax_dtype(attributes)
    if name == CONV2D_MAX_POOL2D_GRAD:
        dtypes[4] = "uint8"
    if name == CONV2D_INT8:
        dtypes[1] = "int8"
    return dtypes


def argmax_dtype(attributes: Attributes) -> str:
    rows, columns = attributes["pool_size"]
    return "uint8" if rows * columns <= _LARGEST_BYTE_WINDOW else "int32"


# --- a framework ----------------------------------------------------------------------------------


class Framework(abc.ABC):
    """Where operations run."""

    @abc.abstractmethod
    def run(self, name: str, inputs: Sequence[Tensor], attributes: Attributes) -> list[Tensor]:
        """The outputs of the operation ``name``, which can be differentiated."""

    @abc.abstractmethod
    def where_positive(self, gradient: Tensor, output: Tensor) -> Tensor:
        """``gradient`` where ``output``, a ReLU's, is above 0, and 0 elsewhere."""

    @abc.abstractmethod
    def shared_by_maxima(self, x: Tensor, y: Tensor, dy: Tensor, axes: tuple[int, int]) -> Tensor:
        """``dy`` in equal shares to where ``x`` is ``y``, the maximum along ``axes``."""

    def run_one(self, name: str, inputs: Sequence[Tensor], attributes: Attributes) -> Tensor:
        """The output of an operation that has but one."""
        (output,) = self.run(name, inputs, attributes)
        return output


# --- derivatives ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Call:
    """One run of an operation; ``skipped`` holds the inputs whose gradient nobody wants."""

    inputs: Sequence[Tensor]
    outputs: Sequence[Tensor]
    attributes: Attributes
    skipped: frozenset[int] = frozenset()


Rule: TypeAlias = "Callable[..., Gradients]"

RULES: dict[str, Rule] = {}
"""By the operation's name, ``rule(framework, call, *upstream)``: the gradients of its inputs."""


def _rule_of(name: str) -> Callable[[Rule], Rule]:
    def register(rule: Rule) -> Rule:
        RULES[name] = rule
        return rule

    return register


def _is_relu(attributes: Attributes) -> bool:
    return bool(attributes["activation"] == "RELU")


def _linear(attributes: Attributes) -> dict[str, Any]:
    return {**_geometry(attributes), "activation": "LINEAR"}


def _geometry(attributes: Attributes) -> dict[str, Any]:
    """Those attributes that all operations of one convolution share."""
    names = (
        *("strides", "dilations", "padding", "explicit_paddings", "data_format", "activation"),
    )
    return {name: attributes[name] for name in names}


def _grad_filter(
    framework: Framework, inputs: Sequence[Tensor], attributes: Attributes, num_bias: int
) -> list[Tensor]:
    """The gradients of the filter and of each bias."""
    return framework.run(
        CONV2D_GRAD_FILTER, inputs, {**_geometry(attributes), "num_bias": num_bias}
    )


def _masked(framework: Framework, gradient: Tensor, mask: Sequence[Tensor]) -> Tensor:
    """``gradient`` where the ReLU let the value through. The mask itself has no gradient."""
    return framework.where_positive(gradient, mask[0]) if mask else gradient


@_rule_of(CONV2D)
def _conv2d_rule(framework: Framework, call: Call, dy: Tensor) -> Gradients:
    x, w, *bias = call.inputs
    attributes = call.attributes
    inputs = [x, w, dy, *([call.outputs[0]] if _is_relu(attributes) else [])]
    dx = dw = None
    dbias: Gradients = [None] * len(bias)
    if 0 not in call.skipped:
        dx = framework.run_one(CONV2D_GRAD_INPUT, inputs, _geometry(attributes))
    if not call.skipped.issuperset(range(1, len(call.inputs))):
        dw, *dbias = _grad_filter(framework, inputs, attributes, len(bias))
    return [dx, dw, *dbias]


@_rule_of(CONV2D_GRAD_INPUT)
def _conv2d_grad_input_rule(framework: Framework, call: Call, ddx: Tensor) -> Gradients:
    # dx is linear in w and in dy; of x only the shape matters.
    _, w, dy, *mask = call.inputs
    (dw,) = _grad_filter(framework, [ddx, w, dy, *mask], call.attributes, 0)
    ddy = framework.run_one(CONV2D, [ddx, w], _linear(call.attributes))
    return [None, dw, _masked(framework, ddy, mask), *[None] * len(mask)]


@_rule_of(CONV2D_GRAD_FILTER)
def _conv2d_grad_filter_rule(
    framework: Framework, call: Call, ddw: Tensor, *ddbias: Tensor
) -> Gradients:
    # dw is linear in x and in dy, and so is dbias in dy; of w only the shape matters.
    x, _, dy, *mask = call.inputs
    inputs = [x, ddw, dy, *mask]
    dx = framework.run_one(CONV2D_GRAD_INPUT, inputs, _geometry(call.attributes))
    ddy = framework.run_one(CONV2D, [x, ddw, *ddbias], _linear(call.attributes))
    return [dx, None, _masked(framework, ddy, mask), *[None] * len(mask)]


@_rule_of(CONV2D_TRANSPOSE)
def _conv2d_transpose_rule(framework: Framework, call: Call, dy: Tensor) -> Gradients:
    # The transpose of the transpose is the convolution that it was named after.
    x, w = call.inputs
    (dw,) = _grad_filter(framework, [dy, w, x], call.attributes, 0)
    return [framework.run_one(CONV2D, [dy, w], _geometry(call.attributes)), dw]


@_rule_of(MAX_POOL2D)
def _max_pool2d_rule(framework: Framework, call: Call, dy: Tensor) -> Gradients:
    (x,) = call.inputs
    if is_global(call.attributes):
        axes = spatial_axes(call.attributes)
        return [framework.shared_by_maxima(x, call.outputs[0], dy, axes)]
    _, argmax = framework.run(MAX_POOL2D_WITH_ARGMAX, [x], call.attributes)
    return [framework.run_one(MAX_POOL2D_GRAD, [x, argmax, dy], call.attributes)]


@_rule_of(MAX_POOL2D_WITH_ARGMAX)
def _max_pool2d_with_argmax_rule(
    framework: Framework, call: Call, dy: Tensor, _: Tensor = None
) -> Gradients:
    inputs = [call.inputs[0], call.outputs[1], dy]
    return [framework.run_one(MAX_POOL2D_GRAD, inputs, call.attributes)]


@_rule_of(MAX_POOL2D_GRAD)
def _max_pool2d_grad_rule(framework: Framework, call: Call, ddx: Tensor) -> Gradients:
    # dx is linear in dy; of x only the shape matters.
    inputs = [ddx, call.inputs[1]]
    return [None, None, framework.run_one(MAX_POOL2D_GRAD_GRAD, inputs, call.attributes)]


@_rule_of(MAX_POOL2D_GRAD_GRAD)
def _max_pool2d_grad_grad_rule(framework: Framework, call: Call, dddy: Tensor) -> Gradients:
    ddx, argmax = call.inputs
    inputs = [ddx, argmax, dddy]
    return [framework.run_one(MAX_POOL2D_GRAD, inputs, call.attributes), None]


@_rule_of(AVERAGE_POOL2D)
def _average_pool2d_rule(framework: Framework, call: Call, dy: Tensor) -> Gradients:
    inputs = [call.inputs[0], dy]
    return [framework.run_one(AVERAGE_POOL2D_GRAD, inputs, call.attributes)]


@_rule_of(AVERAGE_POOL2D_GRAD)
def _average_pool2d_grad_rule(framework: Framework, call: Call, ddx: Tensor) -> Gradients:
    # dx is linear in dy; of x only the shape matters.
    return [None, framework.run_one(AVERAGE_POOL2D, [ddx], call.attributes)]


@_rule_of(CONV2D_MAX_POOL2D)
def _conv2d_max_pool2d_rule(
    framework: Framework, call: Call, dy: Tensor, _: Tensor = None
) -> Gradients:
    x, w, *bias = call.inputs
    y, *argmax = call.outputs
    if not argmax:
        y, *argmax = framework.run(
            CONV2D_MAX_POOL2D, call.inputs, {**call.attributes, "num_argmax": 1}
        )
    num_dx = int(0 not in call.skipped)
    dw, *others = framework.run(
        CONV2D_MAX_POOL2D_GRAD,
        [x, w, dy, y, argmax[0]],
        {
            **_geometry(call.attributes),
            "num_dx": num_dx,
            "num_bias": len(bias),
            "wanted": (num_dx, len(bias)),
        },
    )
    return [*(others[:num_dx] or [None]), dw, *others[num_dx:]]


@_rule_of(CONV2D_MAX_POOL2D_GRAD)
def _conv2d_max_pool2d_grad_rule(
    framework: Framework, call: Call, ddw: Tensor, *upstream: Tensor
) -> Gradients:
    """By the three operations that this one is made of: dz from dy, then dw and dbias, and dx."""
    x, w, dy, y, argmax = call.inputs
    num_dx = call.attributes["num_dx"]
    ddx, ddbias = upstream[:num_dx], upstream[num_dx:]
    linear = _linear(call.attributes)
    window = {
        "pool_size": (2, 2),
        "strides": (2, 2),
        "data_format": linear["data_format"],
        **_padding_attributes("valid"),
    }
    mask = [y] if _is_relu(call.attributes) else []
    # Of the convolution's output the pooling's gradient takes the shape alone.
    whole = framework.run_one(CONV2D, [x, w], linear)
    through = _masked(framework, dy, mask)
    dz = framework.run_one(MAX_POOL2D_GRAD, [whole, argmax, through], window)

    dx = framework.run_one(CONV2D_GRAD_INPUT, [x, ddw, dz], linear)
    ddz = framework.run_one(CONV2D, [x, ddw, *ddbias], linear)
    dw = None
    if ddx:
        (dw,) = _grad_filter(framework, [ddx[0], w, dz], linear, 0)
        ddz = ddz + framework.run_one(CONV2D, [ddx[0], w], linear)
    ddy = framework.run_one(MAX_POOL2D_GRAD_GRAD, [ddz, argmax], window)
    return [dx, dw, _masked(framework, ddy, mask), None, None]


# --- along the batch ------------------------------------------------------------------------------


def inputs_with_batch(name: str, num_inputs: int) -> tuple[bool, ...]:
    """Which inputs have the batch as their first axis. The others, filters and biases, have none."""
    if name in (CONV2D, CONV2D_TRANSPOSE, CONV2D_MAX_POOL2D):
        return (True, *[False] * (num_inputs - 1))
    if name in (CONV2D_GRAD_INPUT, CONV2D_GRAD_FILTER, CONV2D_MAX_POOL2D_GRAD):
        return (True, False, *[True] * (num_inputs - 2))
    return (True,) * num_inputs


def outputs_with_batch(name: str, attributes: Attributes) -> tuple[bool, ...]:
    """Which outputs have the batch as their first axis. The others are sums over the batch."""
    if name == CONV2D_GRAD_FILTER:
        return (False, *[False] * int(attributes["num_bias"]))
    if name == CONV2D_MAX_POOL2D_GRAD:
        return (False, *[True] * attributes["num_dx"], *[False] * attributes["num_bias"])
    with_argmax = name == MAX_POOL2D_WITH_ARGMAX or bool(attributes.get("num_argmax", 0))
    return (True, True) if with_argmax else (True,)


def variant_for_gradient(name: str, attributes: Attributes) -> tuple[str, dict[str, Any]]:
    """The operation, and its attributes, to run where a gradient will be taken.

    It gives the same first output and keeps what the gradient would search for again.
    """
    if name == MAX_POOL2D and not is_global(attributes):
        return MAX_POOL2D_WITH_ARGMAX, dict(attributes)
    if name == CONV2D_MAX_POOL2D:
        return name, {**attributes, "num_argmax": 1}
    return name, dict(attributes)
