"""What the fast layers share: standing in for a stock layer, and leaving a call to it."""

import logging
import weakref

import keras

if keras.backend.backend() == "tensorflow":
    import tensorflow as tf

    from fastconv.adapters import tensorflow as adapter
else:
    tf = adapter = None

_logger = logging.getLogger("fastconv")
_told = weakref.WeakKeyDictionary()  # layer: the reason it was last heard to use the stock code


def stand_in_for(stock):
    """Class decorator: makes the class take ``stock``'s place in models and their files.

    Keras derives from a class's ``__name__`` the default names of layers and the keys of
    ``.weights.h5`` and ``.keras`` files. The class takes over that of the stock layer, so that both
    give the same names and weights can be loaded from one into the other. Its own name remains its
    ``__qualname__`` and the name it is registered by.
    """

    def decorate(cls):
        keras.saving.register_keras_serializable(package="fastconv", name=cls.__name__)(cls)
        cls.__name__ = stock.__name__
        return cls

    return decorate


class OutsideXla:
    """Mixin: has Keras run models with the layer without XLA, inside which no kernel of ours works.

    A property and not an attribute set in ``__init__``, so that the stock layer's ``__init__``
    remains the class's own, with the signature that Keras inspects and users read.
    """

    @property
    def supports_jit(self):
        return adapter is None or bool(_gpus())

    @supports_jit.setter
    def supports_jit(self, value):
        """Ignores what ``keras.layers.Layer.__init__`` sets for every layer."""


def reason_for_stock(inputs, compute_dtype):
    """Why the kernels cannot take these inputs, whatever the layer's options; None if they can."""
    if adapter is None:
        return f"the Keras backend is {keras.backend.backend()}, not tensorflow"
    if not isinstance(inputs, tf.Tensor):
        return f"the input is a {type(inputs).__name__}, not a dense tensor of TensorFlow's"
    if compute_dtype != "float32" or inputs.dtype != tf.float32:
        return f"the data type is not float32: {inputs.dtype.name}, computed in {compute_dtype}"
    if inputs.shape.rank != 4:
        return f"the input's rank is not 4: {inputs.shape}"
    if adapter.inside_xla():
        return "the graph is compiled by XLA"
    if _gpus():
        return "TensorFlow sees a GPU, and the kernels are for CPUs"
    return None


def tell(layer, reason):
    """Logs why ``layer`` uses the stock code, once for as long as the reason stays the same."""
    if _told.get(layer) == reason:
        return
    _told[layer] = reason
    _logger.debug("%s %r uses the stock code: %s", type(layer).__qualname__, layer.name, reason)


def has_empty_output(inputs, window, padding, data_format):
    """Whether no output pixel comes of ``inputs``, as far as is known: the stock layer refuses it.

    ``window`` is the height and width that one output pixel sees.
    """
    shape = inputs.shape.as_list()
    if 0 in shape[1:]:
        return True
    sizes = shape[2:] if data_format == "channels_first" else shape[1:3]
    return padding == "valid" and any(
        size is not None and size < extent for size, extent in zip(sizes, window, strict=True)
    )


def _gpus():
    return tf.config.get_visible_devices("GPU")
