"""A pytest plugin: Keras's own tests on our layers, and a count of the kernels that ran.

Run as ``python -m pytest -p keras_suite_plugin <keras test file>`` with this folder on PYTHONPATH.
"""

import keras
from keras.src import layers as keras_layers

from fastconv.adapters import tensorflow as adapter
from fastconv.keras import FastConv2D, FastMaxPooling2D

# Keras's tests take the layers from the second; the first is what everybody else uses.
for module in (keras.layers, keras_layers):
    module.Conv2D = FastConv2D
    module.MaxPooling2D = FastMaxPooling2D


def pytest_terminal_summary(terminalreporter):
    terminalreporter.write_line(f"kernels run: {adapter.ops_executed()}")
