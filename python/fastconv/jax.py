"""Convolution and pooling of JAX arrays by fastconv's kernels.

They can be compiled (``jax.jit``), differentiated in reverse mode to any order (``jax.grad``; there is
no forward mode: ``jax.jvp`` raises TypeError), mapped (``jax.vmap``) and sharded over the batch.
``jax.vmap`` makes one larger batch of many; where each has filters, or a filter's gradient, of its
own, the kernel is called once for each. On several devices each computes its part of the batch, and
the gradients of filters and biases are summed over the devices; arrays sharded along another axis are
gathered first.

Where float32 is written below, arrays may be of float16 or bfloat16 as well, all of a call of one of them;
sums are float32, and results are rounded once. The kernels run on the CPU; with fastconv's CUDA module, on
NVIDIA GPUs too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastconv.adapters import jax as _adapter

if TYPE_CHECKING:
    import jax

    from fastconv._arguments import IntegerOrPair, Padding

__all__ = [
    "avg_pool2d",
    "conv2d",
    "conv2d_max_pool2d",
    "conv2d_transpose",
    "global_avg_pool2d",
    "global_max_pool2d",
    "max_pool2d",
    "ops_executed",
]


def conv2d(
    x: jax.Array,
    w: jax.Array,
    bias: jax.Array | None = None,
    *,
    strides: IntegerOrPair = 1,
    padding: Padding = "valid",
    dilation_rate: IntegerOrPair = 1,
    activation: str | None = None,
    data_format: str = "channels_last",
) -> jax.Array:
    """2-D convolution with bias and ReLU fused.

    Parameters
    ----------
    x
        float32 array of shape (batch, height, width, channels), or (batch, channels, height,
        width) with ``data_format="channels_first"``.
    w
        float32 array of shape (rows, columns, channels / groups, filters). The number of groups
        follows from the shapes.
    bias
        float32 array of shape (filters,), or None.
    strides
        An integer, or a pair for height and width.
    padding
        ``"valid"``, ``"same"`` or ``((top, bottom), (left, right))``.
    dilation_rate
        An integer, or a pair for height and width.
    activation
        None, ``"linear"`` or ``"relu"``.
    data_format
        ``"channels_last"`` or ``"channels_first"``, of ``x`` and of the result.

    Returns
    -------
    y
        float32 array of shape (batch, new_height, new_width, filters), or (batch, filters,
        new_height, new_width) with ``data_format="channels_first"``.

    Raises
    ------
    TypeError
        If an array is not of float32, or an option is not of the kind stated above.
    ValueError
        If the shapes do not fit each other, or an option has none of the values stated above.
    """
    return _adapter.conv2d(
        x,
        w,
        bias,
        strides=strides,
        padding=padding,
        dilation_rate=dilation_rate,
        activation=activation,
        data_format=data_format,
    )


def conv2d_max_pool2d(
    x: jax.Array,
    w: jax.Array,
    bias: jax.Array | None = None,
    *,
    strides: IntegerOrPair = 1,
    padding: Padding = "valid",
    dilation_rate: IntegerOrPair = 1,
    activation: str | None = None,
    data_format: str = "channels_last",
) -> jax.Array:
    """``max_pool2d(conv2d(...), 2)`` in one pass, which keeps no more than is pooled.

    Parameters
    ----------
    x, w, bias, strides, padding, dilation_rate, activation, data_format
        As for :func:`conv2d`, whose output must be 2 x 2 pixels or larger.

    Returns
    -------
    y
        float32 array of shape (batch, new_height // 2, new_width // 2, filters), or (batch,
        filters, new_height // 2, new_width // 2) with ``data_format="channels_first"``, of which
        new_height and new_width are those of the convolution.

    Raises
    ------
    TypeError, ValueError
        As :func:`conv2d` does; ValueError also if its output is smaller than the window.
    """
    return _adapter.conv2d_max_pool2d(
        x,
        w,
        bias,
        strides=strides,
        padding=padding,
        dilation_rate=dilation_rate,
        activation=activation,
        data_format=data_format,
    )


def conv2d_transpose(
    x: jax.Array,
    w: jax.Array,
    *,
    strides: IntegerOrPair = 1,
    padding: str = "valid",
    output_padding: IntegerOrPair | None = None,
    dilation_rate: IntegerOrPair = 1,
    data_format: str = "channels_last",
) -> jax.Array:
    """Transposed 2-D convolution as ``keras.ops.conv_transpose``.

    Parameters
    ----------
    x
        float32 array of shape (batch, height, width, channels), or (batch, channels, height,
        width) with ``data_format="channels_first"``.
    w
        float32 array of shape (rows, columns, filters, channels).
    strides
        An integer, or a pair for height and width.
    padding
        ``"valid"`` or ``"same"``.
    output_padding
        None, an integer, or a pair for height and width, below the strides: what Keras adds to the
        output's height and width.
    dilation_rate
        An integer, or a pair for height and width.
    data_format
        ``"channels_last"`` or ``"channels_first"``, of ``x`` and of the result.

    Returns
    -------
    y
        float32 array of shape (batch, new_height, new_width, filters), or (batch, filters,
        new_height, new_width) with ``data_format="channels_first"``.

    Raises
    ------
    TypeError, ValueError
        As :func:`conv2d` does.
    """
    return _adapter.conv2d_transpose(
        x,
        w,
        strides=strides,
        padding=padding,
        output_padding=output_padding,
        dilation_rate=dilation_rate,
        data_format=data_format,
    )


def max_pool2d(
    x: jax.Array,
    pool_size: IntegerOrPair,
    *,
    strides: IntegerOrPair | None = None,
    padding: Padding = "valid",
    data_format: str = "channels_last",
) -> jax.Array:
    """2-D max-pooling.

    Where it is differentiated, the place of each maximum is kept, one byte each. The gradient goes to
    the first maximum of each window; a NaN makes the maximum NaN.

    Parameters
    ----------
    x
        float32 array of shape (batch, height, width, channels), or (batch, channels, height,
        width) with ``data_format="channels_first"``.
    pool_size
        An integer, or a pair for height and width.
    strides
        An integer, a pair for height and width, or None for ``pool_size``.
    padding
        ``"valid"``, ``"same"`` or ``((top, bottom), (left, right))``.
    data_format
        ``"channels_last"`` or ``"channels_first"``, of ``x`` and of the result.

    Returns
    -------
    y
        float32 array of shape (batch, new_height, new_width, channels), or (batch, channels,
        new_height, new_width) with ``data_format="channels_first"``.

    Raises
    ------
    TypeError
        If ``x`` is not of float32, or an option is not of the kind stated above.
    ValueError
        If the window does not fit the input, or an option has none of the values stated above.
    """
    return _adapter.max_pool2d(
        x, pool_size, strides=strides, padding=padding, data_format=data_format
    )


def avg_pool2d(
    x: jax.Array,
    pool_size: IntegerOrPair,
    *,
    strides: IntegerOrPair | None = None,
    padding: Padding = "valid",
    data_format: str = "channels_last",
) -> jax.Array:
    """2-D average-pooling, in which padding is not counted.

    Parameters
    ----------
    x, pool_size, strides, padding, data_format
        As for :func:`max_pool2d`.

    Returns
    -------
    y
        float32 array of shape (batch, new_height, new_width, channels), or (batch, channels,
        new_height, new_width) with ``data_format="channels_first"``.

    Raises
    ------
    TypeError, ValueError
        As :func:`max_pool2d` does.
    """
    return _adapter.avg_pool2d(
        x, pool_size, strides=strides, padding=padding, data_format=data_format
    )


def global_avg_pool2d(x: jax.Array, *, data_format: str = "channels_last") -> jax.Array:
    """The average of each channel of each image.

    Parameters
    ----------
    x, data_format
        As for :func:`max_pool2d`.

    Returns
    -------
    y
        float32 array of shape (batch, 1, 1, channels), or (batch, channels, 1, 1) with
        ``data_format="channels_first"``.

    Raises
    ------
    TypeError, ValueError
        As :func:`max_pool2d` does.
    """
    return _adapter.global_avg_pool2d(x, data_format=data_format)


def global_max_pool2d(x: jax.Array, *, data_format: str = "channels_last") -> jax.Array:
    """The maximum of each channel of each image. Equal maxima share the gradient.

    Parameters
    ----------
    x, data_format
        As for :func:`max_pool2d`.

    Returns
    -------
    y
        float32 array of shape (batch, 1, 1, channels), or (batch, channels, 1, 1) with
        ``data_format="channels_first"``.

    Raises
    ------
    TypeError, ValueError
        As :func:`max_pool2d` does.
    """
    return _adapter.global_max_pool2d(x, data_format=data_format)


def ops_executed() -> dict[str, int]:
    """How often each of our kernels has run inside XLA in this process, by the operation's name."""
    return _adapter.ops_executed()
