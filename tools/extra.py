#!/usr/bin/env python3
"""usage: extra.py NAME: prints the requirements of the package and of its extra NAME, one a line.

pip installs an extra only together with the package, which would have to be compiled first.
"""

import sys
from pathlib import Path

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    from pip._vendor import tomli as tomllib

project = tomllib.loads(Path(__file__).parents[1].joinpath("pyproject.toml").read_text())["project"]
print(*project["dependencies"], *project["optional-dependencies"][sys.argv[1]], sep="\n")
