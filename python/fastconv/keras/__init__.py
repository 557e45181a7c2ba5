"""Drop-in Keras layers whose work is done by fastconv's kernels.

``FastConv2D`` and ``FastMaxPooling2D`` are subclasses of the stock layers: same arguments, weights,
names and files. What the kernels do not serve (a data type other than float32, XLA, a Keras backend
other than TensorFlow, ...) is done by the stock layer's own code; the logger ``fastconv`` says so
and why at level DEBUG. Importing this module registers the layers with Keras, so that models that
hold them can be loaded.
"""

from fastconv.keras.conv2d import FastConv2D
from fastconv.keras.max_pooling2d import FastMaxPooling2D

__all__ = ["FastConv2D", "FastMaxPooling2D"]
