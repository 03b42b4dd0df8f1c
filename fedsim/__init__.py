"""Federated and on-device learning judged as an edge workload: accuracy against time, energy, memory and bytes.

Example:
    import fedsim
    run = fedsim.run(method="fedprox", rounds=20)
    run.summary["final"]["accuracy"]
"""

import sys
from importlib import import_module
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedsim.grid.edge import EdgeGrid
    from fedsim.runs.api import Run, compose, load, reprice, resume, run
    from fedsim.runs.federation import Federation
    from fedsim.study.api import Comparison, compare
    from fedsim.workloads.base import Workload

__version__ = "0.1.0"
__all__ = [
    "Comparison",
    "EdgeGrid",
    "Federation",
    "Run",
    "Workload",
    "compare",
    "compose",
    "load",
    "reprice",
    "resume",
    "run",
]

_HOMES = {  # imported when asked for: torch takes seconds
    **dict.fromkeys(("Run", "compose", "load", "reprice", "resume", "run"), "fedsim.runs.api"),
    **dict.fromkeys(("Comparison", "compare"), "fedsim.study.api"),
    "EdgeGrid": "fedsim.grid.edge",
    "Federation": "fedsim.runs.federation",
    "Workload": "fedsim.workloads.base",
}


class _Beside:
    """Finds our other packages beside this one, also where the working folder has some of the same names."""

    names = ("clients", "configs", "devices", "strategies")
    folder = str(Path(__file__).resolve().parent.parent)

    @classmethod
    def find_spec(cls, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        return PathFinder.find_spec(name, [cls.folder]) if name in cls.names else None


def _put_ours_first() -> None:
    for name in _Beside.names:
        module = sys.modules.get(name)
        places = [str(Path(place).resolve().parent) for place in getattr(module, "__path__", ())]
        if module is not None and _Beside.folder not in places:
            where = ", ".join(places) or name
            raise ImportError(
                f"the package {name!r} of {where} was imported before fedsim, which has one of that name too; import "
                "fedsim first, or rename yours"
            )
    if not any(getattr(finder, "__qualname__", "") == _Beside.__qualname__ for finder in sys.meta_path):
        sys.meta_path.insert(0, _Beside)


_put_ours_first()


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'fedsim' has no attribute {name!r} (there are: {', '.join(__all__)})")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
