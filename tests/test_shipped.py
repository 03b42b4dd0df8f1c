"""Every experiment and study that comes with fedsim starts as its header prints it, made short.

What takes official files that are not bundles (CIFAR by torchvision) is composed only, by tests/test_methods.py.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from clients.app import serve
from clients.worker import worker_for
from fedsim.engines.local import LocalEngine
from fedsim.errors import ConfigError, DataError
from fedsim.runs.federation import Federation
from fedsim.settings.build import build_world
from fedsim.settings.compose import compose
from fedsim.settings.groups import config_dir, options
from fedsim.study.spec import Arm, plan, read_study, studies

# One step each of two clients at most; every client has what its experiment gives it.
SHORT = ["engine.device=cpu", "trainer.local_steps=1"]


def marked(names: list[str], quick: tuple[str, ...]) -> list[object]:
    return [pytest.param(n, marks=() if n in quick else pytest.mark.slow) for n in names]


def started(overrides: list[str]) -> None:
    """Runs the first round of an experiment; skips where its data are not here."""
    settings = compose([*overrides, *SHORT])
    if settings["choices"]["stream"] == "none":
        settings |= {"rounds": 1, "evaluate_every": 1}
    settings["cohort"] = min(2, settings["cohort"])
    settings["evaluate_clients"] = min(1, settings["evaluate_clients"])
    settings["deadline_s"], settings["over_selection"] = None, 1.0
    try:
        world = build_world(json.dumps(settings))
    except DataError as error:
        if "FEDSIM_DATA" in str(error) or "download" in str(error):
            pytest.skip(str(error))
        raise
    run = Federation(world, LocalEngine(serve))
    rounds = run.rounds()
    reports = [next(rounds)[0] for _ in range(2)]
    assert [r.round for r in reports] == [0, 1]
    assert reports[1].outcomes.get("completed"), reports[1].outcomes
    build_world.cache_clear()
    worker_for.cache_clear()


def header(experiment: str) -> str:
    lines = (config_dir() / "experiment" / f"{experiment}.yaml").read_text(encoding="utf-8").splitlines()
    return "\n".join(line for line in lines if line.startswith("#"))


def printed(experiment: str) -> list[list[str]]:
    """The overrides of the commands in an experiment's header; of a sweep the first point, else the experiment."""
    found = []
    for command in re.findall(r"^# +fedsim run (?:-m )?(.*)$", header(experiment), re.MULTILINE):
        parts = command.partition("   ")[0].split()
        found.append([part if "[" in part else part.partition(",")[0] for part in parts])
    return found or [[f"experiment={experiment}"]]


@pytest.mark.parametrize(
    "experiment", marked(options("experiment"), ("personal_digits", "mafl_digits", "mafl_femnist"))
)
def test_every_experiment_starts_as_its_header_prints_it(experiment: str):
    for overrides in printed(experiment):
        assert f"experiment={experiment}" in overrides
        started(overrides)


@pytest.mark.parametrize("study", marked(list(studies()), ("personal_digits",)))
def test_every_arm_of_every_study_starts(study: str, tmp_path: Path):
    read = read_study(study)
    assert plan(read, tmp_path)
    for arm in read.trained:
        try:
            started(list(arm.overrides))
        except ConfigError as error:
            raise AssertionError(f"arm {arm.label!r}: {error}") from error


def test_what_a_header_prints_is_found():
    assert printed("mafl_femnist") == [
        ["experiment=mafl_femnist", "method=fedavg", "seed=1"],
        ["experiment=mafl_femnist", "method=naivemix", "trainer.mix_ratio=0.2", "seed=1"],
    ]
    assert isinstance(read_study("mafl_digits").trained[0], Arm)
