"""The examples run, and say what they promise. (That of the article: test_mnist.py.)"""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest

from fastconv.mnist import data
from running import running_on

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(name, *arguments):
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.fixture
def strict():
    """Exactly 0 where all products are 0, as stock: else a ReLU behind it may let a gradient by."""
    with running_on(accuracy="strict"):
        yield


@pytest.mark.parametrize("mode, who", [("mirrored", "replica"), ("workers", "worker")])
def test_distributed(mode, who):
    options = ["--fit"] if mode == "workers" else []
    lines = [json.loads(line) for line in run("distributed.py", mode, *options).splitlines()]
    told = {line["who"]: line for line in lines}
    assert set(told) == {f"{who} 0", f"{who} 1", "alone"}
    one, other, alone = told[f"{who} 0"], told[f"{who} 1"], told["alone"]
    assert one["weights"] == other["weights"]
    assert one["losses"] == other["losses"]
    assert one["losses"][1] < one["losses"][0]
    np.testing.assert_allclose(one["losses"], alone["losses"], rtol=1e-5)
    np.testing.assert_allclose(one["weights"], alone["weights"], rtol=1e-6)
    if options:
        # Keras's own fit, on stock layers. Once it works, the example should use it.
        assert one["fit"].startswith("ValueError: Attempt to convert a value (PerReplica")


def load_example(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_remedies_against_overfitting_train_as_with_stock_layers(strict, executed):
    """The same random numbers, so the same losses, penalties included."""
    example = load_example("less_overfitting")
    mnist = data.read_npz(data.SUBSET, source="the packaged subset").limit(96)
    x, y = mnist.x_train[..., None].astype("float32") / 255, mnist.y_train
    losses, outputs = [], []
    for stock in ({}, {"conv": keras.layers.Conv2D, "pool": keras.layers.MaxPooling2D}):
        model = example.make_model(remedies=True, **stock)
        assert len(model.losses) == 3  # penalties: of L2, of L1 and L2, of L1
        history = model.fit(x, y, epochs=3, batch_size=32, shuffle=False, verbose=0).history
        losses.append(history["loss"])
        outputs.append(model.predict(x, verbose=0))
        if not stock:
            assert executed()["FastconvConv2DMaxPool2D"] == 2 * (3 * 3 + 3)
            after_fast = executed()
    assert executed() == after_fast
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)
    np.testing.assert_allclose(outputs[0], outputs[1], atol=1e-4)


def test_less_overfitting_runs(capsys, monkeypatch):
    subset = data.read_npz(data.SUBSET, source="the packaged subset").limit(64)
    monkeypatch.setattr(data, "load", lambda: subset)
    monkeypatch.setattr(sys, "argv", ["less_overfitting.py", "--images", "64", "--epochs", "1"])
    load_example("less_overfitting").main()
    output = capsys.readouterr().out
    assert "as it is" in output
    assert "with the remedies" in output
