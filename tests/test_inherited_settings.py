"""A setting that a trainer inherits works or is refused: it is never accepted and ignored.

Over every trainer and everything that the classes it comes from take: another value changes the weights that a small
run ends with, or the run is refused in a sentence. A new yaml of a trainer is covered by being there.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import yaml
from hydra.utils import get_class
from test_methods import chosen, taken

from clients.app import serve
from fedsim.engines.local import LocalEngine
from fedsim.errors import ConfigError
from fedsim.messages.records import record_of
from fedsim.report.rounds import weights_sha256
from fedsim.runs.federation import Federation
from fedsim.settings.build import build_world
from fedsim.settings.compose import compose
from fedsim.settings.groups import option_file, options

# Two tasks of two rounds each, of which the second has a memory, a teacher, a penalty; three steps and more a round.
BASE = (
    *("workload=blobs", "workload.num_classes=4", "workload.input_shape=[6]", "workload.examples_per_client=24"),
    *("workload.test_examples=8", "workload.client_test_fraction=0.25", "stream=split_classes", "stream.tasks=2"),
    *("rounds=4", "num_clients=2", "cohort=2", "model=mlp", "model.hidden=[8,8]", "fleet=uniform", "latency=flops"),
    *("engine.device=cpu", "evaluate_every=2"),
)
SMALL = {"batch_size": 3, "local_epochs": 1}  # of every trainer
# Trainers whose default leaves out what a setting is about: the strategy's part, a schedule that a short run sees.
TAUGHT = {"dense_rounds": 1, "prune_rounds": 2, "sparsity": 0.85, "distil": 0.3, "attribution": "sswa", "left_out": 0.3}
OWN: dict[str, dict[str, Any]] = {
    **{"pqk": {"prune_rounds": 2}, "dcil": {"prune_rounds": 3, "distil_after": 1}},
    **dict.fromkeys(("gradual", "magnitude_attention", "cpq", "attribution"), TAUGHT),
    "dropbits": TAUGHT | {"gate_rounds": 1},
}
# Another value of each setting, and what else it needs to matter.
OTHER: dict[str, tuple[Any, dict[str, Any]]] = {
    "lr": (0.03, {}),
    "batch_size": (2, {}),
    "local_epochs": (2, {}),
    "local_steps": (1, {}),
    "momentum": (0.3, {}),
    "weight_decay": (0.1, {}),
    "lr_decay": (0.5, {}),
    "clip_norm": (0.01, {}),
    "task_decay": (0.5, {}),
    "warmup_rounds": (2, {}),
    "cosine_rounds": (3, {}),
    "proximal_mu": (0.5, {}),
    "mix_ratio": (0.3, {}),
    "average_clip": (0.1, {}),
    "average_noise": (1.0, {}),
    "memory_size": (1, {}),
    "budget_bytes": (10, {}),
    "budget_share": (0.0, {}),
    "input_bytes": (8, {"budget_bytes": 60}),
    "store": ("samples", {}),
    "replay_weight": (0.5, {}),
    "replay_batch_size": (1, {}),
    "selection": ("hardest", {"memory_size": 2}),
    "candidate_size": (1, {}),
    "class_balanced": (False, {"memory_size": 2}),
    "sparsity": (0.5, {}),
    "tiers": ({"reference": {"sparsity": 0.5}}, {}),
    "prune_rounds": (1, {}),
    "refresh": (1, {}),
    "floor": (0.1, {}),
    "temperature": (5.0, {}),
    "dense_rounds": (2, {}),
    "prune": ("filters", {}),
    "classifier": (True, {}),
    "bits": (3, {}),
    "activation_bits": (4, {}),
    "distil": (0.8, {}),
    "attribution": ("swa", {}),
    "attribution_weight": (3.0, {}),
    "left_out": (0.7, {}),
}
JUDGING = ("judged_at",)  # of evaluations: held to by tests/test_subnet.py and tests/test_ppp_deployment.py


@cache
def base(trainer: str) -> str:
    own = [f"trainer={trainer}"] if taken("trainer", trainer).startswith("trainer=") else [taken("trainer", trainer)]
    return json.dumps(compose([*BASE, *own]))


def outcome(trainer: str, changed: dict[str, Any]) -> str:
    """Hash of the weights after a run with these settings of the trainer, private ones among them."""
    settings = json.loads(base(trainer))
    settings["trainer"] |= SMALL | OWN.get(trainer, {}) | changed
    run = Federation(build_world(json.dumps(settings)), LocalEngine(serve))
    for _ in run.rounds():
        pass
    private = {
        f"{c}.{n}": t for c, kept in run.grid.store.all().items() for n, t in kept.items() if n.startswith("private.")
    }
    return weights_sha256(run.arrays) + weights_sha256(record_of(private))


@cache
def plain(trainer: str, context: str) -> str:
    return outcome(trainer, json.loads(context))


@cache
def read(trainer: str) -> dict[str, Any]:
    """What the config of a trainer says, and those that it builds on: composing all would take each worker seconds."""
    tree = yaml.safe_load(option_file("trainer", trainer).read_text())
    above = [read(name) for name in tree.pop("defaults", []) if name != "_self_"]
    return {key: value for part in (*above, tree) for key, value in part.items()}


def inherited(trainer: str) -> list[str]:
    """What the classes that a trainer comes from take, and it does not itself; only what its config has."""
    taken_over = read(trainer)
    own, *others = get_class(taken_over["_target_"]).__mro__
    mine = named(own) if others[0].__name__ != "LocalTrainer" else {}  # of plain SGD all
    others_take = {key for kind in others for key in named(kind)} & taken_over.keys()
    return sorted(others_take - set(mine) | set({} if mine else named(own)))


def named(kind: type) -> dict[str, inspect.Parameter]:
    if "__init__" not in vars(kind) or kind is object:
        return {}
    return {
        name: p
        for name, p in inspect.signature(kind).parameters.items()
        if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    }


# The kinds that were once ignored: by a set-up that did not call its parent's, and by another kind of memory.
QUICK = ("task_decay", "selection", "candidate_size", "class_balanced")


def pairs() -> Iterator[Any]:
    for trainer in options("trainer"):
        for setting in inherited(trainer):
            if setting not in JUDGING:
                marks = () if setting in QUICK else pytest.mark.slow
                yield pytest.param(trainer, setting, marks=marks)


@pytest.mark.parametrize("trainer, setting", list(pairs()))
def test_an_inherited_setting_changes_the_update_or_is_refused(trainer: str, setting: str):
    assert setting in OTHER, f"{setting} is new: give it another value here"
    value, context = OTHER[setting]
    before = plain(trainer, json.dumps(context))
    try:
        changed = outcome(trainer, context | {setting: value})
    except ConfigError as error:
        assert f"trainer.{setting}" in str(error)  # noqa: PT017 - a sentence about the setting is as good as its effect
        return
    assert changed != before, f"{trainer} takes {setting}={value} and ignores it"


def test_a_method_is_its_trainers_where_it_takes_it():
    assert (taken("trainer", "ditto"), taken("trainer", "finetune")) == ("method=ditto", "trainer=finetune")
    assert chosen("finetune") == "sgd"
