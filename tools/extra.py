#!/usr/bin/env python3
"""usage: extra.py NAME [--only]

Prints the requirements of the package and of its extra NAME, one a line; with --only, those of the
extra alone. (pip installs an extra only together with the package, which would be compiled first.)
"""

import sys
from pathlib import Path

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    from pip._vendor import tomli as tomllib

project = tomllib.loads(Path(__file__).parents[1].joinpath("pyproject.toml").read_text())["project"]
requirements = project["optional-dependencies"][sys.argv[1]]
if "--only" not in sys.argv[2:]:
    requirements = project["dependencies"] + requirements
print(*requirements, sep="\n")
