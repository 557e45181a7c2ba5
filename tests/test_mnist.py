"""The main job: where its data comes from, and that stock and fast layers train alike."""

import io
import re
import runpy
import socket
import sys
import threading
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from fastconv.cli import main
from fastconv.mnist import data

EXAMPLE = Path(__file__).parents[1] / "examples" / "article_mnist.py"


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    """No network, and a home of Keras's that is empty."""

    def no_answer(url, seconds):
        raise OSError("no network in tests")

    monkeypatch.setattr(data, "wait_for_answer", no_answer)
    monkeypatch.setenv("KERAS_HOME", str(tmp_path / "keras"))


@pytest.fixture
def tensorflow():
    return pytest.importorskip("tensorflow")


def arrays(**changes):
    """A small set in Keras's layout, with some arrays replaced; None leaves one out."""
    rng = np.random.default_rng(0)
    small = {
        "x_train": rng.integers(0, 256, (12, 28, 28), dtype=np.uint8),
        "y_train": np.arange(12, dtype=np.uint8) % 10,
        "x_test": rng.integers(0, 256, (6, 28, 28), dtype=np.uint8),
        "y_test": np.arange(6, dtype=np.uint8),
    }
    return {key: value for key, value in {**small, **changes}.items() if value is not None}


def saved(path, **changes):
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, **arrays(**changes))
    return path


def invoke(*arguments):
    return CliRunner().invoke(main, ["mnist", *map(str, arguments)], prog_name="fastconv")


# --- data -----------------------------------------------------------------------------------------


def test_subset_is_packaged_and_balanced():
    subset = data.read_npz(data.SUBSET, source="packaged")
    assert subset.x_train.shape == (10_000, 28, 28)
    assert subset.x_test.shape == (2_000, 28, 28)
    assert subset.x_train.dtype == np.uint8
    for labels in (subset.y_train, subset.y_test):
        assert np.bincount(labels).min() > 0.75 * len(labels) / 10
    assert data.SUBSET.stat().st_size < 2.1e6
    licence = data.SUBSET.with_name("LICENSE-MNIST.txt").read_text()
    assert "CC BY-SA 3.0" in licence
    assert "LeCun" in licence


def test_offline_falls_back_to_the_subset_and_says_why():
    mnist = data.load()
    assert len(mnist.x_train) == 10_000
    line = mnist.describe()
    assert "10,000 training and 2,000 test images" in line
    assert "subset" in line
    assert "no network in tests" in line


def test_cache_comes_before_download():
    path = saved(data.keras_cache())
    mnist = data.load()
    assert len(mnist.x_train) == 12
    assert f"from Keras's cache, {path}" in mnist.describe()


def test_broken_cache_is_named_among_the_reasons():
    data.keras_cache().parent.mkdir(parents=True)
    data.keras_cache().write_bytes(b"cut off")
    line = data.load().describe()
    assert "subset" in line
    assert str(data.keras_cache()) in line
    assert "no network in tests" in line


def test_download_is_left_to_keras(monkeypatch, tensorflow):
    import keras

    small = arrays()
    pairs = ((small["x_train"], small["y_train"]), (small["x_test"], small["y_test"]))
    monkeypatch.setattr(data, "wait_for_answer", lambda url, seconds: None)
    monkeypatch.setattr(keras.datasets.mnist, "load_data", lambda: pairs)
    before = socket.getdefaulttimeout()
    mnist = data.load()
    assert mnist.x_test is small["x_test"]
    assert "downloaded by keras.datasets.mnist" in mnist.describe()
    assert socket.getdefaulttimeout() == before


def test_failing_download_falls_back_to_the_subset(monkeypatch, tensorflow):
    import keras

    def fail():
        raise Exception("URL fetch failure:\n503")  # what Keras raises, class included

    monkeypatch.setattr(data, "wait_for_answer", lambda url, seconds: None)
    monkeypatch.setattr(keras.datasets.mnist, "load_data", fail)
    assert "(URL fetch failure: 503)" in data.load().describe()


class TestWaitForAnswer:
    """On this machine's own loopback: no test asks the network."""

    @pytest.fixture
    def wait_for_answer(self, monkeypatch):
        monkeypatch.undo()  # the fixture above replaced it
        monkeypatch.setenv("no_proxy", "*")
        return data.wait_for_answer

    def test_silent_host(self, wait_for_answer):
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
            begin = time.monotonic()
            with pytest.raises(OSError, match=r"no answer within 0.3 s|timed out"):
                wait_for_answer(f"http://127.0.0.1:{port}/", 0.3)
            assert time.monotonic() - begin < 5

    def test_slow_name_server(self, wait_for_answer, monkeypatch):
        released = threading.Event()
        monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: released.wait(10))
        try:
            with pytest.raises(TimeoutError, match=r"no answer within 0.2 s"):
                wait_for_answer("http://mnist.invalid/", 0.2)
        finally:
            released.set()

    def test_refused(self, wait_for_answer):
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        with pytest.raises(OSError, match="refused"):
            wait_for_answer(f"http://127.0.0.1:{port}/", 5)

    def test_answer(self, wait_for_answer):
        with socket.create_server(("127.0.0.1", 0)) as server:

            def answer():
                connection, _ = server.accept()
                with connection:
                    connection.recv(4096)
                    connection.sendall(b"HTTP/1.0 200 OK\r\nContent-Length: 0\r\n\r\n")

            thread = threading.Thread(target=answer)
            thread.start()
            wait_for_answer(f"http://127.0.0.1:{server.getsockname()[1]}/", 5)
            thread.join()


@pytest.mark.parametrize("dtype", [np.uint8, np.int64, np.float32, np.float64])
def test_data_file_of_any_number_type(tmp_path, dtype):
    path = saved(tmp_path / "own.npz", x_train=arrays()["x_train"].astype(dtype))
    mnist = data.load(path)
    assert np.array_equal(mnist.x_train, arrays()["x_train"])
    assert str(path) in mnist.describe()


def test_limit_keeps_the_first_of_each(tmp_path):
    mnist = data.load(saved(tmp_path / "own.npz")).limit(8)
    assert len(mnist.x_train) == len(mnist.y_train) == 8
    assert len(mnist.x_test) == len(mnist.y_test) == 6
    assert "8 training and 6 test images" in mnist.describe()


IMAGES = arrays()["x_train"]
WRONG_ARRAYS = {
    "no y_test": ({"y_test": None}, "Received: x_train, y_train, x_test"),
    "flat images": ({"x_train": IMAGES.reshape(12, 784)}, "Received: (12, 784)"),
    "larger images": ({"x_test": np.zeros((6, 32, 32))}, "Received: (6, 32, 32)"),
    "channel axis": ({"x_train": IMAGES[..., None]}, "Received: (12, 28, 28, 1)"),
    "no images": ({"x_train": IMAGES[:0]}, "Received: (0, 28, 28)"),
    "boolean images": ({"x_train": IMAGES > 0}, "Received: bool"),
    "complex images": ({"x_train": IMAGES + 0j}, "Received: complex128"),
    "negative pixel": ({"x_train": IMAGES.astype(int) - 1}, "Received: from -1 to"),
    "too bright": ({"x_train": IMAGES.astype(int) + 1}, "to 256"),
    "not a number": ({"x_train": IMAGES * np.nan}, "Received: from nan to nan"),
    "too few labels": ({"y_train": np.zeros(11, int)}, "Received: (11,)"),
    "one-hot labels": ({"y_train": np.eye(12, 10)}, "Received: (12, 10)"),
    "float labels": ({"y_train": np.zeros(12)}, "Received: float64"),
    "negative label": ({"y_train": np.full(12, -1)}, "Received: from -1 to -1"),
    "label 10": ({"y_test": np.arange(6) + 5}, "Received: from 5 to 10"),
}


@pytest.mark.parametrize(("changes", "received"), WRONG_ARRAYS.values(), ids=WRONG_ARRAYS)
def test_wrong_arrays_are_refused(tmp_path, changes, received):
    path = saved(tmp_path / "own.npz", **changes)
    with pytest.raises(data.DataError, match="Received: ") as error:
        data.load(path)
    assert received in str(error.value)
    assert str(path) in str(error.value)


def npz_bytes(**changes):
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays(**changes))
    return buffer.getvalue()


def npy_bytes(array, **options):
    buffer = io.BytesIO()
    np.save(buffer, array, **options)
    return buffer.getvalue()


def zip_bytes(**members):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in members.items():
            archive.writestr(f"{name}.npy", content)
    return buffer.getvalue()


def damaged():
    """An archive whose directory is sound and whose first array is not."""
    content = bytearray(npz_bytes())
    content[200:400] = bytes(200)
    return bytes(content)


WRONG_FILES = {
    "empty": b"",
    "text": b"x_train,y_train\n",
    "cut off": npz_bytes()[:2000],
    "damaged": damaged(),
    "one array": npy_bytes(IMAGES),
    "no array": zip_bytes(),
    "not arrays": zip_bytes(**dict.fromkeys(data.KEYS, b"text")),
    "pickle": npy_bytes(np.array([{}]), allow_pickle=True),
    "pickles inside": npz_bytes(y_train=np.array([{}] * 12, dtype=object)),
}


@pytest.mark.parametrize("content", WRONG_FILES.values(), ids=WRONG_FILES)
def test_wrong_files_are_refused(tmp_path, content):
    path = tmp_path / "own.npz"
    path.write_bytes(content)
    with pytest.raises(data.DataError, match="Received: "):
        data.load(path)


def test_unpickles_nothing(tmp_path):
    class Trap:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "sprung",))

    path = saved(tmp_path / "own.npz", x_train=np.array([Trap()] * 12, dtype=object))
    with pytest.raises(data.DataError):
        data.load(path)
    assert not (tmp_path / "sprung").exists()


def test_bad_data_file_is_a_usage_error(tmp_path, tensorflow):
    text = tmp_path / "own.npz"
    text.write_text("no archive")
    for path in (tmp_path / "missing.npz", tmp_path, text):
        result = invoke("--data", path)
        assert result.exit_code == 2
        assert "Invalid value for '--data'" in result.output
        assert "Received: " in result.output


# --- training -------------------------------------------------------------------------------------


def last_result(output):
    loss, accuracy = re.findall(r"^Loss: ([\d.]+), Accuracy: ([\d.]+)$", output, re.MULTILINE)[-1]
    return float(loss), float(accuracy)


@pytest.mark.parametrize("layers", ["stock", "fast"])
def test_few_steps_learn(tensorflow, layers):
    from fastconv.adapters.tensorflow import ops_executed

    before = sum(ops_executed().values())
    result = invoke("--layers", layers, "--epochs", 3, "--limit", 800, "--batch-size", 16)
    assert result.exit_code == 0, result.output
    assert (sum(ops_executed().values()) > before) == (layers == "fast")
    assert "800 training and 800 test images, the subset" in result.output
    assert [f"Epoch {epoch}/3" in result.output for epoch in (1, 2, 3)] == [True] * 3
    training_losses = [float(loss) for loss in re.findall(r"- loss: ([\d.]+)", result.output)]
    assert training_losses[2] < 0.5 * training_losses[0]
    loss, accuracy = last_result(result.output)
    assert loss < 1.0
    assert accuracy > 0.75


def test_same_seed_same_result(tensorflow):
    options = ("--epochs", 1, "--limit", 300)
    first, again, other = (
        last_result(invoke(*options, "--seed", seed).output) for seed in (1, 1, 2)
    )
    assert first == pytest.approx(again, rel=1e-3)
    assert first != pytest.approx(other, rel=1e-3)


def test_both_prints_the_comparison(tensorflow):
    result = invoke("--layers", "both", "--epochs", 2, "--limit", 500)
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    tables = lines[lines.index("Fast layers") + 1 :]
    assert max(map(len, tables)) <= 80

    number = r"([\d.,]+)"
    for label in ("Test loss", "Test accuracy", "Seconds", "Images/s"):
        rows = [re.fullmatch(rf" *{label} +{number} +{number} +{number}x *", t) for t in tables]
        assert sum(row is not None for row in rows) == 1, label

    parts = ["Conv2D 1", "Conv2D 2", "Dense 1", "Dense 2"]
    arrays = [f"{part} {array} gradient" for part in parts for array in ("kernel", "bias")]
    for name in ("forward pass", *arrays):
        (row,) = [line for line in tables if line.strip().startswith(name)]
        assert float(row.split()[-1]) <= 1e-5, row


@pytest.mark.parametrize("layers", ["fast", "both"])
def test_plots_are_drawn_from_the_trained_models(tensorflow, tmp_path, layers):
    pytest.importorskip("matplotlib")
    path = saved(tmp_path / "small.npz")
    directory = tmp_path / "plots"
    arguments = ["--data", path, "--layers", layers, "--epochs", 2, "--plot", directory]
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    models = [""] if layers == "fast" else ["-stock", "-fast"]
    names = ["training"]
    names += [f"{kind}{m}" for m in models for kind in ("confusion", "filters", "features")]
    expected = {f"{name}.{ending}" for name in names for ending in ("svg", "png")}
    assert {drawn.name for drawn in directory.iterdir()} == expected
    for name in expected:
        assert f"drawn: {directory / name}" in result.output
        assert (directory / name).stat().st_size > 3000


def test_plots_without_matplotlib_say_what_to_install(tensorflow, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = invoke("--plot", "nowhere")
    assert result.exit_code == 1
    assert "pip install 'fastconv[plot]'" in result.output


def test_single_step_has_no_rate(tensorflow):
    result = invoke("--layers", "both", "--epochs", 1, "--limit", 8)
    assert result.exit_code == 0, result.output
    assert re.search(r"Images/s +- +- +- *$", result.output, re.MULTILINE)


def test_fast_layers_start_and_differ_as_promised(tensorflow):
    from fastconv.mnist import article

    stock, fast = article.same_start(seed=3)
    kinds = [type(layer).__qualname__ for layer in fast.layers]
    assert kinds[:4] == ["FastConv2D", "FastMaxPooling2D"] * 2
    for ours, theirs in zip(fast.get_weights(), stock.get_weights(), strict=True):
        assert np.array_equal(ours, theirs)
    rows = article.differences(stock, fast, data.load(), batch_size=64)
    assert len(rows) == 1 + len(stock.trainable_variables)
    assert rows[0].shape == (64, 10)
    for row in rows:
        assert row.relative <= 1e-5, row


def test_differences_show_a_wrong_gradient(tensorflow):
    """The comparison itself: a model that differs in one weight must not pass it."""
    from fastconv.mnist import article

    stock = article.build_model(article.STOCK)
    other = article.build_model(article.STOCK)
    other.set_weights([1.01 * weights for weights in stock.get_weights()])
    rows = article.differences(stock, other, data.load(), batch_size=8)
    assert all(row.relative > 1e-4 for row in rows)


def test_example_runs(tensorflow, monkeypatch, capsys):
    """The listing as it stands, on fewer images."""
    import keras

    few = data.load().limit(320)
    pairs = ((few.x_train, few.y_train), (few.x_test, few.y_test))
    monkeypatch.setattr(keras.datasets.mnist, "load_data", lambda: pairs)
    with pytest.warns(UserWarning, match="input_shape"):  # stock Conv2D warns of the same
        names = runpy.run_path(str(EXAMPLE))
    assert type(names["model"].layers[0]).__qualname__ == "FastConv2D"
    assert "Epoch 10/10" in capsys.readouterr().out
    assert names["accuracy"] > 0.6


def test_an_epoch_of_the_subset_learns_mnist(tensorflow):
    result = invoke("--epochs", 1)
    assert result.exit_code == 0, result.output
    loss, accuracy = last_result(result.output)
    assert accuracy > 0.93
    assert loss < 0.25
