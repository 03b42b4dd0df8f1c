"""What a run writes: one line per round, one row per client and round, TensorBoard events, a summary.

Everything is on disk as it happens, so that a killed run leaves a readable folder. May import: pyarrow, tensorboard,
safetensors, torch, yaml, fedsim.network's reports. Heavy libraries are imported when a folder is opened.
"""

from __future__ import annotations

import fcntl
import json
import os
import shlex
import shutil
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, RecordDict

from fedsim.errors import ClientError, ConfigError
from fedsim.messages import Instruction, arrays_in, from_array, record_of
from fedsim.network import ClientReport
from fedsim.pricing import OUTCOMES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HOST_FIELDS = ("host_s",)  # the only fields of a report that may differ between equal runs
FLUSH_S, FLUSH_ROWS = 20.0, 20_000
# `out=` may name a folder that exists as long as none of these is in it.
FAILED_CLIENT, ITS_ARRAYS = "failed-client.json", "failed-client.safetensors"
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


@dataclass(frozen=True)
class RoundReport:
    """One round, one line of `rounds.jsonl`. Round 0 is the untrained model.

    `round_s` begins when the round does: the time before it that `round_every_s` lets pass is in `now_s` only.
    `joules` is energy for download, compute, upload and radio tails of all clients, of which `tail_joules` for the
    tails; waiting for the round to close is apart.
    `storage_bytes` is the most that a device of the round keeps: coresets, personal layers.
    `outcomes` lists the clients of the training exchange by what became of them.
    """

    round: int
    now_s: float
    round_s: float
    cohort: tuple[int, ...] = ()
    outcomes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    down_bytes: int = 0
    up_bytes: int = 0
    joules: float = 0.0
    wait_joules: float = 0.0
    tail_joules: float = 0.0
    peak_memory_bytes: int = 0
    storage_bytes: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    host_s: float = 0.0

    @classmethod
    def of(
        cls,
        round: int,
        now_s: float,
        round_s: float,
        clients: Sequence[ClientReport],
        metrics: dict[str, float],
        host_s: float,
    ) -> RoundReport:
        """Sums the clients' reports of one round, training and evaluation exchanges alike."""
        trained = [c for c in clients if c.phase == "train"]
        outcomes = {o: tuple(c.client for c in trained if c.outcome == o) for o in OUTCOMES}
        return cls(
            round=round,
            now_s=now_s,
            round_s=round_s,
            cohort=tuple(c.client for c in trained),
            outcomes={o: ids for o, ids in outcomes.items() if ids},
            down_bytes=sum(c.work.down_bytes for c in clients),
            up_bytes=sum(c.work.up_bytes for c in clients),
            joules=sum(c.joules for c in clients),
            wait_joules=sum(c.wait_joules for c in clients),
            tail_joules=sum(c.cost.tail_joules for c in clients),
            peak_memory_bytes=max((c.work.peak_memory_bytes for c in clients), default=0),
            storage_bytes=max((c.work.storage_bytes for c in clients), default=0),
            metrics=metrics,
            host_s=host_s,
        )

    def to_json(self) -> str:
        """One line; equal runs give equal lines but for HOST_FIELDS."""
        return json.dumps(asdict(self), allow_nan=True)

    @classmethod
    def from_json(cls, line: str) -> RoundReport:
        """The inverse of `to_json`."""
        fields = json.loads(line)
        fields["cohort"] = tuple(fields["cohort"])
        fields["outcomes"] = {o: tuple(ids) for o, ids in fields["outcomes"].items()}
        return cls(**fields)


def read_rounds(folder: Path) -> list[RoundReport]:
    """The rounds of a run folder, finished or not; a last line cut short by a crash is left out."""
    lines = (folder / "rounds.jsonl").read_text().splitlines(keepends=True)
    return [RoundReport.from_json(line) for line in lines if line.endswith("\n")]


def weights_sha256(arrays: ArrayRecord) -> str:
    """Fingerprint of the weights: names, dtypes, shapes and bytes, in the model's order."""
    digest = sha256()
    for name, array in arrays.items():
        digest.update(f"{name} {array.dtype} {tuple(array.shape)}\n".encode())
        digest.update(from_array(array).tobytes())
    return digest.hexdigest()


def write_atomic(path: Path, text: str) -> None:
    """Replaces a file in one step, so that nobody ever reads half of it."""
    part = path.with_name(f".{path.name}.part")
    part.write_text(text)
    os.replace(part, path)


def keep_instruction(folder: Path, sent: Instruction) -> None:
    """Writes what one client was sent: its settings as JSON, its arrays as safetensors."""
    from safetensors.torch import save_file

    arrays = {
        f"{name}/{key}": torch.from_numpy(from_array(array).copy())
        for name, record in arrays_in(sent.content).items()
        for key, array in record.items()
    }
    configs = {name: dict(r) for name, r in sent.content.items() if isinstance(r, ConfigRecord)}
    facts = {"round": sent.round, "client": sent.client, "phase": sent.phase, "configs": configs}
    save_file(arrays, folder / ITS_ARRAYS)
    write_atomic(folder / FAILED_CLIENT, json.dumps(facts, default=str) + "\n")


def kept_instruction(folder: Path) -> Instruction | None:
    """What the client was sent that stopped the run, if one did.

    Raises:
        ConfigError: if its files cannot be read.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not (folder / FAILED_CLIENT).exists():
        return None
    try:
        facts = json.loads((folder / FAILED_CLIENT).read_text())
        arrays = load_file(folder / ITS_ARRAYS)
        content: dict[str, Any] = {name: ConfigRecord(values) for name, values in facts["configs"].items()}
        for name in dict.fromkeys(key.partition("/")[0] for key in arrays):
            content[name] = record_of({k.partition("/")[2]: t for k, t in arrays.items() if k.startswith(f"{name}/")})
        return Instruction(facts["round"], facts["client"], facts["phase"], RecordDict(content))
    except (OSError, KeyError, TypeError, ValueError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{FAILED_CLIENT} and .safetensors in {folder} cannot be read: {reason}") from error


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
        self._rows += [_row(c) for c in clients]
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
        parquet.write_table(pa.Table.from_pylist(self._rows, schema=_schema()), part)
        os.replace(part, target)
        self._rows = []

    def finish(self, summary: dict[str, Any], pictures: Mapping[str, Figure] | None = None) -> None:
        """Writes pictures (PNG and TensorBoard), then the summary; a folder with `summary.json` is a finished run."""
        for name, picture in (pictures or {}).items():
            (self.path / "pictures").mkdir(exist_ok=True)
            picture.savefig(self.path / "pictures" / f"{name}.png", format="png")
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


def _schema() -> Any:
    import pyarrow as pa

    texts = ("phase", "device", "outcome", "reason", "metrics", "work")
    whole = ("round", "client", "num_examples", "down_bytes", "up_bytes", "peak_memory_bytes", "storage_bytes")
    columns = [
        "round phase client device outcome reason start_s down_s compute_s up_s wait_s total_s",
        "down_joules compute_joules up_joules tail_joules joules wait_joules",
        "down_bytes up_bytes peak_memory_bytes storage_bytes flops num_examples metrics work",
    ]
    kinds = {**dict.fromkeys(texts, pa.string()), **dict.fromkeys(whole, pa.int64())}
    return pa.schema([(name, kinds.get(name, pa.float64())) for name in " ".join(columns).split()])


def _row(c: ClientReport) -> dict[str, Any]:
    """One row; `metrics` and `work` are JSON texts, because methods differ in what they report."""
    return {
        "round": c.round,
        "phase": c.phase,
        "client": c.client,
        "device": c.device,
        "outcome": c.outcome,
        "reason": c.reason,
        "start_s": c.start_s,
        "down_s": c.cost.down_s,
        "compute_s": c.cost.compute_s,
        "up_s": c.cost.up_s,
        "wait_s": c.wait_s,
        "total_s": c.cost.total_s,
        "down_joules": c.cost.down_joules,
        "compute_joules": c.cost.compute_joules,
        "up_joules": c.cost.up_joules,
        "tail_joules": c.cost.tail_joules,
        "joules": c.joules,
        "wait_joules": c.wait_joules,
        "down_bytes": c.work.down_bytes,
        "up_bytes": c.work.up_bytes,
        "peak_memory_bytes": c.work.peak_memory_bytes,
        "storage_bytes": c.work.storage_bytes,
        "flops": c.work.flops,
        "num_examples": c.num_examples,
        "metrics": json.dumps(c.metrics),
        "work": json.dumps(c.work.to_dict()),
    }


@dataclass
class Totals:
    """Running sums over a run that the summary needs; memory grows with the clients seen, not with rounds."""

    outcomes: Counter[str] = field(default_factory=Counter)
    joules: float = 0.0
    wait_joules: float = 0.0
    down_bytes: int = 0
    up_bytes: int = 0
    peak_memory_bytes: int = 0
    storage_bytes: int = 0
    client_joules: Counter[int] = field(default_factory=Counter)

    def add(self, report: RoundReport, clients: Sequence[ClientReport]) -> None:
        """Adds one round."""
        self.outcomes.update({o: len(ids) for o, ids in report.outcomes.items()})
        self.joules += report.joules
        self.wait_joules += report.wait_joules
        self.down_bytes += report.down_bytes
        self.up_bytes += report.up_bytes
        self.peak_memory_bytes = max(self.peak_memory_bytes, report.peak_memory_bytes)
        self.storage_bytes = max(self.storage_bytes, report.storage_bytes)
        for c in clients:
            self.client_joules[c.client] += c.joules  # type: ignore[assignment]
