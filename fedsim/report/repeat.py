"""The commands that repeat a run, go on with it, price it anew and compare it, as its page shows them."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from devices.errors import FileError
from devices.reading import read_yaml
from fedsim.errors import ConfigError
from fedsim.report.place import BY_ROUNDS, CHECKPOINT
from fedsim.settings.compose import completed, compose
from fedsim.settings.groups import GROUPS, NEEDED, PRIMARY, Settings, config_dir, options, preset
from fedsim.settings.hydra_text import as_hydra
from fedsim.settings.run_settings import cohort_key

MOST = 40  # settings in a command; more are read from the run's own file
ASIDE = ("out", "choices")  # not repeated


def commands(folder: Path, settings: Settings, summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Returns what one may do next with a run, and the line for it.

    Args:
        folder: of the run.
        settings: as `config.yaml` has them.
        summary: empty where the run is not finished.
    """
    run = shlex.quote(str(folder))
    place = run if folder.is_absolute() else f'"$PWD"/{run}'
    found = [("Repeat it", text)] if (text := command_of(settings)) else []
    own = f"fedsim run --config-path {place} --config-name config out=AGAIN"
    return [*found, ("Repeat it from its own settings", own), *next_steps(folder, settings, summary)]


def next_steps(folder: Path, settings: Settings, summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Returns what one may do with a run that is there, and the line for it; see `commands`."""
    run, found = shlex.quote(str(folder)), []
    if not summary:
        if (folder / CHECKPOINT).exists():
            found.append(("Go on with it", f"fedsim resume {run}"))
    else:
        if _can_go_on(folder, settings, summary):
            found.append(("Go on to more rounds", f"fedsim resume {run} rounds={2 * summary['rounds']}"))
        synchronous = settings.get("choices", {}).get("loop", "rounds") == "rounds"
        if synchronous and settings.get("fleet", {}).get("microphones") is None:  # which other devices would not have
            found.append(("Price it on other devices, without training", f"fedsim reprice {run} fleet=sbc"))
    return [*found, ("Compare it with others", f"fedsim compare {run} OTHER_RUN")]


def command_of(settings: Settings) -> str:
    """Returns `fedsim run` with the settings that are not the usual ones; empty where they cannot be found out."""
    try:
        settings = completed(settings)
        choices = settings["choices"]
        groups = _chosen(choices, usual_options())
        if any(name not in options(group) for group, name in groups.items()):
            return ""
        usual = compose([f"{group}={name}" for group, name in groups.items()])
        if cohort_key(settings) != "cohort":
            usual["cohort"] = settings["cohort"]  # it follows
        others = [*_changed(settings, usual)]
    except (ConfigError, FileError, KeyError, TypeError, AttributeError):  # of code or configs that are not here
        return ""
    if len(others) > MOST:
        return ""
    return shlex.join(["fedsim", "run", *(f"{group}={as_hydra(name)}" for group, name in groups.items()), *others])


def _can_go_on(folder: Path, settings: Settings, summary: Mapping[str, Any]) -> bool:
    """Returns whether a finished run can be given more rounds, as far as its folder tells."""
    if summary.get("repriced") or summary["rounds"] != settings.get("rounds") or not (folder / CHECKPOINT).exists():
        return False
    return not summary.get(BY_ROUNDS)


def usual_options() -> dict[str, str]:
    """Returns the option of each group that a run has when none is named."""
    entries = read_yaml(config_dir() / f"{PRIMARY}.yaml")["defaults"]
    return {group: name for entry in entries if isinstance(entry, dict) for group, name in entry.items()}


def _chosen(choices: Mapping[str, Any], usual: Mapping[str, Any]) -> dict[str, str]:
    """Returns the options that are not the usual ones, without those that the method stands for."""
    method = choices.get("method")
    meant = {**usual, **(preset(method) if method else {})}
    chosen = {g: choices[g] for g in GROUPS if choices.get(g) is not None and choices[g] != meant.get(g)}
    lead: dict[str, str] = {g: chosen.pop(g) for g in ("experiment", "method") if g in chosen}
    return lead | chosen


def _changed(settings: Mapping[str, Any], usual: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Yields the overrides that make the usual settings these."""
    for key, value in settings.items():
        name = f"{prefix}{key}"
        if name in ASIDE or (key in usual and usual[key] == value):
            continue
        if isinstance(value, Mapping) and isinstance(usual.get(key), Mapping):
            yield from _changed(value, usual[key], f"{name}.")
        else:
            yield f"{'' if key in usual else '+'}{name}={as_hydra(value)}"
    yield from (f"~{prefix}{key}" for key in usual if key not in settings and f"{prefix}{key}" not in NEEDED)
