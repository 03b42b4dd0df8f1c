"""Where classes are now that earlier versions of fedsim had elsewhere, for the `_target_`s of their run folders."""

from __future__ import annotations

from typing import Any

_FAMILIES = {
    "compressing": ("dcil", "pqk"),
    "mixing": ("fedmix", "global_mixup", "local_mixup", "naivemix"),
    "personal": ("ditto", "fedrep", "finetune", "sub_fedavg"),
    "rehearsal": ("agem", "ewc", "gss", "joint", "lwf", "ocs", "replay", "reservoir"),
    "widths": ("fjord", "heterofl", "ppp"),
}
MODULES = {  # of 0.1: of now
    **{f"clients.trainers.{n}": f"clients.trainers.{family}.{n}" for family, names in _FAMILIES.items() for n in names},
    **{
        f"fedsim.data.{name}": f"fedsim.workloads.{name}"
        for name in ("blobs", "bundle", "digits", "log_mel", "speech_commands", "torchvision")
    },
    "fedsim.partition": "fedsim.workloads.partition",
    "fedsim.stream_kinds": "fedsim.workloads.streams.kinds",
    "fedsim.streams": "fedsim.workloads.streams.base",
    "fedsim.engines.ray": "fedsim.engines.ray.grid",
    "devices.latency": "devices.latency.models",
}


def current(name: str) -> str:
    """Returns the dotted name that a class or function of ours has now.

    Args:
        name: as any version since 0.1 wrote it; others come back as they are.
    """
    module, _, own = name.rpartition(".")
    return f"{MODULES[module]}.{own}" if module in MODULES else name


def updated(tree: Any) -> Any:
    """Returns settings with the present name in every `_target_`, nested ones alike."""
    if isinstance(tree, dict):
        return {
            key: current(value) if key == "_target_" and isinstance(value, str) else updated(value)
            for key, value in tree.items()
        }
    return [updated(value) for value in tree] if isinstance(tree, list) else tree
