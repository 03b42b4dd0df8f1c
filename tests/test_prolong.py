"""A finished run that is prolonged is, to the byte, the longer run that was never stopped."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path

import pytest
from conftest import honest
from test_methods import NEEDS, methods_of_each_kind
from test_methods import TINY as BLOBS
from test_resume import comparable

from clients.app import serve
from fedsim.engines.local import LocalEngine
from fedsim.errors import ConfigError
from fedsim.runs import prolong as prolong_module
from fedsim.runs import writer
from fedsim.runs.checkpoint import Checkpoints
from fedsim.runs.prolong import prolong
from fedsim.runs.recorded import settings_of_run
from fedsim.settings.compose import compose, of_rounds
from fedsim.settings.groups import following

PHONES = [*BLOBS, "fleet=phones", "cohort=4"]


def made(out: Path, *overrides: str) -> Path:
    """A run folder."""
    writer.run(compose([*overrides]), LocalEngine(serve), out)
    return out


def longer(run: Path, rounds: int) -> Path:
    """The same folder after `rounds` in all."""
    prolong(run, of_rounds(settings_of_run(run), rounds))
    writer.run(settings_of_run(run), LocalEngine(serve), run, resume=True)
    return run


# Methods of a kind of which another one is here are left to slow.
@pytest.mark.parametrize("every", [pytest.param(1, marks=pytest.mark.slow), 2])
@pytest.mark.parametrize("method", [None, *methods_of_each_kind()])
def test_a_prolonged_run_is_the_longer_one(tmp_path: Path, method: str | None, every: int):
    """Also where it judged the model after its last round alone, which takes its devices time: 3 is odd."""
    chosen = [] if method is None else [f"method={method}", *NEEDS.get(f"method={method}", [])]
    base = [*PHONES, "evaluate_clients=3", f"evaluate_every={every}", *chosen, *honest(chosen)]
    run, straight = made(tmp_path / "run", *base, "rounds=3"), made(tmp_path / "straight", *base, "rounds=5")
    try:
        longer(run, 5)
    except ConfigError as error:
        refusal = str(error)
        assert "so that a longer run would have begun in another way" in refusal
        return
    assert comparable(run) == comparable(straight)


STEPS = ("put_beside", "unlink", "write_atomic", "take_beside")


@pytest.fixture(scope="module", params=[1, 2])
def straight(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Runs of three and of five rounds that were never stopped."""
    place = tmp_path_factory.mktemp("straight")
    base = [*PHONES, "method=ditto", f"evaluate_every={request.param}"]
    return {rounds: made(place / str(rounds), *base, f"rounds={rounds}") for rounds in (3, 5)}


@pytest.mark.parametrize("step", STEPS)
def test_one_that_was_killed_on_the_way_is_a_run_to_go_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, straight: dict[int, Path]
):
    """Killed before a step, the folder is that of the run as it was, or of the longer one."""
    run = shutil.copytree(straight[3], tmp_path / "run")
    target = {"unlink": Path, "write_atomic": prolong_module}.get(step, Checkpoints)
    with monkeypatch.context() as patched:
        patched.setattr(target, step, killed)
        with pytest.raises(KilledError):
            longer(run, 5)
    settings = settings_of_run(run)
    if not (run / "summary.json").exists():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that a checkpoint is not of these settings
            writer.run(settings, LocalEngine(serve), run, resume=True)
    assert comparable(run) == comparable(straight[settings["rounds"]])
    if settings["rounds"] == 3:
        assert comparable(longer(run, 5)) == comparable(straight[5])


class KilledError(Exception):
    """The process ends here."""


def killed(*given, **named):
    raise KilledError


REFUSED = {
    "rounds must be more than the 3": ([], 3),
    "ended in round 1 by a target": (["target=0.01"], 5),
    "keeps no checkpoints": (["checkpoint_s=null"], 5),
    "the tasks of the stream divide the rounds": (["stream=permuted", "stream.tasks=3"], 6),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_cannot_be_prolonged_says_why_and_stays(tmp_path: Path, reason: str):
    overrides, rounds = REFUSED[reason]
    run = made(tmp_path / "run", *PHONES, "workload.examples_per_client=30", "rounds=3", *overrides)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(ConfigError, match=reason):
        longer(run, rounds)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_settings_that_follow_the_rounds_are_found_through_what_an_option_builds_on(tmp_path: Path, monkeypatch):
    """Also in the working folder, and where they stand deeper."""
    monkeypatch.chdir(tmp_path)
    place = tmp_path / "configs" / "strategy"
    (place / "part").mkdir(parents=True)
    (place / "mine.yaml").write_text("defaults: [ocs, part: deep, part/deep@other, _self_]\nmore: {n: '${rounds}'}\n")
    (place / "part" / "deep.yaml").write_text("defaults: [/strategy/ewc@_here_, /trainer/sgd, mine]\nk: '${rounds}'\n")
    found = following("strategy", "mine", "rounds")
    deep = [(*place, name) for place in (("part",), ("other",)) for name in ("k", "rounds")]
    assert sorted(found) == sorted([("more", "n"), ("rounds",), *deep])


def test_the_settings_of_a_prolonged_run_are_those_of_the_longer_one(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs" / "trainer").mkdir(parents=True)
    (tmp_path / "configs" / "trainer" / "mine.yaml").write_text("defaults: [base, _self_]\nlr: 0.2\n")
    (tmp_path / "configs" / "trainer" / "base.yaml").write_text("defaults: [sgd]\nlocal_steps: ${rounds}\n")
    base = [*PHONES, "trainer=mine"]
    assert of_rounds(compose([*base, "rounds=3"]), 5) == compose([*base, "rounds=5"])
