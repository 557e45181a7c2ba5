"""What the README shows must run as it stands."""

import re
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_numpy_snippet_runs():
    (snippet,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names = {}
    exec(snippet, names)
    assert names["y"].shape == (8, 28, 28, 32)
    assert names["z"].shape == (8, 14, 14, 32)
    assert names["dw"].shape == names["w"].shape
    assert names["dx"].shape == names["x"].shape
    assert all(names[name].dtype == np.float32 for name in ("y", "z", "dw", "dx"))


def test_linked_files_exist():
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if "://" not in link]
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []
