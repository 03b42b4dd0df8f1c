"""A finished run made longer: its folder becomes that of a run of more rounds, which then goes on."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import yaml
from flwr.serverapp.strategy import Strategy

from devices.writing import write_atomic
from fedsim.engines.locks import hold
from fedsim.errors import ConfigError
from fedsim.grid.server_half import server_half
from fedsim.report.checksums import sha256_of, signed
from fedsim.report.files import read_summary
from fedsim.report.place import CONFIG, PAGE, ROUNDS, SUMMARY
from fedsim.runs import checkpoint
from fedsim.runs.recorded import settings_of_run
from fedsim.settings.build import World, build_strategy, build_world, instantiate
from fedsim.settings.groups import Settings


def prolong(folder: Path, settings: Settings) -> None:
    """Makes a finished run one that has the rest of its rounds before it; killed anywhere, its folder is that of one.

    Args:
        folder: of the run.
        settings: of the run, with more rounds.

    Raises:
        ConfigError: if a longer run would have begun in another way, or its last state was not kept.
    """
    before, summary = settings_of_run(folder), read_summary(folder)
    rounds, last = settings["rounds"], summary["rounds"]
    if rounds <= before["rounds"]:
        raise ConfigError(f"rounds must be more than the {before['rounds']} of {folder}, got {rounds}")
    if "repriced" in summary:
        raise ConfigError(f"{folder} was re-priced and holds no state to go on from; prolong the run that it is of")
    if last < before["rounds"]:
        raise ConfigError(f"{folder} ended in round {last} by a target or limit of its own, and would end there again")
    _check_method(folder, settings)
    saved = checkpoint.load(folder, going_on=True)
    if saved is None or saved.sums is None:
        kept = "keeps no checkpoints" if before["checkpoint_s"] is None else "an earlier fedsim ended, which kept none"
        raise ConfigError(f"{folder} has no state to go on from: it is of a run that {kept}; run it anew: fedsim run")
    text = signed(yaml.safe_dump({**settings, "out": None}, sort_keys=False))
    checkpoints = checkpoint.Checkpoints(folder, 0)
    with (folder / ROUNDS).open("rb+") as lock:
        try:
            hold(lock)
        except OSError:
            raise ConfigError(f"the run in {folder} is going on just now; wait for it, or end it") from None
        # At every instant one checkpoint belongs to the settings that are there: before the run's own end, or after.
        sums = {**saved.sums.files, CONFIG: sha256_of(text.encode())}
        checkpoints.put_beside(saved, replace(saved.sums, files=sums))
        for name in (SUMMARY, PAGE):
            (folder / name).unlink(missing_ok=True)
        write_atomic(folder / CONFIG, text)
        checkpoints.take_beside(saved.round)


def _check_method(folder: Path, settings: Settings) -> None:
    """Refuses a method, trainer or stream that goes by the number of rounds.

    Raises:
        ConfigError: saying what depends on it.
    """
    world = build_world(json.dumps(settings))
    if said := goes_by_rounds(world, build_strategy(world.settings, world.workload.num_clients)):
        raise ConfigError(
            f"{folder} cannot be prolonged: {said}, so that a longer run would have begun in another way; run it anew: "
            f"fedsim run rounds={settings['rounds']}"
        )


def goes_by_rounds(world: World, strategy: Strategy) -> str:
    """Returns what of a run depends on its number of rounds, in words; empty where nothing does."""
    parts = (server_half(strategy), instantiate(world.settings.groups, "trainer"), world.workload)
    return next((part.reads_rounds for part in parts if part.reads_rounds), "")
