"""Prints the oldest versions that pyproject.toml allows of what it names, as constraints for pip."""

import re
import tomllib
from pathlib import Path

PROJECT = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]

for line in PROJECT["dependencies"]:
    name, lowest = re.fullmatch(r"([\w-]+)(?:\[\w+\])?>=([\d.]+).*", line).groups()
    print(f"{name}=={lowest}")
