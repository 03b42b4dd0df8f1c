"""The door for Python: compose settings, run an experiment, read a run folder.

Example:
    run = fedsim.run(method="fedprox", rounds=20, fleet="mixed")
    run.rounds[["round", "accuracy", "now_s", "joules"]]
"""

from __future__ import annotations

import gc
import html
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedsim.settings.groups import FREE_MAPS, Settings
from fedsim.settings.hydra_text import as_hydra

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from fedsim.workloads.metrics import Metric

SHOWN = ("loss", "now_s", "joules", "down_bytes", "up_bytes")


@dataclass(frozen=True)
class Run:
    """A run folder, finished or not.

    Attributes:
        folder: where it is.
    """

    folder: Path

    @cached_property
    def settings(self) -> Settings:
        """Returns the resolved configuration."""
        from fedsim.report.files import read_config

        return read_config(self.folder)

    @cached_property
    def summary(self) -> dict[str, Any]:
        """Returns final and best score, time, energy, bytes and outcomes; empty while the run is not finished."""
        from fedsim.report.files import read_summary

        return read_summary(self.folder)

    @cached_property
    def primary(self) -> Metric:
        """Returns the metric that the models of this run are judged by: its name, unit and direction."""
        from fedsim.report.split import primary_of

        return primary_of(self.folder)

    @cached_property
    def rounds(self) -> pd.DataFrame:
        """Returns one row per round, with a column for each metric; `now_s` is the clock, all else is of that round."""
        import pandas as pd

        from fedsim.report.rounds import RoundReport, read_rounds

        columns = [field.name for field in fields(RoundReport)]  # also of a run that has no round yet
        rounds = pd.DataFrame([vars(report) for report in read_rounds(self.folder)], columns=columns)
        return _unpacked(rounds, "metrics", list(rounds["metrics"]))

    @cached_property
    def clients(self) -> pd.DataFrame:
        """Returns a row per client and exchange, with a column for each metric and each figure of work (`work_...`).

        Bytes and memory stand there twice: `down_bytes` is what was sent before the client's end, `work_down_bytes`
        what its work would have taken, had nothing stopped it. They differ where a client was stopped.
        """
        import pandas as pd

        from fedsim.report.files import read_all_rows

        rows = read_all_rows(self.folder)
        if rows is None:
            return pd.DataFrame()
        rows = rows.reset_index(drop=True)
        work = [{f"work_{key}": value for key, value in _parsed(text).items()} for text in rows["work"]]
        return _unpacked(_unpacked(rows, "work", work), "metrics", list(map(_parsed, rows["metrics"])))

    def plot(self) -> Figure | None:
        """Draws the score against rounds, simulated time, energy and traffic; None where nothing was judged."""
        from fedsim.report.plots.run import curves
        from fedsim.report.rounds import read_rounds

        return curves(read_rounds(self.folder), self.primary)

    def __fspath__(self) -> str:
        """Returns the folder, so that a run stands wherever a path does."""
        return str(self.folder)

    def __repr__(self) -> str:
        return f"Run({str(self.folder)!r})"

    def _repr_html_(self) -> str:
        """Returns a notebook's view: the closing lines of the command, the last rounds, and pictures."""
        from fedsim.report.plots.on_page import outcomes, score_curve
        from fedsim.report.rounds import read_rounds
        from fedsim.report.text import closing_lines

        lines = closing_lines(self.summary, self.folder) if self.summary else [f"{self.folder} is not finished"]
        names = dict.fromkeys(("round", self.primary.name, *SHOWN))
        shown = self.rounds[[name for name in names if name in self.rounds]].tail(10)
        rounds = read_rounds(self.folder)
        pictures = [each for each in (score_curve(rounds, self.primary), outcomes(rounds)) if each is not None]
        return "".join(
            [
                *(f"<p>{html.escape(line)}</p>" for line in lines),
                shown.to_html(index=False, float_format="{:.4g}".format),
                *(f'<div style="max-width: 36rem">{picture}</div>' for picture in pictures),
            ]
        )


def compose(*overrides: str, **settings: Any) -> Settings:
    """Returns checked settings, as `fedsim run` would take them.

    Args:
        overrides: in Hydra's syntax, e.g. `"trainer.lr=0.05"`.
        settings: the same as keywords: a group's option (`method="fedprox"`), a setting of the top (`rounds=20`), or a
            group's settings as a map (`trainer={"lr": 0.05}`).

    Raises:
        ConfigError: naming the key, what came and what is allowed.
    """
    from fedsim.settings.compose import compose as composed
    from fedsim.settings.trust import allow_models

    given = [*overrides, *_all_overrides(settings)]
    allow_models(given)
    return composed(given)


def run(*overrides: str, progress: bool = True, **settings: Any) -> Run:
    """Runs one experiment, as `fedsim run` does, and returns its folder to look into.

    The process stays as it was: torch keeps its threads and random state.

    Args:
        overrides: settings as on the command line, e.g. `"trainer.lr=0.05"`.
        progress: whether a terminal shows a bar over the rounds; a notebook shows none.
        settings: the same as keywords: the option of a group (`method="fedprox"`, `fleet="mixed"`), a setting of the
            top (`rounds=20`, `seed=3`, `out="runs/mine"`), or settings of a group as a map (`trainer={"lr": 0.05}`).
            What there is: `fedsim list methods`, `fedsim explain method ditto`, `fedsim run --help`.

    Returns:
        The run: `summary` (final and best score, time, energy, bytes), `rounds` and `clients` (DataFrames), `settings`,
        `folder`, and `plot()`.

    Example:
        run = fedsim.run(method="fedprox", fleet="mixed", rounds=20, trainer={"lr": 0.05})
        run.summary["final"]["accuracy"], run.summary["energy_j"]["total"]
        run.rounds[["round", "accuracy", "now_s", "joules"]]

    Raises:
        ConfigError, DataError: before anything is written.
        ClientError: when a client fails; what was written so far stays.
    """
    from fedsim.report.terminal import console
    from fedsim.runs.experiment import run_experiment

    shown = console()
    shown.quiet = not progress
    composed = compose(*overrides, **settings)
    with _process_as_before():
        folder, _ = run_experiment(composed, shown)
    return Run(folder)


def resume(
    folder: str | os.PathLike[str], *overrides: str, progress: bool = True, changed_code: bool = False, **settings: Any
) -> Run:
    """Goes on with a run that was interrupted, or with a finished one to more `rounds`; returns its folder.

    Args:
        folder: of the run, or the run itself.
        overrides: as those of `compose`: `rounds`, and settings of the engine.
        progress: whether a terminal shows a bar over the rounds.
        changed_code: whether it goes on where code of the user's is not what the run was begun with.
        settings: the same as keywords.

    Raises:
        ConfigError, DataError: before anything is written.
        ClientError: when a client fails; what was written so far stays.
    """
    from fedsim.report.terminal import console
    from fedsim.runs.experiment import resumed, run_experiment

    shown = console()
    shown.quiet = not progress
    composed = resumed(Path(folder), [*overrides, *_all_overrides(settings)], changed_code)
    if not (Path(folder) / "summary.json").exists():
        with _process_as_before():
            run_experiment(composed, shown, Path(folder))
    return Run(Path(folder))


def reprice(folder: str | os.PathLike[str], *overrides: str, progress: bool = True, **settings: Any) -> Run:
    """Writes a finished run anew as it would have been on other devices, without training; returns the new folder.

    Args:
        folder: of the run, or the run itself.
        overrides: as those of `compose`: fleet, latency, deadline_s, round_every_s, max_simulated_s, name, out.
        progress: whether a terminal shows a bar over the rounds.
        settings: the same as keywords.

    Raises:
        ConfigError, DataError: before anything is written.
    """
    from fedsim.report.terminal import console
    from fedsim.runs.experiment import reprice_experiment

    shown = console()
    shown.quiet = not progress
    with _process_as_before():
        again, _ = reprice_experiment(Path(folder), [*overrides, *_all_overrides(settings)], shown)
    return Run(again)


def load(folder: str | os.PathLike[str]) -> Run:
    """Returns a run folder to look into.

    Raises:
        ConfigError: if it holds no run.
    """
    from fedsim.report.files import check_run

    check_run(Path(folder))
    return Run(Path(folder))


@contextmanager
def _process_as_before() -> Iterator[None]:
    """Gives back what a worker in this process takes: torch's threads, its random state, objects hidden from gc."""
    import torch

    threads, state = torch.get_num_threads(), torch.get_rng_state()
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.set_rng_state(state)
        gc.unfreeze()


def _all_overrides(settings: Mapping[str, Any]) -> list[str]:
    return [text for key, value in settings.items() for text in _overrides(key, value)]


def _overrides(key: str, value: Any) -> list[str]:
    if isinstance(value, Mapping) and key not in FREE_MAPS:
        return [text for below, own in value.items() for text in _overrides(f"{key}.{below}", own)]
    return [f"{key}={as_hydra(value)}"]


def _parsed(text: str) -> dict[str, Any]:
    tree = json.loads(text or "{}")
    return tree if isinstance(tree, dict) else {}


def _unpacked(frame: pd.DataFrame, column: str, maps: list[dict[str, Any]]) -> pd.DataFrame:
    """Returns a frame with what a column's maps hold as columns behind; names that are there keep their values."""
    import pandas as pd

    more = pd.DataFrame(maps, index=frame.index)
    return pd.concat([frame.drop(columns=column), more[[name for name in more if name not in frame]]], axis=1)
