"""A configuration from somebody else, a command line and a study set nothing that Hydra would act on by itself."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import yaml
from conftest import TINY

from fedsim.errors import ConfigError
from fedsim.settings import permissions
from fedsim.settings.compose import compose
from fedsim.settings.foreign import check_foreign

OF_HYDRA = {
    "a launcher": {"config": "hydra: {launcher: {_target_: os.system}}"},
    "a search path": {"config": "hydra: {searchpath: ['pkg://antigravity']}"},
    "a package": {"config": "defaults: [x: y, _self_]", "x/y": "# @package hydra.callbacks\na: {_target_: os.system}"},
    "an environment": {"config": "defaults: [x@hydra.job.env_set: y, _self_]", "x/y": "LD_PRELOAD: ./evil.so"},
    "logging": {
        "config": "defaults: [x@hydra.job_logging.handlers.h: y, _self_]",
        "x/y": "(): os.system\ncommand: touch ran",
    },
    "the root": {"config": "defaults: [x: y, _self_]", "x/y": "# @package _global_\nhydra: {job: {chdir: true}}"},
    "an override": {
        "config": "defaults: [override hydra/launcher: mine, _self_]",
        "hydra/launcher/mine": "_target_: os.system",
    },
}


@pytest.mark.parametrize("sweep", [(), ("-m",)], ids=["run", "sweep"])
@pytest.mark.parametrize("case", OF_HYDRA)
def test_a_config_tree_sets_nothing_of_hydras(here: Path, case: str, sweep: tuple[str, ...]):
    plain = yaml.safe_dump({**compose(TINY), "out": None})
    for name, text in OF_HYDRA[case].items():
        path = here / "tree" / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n{plain}" if name == "config" else text)
    with pytest.raises(ConfigError, match=r" sets hydra[\w.]*: Hydra would act on that by itself"):
        check_foreign(["--config-path", str(here / "tree"), "--config-name", "config", *sweep], ["seed=1"])


def test_a_config_tree_of_the_users_own_is_taken(here: Path):
    (here / "own" / "trainer").mkdir(parents=True)
    (here / "own" / "trainer" / "mine.yaml").write_text("defaults: [sgd, _self_]\nlr: 0.07\n")
    permissions.search(Path("own"))
    assert check_foreign([], ["trainer=mine"]) == []
    assert check_foreign([], ["hydra/launcher=basic"]) == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run", "hydra.launcher._target_=os.system"], "would have Hydra call os.system"),
        (["run", "+hydra.callbacks.a={_target_: os.system}"], "would have Hydra call"),
        (["run", "--experimental-rerun", "job.pickle"], "would unpickle a file"),
        (["run", "--config-path", "pkg://antigravity"], "antigravity is no plug-in"),
        (["data", "describe", "hydra.searchpath=[pkg://antigravity]"], "is a setting of Hydra itself"),
        (["flwr", "+model@hydra.callbacks.a=mlp"], "is a setting of Hydra itself"),
    ],
)
def test_the_command_line_hands_hydra_nothing_to_call(here, fedsim, arguments: list[str], words: str):
    code, _, err = fedsim(*arguments)
    assert (code, err.count("\n")) == (2, 1)
    assert words in err
    assert "antigravity" not in sys.modules


@pytest.mark.parametrize("override", ["hydra.launcher._target_=os.system", "+hydra.job.env_set.LD_PRELOAD=x.so"])
def test_a_study_hands_hydra_nothing(here, fedsim, override: str):
    Path("s.yaml").write_text(yaml.safe_dump({"title": "T", "arms": {"A": [*TINY, override]}}))
    code, _, err = fedsim("study", "s.yaml")
    assert (code, err.count("\n")) == (2, 1)
    assert "is a setting of Hydra itself" in err


@pytest.mark.parametrize("name", ["x", "net.py:Net"])
@pytest.mark.parametrize("place", ["method", "model", "strategy@strategy.server", "+trainer@x", "hydra/launcher"])
def test_an_option_that_climbs_out_of_the_folders_of_options_is_none(here, fedsim, name: str, place: str):
    """Hydra would act on what such a file says of its own settings."""
    (here / "sent").mkdir()
    text = "# @package _global_\nhydra: {callbacks: {a: {_target_: os.mkdir, path: ran}}}\n"
    (here / "sent" / f"{name}.yaml").write_text(text)
    climb = "../" * 20 + str(here / "sent" / name).lstrip("/")
    code, _, err = fedsim("run", *TINY, f"{place}={climb}", "out=A")
    assert (code, err.count("\n")) == (2, 1), err
    Path("s.yaml").write_text(yaml.safe_dump({"title": "T", "arms": {"A": [*TINY, f"{place}={climb}"]}}))
    assert fedsim("study", "s.yaml").code == 2
    assert not (here / "ran").exists()
    assert not (here / "A").exists()
