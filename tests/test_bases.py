"""What options of groups give is composed once and kept; with values on top it is what Hydra composes at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import TINY
from omegaconf import OmegaConf

from fedsim.errors import ConfigError
from fedsim.settings import bases
from fedsim.settings.compose import compose, one_sentence, search_path
from fedsim.settings.overrides import check_overrides

CHOICES = {
    "groups and values": [*TINY, "method=fedmix", "trainer.lr=0.3", "strategy@strategy.server=fedavgm"],
    "values between groups": ["trainer.lr=0.3", "method=fedprox", "trainer.proximal_mu=0.5", "workload=blobs"],
    "added, deleted, forced": ["+fleet.link=wifi", "~trainer.lr", "++trainer.lr=2", "model=lenet5"],
    "a map in the place of a group": ["fleet={speed_sigma: 0.4}", "model.hidden=[3,4]", "name='x y'"],
    "code": ["model=torchvision.models.resnet18", "model.width_per_group=2"],
}


@pytest.mark.parametrize("overrides", CHOICES.values(), ids=CHOICES)
def test_it_is_what_hydra_composes_of_all_at_once(overrides: list[str]):
    with one_sentence(overrides):
        overrides = check_overrides(overrides)
        whole = bases._by_hydra([*overrides, *search_path()])
        for _ in range(2):  # composed, then kept
            ours = bases.composed(overrides, search_path())
            assert ours.hydra.runtime.choices == whole.hydra.runtime.choices
            assert plain(ours) == plain(whole)


def plain(config: Any) -> dict[str, Any]:
    """A config as it stands, without Hydra's own settings."""
    tree = OmegaConf.to_container(config, resolve=False)
    return {key: value for key, value in tree.items() if key != "hydra"}


def test_what_one_call_sets_is_not_there_for_the_next():
    usual = compose(["workload=blobs"])
    compose(["workload=blobs", "trainer.lr=0.77", "fleet.devices={pixel3: 1}"])["trainer"]["batch_size"] = 99
    assert compose(["workload=blobs"]) == usual


def test_an_option_that_is_edited_made_or_deleted_is_another_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "configs" / "fleet" / "mine.yaml"
    with pytest.raises(ConfigError, match="unknown fleet 'mine'"):
        compose(["fleet=mine"])
    file.parent.mkdir(parents=True)
    for speed in ("0.1", "0.2"):
        file.write_text(f"defaults: [phones, _self_]\nspeed_sigma: {speed}\n")
        assert compose(["fleet=mine"])["fleet"]["speed_sigma"] == float(speed)
    file.unlink()
    with pytest.raises(ConfigError, match="unknown fleet 'mine'"):
        compose(["fleet=mine"])


def test_a_file_that_was_not_there_is_seen_when_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "configs" / "fleet"
    folder.mkdir(parents=True)
    (folder / "mine.yaml").write_text("defaults: [phones, {optional more: later}, _self_]\n")
    assert compose(["fleet=mine"])["fleet"]["speed_sigma"] != 0.7
    (folder / "more").mkdir()
    (folder / "more" / "later.yaml").write_text("# @package fleet\nspeed_sigma: 0.7\n")
    assert compose(["fleet=mine"])["fleet"]["speed_sigma"] == 0.7


def test_no_more_are_kept_than_there_is_room_for(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(bases, "MAX_KEPT", 2)
    monkeypatch.setattr(bases, "_KEPT", {})
    for method in ("fedavg", "fedprox", "fedadam"):
        compose([f"method={method}"])
    assert [[text for text in key if "method" in text] for key in bases._KEPT] == [
        ["method=fedprox"],
        ["method=fedadam"],
    ]
