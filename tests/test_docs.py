"""The documentation's pages: they build without a warning, name everything and load nothing."""

import ast
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

import fastconv
from fastconv.cli import main

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The pages as `make docs` makes them."""
    pages = tmp_path_factory.mktemp("docs")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "--quiet", "-b", "html"]
    command += ["-d", str(pages / ".doctrees"), str(DOCS), str(pages)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return pages


LOADING = {"script": "src", "img": "src", "iframe": "src", "source": "src", "link": "href"}


class Loads(HTMLParser):
    """What a browser fetches for a page, and the ids in it."""

    def __init__(self, page):
        super().__init__()
        self.loads, self.ids = [], set()
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.ids.add(attributes.get("id"))
        if attributes.get(LOADING.get(tag)):
            self.loads.append(attributes[LOADING[tag]])


def test_pages_load_nothing_from_elsewhere(built):
    pages = list(built.rglob("*.html"))
    assert len(pages) > 15
    for page in pages:
        loads = Loads(page).loads
        assert loads
        for target in loads:
            assert "//" not in target, f"{page.name} loads {target}"
            if not target.startswith("data:"):
                assert (page.parent / target.partition("?")[0].partition("#")[0]).exists(), target
    styles = list(built.rglob("*.css"))
    assert styles
    for style in styles:
        text = style.read_text(encoding="utf-8")
        assert not re.search(r"(@import|url\()\s*['\"]?(https?:)?//", text), style.name


def test_reference_has_every_public_name(built):
    functions = Loads(built / "api" / "functions.html").ids
    assert {f"fastconv.{name}" for name in fastconv.__all__} <= functions
    for part in ("cuda", "jax", "keras", "torch"):
        names = _public_names(ROOT / "python" / "fastconv" / part)
        reference = Loads(built / "api" / f"{part}.html").ids
        assert names
        assert {f"fastconv.{part}.{name}" for name in names} <= reference
    commands = Loads(built / "api" / "command_line.html").ids
    assert len(main.commands) >= 3
    assert {f"fastconv-{name}" for name in main.commands} <= commands


def _public_names(module):
    """Those of its ``__all__``, without importing it: not every framework is there."""
    path = module / "__init__.py" if module.is_dir() else module.with_suffix(".py")
    for statement in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(statement, ast.Assign) and statement.targets[0].id == "__all__":
            return ast.literal_eval(statement.value)
    raise AssertionError(f"{path} has no __all__")


def test_reference_shows_text_not_markup(built):
    """Docstrings are read in the style they are written in: no heading of theirs is left over."""
    for name in ("functions", "keras"):
        page = (built / "api" / f"{name}.html").read_text(encoding="utf-8")
        for markup in (":func:", "Args:", "-----", "``", "alias of"):
            assert markup not in page
    page = (built / "api" / "functions.html").read_text(encoding="utf-8")
    assert page.count("Raises") == len(fastconv.__all__) - 1  # all but __version__


def test_figures_are_what_the_script_draws():
    script = DOCS / "figures" / "draw.py"
    drawn = {f"{figure.name}.svg": figure.svg() for figure in _figures(script)}
    committed = {path.name: path.read_text("utf-8") for path in script.parent.glob("*.svg")}
    assert drawn == committed, f"run: python {script.relative_to(ROOT)}"


def _figures(script):
    spec = importlib.util.spec_from_file_location("draw", script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return [make() for make in module.FIGURES]


def blocks(page, language):
    text = (DOCS / page).read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def test_code_of_the_guide_runs():
    names = {}
    for block in blocks("guide/numpy.md", "python"):
        exec(block, names)
    assert names["pooled"].shape == (8, 14, 14, 32)
    assert names["dx"].shape == names["x"].shape
    assert names["dw"].shape == names["w"].shape
    assert names["dbias"].shape == (32,)


def test_kernel_of_contributing_compiles(tmp_path):
    """The header and the line of a table that the page shows, in the portable instance."""
    header, line = blocks("contributing.md", "cpp")
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "pointwise.hpp").write_text(header)
    scalar = (ROOT / "csrc" / "cpu" / "isa" / "scalar.cpp").read_text(encoding="utf-8")
    table = "kConv2dAlgorithms[] = {\n"
    assert table in scalar
    instance = tmp_path / "scalar.cpp"
    instance.write_text(
        '#include "cpu/pointwise.hpp"\n'
        + scalar.replace(table, table + line.replace("Avx512", "Scalar"))
    )
    compiler = next(filter(shutil.which, [os.environ.get("CXX", "c++"), "g++", "clang++"]))
    command = [compiler, "-std=c++20", "-fsyntax-only", "-Wall", "-Werror", "-Wno-unknown-pragmas"]
    command += [f"-I{tmp_path}", f"-I{ROOT / 'csrc'}", str(instance)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    (python,) = blocks("contributing.md", "python")
    compile(python, "test_pointwise.py", "exec")
