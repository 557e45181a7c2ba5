"""The examples run, and say what they promise. (That of the article: test_mnist.py.)"""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import keras
import nbclient
import nbformat
import numpy as np
import pytest
import tensorflow as tf

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


def test_numpy_network_has_the_gradients_of_tensorflow(strict):
    """Its backward pass is written by hand; TensorFlow derives the same."""
    example = load_example("numpy_network")
    rng = np.random.default_rng(3)
    parameters = example.make_parameters(rng)
    mnist = data.read_npz(data.SUBSET, source="the packaged subset").limit(16)
    x, labels = mnist.x_train[..., None].astype("float32") / 255, mnist.y_train
    loss, gradients, right = example.loss_and_gradients(parameters, x, labels)

    variables = {name: tf.Variable(value) for name, value in parameters.items()}
    with tf.GradientTape() as tape:
        y = x
        for block in "12":
            y = tf.nn.conv2d(y, variables[f"w{block}"], 1, "SAME") + variables[f"b{block}"]
            y = tf.nn.max_pool2d(tf.nn.relu(y), 2, 2, "VALID")
        logits = tf.reshape(y, (len(x), -1)) @ variables["w3"] + variables["b3"]
        losses = tf.nn.sparse_softmax_cross_entropy_with_logits(labels.astype("int64"), logits)
        expected_loss = tf.reduce_mean(losses)
    expected = tape.gradient(expected_loss, variables)
    np.testing.assert_allclose(loss, expected_loss.numpy(), rtol=1e-5)
    assert right == (logits.numpy().argmax(axis=1) == labels).sum()
    assert set(gradients) == set(expected)
    for name, gradient in gradients.items():
        scale = np.abs(expected[name]).max()
        np.testing.assert_allclose(gradient, expected[name], rtol=0, atol=1e-5 * scale)


def test_numpy_network_learns_without_tensorflow():
    """In a process in which TensorFlow and Keras cannot be imported."""
    script = (
        "import runpy, sys; sys.modules['tensorflow'] = sys.modules['keras'] = None;"
        f"sys.argv = ['', '--images', '1500', '--epochs', '2']; "
        f"runpy.run_path({str(EXAMPLES / 'numpy_network.py')!r}, run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    losses = [float(loss) for loss in re.findall(r"loss (\S+),", done.stdout)]
    assert len(losses) == 2
    assert losses[1] < losses[0] < 2.3
    assert float(re.findall(r"new images (\S+)%", done.stdout)[-1]) > 80


def test_alexnet_has_the_shapes_of_its_paper():
    example = load_example("alexnet")
    model = example.make_model(227, 1 / 16)
    sizes = {layer.name: layer.output.shape[1:3] for layer in model.layers if "o" in layer.name}
    pools = [sizes[name] for name in ("conv1", "pool1", "pool2", "pool5")]
    assert pools == [(55, 55), (27, 27), (13, 13), (6, 6)]
    kernels = {w.path: tuple(w.shape) for w in model.weights if w.path.endswith("kernel")}
    assert kernels["alexnet/conv2/kernel"] == (5, 5, 3, 16)  # two groups: half of conv1's channels


def test_alexnet_trains_as_with_stock_layers(strict, executed):
    example = load_example("alexnet")
    mnist = data.read_npz(data.SUBSET, source="the packaged subset").limit(32)
    x, y = example.enlarge(mnist.x_train, 67), mnist.y_train
    losses = []
    for kinds in (example.FAST, example.STOCK):
        model = example.make_model(67, 1 / 16, **kinds)
        losses.append(
            model.fit(x, y, epochs=2, batch_size=16, shuffle=False, verbose=0).history["loss"]
        )
        if kinds is example.FAST:
            ran = executed()
            assert ran["FastconvConv2D"] == 2 * 2 * 5
            assert ran["FastconvMaxPool2DWithArgmax"] == 2 * 2 * 3
    assert executed() == ran
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)


def test_alexnet_runs(capsys):
    load_example("alexnet").main(
        ["--size", "67", "--width", "0.0625", "--images", "64", "--epochs", "2"]
    )
    output = capsys.readouterr().out
    assert "pool5  1 x 1 x 16" in output
    assert len(re.findall(r"^epoch \d: loss", output, re.MULTILINE)) == 2


def test_resnet50_runs(capsys):
    load_example("resnet50").main(["--size", "64", "--rounds", "1"])
    output = capsys.readouterr().out
    assert "53 FastConv2D" in output
    difference, restored = re.findall(r"difference\D* (\d\S*)", output)
    assert float(difference) < 1e-4
    assert float(restored) == 0


def test_notebook_runs():
    """Every cell, in a kernel, on few images."""
    notebook = nbformat.read(EXAMPLES / "first_steps.ipynb", as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    # Committed without outputs: they would differ with every machine, and hide what changed.
    assert all(not cell.outputs and cell.execution_count is None for cell in cells)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(os.environ, "FIRST_STEPS_IMAGES", "640")
        nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    texts = ["".join(output.get("text", "") for output in cell.outputs) for cell in cells]
    assert any("image/png" in output.get("data", {}) for output in cells[1].outputs)
    assert "winograd4" in texts[2]
    (difference,) = re.findall(r"probabilities: (\S+)", texts[4])
    assert float(difference) < 1e-4
    assert "4 of 7 layers" in cells[5].outputs[0].data["text/plain"]


def test_readme_lists_every_example():
    text = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    for example in EXAMPLES.glob("*.*"):
        if example.name != "README.md":
            assert f"]({example.name})" in text
    assert "](c)" in text
