"""Runs that are cut short and go on: for the tests of what they end with."""

import json
from pathlib import Path
from typing import Any

import pandas
import pytest
from conftest import DAILY

from clients.app import serve
from fedsim.engines.local import LocalEngine
from fedsim.report.rounds import read_rounds
from fedsim.runs import writer
from fedsim.runs.recorded import settings_of_run

# Late and absent clients, personal layers, clients that judge: all that a run can keep between rounds.
RICH = ("method=ditto", "evaluate_clients=2", "deadline_s=2", "fleet=phones", *DAILY, "rounds=5")
# Two of six replies are not taken: what is private goes on all the same, what the upload owes does not.
SURPLUS = ("method=ditto", "uplink=topk", "cohort=4", "over_selection=1.5", "fleet.network_sigma=0.6", "rounds=5")


class EndError(Exception):
    """The run is cut short here."""


def ends_after(number: int):
    def watch(report) -> None:
        if report.round == number:
            raise EndError

    return watch


def comparable(folder: Path) -> tuple:
    """Everything that a finished run folder says, but for host times."""
    rounds = [{**json.loads(r.to_json()), "host_s": 0} for r in read_rounds(folder)]
    tables = [pandas.read_parquet(path) for path in sorted((folder / "clients").iterdir())]
    summary = {**json.loads((folder / "summary.json").read_text()), "host_s": 0}
    return rounds, pandas.concat(tables).to_csv(index=False), summary


@pytest.fixture
def go(settings, tmp_path: Path):
    """Runs or resumes a tiny experiment in a folder by that name, perhaps only so far; the rounds that were run."""

    def make(name: str, *overrides: str, until: int | None = None, resume: bool = False, **more: Any) -> list[int]:
        rounds: list[int] = []
        end = ends_after(until if until is not None else -1)

        def watch(report) -> None:
            rounds.append(report.round)
            end(report)

        chosen = settings_of_run(tmp_path / name) if resume else settings("checkpoint_s=0", *overrides)
        try:
            writer.run(chosen, LocalEngine(serve), tmp_path / name, watch, resume=resume, **more)
        except EndError:
            assert until is not None
        return rounds

    return make
