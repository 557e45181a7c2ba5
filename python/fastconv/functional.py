"""Convolution and pooling (maximum and average) of NumPy arrays, forward and backward.

Arguments and their names are those of Keras. Activations are arrays of shape (batch, height, width,
channels), or (batch, channels, height, width) with ``data_format="channels_first"``; filters are of
shape (rows, columns, channels / groups, filters) with either. Strided views are taken too, at the price
of a copy. Results are new arrays, or go to ``out``, the same bits for any number of threads. Where shapes
or options do not fit, nothing is computed.

Arrays are of float32, float16 or bfloat16 (the dtype of the package ``ml_dtypes``), all of a call of one of
them, and so are the results. Sums are of float32 whatever that is; those of 16 bits are rounded once, to
nearest.

Convolutions are computed as implicit matrix products: the patches of the input that meet the filter
are gathered while the multiplication runs, never stored as a matrix [1]_ [2]_.

Where fewer multiplications do, others are chosen: see :func:`fastconv.set_accuracy` and
:func:`fastconv.explain`.

Arrays on a GPU are computed there: see :mod:`fastconv.cuda`.

.. [1] S. Chetlur et al., "cuDNN: Efficient Primitives for Deep Learning", arXiv:1410.0759, 2014.
.. [2] M. Dukhan, "The Indirect Convolution Algorithm", arXiv:1907.02129, 2019.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, overload

from fastconv import _core
from fastconv._arguments import (
    conv2d_options,
    normalize_algorithm,
    normalize_data_format,
    normalize_integer,
    normalize_padding,
    normalize_pair,
    normalize_shape,
)
from fastconv._core import cuda as _cuda
from fastconv.packed_filter import PackedFilter, compiled

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import SupportsIndex, TypeVar

    import numpy as np
    from numpy.typing import NDArray

    from fastconv._arguments import IntegerOrPair, Padding

    Real = TypeVar("Real", bound=np.generic)  # float32, float16 or bfloat16
    FloatArray = NDArray[np.float32]
    Int8Array = NDArray[np.int8]
    ArgmaxArray = NDArray[np.uint8] | NDArray[np.int32]
    Shape = Sequence[SupportsIndex]

__all__ = [
    "avg_pool2d",
    "avg_pool2d_grad",
    "conv2d",
    "conv2d_grad_filter",
    "conv2d_grad_input",
    "conv2d_int8",
    "conv2d_max_pool2d",
    "conv2d_max_pool2d_grad",
    "get_num_threads",
    "info",
    "max_pool2d",
    "max_pool2d_grad",
    "quantize_filter",
    "set_num_threads",
]


def conv2d(
    x: NDArray[Real],
    w: NDArray[Real] | PackedFilter,
    bias: NDArray[Real] | None = None,
    *,
    strides: IntegerOrPair = 1,
    padding: Padding = "valid",
    dilation_rate: IntegerOrPair = 1,
    groups: SupportsIndex = 1,
    activation: str | None = None,
    data_format: str = "channels_last",
    out: NDArray[Real] | None = None,
    algorithm: str | None = None,
) -> NDArray[Real]:
    """2-D convolution, ``activation(x * w + bias)``, in one pass.

    As in every neural-network library this is the cross-correlation: filters are not flipped.

    Parameters
    ----------
    x
        Array of float32, float16 or bfloat16, of shape (batch, height, width, channels), or (batch,
        channels, height, width) with ``data_format="channels_first"``. The batch may be 0.
    w
        Array of the dtype of ``x`` and shape (rows, columns, channels / groups, filters); or, for
        float32, a :class:`~fastconv.PackedFilter` of one, which many calls use faster.
    bias
        Array of that dtype and shape (filters,), or None for none.
    strides
        Step of the window: an integer, or a pair for height and width.
    padding
        ``"valid"`` (none), ``"same"`` (zeros such that the output is of height
        ceil(height / stride), an odd one at the bottom and the right) or the rows and columns of
        zeros as ``((top, bottom), (left, right))``.
    dilation_rate
        Distance between neighbouring taps of the filter: an integer, or a pair for height and
        width.
    groups
        Number of groups that channels and filters are split into; the filters of a group see the
        channels of that group alone.
    activation
        None or ``"linear"``; or ``"relu"``, which lets NaN through.
    data_format
        ``"channels_last"`` or ``"channels_first"``, of ``x`` and of the result.
    out
        Array to write the result to, of its shape and dtype, C-contiguous and sharing no memory
        with the inputs; None for a new one.
    algorithm
        Name of the algorithm to use whatever the accuracy setting, such as ``"direct"`` (see
        :func:`explain`), or None for the selector's choice.

    Returns
    -------
    y
        Array of the dtype of ``x``, of shape (batch, new_height, new_width, filters), or (batch,
        filters, new_height, new_width) with ``data_format="channels_first"``.

    Raises
    ------
    TypeError
        If an array is none or of another dtype than stated, or an option is not of the kind stated above.
    ValueError
        If a shape or the value of an option is not one of those stated above, the dilated filter
        is larger than the padded input, or ``algorithm`` does not serve the problem.
    """
    result: NDArray[Real] = _for(x).conv2d(
        x,
        compiled(w),
        bias,
        **conv2d_options(strides, padding, dilation_rate, groups, activation, data_format),
        algorithm=normalize_algorithm(algorithm),
        out=out,
    )
    return result


def quantize_filter(w: FloatArray) -> tuple[Int8Array, FloatArray]:
    """Filters as int8, each output channel by a scale of its own, for :func:`conv2d_int8`.

    As ``keras.quantizers.AbsMaxQuantizer(axis=(0, 1, 2))``: ``w_int8 = round(w * w_scale)``, half to
    even, with ``w_scale = 127 / (max(abs(w)) + 1e-7)``. Scales multiply, as Keras's do: ``w`` is about
    ``w_int8 / w_scale``.

    Parameters
    ----------
    w
        float32 array of shape (rows, columns, channels / groups, filters), finite.

    Returns
    -------
    w_int8
        int8 array of ``w``'s shape, from -127 to 127.
    w_scale
        float32 array of shape (filters,).

    Raises
    ------
    TypeError
        If ``w`` is no NumPy array of float32.
    ValueError
        If ``w`` has not 4 dimensions, one of them is 0, or a value is NaN or infinite.
    """
    import numpy as np

    if not isinstance(w, np.ndarray):
        received = f"w of type {type(w).__name__}"
        raise TypeError(f"`w` must be a NumPy array. Received: {received}")
    if w.dtype != np.float32:
        raise TypeError(f"`w` must have dtype float32. Received: w.dtype={w.dtype}")
    if w.ndim != 4 or w.size == 0:
        raise ValueError(f"`w` must have 4 dimensions, none of them 0. Received: w.shape={w.shape}")
    largest = np.abs(w).max(axis=(0, 1, 2))
    if not np.isfinite(largest).all():
        raise ValueError("`w` must be finite. Received: w with NaN or infinity")
    scale = np.float32(127) / (largest + np.float32(1e-7))
    return np.rint(w * scale).astype(np.int8), scale


def conv2d_int8(
    x: FloatArray,
    w: Int8Array,
    w_scale: FloatArray,
    bias: FloatArray | None = None,
    *,
    strides: IntegerOrPair = 1,
    padding: Padding = "valid",
    dilation_rate: IntegerOrPair = 1,
    groups: SupportsIndex = 1,
    activation: str | None = None,
    data_format: str = "channels_last",
    out: FloatArray | None = None,
    algorithm: str | None = None,
) -> FloatArray:
    """2-D convolution of int8, for inference: float32 in and out, on the CPU.

    Each image of ``x`` is quantised by a scale of its own, so that no image's result depends on the
    others: ``x_int8 = round(x * x_scale)``, half to even, with ``x_scale = 127 / (max(abs(x)) + 1e-7)``.
    The result is ``activation(conv(x_int8, w) * (1 / (w_scale * x_scale)) + bias)``. The sums are of
    32-bit integers and exact, so that it is the same bits on every processor. An image that holds NaN or
    infinity gives NaN.

    Parameters
    ----------
    x
        float32 array as of :func:`conv2d`.
    w, w_scale
        Filters and their scales as :func:`quantize_filter` returns them. ``w`` may hold -128 too.
    bias, strides, padding, dilation_rate, groups, activation, data_format, out
        As of :func:`conv2d`.
    algorithm
        ``"vnni"`` (dot products of bytes in hardware, where the processor has them), ``"madd"``
        (multiplications of 16 bits) or ``"plain"``, which all give the same result; None for the fastest.

    Returns
    -------
    y
        float32 array of the shape that :func:`conv2d` returns.

    Raises
    ------
    TypeError
        If ``w`` is no array of int8, another array none of float32, or an option is not of the kind
        :func:`conv2d` takes.
    ValueError
        If a shape or the value of an option is not one of those stated above, a filter has more than
        131072 taps times channels, whose sum might not fit 32 bits, or ``algorithm`` does not serve the
        problem on this processor.
    """
    result: FloatArray = _core.conv2d_int8(
        x,
        w,
        w_scale,
        bias,
        **conv2d_options(strides, padding, dilation_rate, groups, activation, data_format),
        algorithm=normalize_algorithm(algorithm),
        out=out,
    )
    return result


def conv2d_grad_input(
    dy: NDArray[Real],
    w: NDArray[Real] | PackedFilter,
    input_shape: Shape,
    *,
    strides: IntegerOrPair = 1,
    padding: Padding = "valid",
    dilation_rate: IntegerOrPair = 1,
    groups: SupportsIndex = 1,
    data_format: str = "channels_last",
    activation: str | None = None,
    output: NDArray[Real] | None = None,
    out: NDArray[Real] | None = None,
    algorithm: str | None = None,
) -> NDArray[Real]:
    """Gradient of :func:`conv2d` by its input; the transposed convolution of ``dy``.

    Computed as a convolution of ``dy`` with the flipped, transposed filters; a strided one is
    split into one for each residue of the stride, so that no zeros are inserted.

    Parameters
    ----------
    dy
        Gradient of the result: array of the shape and dtype that ``conv2d`` returned.
    w
        The filters ``conv2d`` was given; of float32, also a :class:`~fastconv.PackedFilter` of them.
    input_shape
        Shape of the input ``x`` that ``conv2d`` was given.
    strides, padding, dilation_rate, groups, data_format
        As ``conv2d`` was given.
    activation
        As ``conv2d`` was given. With ``"relu"``, ``dy`` counts only where ``output`` > 0.
    output
        The result of ``conv2d``: required with ``activation="relu"``, else not read.
    out
        Array to write ``dx`` to, as for ``conv2d``; None for a new one.
    algorithm
        As for ``conv2d``; it need not be the one ``conv2d`` was given.

    Returns
    -------
    dx
        Array of the dtype of ``dy`` and shape ``input_shape``.

    Raises
    ------
    TypeError
        If an array is none or of another dtype than stated, or an option is not of the kind ``conv2d`` takes.
    ValueError
        If the shapes do not belong to one convolution, an option has a value that ``conv2d``
        refuses, ``output`` is missing, or ``algorithm`` does not serve the problem.
    """
    result: NDArray[Real] = _for(dy).conv2d_grad_input(
        dy,
        compiled(w),
        normalize_shape(input_shape, "input_shape"),
        output,
        **conv2d_options(strides, padding, dilation_rate, groups, activation, data_format),
        algorithm=normalize_algorithm(algorithm),
        out=out,
    )
    return result


@overload
def conv2d_grad_filter(
    x: NDArray[Real],
    dy: NDArray[Real],
    filter_shape: Shape,
    *,
    strides: IntegerOrPair = ...,
    padding: Padding = ...,
    dilation_rate: IntegerOrPair = ...,
    groups: SupportsIndex = ...,
    data_format: str = ...,
    activation: str | None = ...,
    output: NDArray[Real] | None = ...,
    algorithm: str | None = ...,
    return_bias_grad: Literal[False] = ...,
    out: NDArray[Real] | None = ...,
) -> NDArray[Real]: ...
@overload
def conv2d_grad_filter(
    x: NDArray[Real],
    dy: NDArray[Real],
    filter_shape: Shape,
    *,
    strides: IntegerOrPair = ...,
    padding: Padding = ...,
    dilation_rate: IntegerOrPair = ...,
    groups: SupportsIndex = ...,
    data_format: str = ...,
    activation: str | None = ...,
    output: NDArray[Real] | None = ...,
    algorithm: str | None = ...,
    return_bias_grad: Literal[True],
    out: NDArray[Real] | None = ...,
) -> tuple[NDArray[Real], NDArray[Real]]: ...
def conv2d_grad_filter(
    x: NDArray[Real],
    dy: NDArray[Real],
    filter_shape: Shape,
    *,
    strides: IntegerOrPair = 1,
    padding: Padding = "valid",
    dilation_rate: IntegerOrPair = 1,
    groups: SupportsIndex = 1,
    data_format: str = "channels_last",
    activation: str | None = None,
    output: NDArray[Real] | None = None,
    algorithm: str | None = None,
    return_bias_grad: bool = False,
    out: NDArray[Real] | None = None,
) -> NDArray[Real] | tuple[NDArray[Real], NDArray[Real]]:
    """Gradient of :func:`conv2d` by its filters and, if asked for, by its bias.

    The sum over batch and pixels is split by the shapes alone and its parts are added in a fixed
    order.

    Parameters
    ----------
    x
        The input ``conv2d`` was given.
    dy
        Gradient of the result: array of the shape and dtype that ``conv2d`` returned.
    filter_shape
        Shape of the filters ``w`` that ``conv2d`` was given.
    strides, padding, dilation_rate, groups, data_format
        As ``conv2d`` was given.
    activation
        As ``conv2d`` was given. With ``"relu"``, ``dy`` counts only where ``output`` > 0.
    output
        The result of ``conv2d``: required with ``activation="relu"``, else not read.
    algorithm
        As for ``conv2d``; it need not be the one ``conv2d`` was given.
    return_bias_grad
        Whether to return the gradient by the bias too.
    out
        Array to write ``dw`` to, as for ``conv2d``; None for a new one.

    Returns
    -------
    dw
        Array of the dtype of ``x`` and shape ``filter_shape``.
    dbias
        Array of the dtype of ``x`` and shape (filters,), with ``return_bias_grad=True`` only.

    Raises
    ------
    TypeError
        If an array is none or of another dtype than stated, or an option is not of the kind ``conv2d`` takes.
    ValueError
        If the shapes do not belong to one convolution, an option has a value that ``conv2d``
        refuses, ``output`` is missing, or ``algorithm`` does not serve the problem.
    """
    result: NDArray[Real] | tuple[NDArray[Real], NDArray[Real]] = _for(x).conv2d_grad_filter(
        x,
        dy,
        normalize_shape(filter_shape, "filter_shape"),
        output,
        bool(return_bias_grad),
        **conv2d_options(strides, padding, dilation_rate, groups, activation, data_format),
        algorithm=normalize_algorithm(algorithm),
        out=out,
    )
    return result


@overload
def max_pool2d(
    x: NDArray[Real],
    pool_size: IntegerOrPair,
    *,
    strides: IntegerOrPair | None = ...,
    padding: Padding = ...,
    data_format: str = ...,
    return_argmax: Literal[False] = ...,
    out: NDArray[Real] | None = ...,
) -> NDArray[Real]: ...
@overload
def max_pool2d(
    x: NDArray[Real],
    pool_size: IntegerOrPair,
    *,
    strides: IntegerOrPair | None = ...,
    padding: Padding = ...,
    data_format: str = ...,
    return_argmax: Literal[True],
    out: NDArray[Real] | None = ...,
) -> tuple[NDArray[Real], ArgmaxArray]: ...
def max_pool2d(
    x: NDArray[Real],
    pool_size: IntegerOrPair,
    *,
    strides: IntegerOrPair | None = None,
    padding: Padding = "valid",
    data_format: str = "channels_last",
    return_argmax: bool = False,
    out: NDArray[Real] | None = None,
) -> NDArray[Real] | tuple[NDArray[Real], ArgmaxArray]:
    """Maximum of each window.

    Of equal maxima the first in row-major order wins, as in TensorFlow. A window that holds NaN
    gives NaN; padding never wins.

    Parameters
    ----------
    x
        Array of float32, float16 or bfloat16, of shape (batch, height, width, channels), or (batch,
        channels, height, width) with ``data_format="channels_first"``. The batch may be 0.
    pool_size
        Extent of the window: an integer, or a pair for height and width.
    strides
        Step of the window: an integer, a pair for height and width, or None for ``pool_size``.
    padding
        ``"valid"``, ``"same"`` or ``((top, bottom), (left, right))`` as for :func:`conv2d`; each
        side must be smaller than the window.
    data_format
        ``"channels_last"`` or ``"channels_first"``, of ``x`` and of the results.
    return_argmax
        Whether to return where each maximum was, which :func:`max_pool2d_grad` needs.
    out
        Array to write ``y`` to, as for :func:`conv2d`; None for a new one.

    Returns
    -------
    y
        Array of the dtype of ``x``, of shape (batch, new_height, new_width, channels), or (batch,
        channels, new_height, new_width) with ``data_format="channels_first"``.
    argmax
        With ``return_argmax=True`` only: an array of the shape of ``y`` that holds row *
        pool_width + column of the maximum within its window, padding included; uint8, or int32
        where the window has more than 256 taps.

    Raises
    ------
    TypeError
        If ``x`` is no array or of another dtype, or an option is not of the kind stated above.
    ValueError
        If a shape or the value of an option is not one of those stated above, or the window is
        larger than the padded input.
    """
    result: NDArray[Real] | tuple[NDArray[Real], ArgmaxArray] = _for(x).max_pool2d(
        x,
        bool(return_argmax),
        **_pool2d_options(pool_size, strides, padding, data_format),
        out=out,
    )
    return result


def max_pool2d_grad(
    dy: NDArray[Real],
    argmax: ArgmaxArray,
    input_shape: Shape,
    pool_size: IntegerOrPair,
    *,
    strides: IntegerOrPair | None = None,
    padding: Padding = "valid",
    data_format: str = "channels_last",
    out: NDArray[Real] | None = None,
) -> NDArray[Real]:
    """Gradient of :func:`max_pool2d` by its input: each ``dy`` goes to its window's maximum.

    Parameters
    ----------
    dy
        Gradient of the result: array of the shape and dtype that ``max_pool2d`` returned.
    argmax
        The second result of ``max_pool2d``. A value that names a tap in the padding contributes
        nothing.
    input_shape
        Shape of the input ``x`` that ``max_pool2d`` was given.
    pool_size, strides, padding, data_format
        As ``max_pool2d`` was given.
    out
        Array to write ``dx`` to, as for :func:`conv2d`; None for a new one.

    Returns
    -------
    dx
        Array of the dtype of ``dy`` and shape ``input_shape``; where windows overlap, the sum of their shares.

    Raises
    ------
    TypeError
        If an array is none or not of the dtype stated, or an option is not of the kind
        ``max_pool2d`` takes.
    ValueError
        If the shapes do not belong to one pooling, an option has a value that ``max_pool2d``
        refuses, or ``argmax`` holds a value outside the window.
    """
    result: NDArray[Real] = _for(dy).max_pool2d_grad(
        dy,
        argmax,
        normalize_shape(input_shape, "input_shape"),
        **_pool2d_options(pool_size, strides, padding, data_format),
        out=out,
    )
    return result


def avg_pool2d(
    x: NDArray[Real],
    pool_size: IntegerOrPair,
    *,
    strides: IntegerOrPair | None = None,
    padding: Padding = "valid",
    data_format: str = "channels_last",
    out: NDArray[Real] | None = None,
) -> NDArray[Real]:
    """Average of each window; as in TensorFlow, padding is not counted.

    The rows of a window are summed first, then their sums. With ``pool_size`` the height and width
    of ``x`` it is global average pooling.

    Parameters
    ----------
    x
        Array of float32, float16 or bfloat16, of shape (batch, height, width, channels), or (batch,
        channels, height, width) with ``data_format="channels_first"``. The batch may be 0.
    pool_size, strides, padding, data_format
        As for :func:`max_pool2d`.
    out
        Array to write ``y`` to, as for :func:`conv2d`; None for a new one.

    Returns
    -------
    y
        Array of the dtype of ``x``, of shape (batch, new_height, new_width, channels), or (batch,
        channels, new_height, new_width) with ``data_format="channels_first"``: the sum of a window's pixels
        that lie inside ``x`` over their number.

    Raises
    ------
    TypeError
        If ``x`` is no array or of another dtype, or an option is not of the kind stated above.
    ValueError
        If a shape or the value of an option is not one of those stated above, or the window is
        larger than the padded input.
    """
    result: NDArray[Real] = _for(x).avg_pool2d(
        x, **_pool2d_options(pool_size, strides, padding, data_format), out=out
    )
    return result


def avg_pool2d_grad(
    dy: NDArray[Real],
    input_shape: Shape,
    pool_size: IntegerOrPair,
    *,
    strides: IntegerOrPair | None = None,
    padding: Padding = "valid",
    data_format: str = "channels_last",
    out: NDArray[Real] | None = None,
) -> NDArray[Real]:
    """Gradient of :func:`avg_pool2d` by its input: each ``dy`` is shared out among its window.

    Parameters
    ----------
    dy
        Gradient of the result: array of the shape and dtype that ``avg_pool2d`` returned.
    input_shape
        Shape of the input ``x`` that ``avg_pool2d`` was given.
    pool_size, strides, padding, data_format
        As ``avg_pool2d`` was given.
    out
        Array to write ``dx`` to, as for :func:`conv2d`; None for a new one.

    Returns
    -------
    dx
        Array of the dtype of ``dy`` and shape ``input_shape``; where windows overlap, the sum of their shares.

    Raises
    ------
    TypeError
        If ``dy`` is no array or of another dtype, or an option is not of the kind ``avg_pool2d``
        takes.
    ValueError
        If the shapes do not belong to one pooling, or an option has a value that ``avg_pool2d``
        refuses.
    """
    result: NDArray[Real] = _for(dy).avg_pool2d_grad(
        dy,
        normalize_shape(input_shape, "input_shape"),
        **_pool2d_options(pool_size, strides, padding, data_format),
        out=out,
    )
    return result


@overload
def conv2d_max_pool2d(
    x: NDArray[Real],
    w: NDArray[Real],
    bias: NDArray[Real] | None = ...,
    *,
    strides: IntegerOrPair = ...,
    padding: Padding = ...,
    dilation_rate: IntegerOrPair = ...,
    groups: SupportsIndex = ...,
    activation: str | None = ...,
    data_format: str = ...,
    return_argmax: Literal[False] = ...,
    out: NDArray[Real] | None = ...,
    algorithm: str | None = ...,
) -> NDArray[Real]: ...
@overload
def conv2d_max_pool2d(
    x: NDArray[Real],
    w: NDArray[Real],
    bias: NDArray[Real] | None = ...,
    *,
    strides: IntegerOrPair = ...,
    padding: Padding = ...,
    dilation_rate: IntegerOrPair = ...,
    groups: SupportsIndex = ...,
    activation: str | None = ...,
    data_format: str = ...,
    return_argmax: Literal[True],
    out: NDArray[Real] | None = ...,
    algorithm: str | None = ...,
) -> tuple[NDArray[Real], NDArray[np.uint8]]: ...
def conv2d_max_pool2d(
    x: NDArray[Real],
    w: NDArray[Real],
    bias: NDArray[Real] | None = None,
    *,
    strides: IntegerOrPair = 1,
    padding: Padding = "valid",
    dilation_rate: IntegerOrPair = 1,
    groups: SupportsIndex = 1,
    activation: str | None = None,
    data_format: str = "channels_last",
    return_argmax: bool = False,
    out: NDArray[Real] | None = None,
    algorithm: str | None = None,
) -> NDArray[Real] | tuple[NDArray[Real], NDArray[np.uint8]]:
    """:func:`conv2d` and 2 x 2 max-pooling of stride 2 behind it, in one pass.

    ``max_pool2d(conv2d(...), 2)``, of which the convolution's output is never in memory as a whole:
    it is pooled where it is computed.

    Parameters
    ----------
    x, w, bias, strides, padding, dilation_rate, groups, activation, data_format, algorithm
        As for :func:`conv2d`, whose output must be 2 x 2 pixels or larger.
    return_argmax
        Whether to return where each maximum was, which :func:`conv2d_max_pool2d_grad` needs.
    out
        Array to write ``y`` to, as for :func:`conv2d`; None for a new one.

    Returns
    -------
    y
        Array of the dtype of ``x``, of shape (batch, new_height // 2, new_width // 2, filters), or (batch,
        filters, new_height // 2, new_width // 2) with ``data_format="channels_first"``, of which
        new_height and new_width are those of the convolution.
    argmax
        With ``return_argmax=True`` only: a uint8 array of the shape of ``y``, as of
        :func:`max_pool2d`.

    Raises
    ------
    TypeError
        If an array is none or of another dtype than stated, or an option is not of the kind stated above.
    ValueError
        If ``conv2d`` refuses the arguments, or its output is smaller than the window.
    """
    result: NDArray[Real] | tuple[NDArray[Real], NDArray[np.uint8]] = _for(x).conv2d_max_pool2d(
        x,
        w,
        bias,
        bool(return_argmax),
        **conv2d_options(strides, padding, dilation_rate, groups, activation, data_format),
        algorithm=normalize_algorithm(algorithm),
        out=out,
    )
    return result


def conv2d_max_pool2d_grad(
    x: NDArray[Real],
    w: NDArray[Real],
    dy: NDArray[Real],
    output: NDArray[Real],
    argmax: NDArray[np.uint8],
    *,
    strides: IntegerOrPair = 1,
    padding: Padding = "valid",
    dilation_rate: IntegerOrPair = 1,
    groups: SupportsIndex = 1,
    activation: str | None = None,
    data_format: str = "channels_last",
    with_input_grad: bool = True,
    algorithm: str | None = None,
) -> tuple[NDArray[Real] | None, NDArray[Real], NDArray[Real]]:
    """Gradients of :func:`conv2d_max_pool2d`; all that it needs of the forward pass is pooled.

    Parameters
    ----------
    x, w, strides, padding, dilation_rate, groups, activation, data_format
        As ``conv2d_max_pool2d`` was given.
    dy
        Gradient of the result: array of the shape and dtype that ``conv2d_max_pool2d`` returned.
    output, argmax
        What ``conv2d_max_pool2d`` returned.
    with_input_grad
        Whether to compute the gradient by ``x``, which the first layer of a network need not.
    algorithm
        As for :func:`conv2d`, of the gradient by ``x``; without that, of the one by ``w``. Or
        ``"sparse"``, of both: from lists of the one pixel in four that has a gradient (filters of
        3 or 5 columns, strides of 1 or 2, channels last, neither dilation nor groups). Without a
        name, that is chosen where it takes less time.

    Returns
    -------
    dx
        Array of the shape and dtype of ``x``; None with ``with_input_grad=False``.
    dw
        Array of the shape and dtype of ``w``.
    dbias
        Array of that dtype and shape (filters,).

    Raises
    ------
    TypeError
        If an array is none or not of the dtype stated, or an option is not of the kind ``conv2d``
        takes.
    ValueError
        If the shapes do not belong to one another, or an option has a value that ``conv2d``
        refuses, or ``argmax`` holds a value above 3.
    """
    result: tuple[NDArray[Real] | None, NDArray[Real], NDArray[Real]] = _for(
        x
    ).conv2d_max_pool2d_grad(
        x,
        w,
        dy,
        output,
        argmax,
        bool(with_input_grad),
        **conv2d_options(strides, padding, dilation_rate, groups, activation, data_format),
        algorithm=normalize_algorithm(algorithm),
    )
    return result


def set_num_threads(num_threads: SupportsIndex) -> None:
    """Sets how many threads a call may use, the caller's included, in the whole process.

    Until then it is what the environment variable ``FASTCONV_NUM_THREADS`` says, else the number
    of processors the process may run on. Results do not depend on it.

    Parameters
    ----------
    num_threads
        An integer from 1 to 1024.

    Raises
    ------
    TypeError
        If ``num_threads`` is no integer.
    ValueError
        If it is out of range.
    """
    _core.set_num_threads(normalize_integer(num_threads, "num_threads"))


def get_num_threads() -> int:
    """How many threads a call may use.

    Raises
    ------
    ValueError
        If the environment variable ``FASTCONV_NUM_THREADS`` is no integer from 1 to 1024.
    """
    return _core.get_num_threads()


def info() -> dict[str, Any]:
    """What this build of fastconv is and runs on.

    Returns
    -------
    facts
        ``version``; ``isa``, the instruction set in use; ``isa_available``, those that this build
        and this CPU have, best first (``FASTCONV_ISA`` in the environment chooses one);
        ``num_threads``; ``cuda``, a dict of ``available``, the ``reason`` where it is not and,
        where this build has CUDA kernels, their ``library``, the versions of CUDA's ``runtime``
        and ``driver``, and the ``devices`` found.

    Raises
    ------
    ValueError
        If ``FASTCONV_ISA`` or ``FASTCONV_NUM_THREADS`` in the environment has a wrong value.
    """
    return {
        "version": _core.__version__,
        "isa": _core.isa(),
        "isa_available": _core.available_isas(),
        "num_threads": _core.get_num_threads(),
        "cuda": _cuda.availability(),
    }


def _for(array: Any) -> Any:
    """The compiled functions for arrays like this one: on the host, or on a GPU."""
    return _cuda if _cuda.is_device_array(array) else _core


def _pool2d_options(pool_size: Any, strides: Any, padding: Any, data_format: Any) -> dict[str, Any]:
    window = normalize_pair(pool_size, "pool_size")
    return {
        "pool_size": window,
        "strides": window if strides is None else normalize_pair(strides, "strides"),
        "padding": normalize_padding(padding),
        "data_format": normalize_data_format(data_format),
    }
