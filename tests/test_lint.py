"""The versions that `make lint` and the pre-commit hooks use are the same."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_pre_commit_has_the_versions_of_make_lint():
    pinned = re.findall(r'"([\w-]+==[\w.]+)"', (ROOT / ".pre-commit-config.yaml").read_text())
    assert len(pinned) == 3
    project = (ROOT / "pyproject.toml").read_text()
    for requirement in pinned:
        assert f'"{requirement}"' in project
