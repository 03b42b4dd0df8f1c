"""An option in the place of a preset's leaves nothing of the preset's behind that nobody takes."""

from __future__ import annotations

from itertools import cycle, islice

import pytest
from hydra.utils import get_object

from fedsim.errors import ConfigError
from fedsim.settings.compose import compose
from fedsim.settings.groups import FORMAT, PRESETS, options, set_by_presets
from fedsim.settings.parameters import SPECIAL, check_parameters, parameter_names

OPTIONS = {group: options(group) for group in ("partition", "loop", "model", "uplink")}
SETTING = [(preset, name) for preset in PRESETS for name in options(preset)]


@pytest.mark.parametrize("group", OPTIONS)
def test_every_option_goes_in_the_place_of_a_presets(group: str):
    """Each option after a preset, and one preset for each set of settings in the group: only what is taken is left."""
    presets = {frozenset(set_by_presets(group, {preset: name})): f"{preset}={name}" for preset, name in SETTING}
    count = max(len(presets), len(OPTIONS[group]))
    for preset, option in islice(zip(cycle(presets.values()), cycle(OPTIONS[group]), strict=False), count):
        left = compose([preset, f"{group}={option}"])[group]
        taken = parameter_names(get_object(left["_target_"]))
        assert left.keys() <= {*taken, *SPECIAL, FORMAT}, (preset, option)


def test_a_setting_that_both_take_stays():
    assert compose(["experiment=mafl_digits", "trainer=fedprox"])["trainer"]["local_epochs"] == 2


def test_what_was_asked_for_is_checked():
    settings = compose(["experiment=mafl_digits", "partition=dirichlet", "partition.classes_per_client=3"])
    with pytest.raises(ConfigError, match=r"unknown setting for Dirichlet 'partition.classes_per_client'"):
        check_parameters("partition", settings["partition"])
