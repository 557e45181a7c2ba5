"""Convolution and pooling in float64 NumPy, written from their definitions.

Shares nothing with fastconv: not its C++, not its rules for shapes. Arrays are (batch, height,
width, channels) unless ``data_format`` says otherwise; padding is "valid", "same" or ((top,
bottom), (left, right)); strides, dilation_rate and pool_size are pairs.
"""

import numpy as np


def conv2d(x, w, bias=None, *, activation=None, data_format="channels_last", groups=1, **geometry):
    x = _channels_last(x, data_format)
    y = sum(
        _product(pixels, filters)
        for pixels, filters in zip(
            _pixels_of_taps(x, w.shape, groups, **geometry),
            _filters_of_taps(w, groups),
            strict=True,
        )
    )
    y = y.reshape(*y.shape[:3], w.shape[3])
    if bias is not None:
        y = y + bias.astype(np.float64)
    if activation == "relu":
        y = np.where(y < 0, 0.0, y)
    return _from_channels_last(y, data_format)


def conv2d_grad_input(
    dy, w, input_shape, *, mask=None, data_format="channels_last", groups=1, **geometry
):
    """``mask`` is fprop's output; ``dy`` counts only where it is positive."""
    dy = _channels_last(_masked(dy, mask), data_format)
    dy = dy.reshape(*dy.shape[:3], groups, w.shape[3] // groups)
    dx = np.zeros(_shape_channels_last(input_shape, data_format))
    (top, bottom), (left, right), _, _ = _geometry(dx.shape[1:3], w.shape, **geometry)
    padded = np.pad(dx, ((0, 0), (top, bottom), (left, right), (0, 0)))
    at_taps = _pixels_of_taps(padded, w.shape, groups, **{**geometry, "padding": "valid"})
    for pixels, filters in zip(at_taps, _filters_of_taps(w, groups), strict=True):
        pixels += _product(dy, filters.transpose(0, 2, 1))
    inside = padded[:, top : top + dx.shape[1], left : left + dx.shape[2]]
    return _from_channels_last(inside, data_format)


def conv2d_grad_filter(
    x, dy, filter_shape, *, mask=None, data_format="channels_last", groups=1, **geometry
):
    """(dw, dbias); ``mask`` as for conv2d_grad_input."""
    dy = _channels_last(_masked(dy, mask), data_format)
    x = _channels_last(x, data_format)
    flat = dy.reshape(-1, groups, filter_shape[3] // groups)
    dw = []
    for pixels in _pixels_of_taps(x, filter_shape, groups, **geometry):
        pixels = pixels.reshape(-1, groups, filter_shape[2])
        if filter_shape[2] == 1:
            of_tap = (pixels * flat).sum(axis=0)[:, np.newaxis]
        else:
            of_tap = pixels.transpose(1, 2, 0) @ flat.transpose(1, 0, 2)
        dw.append(of_tap.transpose(1, 0, 2))  # channels, groups, filters
    return np.stack(dw).reshape(filter_shape), flat.sum(axis=0).reshape(-1)


def max_pool2d(x, pool_size, *, strides, padding, data_format="channels_last"):
    """(y, argmax). The first maximum wins, the first NaN beats all; padding never wins."""
    x = _channels_last(x, data_format)
    y = argmax = None
    for tap, value, inside in _pool_taps(x, pool_size, strides, padding):
        if y is None:
            y, argmax = np.full(value.shape, -np.inf), np.full(value.shape, -1)
        wins = (argmax < 0) | (value > y) | (np.isnan(value) & ~np.isnan(y))
        wins &= inside
        y, argmax = np.where(wins, value, y), np.where(wins, tap, argmax)
    return _from_channels_last(y, data_format), _from_channels_last(argmax, data_format)


def max_pool2d_grad(
    dy, argmax, input_shape, pool_size, *, strides, padding, data_format="channels_last"
):
    dy, argmax = _channels_last(dy, data_format), _channels_last(argmax, data_format)
    shape = _shape_channels_last(input_shape, data_format)
    at = np.arange(np.prod(shape, dtype=np.int64), dtype=np.float64).reshape(shape)
    dx = np.zeros(at.size)
    for tap, pixel, inside in _pool_taps(at, pool_size, strides, padding):
        chosen = inside & (argmax == tap)
        np.add.at(dx, pixel[chosen].astype(np.int64), dy[chosen])
    return _from_channels_last(dx.reshape(shape), data_format)


def avg_pool2d(x, pool_size, *, strides, padding, data_format="channels_last"):
    """Padding is not counted."""
    x = _channels_last(x, data_format)
    total = count = 0
    for _, value, inside in _pool_taps(x, pool_size, strides, padding):
        total, count = total + np.where(inside, value, 0), count + inside
    return _from_channels_last(total / count, data_format)


def avg_pool2d_grad(dy, input_shape, pool_size, *, strides, padding, data_format="channels_last"):
    dy = _channels_last(dy, data_format)
    shape = _shape_channels_last(input_shape, data_format)
    at = np.arange(np.prod(shape, dtype=np.int64), dtype=np.float64).reshape(shape)
    taps = list(_pool_taps(at, pool_size, strides, padding))
    share = dy / sum(inside for _, _, inside in taps)
    dx = np.zeros(at.size)
    for _, pixel, inside in taps:
        np.add.at(dx, pixel[inside].astype(np.int64), share[inside])
    return _from_channels_last(dx.reshape(shape), data_format)


def _channels_last(array, data_format):
    array = np.asarray(array, np.float64)
    return array if data_format == "channels_last" else array.transpose(0, 2, 3, 1)


def _from_channels_last(array, data_format):
    return array if data_format == "channels_last" else array.transpose(0, 3, 1, 2)


def _shape_channels_last(shape, data_format):
    if data_format == "channels_last":
        return tuple(shape)
    n, c, h, w = shape
    return n, h, w, c


def _masked(dy, mask):
    return dy if mask is None else np.where(mask > 0, dy, 0)


def _axis(extent, window, stride, padding):
    """(padding before, padding after, output extent) along one axis."""
    if padding == "same":
        out = -(-extent // stride)
        total = max((out - 1) * stride + window - extent, 0)
        return total // 2, total - total // 2, out
    before, after = (0, 0) if padding == "valid" else padding
    return before, after, (before + extent + after - window) // stride + 1


def _geometry(size, filter_shape, *, strides, padding, dilation_rate):
    per_axis = (padding, padding) if isinstance(padding, str) else padding
    top, bottom, rows = _axis(
        size[0], (filter_shape[0] - 1) * dilation_rate[0] + 1, strides[0], per_axis[0]
    )
    left, right, columns = _axis(
        size[1], (filter_shape[1] - 1) * dilation_rate[1] + 1, strides[1], per_axis[1]
    )
    return (top, bottom), (left, right), rows, columns


def _pixels(i, j, rows, columns, strides, dilation_rate):
    """Where tap (i, j) of every window lies in the padded input, as two slices."""
    starts = (i * dilation_rate[0], j * dilation_rate[1])
    return tuple(
        slice(start, start + (count - 1) * stride + 1, stride)
        for start, count, stride in zip(starts, (rows, columns), strides, strict=True)
    )


def _pixels_of_taps(x, filter_shape, groups, *, strides, padding, dilation_rate):
    """For each tap what every output pixel meets: views (batch, rows, columns, groups, channels)."""
    sides_h, sides_w, rows, columns = _geometry(
        x.shape[1:3],
        filter_shape,
        strides=strides,
        padding=padding,
        dilation_rate=dilation_rate,
    )
    if any(sides_h + sides_w):
        x = np.pad(x, ((0, 0), sides_h, sides_w, (0, 0)))
    x = x.reshape(*x.shape[:3], groups, filter_shape[2])
    for i in range(filter_shape[0]):
        for j in range(filter_shape[1]):
            yield x[(slice(None), *_pixels(i, j, rows, columns, strides, dilation_rate))]


def _filters_of_taps(w, groups):
    """For each tap (groups, channels, filters)."""
    taps = w.astype(np.float64).reshape(-1, w.shape[2], groups, w.shape[3] // groups)
    return taps.transpose(0, 2, 1, 3)


def _product(pixels, filters):
    """(batch, rows, columns, groups, channels) times (groups, channels, filters)."""
    if filters.shape[1] == 1:
        return pixels * filters[:, 0]
    flat = pixels.reshape(-1, *pixels.shape[3:]).transpose(1, 0, 2)
    return (flat @ filters).transpose(1, 0, 2).reshape(*pixels.shape[:4], filters.shape[2])


def _pool_taps(x, pool_size, strides, padding):
    """For each tap of the window its number, its values and whether they lie inside ``x``."""
    sides_h, sides_w, rows, columns = _geometry(
        x.shape[1:3], pool_size, strides=strides, padding=padding, dilation_rate=(1, 1)
    )
    sides = ((0, 0), sides_h, sides_w, (0, 0))
    padded, inside = np.pad(x, sides), np.pad(np.ones(x.shape, bool), sides)
    for i in range(pool_size[0]):
        for j in range(pool_size[1]):
            at = (slice(None), *_pixels(i, j, rows, columns, strides, (1, 1)))
            yield i * pool_size[1] + j, padded[at], inside[at]
