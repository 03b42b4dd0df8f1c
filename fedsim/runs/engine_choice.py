"""Where a run that leaves it open is trained: on a card, or on the CPU.

The rule looks at the work alone, never at times: the same run must give the same bytes tomorrow. The choice is written
into the run's config.yaml.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from fedsim.settings.groups import Settings

CARD, HOST = "cuda", "cpu"
DRIVERS = ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd")  # without one, torch, whose import takes long, finds no card
SLOTS = 32  # of a card
WORTH_FLOPS = 1e8  # of a step of all clients that train at once


def settled(trees: Sequence[Settings]) -> tuple[list[Settings], str]:
    """Returns settings in which the engine is settled, the same for all runs that are compared.

    Args:
        trees: settings of runs, checked.

    Returns:
        The settings, in order, and a sentence on what was chosen and why; none where there was no choice.
    """
    open_ones = [tree for tree in trees if _is_open(tree)]
    if not open_ones:
        return list(trees), ""
    why, place = "", HOST
    choosing = [tree["engine"] for tree in open_ones]
    if any(engine["device"] == "auto" and engine.get("slots", 0) is None for engine in choosing) and has_card():
        most = max(map(flops_at_once, open_ones))
        place = CARD if most >= WORTH_FLOPS else HOST
        than = "more" if place == CARD else "less"
        why = f"a step of the clients that train at once takes {most:.3g} FLOPs, {than} than {WORTH_FLOPS:g}"
    return [_on(tree, place) if _is_open(tree) else tree for tree in trees], why and f"trained on {place}: {why}"


def has_card() -> bool:
    """Returns whether torch finds a GPU on this host."""
    if not any(Path(driver).exists() for driver in DRIVERS):
        return False
    import torch

    return torch.cuda.is_available()


def flops_at_once(settings: Settings) -> float:
    """Returns the FLOPs of one training step of as many clients as a card trains at once."""
    from fedsim.exchanges.slices import model_cost
    from fedsim.settings.build import build_world

    world = build_world(json.dumps(settings))
    cost = model_cost(world.workload, world.workload.build_model(), "dense")
    at_once = int(world.settings.groups["trainer"].get("batch_size", 1)) * min(world.settings.cohort, SLOTS)
    return float(cost.forward_flops + cost.backward_flops) * at_once


def _is_open(tree: Settings) -> bool:
    """Returns whether device or slots are left open, in an engine whose clients are in this process."""
    engine = tree.get("engine")
    if not isinstance(engine, dict) or "device" not in engine:  # of a damaged file, as others will say
        return False
    return "workers" not in engine and (engine["device"] == "auto" or engine.get("slots", 0) is None)


def _on(tree: Settings, place: str) -> Settings:
    engine, slots = dict(tree["engine"]), tree["engine"].get("slots", 0)
    if engine["device"] == "auto":
        engine["device"] = place if slots is None or not has_card() else CARD
    if slots is None:
        engine["slots"] = SLOTS if engine["device"] == CARD and engine["batch_clients"] == 1 else 0
    return {**tree, "engine": engine}
