"""What the fast pooling layers share."""

from fastconv.keras._stand_in import has_empty_output, reason_for_stock, tf


def reason_against_window(layer, inputs):
    """Why the stock code must take ``inputs`` of a layer with a window; None if it need not."""
    reason = reason_for_stock(inputs, layer.compute_dtype)
    if reason is not None:
        return reason
    if not all(layer.strides):
        return f"the strides contain 0: {layer.strides}"
    padding = layer.padding.lower()
    if padding not in ("valid", "same"):
        return f"the padding is none of Keras's: {layer.padding!r}"
    if has_empty_output(inputs, layer.pool_size, padding, layer.data_format):
        return f"the output would be empty: input of shape {inputs.shape}"
    return None


def window(layer):
    """The adapter's arguments of a layer with a window."""
    return {
        "pool_size": layer.pool_size,
        "strides": layer.strides,
        "padding": layer.padding.lower(),
        "data_format": layer.data_format,
    }


def reason_against_global(layer, inputs):
    """Why the stock code must take ``inputs`` of a global pooling; None if it need not."""
    reason = reason_for_stock(inputs, layer.compute_dtype)
    if reason is not None:
        return reason
    if 0 in inputs.shape[1:]:
        return f"an extent of the input is 0: {inputs.shape}"
    return None


def without_image_axes(layer, outputs):
    """``outputs`` of a global pooling, with axes of size 1 where the layer keeps them."""
    if layer.keepdims:
        return outputs
    return tf.squeeze(outputs, [2, 3] if layer.data_format == "channels_first" else [1, 2])
