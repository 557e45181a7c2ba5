"""The operations of ``_operations`` on NumPy arrays, by the compiled module's functions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from fastconv import _core
from fastconv.adapters import _operations
from fastconv.adapters._extents import Attributes

Array: TypeAlias = NDArray[Any]
Shape: TypeAlias = "Sequence[int]"


def run(
    name: str, inputs: Sequence[Array], attributes: Attributes, out: Array | None = None
) -> list[Array]:
    """The outputs of the operation ``name``; the first of them is ``out``, if that is given.

    CONV2D_MAX_POOL2D_GRAD and MAX_POOL2D_GRAD_GRAD take no ``out``.
    """
    results = _run(name, list(inputs), attributes, {} if out is None else {"out": out})
    return list(results) if isinstance(results, (tuple, list)) else [results]


def _run(name: str, inputs: list[Any], attributes: Attributes, out: dict[str, Any]) -> Any:
    x = inputs[0]
    if "Conv2D" not in name:
        return _pool(name, inputs, attributes, out)
    options = _conv2d_options(x.shape, inputs[1].shape, attributes)
    if name == _operations.CONV2D:
        return _core.conv2d(x, inputs[1], _optional(inputs, 2), **options, **out)
    if name == _operations.CONV2D_GRAD_INPUT:
        _, w, dy = inputs[:3]
        output = _optional(inputs, 3)
        return _core.conv2d_grad_input(dy, w, x.shape, output, **options, **out)
    if name == _operations.CONV2D_GRAD_FILTER:
        _, w, dy = inputs[:3]
        with_bias = bool(attributes["num_bias"])
        output = _optional(inputs, 3)
        return _core.conv2d_grad_filter(x, dy, w.shape, output, with_bias, **options, **out)
    if name == _operations.CONV2D_TRANSPOSE:
        w = inputs[1]
        shape = transposed_shape(x.shape, w.shape, attributes)
        options = _conv2d_options(shape, w.shape, attributes)
        return _core.conv2d_grad_input(x, w, shape, None, **options, **out)
    if name == _operations.CONV2D_MAX_POOL2D:
        with_argmax = bool(attributes["num_argmax"])
        bias = _optional(inputs, 2)
        return _core.conv2d_max_pool2d(x, inputs[1], bias, with_argmax, **options, **out)
    if name == _operations.CONV2D_MAX_POOL2D_GRAD:
        _, w, dy, y, argmax = inputs
        with_dx = bool(attributes["num_dx"])
        dx, dw, dbias = _core.conv2d_max_pool2d_grad(x, w, dy, y, argmax, with_dx, **options)
        return [dw, *([] if dx is None else [dx]), *[dbias] * attributes["num_bias"]]
    raise LookupError(name)


def _pool(name: str, inputs: list[Any], attributes: Attributes, out: dict[str, Any]) -> Any:
    x = inputs[0]
    options = _pool2d_options(x.shape, attributes)
    if name == _operations.MAX_POOL2D:
        return _core.max_pool2d(x, False, **options, **out)
    if name == _operations.MAX_POOL2D_WITH_ARGMAX:
        return _core.max_pool2d(x, True, **options, **out)
    if name == _operations.MAX_POOL2D_GRAD:
        _, argmax, dy = inputs
        return _core.max_pool2d_grad(dy, argmax, x.shape, **options, **out)
    if name == _operations.MAX_POOL2D_GRAD_GRAD:
        return _at_argmax(x, inputs[1], attributes)
    if name == _operations.AVERAGE_POOL2D:
        return _core.avg_pool2d(x, **options, **out)
    if name == _operations.AVERAGE_POOL2D_GRAD:
        return _core.avg_pool2d_grad(inputs[1], x.shape, **options, **out)
    raise LookupError(name)


def _optional(inputs: list[Any], index: int) -> Any:
    return inputs[index] if len(inputs) > index else None


def _data_format(attributes: Attributes) -> str:
    return "channels_first" if attributes["data_format"] == "NCHW" else "channels_last"


def _padding(attributes: Attributes) -> Any:
    return attributes["padding"].lower(), attributes["explicit_paddings"]


def _conv2d_options(x_shape: Shape, filter_shape: Shape, attributes: Attributes) -> dict[str, Any]:
    # Where the shapes do not fit, 1 group leads to the error that says so.
    groups = 1
    if len(x_shape) == len(filter_shape) == 4 and filter_shape[2] > 0:
        channels = x_shape[_operations.channel_axis(attributes)]
        if channels > 0 and channels % filter_shape[2] == 0:
            groups = channels // filter_shape[2]
    return {
        "strides": attributes["strides"],
        "padding": _padding(attributes),
        "dilation_rate": attributes["dilations"],
        "groups": groups,
        "activation": attributes["activation"].lower(),
        "data_format": _data_format(attributes),
    }


def _pool2d_options(x_shape: Shape, attributes: Attributes) -> dict[str, Any]:
    window = attributes["pool_size"]
    if _operations.is_global(attributes) and len(x_shape) == 4:
        window = tuple(max(1, x_shape[axis]) for axis in _operations.spatial_axes(attributes))
    return {
        "pool_size": window,
        "strides": attributes["strides"],
        "padding": _padding(attributes),
        "data_format": _data_format(attributes),
    }


def transposed_shape(x_shape: Shape, filter_shape: Shape, attributes: Attributes) -> Any:
    """The shape of a transposed convolution's output."""
    shape = list(x_shape)
    if len(shape) == 4:
        shape[_operations.channel_axis(attributes)] = filter_shape[2]
        axes = zip(
            _operations.spatial_axes(attributes),
            attributes["strides"],
            attributes["output_offset"],
            strict=True,
        )
        for axis, stride, offset in axes:
            shape[axis] = shape[axis] * stride + offset
    return tuple(shape)


def _at_argmax(ddx: Array, argmax: Array, attributes: Attributes) -> Array:
    """What a window takes from its argmax's pixel: the transpose of max-pooling's gradient.

    It serves second derivatives alone, so it is plain.
    """
    rows, columns = _operations.spatial_axes(attributes)
    height, width = ddx.shape[rows], ddx.shape[columns]
    places = []
    for axis, stride, before, tap in zip(
        (rows, columns),
        attributes["strides"],
        _padding_before(ddx.shape, attributes),
        np.divmod(argmax.astype(np.int64), attributes["pool_size"][1]),
        strict=True,
    ):
        shape = [1] * 4
        shape[axis] = argmax.shape[axis]
        places.append(np.arange(argmax.shape[axis]).reshape(shape) * stride - before + tap)
    row, column = places
    inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    flat = np.where(inside, row * width + column, 0)
    if rows == 1:
        n, _, _, c = ddx.shape
        taken = np.take_along_axis(ddx.reshape(n, -1, c), flat.reshape(n, -1, c), axis=1)
    else:
        n, c, _, _ = ddx.shape
        taken = np.take_along_axis(ddx.reshape(n, c, -1), flat.reshape(n, c, -1), axis=2)
    return np.where(inside, taken.reshape(argmax.shape), ddx.dtype.type(0))


def _padding_before(shape: Shape, attributes: Attributes) -> tuple[int, int]:
    """The rows above and the columns to the left of an image that windows see."""
    if attributes["padding"] != "SAME":
        top, _, left, _ = attributes["explicit_paddings"]
        return top, left
    before = []
    for axis, window, stride in zip(
        _operations.spatial_axes(attributes),
        attributes["pool_size"],
        attributes["strides"],
        strict=True,
    ):
        number = -(-shape[axis] // stride)
        before.append(max(0, (number - 1) * stride + window - shape[axis]) // 2)
    return before[0], before[1]


def check(name: str, shapes: Sequence[Sequence[Any]], attributes: Attributes) -> None:
    """Raises ValueError where an operation's inputs cannot be of these shapes.

    By a batch of none, for which nothing is computed. Extents that are no numbers yet are left to
    the kernel.
    """
    if name == _operations.MAX_POOL2D_GRAD_GRAD or any(
        not isinstance(extent, int) for shape in shapes for extent in shape
    ):
        return
    batch = _operations.inputs_with_batch(name, len(shapes))
    dtypes = _operations.input_dtypes(name, len(shapes), attributes)
    arrays = [
        np.empty((0, *shape[1:]) if has_batch else shape, dtype)
        for shape, has_batch, dtype in zip(shapes, batch, dtypes, strict=True)
    ]
    run(name, arrays, attributes)
