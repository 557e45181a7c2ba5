"""The package: what it exports, how it imports, what its types and its docstrings promise."""

import ast
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fastconv
from fastconv import _core, functional, packed_filter, selection

PACKAGE = Path(fastconv.__file__).parent

# Makes Python believe that the tensorflow extra was not installed.
WITHOUT_TENSORFLOW = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("tensorflow", "keras"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocker())
import fastconv
"""


def run_python(script):
    return subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False
    )


def test_exports():
    public = {"__version__", *functional.__all__, *packed_filter.__all__, *selection.__all__}
    assert set(fastconv.__all__) == public
    assert public | {"keras"} <= set(dir(fastconv))
    for name in public:
        assert hasattr(fastconv, name)
    with pytest.raises(AttributeError, match="module 'fastconv' has no attribute 'nonsense'"):
        fastconv.nonsense  # noqa: B018


def test_info():
    info = fastconv.info()
    assert set(info) == {"version", "isa", "isa_available", "num_threads", "cuda"}
    assert info["version"] == fastconv.__version__
    assert info["isa"] in info["isa_available"]
    assert info["cuda"] == {"available": False, "reason": "this build has no CUDA kernels"}


def test_import_brings_nothing_heavy():
    """Not even NumPy, which whoever has arrays has imported; TensorFlow would take seconds."""
    result = run_python(
        "import sys, typing; before = set(sys.modules); import fastconv;"
        "print(*sorted({name.partition('.')[0] for name in set(sys.modules) - before}))"
    )
    assert result.returncode == 0, result.stderr
    assert set(result.stdout.split()) <= {"fastconv", "__future__", "importlib"}


def test_import_is_quick():
    """50 ms, of the processor's time and at best, so that a busy machine fails nothing."""
    script = (
        "import time; start = time.process_time(); import fastconv;"
        "print(time.process_time() - start)"
    )
    seconds = [float(run_python(script).stdout) for _ in range(5)]
    assert min(seconds) < 0.05


def test_functions_work_without_tensorflow():
    script = "import numpy as np; print(fastconv.conv2d(*[np.ones((1, 1, 1, 1), 'f')] * 2).item())"
    result = run_python(WITHOUT_TENSORFLOW + script)
    assert result.stdout.strip() == "1.0", result.stderr


def test_layers_without_tensorflow_say_what_to_install():
    result = run_python(WITHOUT_TENSORFLOW + "fastconv.keras")
    assert result.returncode == 1
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: ")
    assert last.endswith("pip install 'fastconv[tensorflow]'")


def test_other_import_errors_are_not_hidden(monkeypatch):
    def fail(name):
        raise ModuleNotFoundError("No module named 'absent'", name="absent")

    monkeypatch.delitem(sys.modules, "fastconv.keras", raising=False)
    monkeypatch.delitem(vars(fastconv), "keras", raising=False)
    monkeypatch.setattr(fastconv.importlib, "import_module", fail)
    with pytest.raises(ModuleNotFoundError, match="absent"):
        fastconv.keras  # noqa: B018


@pytest.mark.parametrize("name", functional.__all__)
def test_docstrings_name_every_parameter(name):
    function = getattr(fastconv, name)
    document = inspect.getdoc(function)
    for parameter in inspect.signature(function).parameters:
        assert parameter in document.partition("Parameters\n")[2]
    assert "Raises\n------" in document


def signatures(body):
    """Parameter names by function, of a stub's module or class."""
    return {
        node.name: [argument.arg for argument in node.args.args]
        for node in body
        if isinstance(node, ast.FunctionDef)
    }


def test_stub_describes_the_compiled_module():
    """Its parameters; of the rest, see test_lint.py."""
    assert (PACKAGE / "py.typed").is_file()
    stubs = {
        path.stem: signatures(ast.parse(path.read_text()).body)
        for path in (PACKAGE / "_core").glob("*.pyi")
    }
    assert set(stubs) == {"__init__", "cuda", "reference", "timed"}
    operations = stubs["__init__"]
    assert len(operations) > 20
    assert len(stubs["cuda"]) > 15
    for submodule, stubbed in stubs.items():
        module = _core if submodule == "__init__" else getattr(_core, submodule)
        if submodule in ("reference", "timed"):  # their operations are imported
            stubbed = {
                name: operations[name] for name in operations if hasattr(module, name)
            } | stubbed
            assert len(stubbed) >= 9
        for name, parameters in stubbed.items():
            # pybind11 documents a function as "conv2d(x: object, w: object, ...) -> ...".
            signature = getattr(module, name).__doc__.splitlines()[0]
            assert re.findall(r"[( ](\w+): ", signature) == parameters
