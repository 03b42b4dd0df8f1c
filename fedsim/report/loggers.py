"""Where the numbers of a run go beside its folder, where the user asks for it: Weights & Biases, or MLflow.

What goes where is said by the environment as those libraries read it, never by a file; without WANDB_MODE nothing
leaves this machine. A run that goes on continues the same entry, whose id its folder holds. No result depends on it:
what a library refuses while the run is going on is warned of once.
"""

from __future__ import annotations

import os
import re
import uuid
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from devices.errors import one_line
from devices.reading import read_json
from devices.writing import write_atomic
from fedsim.errors import ConfigError
from fedsim.report import strict_json
from fedsim.report.place import LOGGED
from fedsim.report.rounds import RoundReport
from fedsim.report.scalars import Spent, hyperparameters, of_end, of_round
from fedsim.settings.groups import Settings
from fedsim.settings.names import label_of
from fedsim.settings.run_settings import RunSettings

PROJECT = "fedsim"
ID = re.compile(r"[0-9a-f]{8,64}")
AT_ONCE = 100  # parameters that MLflow takes in one call


class Service(Protocol):
    """A library's entry for one run."""

    id: str

    def log(self, values: Mapping[str, float], step: int, now_s: float) -> None:
        """Adds the numbers of a round; `now_s` is simulated."""

    def end(self, figures: Mapping[str, float], step: int, now_s: float) -> None:
        """Adds the numbers of the end."""

    def close(self, ended: bool) -> None:
        """Closes the entry, as one that ended or failed."""


class Wandb:
    """An entry at Weights & Biases, offline in the run folder unless WANDB_MODE says otherwise."""

    def __init__(self, folder: Path, label: str, parameters: Mapping[str, Any], known: str | None):
        import wandb

        self.id = known or uuid.uuid4().hex
        mode: Any = os.environ.get("WANDB_MODE", "offline")
        quiet = wandb.Settings(console="off", silent=True, disable_git=True, save_code=False, x_disable_stats=True)
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            dir=os.environ.get("WANDB_DIR", str(folder)),
            mode=mode,
            id=self.id,
            name=label,
            config={**parameters},
            resume="allow",
            allow_val_change=True,
            reinit="create_new",
            settings=quiet,
        )

    def log(self, values: Mapping[str, float], step: int, now_s: float) -> None:
        self._run.log({**values}, step=step)

    def end(self, figures: Mapping[str, float], step: int, now_s: float) -> None:
        self._run.summary.update({**figures})

    def close(self, ended: bool) -> None:
        self._run.finish(exit_code=0 if ended else 1)


class Mlflow:
    """A run of MLflow, where MLFLOW_TRACKING_URI says; by itself in `mlflow.db` of the working folder.

    Timestamps are simulated time, so that a number that is logged again stays one.
    """

    def __init__(self, folder: Path, label: str, parameters: Mapping[str, Any], known: str | None):
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        self._client, self._metric = MlflowClient(), Metric
        if known is not None:
            self.id = known
            self._client.update_run(known, status="RUNNING")
            return
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        found = self._client.get_experiment_by_name(name)
        experiment = found.experiment_id if found else self._client.create_experiment(name)
        self.id = self._client.create_run(experiment, run_name=label).info.run_id
        every = [Param(key, str(value)) for key, value in parameters.items()]
        for start in range(0, len(every), AT_ONCE):
            self._client.log_batch(self.id, params=every[start : start + AT_ONCE])

    def log(self, values: Mapping[str, float], step: int, now_s: float) -> None:
        every = [self._metric(key, float(value), round(1000 * now_s), step) for key, value in values.items()]
        self._client.log_batch(self.id, metrics=every)

    def end(self, figures: Mapping[str, float], step: int, now_s: float) -> None:
        self.log(figures, step, now_s)

    def close(self, ended: bool) -> None:
        self._client.set_terminated(self.id, status="FINISHED" if ended else "FAILED")


SERVICES: Mapping[str, Callable[..., Service]] = {"wandb": Wandb, "mlflow": Mlflow}


def check_logger(name: str | None) -> None:
    """Refuses a logger whose library is not there.

    Raises:
        ConfigError: saying how to get it.
    """
    if name is not None and find_spec(name) is None:
        how = f"pip install 'fedsim-edge[{name}]'"
        raise ConfigError(f"logger={name} needs a package that is not installed: {how}, or set logger=null")


class Log:
    """What a run tells the logger that its settings name; nothing where they name none.

    Args:
        folder: of the run.
        settings: of the run.
        before: the rounds that are there already, and are told again where the logger does not know them.

    Raises:
        ConfigError: if the library cannot begin.
    """

    def __init__(self, folder: Path, settings: Settings, before: Sequence[RoundReport]):
        typed = RunSettings.of(settings)
        self.name, self.spent, self._service = typed.logger, Spent(), None  # type: str | None, Spent, Service | None
        if self.name is None:
            return
        known = _ids(folder)
        try:
            make = SERVICES[self.name]
            self._service = make(folder, label_of(typed), hyperparameters(settings), known.get(self.name))
        except Exception as error:
            raise ConfigError(f"logger={self.name} cannot begin: {one_line(error)}; or set logger=null") from error
        write_atomic(folder / LOGGED, strict_json.dumps({**known, self.name: self._service.id}) + "\n")
        for report in before:
            self.add(report, self.name not in known)

    def add(self, report: RoundReport, told: bool = True) -> None:
        """Adds a round."""
        self.spent.add(report)
        if told:
            self._try(lambda one: one.log(of_round(report, self.spent), report.round, report.now_s))

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Adds the figures of a run that has ended."""
        self._try(lambda one: one.end(of_end(summary), summary["rounds"], summary["simulated_s"]))

    def close(self, ended: bool) -> None:
        """Closes the entry."""
        self._try(lambda one: one.close(ended))

    def _try(self, tell: Callable[[Service], None]) -> None:
        if self._service is None:
            return
        try:
            tell(self._service)
        except Exception as error:
            warnings.warn(f"logger={self.name} takes no more: {one_line(error)}; the run goes on", stacklevel=3)
            self._service = None


def _ids(folder: Path) -> dict[str, str]:
    """Returns the ids of a run's entries, by logger."""
    path = folder / LOGGED
    found = read_json(path) if path.exists() else {}
    known = found.items() if isinstance(found, dict) else ()
    return {name: entry for name, entry in known if isinstance(entry, str) and ID.fullmatch(entry)}
