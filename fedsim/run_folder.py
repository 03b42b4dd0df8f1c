"""The folder of a run: where it goes, and everything that is written into it.

Everything is on disk as it happens, so that a killed run leaves a readable folder. May import: pyarrow, tensorboard,
yaml, fedsim. Heavy libraries are imported when a folder is opened.
"""

from __future__ import annotations

import fcntl
import json
import os
import shlex
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from devices.figures import box_missing_letters, save_figure
from devices.texts import file_name
from fedsim.client_rows import client_row, client_schema
from fedsim.durable import write_atomic
from fedsim.errors import ClientError, ConfigError
from fedsim.instructions import FAILED_CLIENT, ITS_ARRAYS, keep_instruction
from fedsim.messages import Instruction
from fedsim.network import ClientReport
from fedsim.pricing import OUTCOMES
from fedsim.report import RoundReport, read_rounds

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FLUSH_S, FLUSH_ROWS = 20.0, 20_000
# `out=` may name a folder that exists as long as none of these is in it.
WRITTEN = (
    "config.yaml",
    "rounds.jsonl",
    "clients",
    "tensorboard",
    "summary.json",
    "failure.json",
    "checkpoint",
    "pictures",
    "report.html",
    FAILED_CLIENT,
    ITS_ARRAYS,
)


def run_folder(settings: dict[str, Any]) -> Path:
    """Where the run goes: `out`, or `runs/<date>-<time>-<name>` with a number behind it when that is taken."""
    if settings["out"] is not None:
        return Path(str(settings["out"]))
    choices = settings["choices"]
    label = settings["name"] or f"{choices.get('method') or choices['strategy']}-{choices['workload']}"
    first = Path("runs") / f"{time.strftime('%Y%m%d-%H%M%S')}-{label}"
    numbered = (first.with_name(f"{first.name}-{number}") for number in range(2, 1000))
    return next(path for path in (first, *numbered) if not path.exists())


def check_free(folder: Path) -> None:
    """Refuses a folder that holds another run or is no folder; called before anything is built or written.

    Raises:
        ConfigError: naming the folder and what is in it.
    """
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"out={folder} is a file; name a folder that is new or empty")
    taken = [name for name in WRITTEN if (folder / name).exists()]
    if taken:
        raise ConfigError(f"out={folder} holds another run ({', '.join(taken)}); name a new folder or remove it")


class RunFolder:
    """An open run folder: `rounds.jsonl`, `clients/*.parquet`, `tensorboard/`, `summary.json`.

    Args:
        path: created with its parents; must not hold another run.
        settings: written to `config.yaml`, enough to repeat the run.
        resume: the folder holds the beginning of this run.
        last: then, the last round that stays; what came after it is taken away, to be written again.

    Attributes:
        before: the rounds that are there already.

    Raises:
        ConfigError: if the folder is taken, cannot be made, or its run is going on.
    """

    def __init__(self, path: Path, settings: dict[str, Any], resume: bool = False, last: int = -1):
        import yaml
        from torch.utils.tensorboard import SummaryWriter

        if not resume:
            check_free(path)
        try:
            (path / "clients").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"out={path} cannot be made: {error.strerror}; name another folder") from error
        self.path = path
        self._rounds = (path / "rounds.jsonl").open("a+")
        try:
            fcntl.flock(self._rounds, fcntl.LOCK_EX | fcntl.LOCK_NB)  # gone with this process, however it ends
        except OSError:
            self._rounds.close()
            raise ConfigError(f"the run in {path} is going on just now; wait for it, or end it") from None
        self.before = self._cut_back(last)
        if not resume:
            write_atomic(path / "config.yaml", yaml.safe_dump({**settings, "out": None}, sort_keys=False))
        self._events = SummaryWriter(str(path / "tensorboard"), purge_step=last + 1 if resume else None)
        self._rows: list[dict[str, Any]] = []
        self._flushed_at = time.monotonic()

    def _cut_back(self, last: int) -> list[RoundReport]:
        """Takes away what was written after round `last`; the rounds that stay.

        Raises:
            ConfigError: if some of those are missing.
        """
        stay = [report for report in read_rounds(self.path) if report.round <= last]
        if len(stay) != last + 1:
            raise ConfigError(f"{self.path / 'rounds.jsonl'} lacks rounds that {self.path / 'checkpoint'} goes on from")
        for table in (self.path / "clients").iterdir():
            if table.suffix != ".parquet" or int(table.stem.split("-")[1]) > last:
                table.unlink()
        self._rounds.truncate(sum(len(line) for line in self._lines(len(stay))))
        for name in ("failure.json", FAILED_CLIENT, ITS_ARRAYS):
            (self.path / name).unlink(missing_ok=True)
        return stay

    def _lines(self, count: int) -> list[bytes]:
        return (self.path / "rounds.jsonl").read_bytes().splitlines(keepends=True)[:count]

    def add(self, report: RoundReport, clients: Sequence[ClientReport]) -> None:
        """Writes one round; the client rows follow in batches of about 20 s, one Parquet file each."""
        self._rounds.write(report.to_json() + "\n")
        self._rounds.flush()
        self._rows += [client_row(c) for c in clients]
        self._add_events(report)
        if time.monotonic() - self._flushed_at > FLUSH_S or len(self._rows) >= FLUSH_ROWS:
            self.flush()

    def flush(self) -> None:
        """Writes the client rows so far as a Parquet file of its own: complete, or not there."""
        self._flushed_at = time.monotonic()
        self._events.flush()
        if not self._rows:
            return
        import pyarrow as pa
        from pyarrow import parquet

        first, last = self._rows[0]["round"], self._rows[-1]["round"]
        target = self.path / "clients" / f"rounds-{first:06d}-{last:06d}.parquet"
        part = target.with_suffix(".part")
        parquet.write_table(pa.Table.from_pylist(self._rows, schema=client_schema()), part)
        os.replace(part, target)
        self._rows = []

    def finish(self, summary: dict[str, Any], pictures: Mapping[str, Figure] | None = None) -> None:
        """Writes pictures (PNG and TensorBoard), then the summary; a folder with `summary.json` is a finished run."""
        for name, picture in (pictures or {}).items():
            (self.path / "pictures").mkdir(exist_ok=True)
            save_figure(picture, self.path / "pictures" / f"{file_name(name)}.png")
            with box_missing_letters():
                self._events.add_figure(name, picture, summary["rounds"], walltime=summary["simulated_s"])
        self.flush()
        write_atomic(self.path / "summary.json", json.dumps(summary, indent=1) + "\n")

    def fail(self, error: BaseException) -> None:
        """Leaves a note beside everything written so far, and what a client that failed was sent."""
        self.flush()
        if isinstance(error, ClientError) and isinstance(error.instruction, Instruction):
            keep_instruction(self.path, error.instruction)
            who = f"--round {error.instruction.round} --client {error.instruction.client}"
            error.add_note(f"replay it with: fedsim replay {shlex.quote(str(self.path))} {who}")
        note = {"error": type(error).__name__, "reason": "; ".join([str(error), *getattr(error, "__notes__", [])])}
        write_atomic(self.path / "failure.json", json.dumps(note, indent=1) + "\n")

    def discard(self) -> None:
        """Removes what this run wrote, and the folder if nothing else is in it."""
        self.close()
        for name in WRITTEN:
            target = self.path / name
            if target.is_dir():
                shutil.rmtree(target)
            else:
                target.unlink(missing_ok=True)
        with suppress(OSError):
            self.path.rmdir()

    def close(self) -> None:
        """Closes the files."""
        self._rounds.close()
        self._events.close()

    def _add_events(self, report: RoundReport) -> None:
        """TensorBoard gets the simulated time as wall time: its "relative" axis is the devices' time."""
        outcomes = {f"outcome/{o}": len(report.outcomes.get(o, ())) for o in OUTCOMES} if report.cohort else {}
        scalars = {
            **{f"metric/{key}": value for key, value in report.metrics.items()},
            "round/simulated_s": report.round_s,
            "round/energy_j": report.joules,
            "round/tail_energy_j": report.tail_joules,
            "round/down_bytes": report.down_bytes,
            "round/up_bytes": report.up_bytes,
            "round/peak_memory_bytes": report.peak_memory_bytes,
            "round/storage_bytes": report.storage_bytes,
            **outcomes,
        }
        from tensorboard.compat.proto.summary_pb2 import Summary  # type: ignore[import-untyped]

        # One event for all: the writer's queue costs as much as everything else that is written of a round.
        every = Summary(value=[Summary.Value(tag=tag, simple_value=value) for tag, value in scalars.items()])
        writer: Any = self._events.file_writer
        writer.add_summary(every, report.round, walltime=report.now_s)
