"""Reports of a run's rounds: one line for each, sums over all, and the fingerprint of the weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import ArrayRecord

from devices.errors import FileError
from devices.reading import parse_json, read_json_lines
from fedsim.grid.exchange import ClientReport
from fedsim.messages.cohort import OUTCOMES
from fedsim.messages.records import from_array
from fedsim.report import strict_json
from fedsim.report.checksums import check_inside
from fedsim.settings.forms import INTEGERS, NUMBER, NUMBERS, WHOLE, check_tree, maps_of, optional
from fedsim.workloads import metrics as figures

HOST_FIELDS = ("host_s",)  # the only fields of a report that may differ between equal runs


# What each field of a line holds; those that fedsim 0.1 did not have yet may lack.
ROUND = {
    **{"round": WHOLE, "now_s": NUMBER, "round_s": NUMBER, "metrics": optional(NUMBERS)},
    **{"cohort": optional(INTEGERS), "outcomes": optional(maps_of(INTEGERS))},
    **dict.fromkeys(("down_bytes", "up_bytes", "peak_memory_bytes", "storage_bytes"), optional(WHOLE)),
    **dict.fromkeys(("joules", "wait_joules", "tail_joules", "host_s"), optional(NUMBER)),
}


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
        """Returns one line; equal runs give equal lines but for HOST_FIELDS."""
        return strict_json.dumps(asdict(self))

    @classmethod
    def from_json(cls, line: str) -> RoundReport:
        """Reads a line of `to_json`.

        Raises:
            FileError: if it is no such line.
        """
        return cls.from_tree(parse_json(line, "a round"), "a round")

    @classmethod
    def from_tree(cls, tree: Any, where: str) -> RoundReport:
        """Reads a report from what JSON holds; `where` names it in the sentence.

        A judgement that was not finite has no accuracy, in files of fedsim 0.1 too.

        Raises:
            FileError: if it lacks something, or holds what no report does.
        """
        check_tree(tree, ROUND, where)
        if unknown := sorted(set(tree) - {f.name for f in fields(cls)}):
            raise FileError(f"{where} holds {unknown[0]!r}, which no round of a run does")
        outcomes = {outcome: tuple(ids) for outcome, ids in tree.get("outcomes", {}).items()}
        metrics = figures.read(tree.get("metrics", {}))
        return cls(**{**tree, "metrics": metrics, "cohort": tuple(tree.get("cohort", ())), "outcomes": outcomes})


def read_rounds(folder: Path) -> list[RoundReport]:
    """Reads the rounds of a run folder, finished or not; a last line cut short by a crash is left out.

    Raises:
        FileError: if they cannot be read, naming the file and the line.
    """
    path = check_inside(folder, folder / "rounds.jsonl")
    trees = read_json_lines(path)
    return [RoundReport.from_tree(tree, f"{path}, line {number}") for number, tree in enumerate(trees, 1)]


def weights_sha256(arrays: ArrayRecord) -> str:
    """Returns the SHA-256 of the weights: names, dtypes, shapes and bytes, in the model's order."""
    digest = sha256()
    for name, array in arrays.items():
        digest.update(f"{name} {array.dtype} {tuple(array.shape)}\n".encode())
        digest.update(from_array(array).tobytes())
    return digest.hexdigest()


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


def running_costs(rounds: list[RoundReport]) -> dict[str, list[float]]:
    """Returns what a run has cost up to the end of each round: simulated seconds, joules, bytes down and up, rounds."""
    return {
        "simulated_s": [r.now_s for r in rounds],
        "joules": np.cumsum([r.joules for r in rounds]).tolist(),
        "traffic_bytes": np.cumsum([r.down_bytes + r.up_bytes for r in rounds]).tolist(),
        "rounds": [float(r.round) for r in rounds],
    }
