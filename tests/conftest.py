"""What tests share: tiny runs on made-up data, in this process, one thread each."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from clients.app import app
from fedsim.cli import main as cli
from fedsim.engines.base import assume_task_identity
from fedsim.engines.local import LocalGrid
from fedsim.runs import federation as federations
from fedsim.runs.federation import Federation
from fedsim.settings.build import build_world
from fedsim.settings.compose import compose
from fedsim.settings.groups import Settings

# Six clients with eight examples each, of which one is held out; three of them train for one epoch of two steps.
TINY = (
    "workload=blobs",
    "workload.examples_per_client=8",
    "workload.test_examples=40",
    "fleet=uniform",
    "latency=flops",  # one rate: hand-computed seconds
    "engine.device=cpu",
    "trainer.local_epochs=1",
    "trainer.batch_size=4",
    "num_clients=6",
    "cohort=3",
    "rounds=2",
)

# Clients sleep eight hours a day, each at hours of its own.
DAILY = ("fleet.availability._target_=devices.availability.Diurnal", "+fleet.availability.hours=16")


@pytest.fixture(scope="session", autouse=True)
def _one_quiet_process():
    torch.set_num_threads(1)
    assume_task_identity()
    logging.getLogger("flwr").setLevel(logging.ERROR)


class Ended(NamedTuple):
    """How a command ended: its exit code, stdout and stderr."""

    code: int
    out: str
    err: str


@pytest.fixture
def fedsim(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Ended]:
    """Runs `fedsim ARGS` in this process: importing torch anew would cost seconds each time."""

    def call(*arguments: str) -> Ended:
        monkeypatch.setattr(sys, "argv", ["fedsim", *arguments])
        monkeypatch.setenv("HYDRA_FULL_ERROR", "1")  # the command sets it; this takes it back after the test
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        shown = capsys.readouterr()
        return Ended(int(ended.value.code or 0), shown.out, shown.err)

    return call


@pytest.fixture
def settings():
    """Composes the settings of a tiny run: `settings("seed=2", "cohort=1")`."""

    def make(*overrides: str) -> Settings:
        return compose([*TINY, *honest(overrides), *overrides])

    return make


def honest(overrides: Sequence[str]) -> list[str]:
    """Three clients can bear no liar."""
    krum = {"method=krum", "strategy=krum", "strategy@strategy.server=krum"} & set(overrides)
    return [f"strategy.{'server.' if '@' in name else ''}num_malicious_nodes=0" for name in krum]


@pytest.fixture
def federation(settings):
    """A Federation in this process, from overrides of a tiny run."""

    def make(*overrides: str) -> Federation:
        return Federation(build_world(json.dumps(settings(*overrides))), LocalGrid(app))

    return make


@pytest.fixture
def run(settings, tmp_path):
    """Runs a tiny experiment from top to bottom into `out` and returns its summary."""

    def make(*overrides: str, out: Path = tmp_path) -> dict[str, Any]:
        return federations.run(settings(*overrides), LocalGrid(app), out)

    return make


@pytest.fixture
def data_folder() -> Path:
    """The real data bundles; tests that ask for it are marked `data`."""
    if "FEDSIM_DATA" not in os.environ:
        pytest.skip("FEDSIM_DATA names no folder with data bundles")
    return Path(os.environ["FEDSIM_DATA"])
