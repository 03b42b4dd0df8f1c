"""Plug-ins: installed packages with the entry point group `fedsim.plugins`; they may bring classes and configs."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable
from functools import lru_cache
from importlib.metadata import EntryPoint, distributions, entry_points
from importlib.util import find_spec
from pathlib import Path

from devices.errors import one_line
from devices.texts import as_yaml

ENTRY_POINTS = "fedsim.plugins"  # group of entry points, each naming a package


@lru_cache(maxsize=1)
def plugins() -> frozenset[str]:
    """Returns the top packages of the installed plug-ins; warns of entry points that name none, which stay unused."""
    found = set()
    for entry in _entries():
        root = re.split(r"[.:\s\[]", entry.value)[0]  # entry.module fails for a value that has none
        try:
            there = root.isidentifier() and root != "__main__" and find_spec(root) is not None
        except (ImportError, ValueError):
            there = False
        if there:
            found.add(root)
        else:
            what = f"plug-in {as_yaml(entry.name)} is not used: its entry point {as_yaml(entry.value)} names no package"
            warnings.warn(f"{what} that can be imported; install what brings it again", stacklevel=2)
    return frozenset(found)


def _entries() -> Iterable[EntryPoint]:
    """Yields the entry points of plug-ins, also where those of some other package cannot be read."""
    try:
        yield from entry_points(group=ENTRY_POINTS)
    except (OSError, TypeError, ValueError, AttributeError):
        for package in distributions():
            try:
                yield from package.entry_points.select(group=ENTRY_POINTS)
            except (OSError, TypeError, ValueError, AttributeError) as error:
                what = f"the entry points of a package in {package.locate_file('')} cannot be read"
                warnings.warn(f"{what} ({one_line(error)})", stacklevel=3)


def plugin_folders() -> list[Path]:
    """Returns the `configs` folders of the installed plug-ins, below the packages that their entry points name."""
    found = []
    for root in sorted(plugins()):
        spec = find_spec(root)
        found += [Path(place) / "configs" for place in (spec and spec.submodule_search_locations) or ()]
    return [folder for folder in found if folder.is_dir()]
