"""Sphinx's configuration. `make docs` builds the pages; a test builds them with every run."""

import importlib.util

import keras

import fastconv
import fastconv.keras
from fastconv.keras._stand_in import JOINING, STAND_INS

keras.config.disable_interactive_logging()

# Layers take over the stock layer's __name__ for the sake of files (see stand_in_for), at which
# autodoc would call them aliases. In this process nothing is saved.
for _fast in (*STAND_INS.values(), *JOINING.values()):
    _fast.__name__ = _fast.__qualname__

# Their pages need no more than the names.
autodoc_mock_imports = [name for name in ("jax", "torch") if importlib.util.find_spec(name) is None]

project = "fastconv"
author = "The fastconv authors"
copyright = author
version = release = fastconv.__version__

extensions = [
    "myst_parser",  # pages are Markdown, which GitHub shows too
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",  # docstrings of functions are numpydoc's, those of layers Google's
    "sphinx_click",
]
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3  # "#a-heading" works as on GitHub

nitpicky = True  # a reference that leads nowhere is a warning, and warnings are errors
nitpick_ignore_regex = [
    # Names of other projects in the docstrings: this documentation does not reach out for theirs.
    ("py:.*", r"(jax|keras|tf|tensorflow|torch|rich|numpy)\..*"),
]

smartquotes = False  # would make one dash of the two of an option
autodoc_typehints = "none"  # shapes and dtypes are in the text; annotations would only repeat less
autodoc_member_order = "bysource"
napoleon_use_rtype = False
napoleon_preprocess_types = False

html_theme = "furo"
html_title = f"fastconv {release}"
html_static_path = ["_static"]
html_css_files = ["fastconv.css"]
html_copy_source = False
html_show_copyright = False
html_show_sphinx = False
html_theme_options = {"navigation_with_keys": True}
pygments_style = "default"
pygments_dark_style = "github-dark"
