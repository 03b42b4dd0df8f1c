"""Federated and on-device learning judged as an edge workload: accuracy against time, energy, memory and bytes.

Example:
    import fedsim
    run = fedsim.run(method="fedprox", rounds=20)
    run.summary["final"]["accuracy"]
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedsim.grid.edge import EdgeGrid
    from fedsim.runs.api import Run, compose, load, run
    from fedsim.runs.federation import Federation
    from fedsim.workloads.base import Workload

__version__ = "0.1.0"
__all__ = ["EdgeGrid", "Federation", "Run", "Workload", "compose", "load", "run"]

_HOMES = {  # imported when asked for: torch takes seconds
    **dict.fromkeys(("Run", "compose", "load", "run"), "fedsim.runs.api"),
    "EdgeGrid": "fedsim.grid.edge",
    "Federation": "fedsim.runs.federation",
    "Workload": "fedsim.workloads.base",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'fedsim' has no attribute {name!r} (there are: {', '.join(__all__)})")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
