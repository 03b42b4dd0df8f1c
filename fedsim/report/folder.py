"""The folder of a run while it is written: rounds, client rows, events, pictures, summary, or the note of a failure.

Everything is on disk as it happens, so that a killed run leaves a readable folder.
"""

from __future__ import annotations

import io
import os
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from devices.errors import FileError
from devices.figures import save_figure
from devices.reading import open_file
from devices.texts import file_name
from devices.writing import make_folders, naming, remove_empty, sync_folder, write_atomic, write_new
from fedsim.engines.locks import hold
from fedsim.errors import ClientError, ConfigError
from fedsim.grid.exchange import ClientReport
from fedsim.messages.updates import Instruction
from fedsim.report import strict_json
from fedsim.report.checksums import Beginning, Checksums, check_inside, sha256_of, sha256_of_file, signed
from fedsim.report.client_rows import client_table, confusion_table
from fedsim.report.instructions import write_instruction
from fedsim.report.place import (
    CHECKPOINT,
    CLIENTS,
    CONFIG,
    CONFUSION,
    EVENTS,
    FAILED_CLIENT,
    FAILED_CLIENT_ARRAYS,
    FAILURE,
    PICTURES,
    REPRICED,
    RESERVE,
    ROUNDS,
    ROWS,
    SUMMARY,
    WRITTEN,
    check_free,
    refuse_taken,
    remove,
    remove_unfinished,
)
from fedsim.report.rounds import RoundReport, read_rounds
from fedsim.report.tensorboard import Board
from fedsim.settings.names import label_of
from fedsim.settings.run_settings import RunSettings
from fedsim.workloads.by_class import ByClass
from fedsim.workloads.metrics import ACCURACY, LOSS, OF_ROUNDS, Metric
from fedsim.workloads.metrics import CLIENTS as OF_CLIENTS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FLUSH_S, FLUSH_ROWS = 20.0, 20_000
RESERVED_BYTES = 16 * 1024


class RunFolder:
    """An open run folder: `rounds.jsonl`, `clients/*.parquet`, `tensorboard/`, `summary.json`.

    Args:
        path: created with its parents; must hold nothing.
        settings: written to `config.yaml`, enough to repeat the run.
        resume: the folder holds the beginning of this run.
        last: then, the last round that stays; what came after it is taken away, to be written again.
        sums: then, of the checkpoint that the run goes on from; None where there is none, or fedsim 0.1 wrote it.
        primary: the metric that models are judged by.
        repriced: for a new folder, of which run it holds the rounds on other devices, and up to which.

    Attributes:
        before: the rounds that are there already.

    Raises:
        ConfigError: if the folder is taken, cannot be made, or its run is going on.
        OSError: here and in every method, naming the file, if the disk does not take it.
    """

    def __init__(
        self,
        path: Path,
        settings: dict[str, Any],
        resume: bool = False,
        last: int = -1,
        sums: Checksums | None = None,
        primary: Metric = ACCURACY,
        repriced: Mapping[str, Any] | None = None,
    ):
        import yaml

        if resume:
            _refuse_links(path)
        else:
            check_free(path)
        self.path, self._settings, self._digest, self._length = path, settings, sha256(), 0
        try:
            self._made = make_folders(path)
            (path / CLIENTS).mkdir(exist_ok=True)
            if os.path.lexists(path / ROUNDS):
                open_file(path / ROUNDS).close()  # no pipe, no folder
            self._rounds = (path / ROUNDS).open("ab+", buffering=0)
        except OSError as error:
            where = "" if error.filename in (None, str(path)) else f" ({error.filename})"
            raise ConfigError(f"out={path} cannot be made: {error.strerror}{where}; name another folder") from error
        try:
            hold(self._rounds)  # gone with this process, however it ends
        except OSError:
            self._rounds.close()
            raise ConfigError(f"the run in {path} is going on just now; wait for it, or end it") from None
        try:
            if not resume:
                refuse_taken(path)  # another run may have been quicker
            remove_unfinished(path)
            write_new(path / RESERVE, bytes(RESERVED_BYTES))
            self.before = self._cut_back(last, sums)
            if not resume and repriced:
                write_atomic(path / REPRICED, strict_json.dumps(repriced, indent=1) + "\n")
            if not resume:
                write_atomic(path / CONFIG, signed(yaml.safe_dump({**settings, "out": None}, sort_keys=False)))
            self._files = {CONFIG: sha256_of_file(path / CONFIG)}
            self._files |= {f"{CLIENTS}/{name}": sha256_of_file(path / CLIENTS / name) for name in self._tables()}
            typed = RunSettings.of(settings)
            shown = (primary.name, LOSS, *(f"{OF_CLIENTS}{name}" for name in (primary.name, LOSS)), *OF_ROUNDS)
            self._events = Board(path / EVENTS, label_of(typed), shown, self.before if resume else None)
        except BaseException:
            self._rounds.close()
            raise
        self._clients: list[ClientReport] = []  # whose rows are not written yet
        self._flushed_at = time.monotonic()

    def _tables(self) -> list[str]:
        """Returns the names of the files of client rows, in order."""
        return sorted(name for name in os.listdir(self.path / CLIENTS) if ROWS.fullmatch(name))

    def _cut_back(self, last: int, sums: Checksums | None) -> list[RoundReport]:
        """Takes away what was written after round `last`; returns the rounds that stay.

        Raises:
            ConfigError: if some of those are missing.
        """
        lines = (self.path / ROUNDS).read_bytes().splitlines(keepends=True)[: last + 1]
        self._length = sums.rounds.bytes if sums else sum(map(len, lines))
        self._rounds.truncate(self._length)
        stay = read_rounds(self.path)
        if [report.round for report in stay] != list(range(last + 1)):
            raise ConfigError(f"{self.path / ROUNDS} lacks rounds that {self.path / 'checkpoint'} goes on from")
        self._digest.update((self.path / ROUNDS).read_bytes())
        for name in self._tables():
            if f"{CLIENTS}/{name}" not in sums.files if sums else int(name.split("-")[1]) > last:
                (self.path / CLIENTS / name).unlink()
        for name in (FAILURE, FAILED_CLIENT, FAILED_CLIENT_ARRAYS):
            (self.path / name).unlink(missing_ok=True)
        return stay

    def add(self, report: RoundReport, clients: Sequence[ClientReport]) -> None:
        """Writes one round; the client rows follow in batches of about 20 s, one Parquet file each."""
        line = (report.to_json() + "\n").encode()
        with naming(self.path / ROUNDS):
            written = 0
            while written < len(line):
                written += self._rounds.write(line[written:]) or 0
        self._digest.update(line)
        self._length += len(line)
        self._clients += clients
        self._events.add(report)
        if ages := [c.metrics["staleness"] for c in clients if c.outcome == "completed" and "staleness" in c.metrics]:
            self._events.histogram("staleness", ages, report.round, report.now_s)
        if time.monotonic() - self._flushed_at > FLUSH_S or len(self._clients) >= FLUSH_ROWS:
            self.flush()

    def flush(self) -> None:
        """Writes the client rows so far as a Parquet file of its own: complete, or not there."""
        self._flushed_at = time.monotonic()
        self._events.flush()
        if not self._clients:
            return
        first, last = self._clients[0].round, self._clients[-1].round
        name = f"{CLIENTS}/rounds-{first:06d}-{last:06d}.parquet"
        self._files[name] = sha256_of(self._write_table(name, client_table(self._clients)))
        self._clients = []

    def _write_table(self, name: str, table: Any) -> bytes:
        from pyarrow import parquet

        buffer = io.BytesIO()
        parquet.write_table(table, buffer)
        write_atomic(self.path / name, buffer.getvalue())
        return buffer.getvalue()

    def checksums(self) -> Checksums:
        """Brings everything so far to the disk, and says what it is."""
        self.flush()
        with naming(self.path / ROUNDS):
            os.fsync(self._rounds.fileno())
        for folder in (self.path / CLIENTS, self.path):
            sync_folder(folder)
        return Checksums(Beginning(self._length, self._digest.hexdigest()), dict(self._files))

    def finish(
        self, summary: dict[str, Any], pictures: Mapping[str, Figure] | None = None, by_class: ByClass | None = None
    ) -> None:
        """Writes pictures (PNG and TensorBoard), the confusion matrix, then the summary, which a finished run has."""
        for name, picture in (pictures or {}).items():
            (self.path / PICTURES).mkdir(exist_ok=True)
            png = io.BytesIO()
            save_figure(picture, png)
            write_atomic(self.path / PICTURES / f"{file_name(name)}.png", png.getvalue())
            self._events.picture(name, picture, png.getvalue(), summary["rounds"], summary["simulated_s"])
        if by_class is not None:
            self._write_table(CONFUSION, confusion_table(*by_class.cells()))
        self._events.finish(self._settings, summary)
        self.checksums()
        write_atomic(self.path / SUMMARY, strict_json.dumps(summary, indent=1) + "\n")
        (self.path / RESERVE).unlink(missing_ok=True)

    def fail(self, error: BaseException) -> None:
        """Leaves a note beside everything written so far, and what a client that failed was sent.

        Where the disk takes no more, what was reserved is given back for the note; where it cannot be written all the
        same, the error says so.
        """
        with suppress(OSError):
            (self.path / RESERVE).unlink(missing_ok=True)
        with suppress(Exception):  # of the error that is told already, most likely
            self.flush()
        if isinstance(error, ClientError) and isinstance(error.instruction, Instruction):
            sent = error.instruction
            self._try(error, "what the client was sent", lambda: self._keep(error, sent))
        note = {"error": type(error).__name__, "reason": "; ".join([str(error), *getattr(error, "__notes__", [])])}
        text = strict_json.dumps(note, indent=1) + "\n"
        self._try(error, FAILURE, lambda: write_atomic(self.path / FAILURE, text))

    def _keep(self, error: BaseException, sent: Instruction) -> None:
        write_instruction(self.path, sent)
        who = f"--round {sent.round} --client {sent.client}"
        error.add_note(f"replay it with: fedsim replay {shlex.quote(str(self.path))} {who}")

    def _try(self, error: BaseException, what: str, write: Callable[[], None]) -> None:
        try:
            write()
        except OSError as second:
            error.add_note(f"{what} could not be written: {second.strerror}")

    def discard(self) -> None:
        """Removes what this run wrote, and the folders that it made if nothing else is in them."""
        self.close()
        for name in (*WRITTEN, RESERVE):
            if name != CLIENTS:
                remove(self.path / name)
        for name in self._tables():
            (self.path / CLIENTS / name).unlink()
        with suppress(OSError):
            (self.path / CLIENTS).rmdir()
        remove_empty(self._made)

    def close(self) -> None:
        """Closes the files; what a full disk did not take before it does not take now."""
        for file in (self._events, self._rounds):
            with suppress(OSError):
                file.close()


def _refuse_links(path: Path) -> None:
    """Refuses a folder whose parts are links to elsewhere, or no files: a run that goes on would write to them.

    Raises:
        ConfigError: naming the first.
    """
    try:
        for name in (*WRITTEN, RESERVE):
            check_inside(path, path / name)
        for name in (CLIENTS, CHECKPOINT, EVENTS):
            for found in (path / name).rglob("*"):
                check_inside(path, found)
        files = (path / name for name in WRITTEN if "." in name)
        for file in (*files, *(table for table in (path / CLIENTS).glob("*") if ROWS.fullmatch(table.name))):
            if os.path.lexists(file):
                open_file(file).close()
    except FileError as error:
        raise ConfigError(str(error)) from error
