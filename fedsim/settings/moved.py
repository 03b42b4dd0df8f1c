"""Present names of classes that earlier versions of fedsim had elsewhere, for the `_target_`s of their run folders."""

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
    "devices.latency": "devices.latency.models",
}
FROM_TRAINER = {  # settings that earlier versions of these strategies read from the trainer's
    "strategies.heterofl.HeteroFL": ("batch_size", "judged_at", "static_norm"),
    "strategies.ppp.PPPStrategy": ("diversity", "judged_at"),
    "strategies.widths.WidthStrategy": ("batch_size", "judged_at"),
}

NAMES = {  # of classes that have another name now
    "fedsim.engines.local.LocalGrid": "fedsim.engines.local.LocalEngine",
    "fedsim.engines.ray.RayGrid": "fedsim.engines.ray.engine.RayEngine",
    "fedsim.engines.ray.grid.RayGrid": "fedsim.engines.ray.engine.RayEngine",
}


def current(name: str) -> str:
    """Returns the dotted name that a class or function of ours has now.

    Args:
        name: as any version since 0.1 wrote it; others come back as they are.
    """
    if name in NAMES:
        return NAMES[name]
    module, _, own = name.rpartition(".")
    return f"{MODULES[module]}.{own}" if module in MODULES else name


def updated(tree: Any) -> Any:
    """Returns settings as this version writes them.

    Every `_target_` has its present name, nested ones alike; a strategy has the settings that it once read from the
    trainer's.
    """
    tree = _renamed(tree)
    if isinstance(tree, dict) and isinstance(tree.get("trainer"), dict) and "strategy" in tree:
        tree["strategy"] = _with_shared(tree["strategy"], tree["trainer"])
    return tree


def _renamed(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {
            key: current(value) if key == "_target_" and isinstance(value, str) else _renamed(value)
            for key, value in tree.items()
        }
    return [_renamed(value) for value in tree] if isinstance(tree, list) else tree


def _with_shared(strategy: Any, trainer: dict[str, Any]) -> Any:
    """Returns a strategy's settings, and those of one inside it, with the trainer's that both halves must know."""
    if not isinstance(strategy, dict):
        return strategy
    names = FROM_TRAINER.get(str(strategy.get("_target_")), ())
    shared = {name: trainer[name] for name in names if name in trainer}
    return {**shared, **{key: _with_shared(value, trainer) for key, value in strategy.items()}}
