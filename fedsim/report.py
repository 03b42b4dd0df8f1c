"""What a run says of its rounds: one line for each, sums over all, and the fingerprint of its weights.

May import: flwr, fedsim.network's reports.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path

from flwr.app import ArrayRecord

from fedsim.messages import from_array
from fedsim.network import ClientReport
from fedsim.pricing import OUTCOMES

HOST_FIELDS = ("host_s",)  # the only fields of a report that may differ between equal runs


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
