"""Names of classes that moved: run folders of earlier versions are read as if nothing had."""

from __future__ import annotations

import pytest

from fedsim.settings.moved import MODULES, current, updated
from fedsim.settings.trust import locate


@pytest.mark.parametrize("module", MODULES.values())
def test_every_new_module_is_there_and_is_ours(module: str):
    __import__(module)
    assert module.partition(".")[0] in ("clients", "devices", "fedsim")


def test_a_name_of_0_1_is_the_same_class_now():
    was = "clients.trainers.ditto.DittoTrainer"
    assert current(was) == "clients.trainers.personal.ditto.DittoTrainer"
    assert current(current(was)) == current(was)
    assert locate("trainer._target_", current(was)).__name__ == "DittoTrainer"


def test_names_of_others_stay():
    for name in ("torch.nn.Linear", "mine.Net", "clients.trainers.sgd.SGDTrainer", "clients.trainers.ditto"):
        assert current(name) == name


def test_nested_targets_are_updated_and_other_texts_are_not():
    tree = {"a": [{"_target_": "fedsim.partition.Shards", "name": "fedsim.partition.Shards"}], "b": 1}
    assert updated(tree) == {
        "a": [{"_target_": "fedsim.workloads.partition.Shards", "name": "fedsim.partition.Shards"}],
        "b": 1,
    }


def test_a_strategy_of_0_1_has_the_settings_that_it_read_from_the_trainers():
    trainer = {"batch_size": 8, "judged_at": [0.5], "static_norm": True}
    old = {"_target_": "strategies.heterofl.HeteroFL", "levels": [1.0]}
    assert updated({"strategy": old, "trainer": trainer})["strategy"] == {**trainer, **old}
    within = updated({"strategy": {"_target_": "strategies.mafl.Mafl", "server": old}, "trainer": trainer})
    assert within["strategy"]["server"] == {**trainer, **old}
    now = {**old, "static_norm": False, "judged_at": [], "batch_size": 1}
    assert updated({"strategy": now, "trainer": trainer})["strategy"] == now
