"""A finished run that is prolonged is, to the byte, the longer run that was never stopped."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import DAILY, honest
from test_methods import NEEDS
from test_methods import TINY as BLOBS
from test_resume import comparable

from clients.app import serve
from fedsim.engines.local import LocalEngine
from fedsim.errors import ConfigError
from fedsim.runs import writer
from fedsim.runs.prolong import prolong
from fedsim.runs.recorded import settings_of_run
from fedsim.settings.compose import compose, of_rounds
from fedsim.settings.groups import options

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


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("method", [None, *options("method")])
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
