"""What TensorFlow's XLA is told where there is a GPU: played, for on this machine there is none.

tests/test_cuda_xla.py calls the handlers themselves. Not yet run on hardware.
"""

import types

import numpy as np
import pytest
import tensorflow as tf

import cuda_support
from fastconv.adapters import _xla_library, xla
from fastconv.adapters import tensorflow as ops
from fastconv.keras import FastConv2D, explain_layer


@pytest.fixture
def forgotten():
    """What was found out of the GPU is forgotten, before the test and after it."""
    xla.reason_against_gpus.cache_clear()
    yield
    xla.reason_against_gpus.cache_clear()


@pytest.fixture
def seen_by_tensorflow(monkeypatch):
    visible = tf.config.get_visible_devices

    def get_visible_devices(kind=None):
        return ["GPU:0"] if kind == "GPU" else visible(kind)

    monkeypatch.setattr(tf.config, "get_visible_devices", get_visible_devices)


class Library:
    def __init__(self, answer):
        self.registrations = 0
        self.answer = answer

    def fastconv_xla_register_cuda(self):
        self.registrations += 1
        return self.answer


@pytest.mark.parametrize("answer, reason", [(None, None), (b"no stream", "no stream")])
def test_kernels_are_registered_once(answer, reason, forgotten, seen_by_tensorflow, monkeypatch):
    library = Library(answer)
    monkeypatch.setattr(
        xla,
        "_xla_library",
        types.SimpleNamespace(gpu_is_available=lambda: True, load=lambda: library),
    )
    assert xla.on_gpus() == (reason is None)
    assert xla.reason_against_gpus() == reason
    assert library.registrations == 1


def test_nothing_is_registered_without_a_gpu(forgotten, monkeypatch):
    library = Library(None)
    monkeypatch.setattr(
        xla,
        "_xla_library",
        types.SimpleNamespace(gpu_is_available=lambda: False, load=lambda: library),
    )
    assert not xla.on_gpus()
    assert "fastconv finds no GPU" in xla.reason_against_gpus()
    assert library.registrations == 0


@cuda_support.EMULATOR_ONLY
def test_xla_takes_the_handlers(forgotten):
    """Of the library itself, by TensorFlow's XLA, which looks for no GPU in this."""
    with cuda_support.using_library(cuda_support.library("fast")):
        assert _xla_library.gpu_is_available()
        assert xla.reason_against_gpus() is None


def test_one_module_for_every_platform(monkeypatch, executed_in_xla):
    monkeypatch.setattr(xla, "on_gpus", lambda: True)
    x, w = tf.ones((1, 4, 4, 1)), tf.ones((3, 3, 1, 1))
    y = tf.function(ops.conv2d, jit_compile=True)(x, w)
    np.testing.assert_array_equal(y, np.full((1, 2, 2, 1), 9))
    assert executed_in_xla() == {"FastconvConv2D": 1}


def test_layers_serve_inside_xla_alone(seen_by_tensorflow, monkeypatch):
    monkeypatch.setattr(xla, "reason_against_gpus", lambda: None)
    monkeypatch.setattr(ops, "inside_xla", lambda: False)
    assert "inside XLA alone" in ops.reason_against_place(None)
    monkeypatch.setattr(ops, "inside_xla", lambda: True)
    assert ops.reason_against_place(None) is None
    explanation = explain_layer(FastConv2D(1, 1, use_bias=False))
    assert explanation.served_by == "fastconv"
    assert explanation.reason == "float32 on the GPU, inside XLA"
    monkeypatch.setattr(xla, "reason_against_gpus", lambda: "this test says so")
    assert "on which the kernels cannot run here: this test says so" in ops.reason_against_all()
    assert explain_layer(FastConv2D(1, 1)).served_by == "stock"
