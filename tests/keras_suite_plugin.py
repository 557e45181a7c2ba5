"""A pytest plugin: Keras's own tests on our layers, and a count of the kernels that ran.

Run as ``python -m pytest -p keras_suite_plugin <keras test files>`` with this folder on PYTHONPATH,
on any of Keras's backends.
"""

import collections

import keras
import pytest
from keras.src import layers as keras_layers

from fastconv.keras._stand_in import STAND_INS, adapter

# Keras's tests take the layers from the second; the first is what everybody else uses.
for stock, fast in STAND_INS.items():
    for module in (keras.layers, keras_layers):
        setattr(module, stock.__name__, fast)

_executed = collections.defaultdict(collections.Counter)  # by test file, by op


@pytest.hookimpl(
    tryfirst=True
)  # before the test is skipped, after which teardown comes all the same
def pytest_runtest_setup(item):
    item.ops_before = adapter.ops_executed()


def pytest_runtest_teardown(item):
    _executed[item.path.name].update(adapter.ops_executed())
    _executed[item.path.name].subtract(item.ops_before)


def pytest_terminal_summary(terminalreporter):
    for file, counts in _executed.items():
        terminalreporter.write_line(f"kernels run in {file}: {dict(counts)}")
