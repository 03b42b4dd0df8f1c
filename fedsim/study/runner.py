"""Runs what a study lacks: each run a process, some at a time; what is finished is kept."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from devices.errors import FileError
from devices.reading import read_bytes
from devices.writing import open_lock, open_new
from fedsim.engines.locks import hold
from fedsim.errors import ConfigError
from fedsim.report.checksums import check_inside
from fedsim.settings.permissions import flags
from fedsim.study.processes import Process, Processes
from fedsim.study.spec import PlannedRun, can_be_resumed, is_finished

LOCAL = "fedsim.engines.local.LocalEngine"  # the one engine that starts neither threads nor processes


@dataclass
class Progress:
    """The progress of a study.

    Attributes:
        total, done: runs; those finished before count as done.
        rounds_total, rounds_done: of the runs that were not finished before.
        failed: the sentence of each run that failed, by its name.
    """

    total: int
    done: int
    rounds_total: int
    rounds_done: int = 0
    failed: dict[str, str] = field(default_factory=dict)


@dataclass
class _Running:
    """A run whose process is going on, and the file of its output."""

    run: PlannedRun
    process: Process
    log: Path


Watch = Callable[[Progress, PlannedRun | None], None]  # called often with None, and with each run that has just ended


@contextmanager
def study_folder(out: Path) -> Iterator[int]:
    """Makes a study's folder and locks it; the lock lasts as long as this process or a run that was given it.

    Yields:
        The lock's file descriptor, for `run_study`.

    Raises:
        ConfigError: if the folder cannot be made or another study is running in it.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = open_lock(out / ".lock")
    except OSError as error:
        where = "" if error.filename in (None, str(out)) else f" ({error.filename})"
        raise ConfigError(f"--out={out} cannot be made: {error.strerror}{where}; name another folder") from error
    with lock:
        try:
            hold(lock)
        except OSError:
            raise ConfigError(f"a study is running in {out} just now; wait for it, or name another --out") from None
        yield lock.fileno()


def run_study(runs: Sequence[PlannedRun], jobs: int, lock: int, watch: Watch) -> Progress:
    """Runs what is not finished, `jobs` at a time, in the given order; a run that fails does not stop the others.

    One that was cut short goes on from its checkpoint.

    However this ends, its processes have ended too.

    Raises:
        ConfigError: if a folder holds a finished run with other settings, or a run would lie outside of the study's
            folder; then nothing is run.
    """
    waiting = [run for run in runs if not is_finished(run)]
    for run in waiting:
        _refuse_links(run.folder)
    progress = Progress(len(runs), len(runs) - len(waiting), sum(run.typed.rounds for run in waiting))
    running: list[_Running] = []
    ended_rounds = 0
    with Processes(lock) as processes:
        while waiting or running:
            while waiting and len(running) < jobs:
                running.append(_start(waiting.pop(0), processes))
            processes.look()
            for one in [r for r in running if r.process.code is not None]:
                running.remove(one)
                ended_rounds += one.run.typed.rounds
                progress.done += 1
                if reason := _reason(one):
                    progress.failed[one.run.name] = reason
                watch(progress, one.run)
            progress.rounds_done = ended_rounds + sum(_rounds(one.run.folder) for one in running)
            watch(progress, None)
    return progress


def _start(run: PlannedRun, processes: Processes) -> _Running:
    """Starts a run, or goes on with one."""
    settings = None
    if can_be_resumed(run):
        address = run.typed.cluster_address  # which the study was told on its command line
        command = ["resume", str(run.folder), *([f"engine.address={address}"] if address else [])]
    else:
        command = run.command
        settings = {**run.settings, "out": str(run.folder)}
        _set_aside(run.folder)
    run.folder.parent.mkdir(parents=True, exist_ok=True)
    log = run.folder.with_name(f"{run.folder.name}.log")
    alone = run.settings["engine"].get("_target_") != LOCAL
    with open_new(log) as file:
        process = processes.start([*command, *flags()], file, settings, alone)
    return _Running(run, process, log)


def _refuse_links(folder: Path) -> None:
    """Refuses the folder of a run that a link, or what stands in an arm's place, keeps out of its study's.

    Raises:
        ConfigError: naming it.
    """
    try:
        check_inside(folder.parent.parent, folder)
    except FileError as error:
        raise ConfigError(f"{error}; remove it, or name another --out") from error
    if folder.parent.exists() and not folder.parent.is_dir():
        raise ConfigError(f"{folder.parent} is no folder; remove it, or name another --out")


def _set_aside(folder: Path) -> None:
    """Renames what a run without a checkpoint has left, so that nothing is lost and the folder is free."""
    if os.path.lexists(folder):
        names = (folder.with_name(f"{folder.name}.unfinished-{number}") for number in range(1, 1000))
        folder.rename(next(name for name in names if not os.path.lexists(name)))


def _rounds(folder: Path) -> int:
    """Returns how many training rounds a run has written."""
    try:
        return max(0, read_bytes(check_inside(folder, folder / "rounds.jsonl")).count(b"\n") - 1)
    except FileError:
        return 0


def _reason(one: _Running) -> str:
    """Says why a run that has ended is not finished, in its own words; empty, with its log removed, if it is."""
    code = one.process.code or 0
    if code == 0 and (one.run.folder / "summary.json").is_file():
        one.log.unlink()
        return ""
    lines = one.log.read_text(errors="replace").splitlines()
    said = [line for line in lines if line.startswith("fedsim: ") and not line.startswith("fedsim: warning: ")]
    how = f"ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
    return said[-1].removeprefix("fedsim: ") if said else f"{how}, see {one.log}"
