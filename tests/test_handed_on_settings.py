"""A plug-in may hand `**settings` on to the class above it, and give that itself what it requires."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hydra.utils import get_object
from test_methods import TINY, federate

from fedsim.errors import ConfigError
from fedsim.settings.build import World, build_world
from fedsim.settings.compose import compose
from fedsim.workloads.arrays import Arrays, ArrayWorkload, DataSet

GROUPS = (
    *("workload", "model", "partition", "fleet", "latency", "compression", "uplink", "strategy", "trainer", "engine"),
    "stream",
)
CHOSEN = {"partition": ["workload=digits", "model=mlp", "partition=dirichlet", "num_clients=7"]}
CHOSEN["stream"] = ["stream=rotated", "stream.tasks=2", "workload.input_shape=[1,6,6]"]
CHOSEN["latency"] = ["latency=flops"]


def below(target: str) -> str:
    """The name of a class below a shipped one, which takes one setting more and hands on all others."""
    above = get_object(target)

    class Mine(above):  # type: ignore[misc,valid-type]
        def __init__(self, *, extra: int, **settings: Any):
            super().__init__(**settings)
            MADE.append(extra)

    name = f"Mine{above.__name__}"
    Mine.__qualname__ = Mine.__name__ = name
    globals()[name] = Mine
    return f"{__name__}.{name}"


MADE: list[int] = []


@pytest.mark.parametrize("group", GROUPS)
def test_a_class_that_hands_its_settings_on_is_built_and_its_own_are_checked(group: str):
    base = [*TINY, *CHOSEN.get(group, [])]
    if group == "partition":
        base = [*CHOSEN[group], "cohort=3", "rounds=1", "fleet=uniform", "trainer.local_steps=1", "engine.device=cpu"]
    mine = [f"{group}._target_={below(compose(base)[group]['_target_'])}"]
    MADE.clear()
    ours, plain = federate(*mine, f"+{group}.extra=3", base=base), federate(base=base)
    assert set(MADE) == {3}
    assert ours.comparable() == plain.comparable()
    for wrong, word in (
        ([], "extra.* must be given|required argument: 'extra'"),
        ([f"+{group}.extra=x"], f"{group}.extra must be a whole"),
    ):
        with pytest.raises(ConfigError, match=word):
            federate(*mine, *wrong, base=base)


class Sines(ArrayWorkload):
    """Gives the class above its name, and takes its other settings with one of its own."""

    def __init__(self, size: int, **settings: Any):
        self.size = size
        super().__init__(name="sines", **settings)

    def read(self) -> DataSet:
        x = np.sin(np.arange(self.size * 4, dtype=np.float32)).reshape(-1, 4)
        part = Arrays(x, np.arange(self.size) % 2, None)
        return DataSet(part, part, ["a", "b"], "tabular", "sines")


class Forgetful(Sines):
    """Leaves out what the class above requires."""

    def __init__(self, **settings: Any):
        super().__init__(**settings)


def world_of(kind: type, **given: Any) -> World:
    """A world with that workload alone."""
    settings = compose(["fleet=uniform", "partition=iid", "num_clients=3", "cohort=2"])
    settings["workload"] = {"_target_": f"{__name__}.{kind.__name__}", **given}
    return build_world(json.dumps(settings))


def test_what_a_class_gives_the_one_above_need_not_be_in_the_settings():
    made = world_of(Sines, size=30, client_test_fraction=0.2).workload
    assert (made.name, made.num_clients, len(made.client_data(0).test)) == ("sines", 3, 2)


@pytest.mark.parametrize(
    ("kind", "given", "sentence"),
    [
        (Sines, {}, r"workload\.size must be given, e\.g\. workload\.size=\.\.\."),
        (Forgetful, {}, r"workload\.size must be given, e\.g\. workload\.size=\.\.\. \(Sines"),
        (Sines, {"size": 30, "client_test_fraction": 2}, r"workload\.client_test_fraction must be in \[0, 1\), got 2"),
        (Sines, {"size": 30, "siez": 3}, r"unknown setting for Sines 'workload\.siez'.*workload\.size"),
    ],
)
def test_a_wrong_setting_is_named_wherever_it_goes(kind: type, given: dict[str, Any], sentence: str):
    with pytest.raises(ConfigError, match=sentence):
        world_of(kind, **given)
