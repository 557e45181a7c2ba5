"""Files that are damaged or not ours: an error that says so, no crash, nothing run from them.

MNIST's .npz files are in test_mnist.py.
"""

import ast
import json
import re
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

import fastconv
from fastconv.bench import files
from fastconv.cli import main

PACKAGE = Path(fastconv.__file__).parent
ROOT = Path(__file__).parent.parent


# --- nothing is unpickled or evaluated ------------------------------------------------------------


def sources():
    for directory in (PACKAGE, ROOT / "tools", ROOT / "bench", ROOT / "examples"):
        for path in directory.rglob("*.py"):
            yield path, ast.parse(path.read_text())


def test_nothing_is_unpickled():
    """No module that unpickles is imported, and each np.load says that it must not."""
    forbidden = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve"}
    forbidden |= {"marshal", "yaml"}
    loads = 0
    for path, tree in sources():
        for node in ast.walk(tree):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            assert not forbidden & {name.partition(".")[0] for name in names}, path
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func)
            assert called not in ("eval", "exec", "compile"), path
            options = {word.arg: ast.unparse(word.value) for word in node.keywords}
            assert options.get("safe_mode") != "False", path
            assert options.get("allow_pickle") in (None, "False"), path
            assert "enable_unsafe_deserialization" not in called, path
            if called in ("np.load", "numpy.load"):
                loads += 1
                assert options.get("allow_pickle") == "False", (path, node.lineno)
    assert loads >= 2


# --- results of fastconv bench --------------------------------------------------------------------

PROBLEM = "mb1ic8ih9oc8kh3"
TIMES = {"median": 1000.0, "low": 900.0, "high": 1100.0, "least": 800.0}
RUN = {
    "format": files.FORMAT,
    "command": "fastconv bench",
    "complete": True,
    "planned": 1,
    "seconds": 1.0,
    "conditions": {
        "cpu": "a", "cpus": 2, "threads": 2, "system": "b", "versions": {"fastconv": "1"},
        "absent": {"torch": "not installed"}, "malloc": None, "cold": False, "layout": "nhwc",
        "dtype": "float32", "rounds": 3, "when": "2026-01-01T00:00:00+00:00", "others": 0.1,
        "limits": {"flops": 1e11, "read": 1e10, "write": 1e10},
    },
    "results": [
        {
            "suite": "problems", "problem": PROBLEM, "name": "", "kind": "convolution",
            "direction": "fprop", "flops": 56448, "read": 4900, "written": 1568,
            "repeat": "fastconv bench", "rounds": 3, "left_out": {},
            "ratio": {"peer": "torch", "median": 2.0, "low": 1.9, "high": 2.1},
            "call_ratio": None,
            "implementations": {
                "fastconv": {
                    "algorithm": "direct", "error": 1e-7, "workspace": 64, "kernel": TIMES,
                    "call": TIMES,
                },
                "torch": {
                    "algorithm": None, "error": 1e-7, "workspace": None,
                    "kernel": {**TIMES, "estimated": True},
                },
            },
        }
    ],
}  # fmt: skip


def invoke(*arguments):
    return CliRunner().invoke(main, ["bench", *map(str, arguments)], prog_name="fastconv")


def assert_clear_failure(result):
    assert isinstance(result.exception, SystemExit), repr(result.exception)
    assert result.exit_code in (1, 2)
    assert "Error: " in result.output
    assert "Traceback" not in result.output


def test_the_run_that_is_damaged_below_is_sound(tmp_path):
    path = tmp_path / "run.json"
    path.write_text(json.dumps(RUN))
    assert files.read_json(path) == RUN
    for arguments in (["--from", path, "--csv", tmp_path / "a.csv"], ["--compare", path, path]):
        result = invoke(*arguments)
        assert result.exit_code == 0, result.output
    if pytest.importorskip("matplotlib"):
        result = invoke("--from", path, "--report", tmp_path / "a.md")
        assert result.exit_code == 0, result.output


def places(value, path=()):
    """Where a JSON value has members."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, member in items:
        yield (*path, key)
        if isinstance(member, (dict, list)):
            yield from places(member, (*path, key))


def changed(path, change):
    run = json.loads(json.dumps(RUN))
    part = run
    for key in path[:-1]:
        part = part[key]
    change(part, path[-1])
    return run


WRONG_VALUES = [None, True, "x", "../x", -1, 0, 1e400, float("nan"), [], {}, [1], {"a": 1}]


@pytest.mark.parametrize("path", list(places(RUN)), ids=lambda path: ".".join(map(str, path)))
def test_damaged_results(path, tmp_path):
    """A member is gone or something else: refused with a reason, or shown."""
    file = tmp_path / "run.json"
    damaged = [changed(path, lambda part, key: part.pop(key))]
    damaged += [
        changed(path, lambda part, key, value=value: part.__setitem__(key, value))
        for value in WRONG_VALUES
    ]
    for run in damaged:
        file.write_text(json.dumps(run))
        for arguments in (
            ["--from", file, "--csv", tmp_path / "a.csv"],
            ["--compare", file, file],
        ):
            result = invoke(*arguments)
            if result.exit_code != 0:
                assert_clear_failure(result)
                assert "Received: " in result.output or "must hold results" in result.output


@pytest.mark.parametrize("name", ["../out", "/out", "a/b", "a\\b", "a\0b"])
def test_figures_are_drawn_where_they_were_asked_for(name, tmp_path):
    """The names of figures come from the file."""
    run = changed(("results", 0, "suite"), lambda part, key: part.__setitem__(key, name))
    (tmp_path / "run.json").write_text(json.dumps(run))
    result = invoke("--from", tmp_path / "run.json", "--plot", tmp_path / "plots")
    assert_clear_failure(result)
    assert "suite=" in result.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.json"]


NOT_JSON = {
    "empty": b"",
    "binary": bytes(range(256)),
    "cut off": json.dumps(RUN).encode()[:-200],
    "another file": b'{"a": 1}',
    "a number": b"3",
    "too deep": b"[" * 100_000,
    "too long a number": b'{"format": ' + b"9" * 100_000 + b"}",
    "UTF-16": json.dumps(RUN).encode("utf-16"),
    "another format": json.dumps({**RUN, "format": 2}).encode(),
    "no results": json.dumps({**RUN, "results": None}).encode(),
}


@pytest.mark.parametrize("content", NOT_JSON.values(), ids=NOT_JSON)
def test_other_files_are_no_results(content, tmp_path):
    path = tmp_path / "run.json"
    path.write_bytes(content)
    for arguments in (["--from", path], ["--compare", path, path]):
        result = invoke(*arguments)
        assert_clear_failure(result)
        assert str(path) in result.output.replace("\n", "")


@pytest.mark.parametrize("seed", range(20))
def test_flipped_bits_of_results(seed, tmp_path):
    rng = np.random.default_rng(seed)
    content = bytearray(json.dumps(RUN).encode())
    for at in rng.integers(0, len(content), 3):
        content[at] ^= 1 << int(rng.integers(0, 8))
    path = tmp_path / "run.json"
    path.write_bytes(content)
    for arguments in (["--from", path], ["--compare", path, path]):
        result = invoke(*arguments)
        if result.exit_code != 0:
            assert_clear_failure(result)


# --- Keras's files --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def keras_files(tmp_path_factory):
    """{ending: content} of a model of fast layers, and its weights."""
    keras = pytest.importorskip("keras")
    directory = tmp_path_factory.mktemp("files")
    layers = fastconv.keras
    model = keras.Sequential(
        [
            keras.layers.Input((12, 12, 1)),
            layers.FastConv2D(4, 3, activation="relu"),
            layers.FastMaxPooling2D(2),
            layers.FastDepthwiseConv2D(3),
            layers.FastGlobalAveragePooling2D(),
        ]
    )
    model.save(directory / "model.keras")
    model.save_weights(directory / "model.weights.h5")
    return model, {
        ending: (directory / f"model{ending}").read_bytes() for ending in (".keras", ".weights.h5")
    }


def load(model, ending, path):
    import keras

    if ending == ".keras":
        return keras.models.load_model(path)
    copy = keras.models.clone_model(model)
    copy.load_weights(path)
    return copy


@pytest.mark.parametrize("ending", [".keras", ".weights.h5"])
def test_whole_files_load(ending, keras_files, tmp_path):
    model, contents = keras_files
    (tmp_path / f"m{ending}").write_bytes(contents[ending])
    loaded = load(model, ending, tmp_path / f"m{ending}")
    assert [type(layer) for layer in loaded.layers] == [type(layer) for layer in model.layers]
    for ours, theirs in zip(loaded.get_weights(), model.get_weights(), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("ending", [".keras", ".weights.h5"])
def test_cut_off_and_foreign_files(ending, keras_files, tmp_path):
    model, contents = keras_files
    whole = contents[ending]
    path = tmp_path / f"m{ending}"
    for content in (
        b"",
        b"text",
        bytes(len(whole)),
        *(whole[: len(whole) * part // 8] for part in range(8)),
        whole[len(whole) // 2 :],
    ):
        path.write_bytes(content)
        with pytest.raises((OSError, ValueError, KeyError)) as caught:
            load(model, ending, path)
        assert re.search(r"\w+ \w+", str(caught.value))


@pytest.mark.parametrize("ending", [".keras", ".weights.h5"])
def test_damaged_files(ending, keras_files, tmp_path):
    """Zeroed stretches and flipped bits: an exception, or a model; never a crash.

    .keras files are zip archives with a checksum of every member; .h5 files have none of their
    weights, so that damage there can pass.
    """
    model, contents = keras_files
    rng = np.random.default_rng(4)
    path = tmp_path / f"m{ending}"
    refused = 0
    for turn in range(40):
        content = bytearray(contents[ending])
        at = int(rng.integers(0, len(content)))
        if turn % 2:
            content[at : at + 64] = bytes(len(content[at : at + 64]))
        else:
            content[at] ^= 1 << int(rng.integers(0, 8))
        path.write_bytes(content)
        try:
            loaded = load(model, ending, path)
        except Exception as error:  # noqa: BLE001 - h5py, zipfile and Keras have each their own
            refused += 1
            assert str(error)  # noqa: PT017 - a file that loads is right too
        else:
            assert len(loaded.layers) == len(model.layers)
    assert refused >= (20 if ending == ".keras" else 1)


def test_configurations_with_wrong_values(keras_files, tmp_path):
    """A file whose archive is whole, of a layer that cannot be."""
    import zipfile

    import keras

    _, contents = keras_files
    (tmp_path / "m.keras").write_bytes(contents[".keras"])
    with zipfile.ZipFile(tmp_path / "m.keras") as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    config = members["config.json"].decode()
    for old, new in [
        ('"filters": 4', '"filters": -4'),
        ('"filters": 4', '"filters": "many"'),
        ('"kernel_size": [3, 3]', '"kernel_size": [0, 3]'),
        ('"padding": "valid"', '"padding": "full"'),
        ("FastConv2D", "FastConv9D"),
        ('"data_format": "channels_last"', '"data_format": "sideways"'),
    ]:
        assert old in config, old
        with zipfile.ZipFile(tmp_path / "wrong.keras", "w") as archive:
            for name, content in members.items():
                content = config.replace(old, new).encode() if name == "config.json" else content
                archive.writestr(name, content)
        with pytest.raises((TypeError, ValueError, ImportError, AttributeError)) as caught:
            keras.models.load_model(tmp_path / "wrong.keras")
        assert re.search(r"\w+ \w+", str(caught.value))
