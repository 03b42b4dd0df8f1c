"""Cohort tasks and answers as Flower records, for engines whose workers are Flower nodes.

Records that several clients share travel once; the facts beside them are JSON. Of one client: `arrays` its weights,
`config` settings, `state` what it keeps, and any other ArrayRecord is an extra of the method.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, RecordDict

from devices.cost import pack_works, unpack_works
from fedsim.messages.cohort import BlockAnswer, ClientAnswer, ClientTask, Close, CohortAnswer, CohortTask
from fedsim.messages.records import STATE, record_of, tensors_of
from fedsim.messages.updates import Broadcast
from fedsim.messages.weights import SentWeights
from fedsim.workloads.base import Tensors

COHORT, SETTINGS = "cohort", "settings"
FACTS, LAYOUT, JSON = "header", "layout", "json"
ROW = ("client", "block", "group", "down_bytes", "expected_flops", "repeat")  # of a ClientTask


class _Records:
    """Packs tensors into records; those that are one object become one record.

    Args:
        settings: of the run, beside the records.
    """

    def __init__(self, settings: Mapping[str, str]):
        self.content: dict[str, Any] = {SETTINGS: ConfigRecord(dict(settings))} if settings else {}
        self._names: dict[int, str] = {}

    def name(self, tensors: Tensors) -> str:
        """The name of the record that holds them."""
        if id(tensors) not in self._names:
            self._names[id(tensors)] = f"r{len(self._names)}"
            self.content[self._names[id(tensors)]] = record_of(tensors)
        return self._names[id(tensors)]

    def packed(self, facts: Mapping[str, Any]) -> RecordDict:
        """All of them in one content."""
        return RecordDict({**self.content, COHORT: ConfigRecord({FACTS: json.dumps(facts)})})


class _Tensors:
    """Unpacks the records of a content, each once."""

    def __init__(self, content: RecordDict):
        self._content, self._known = content, {}  # type: RecordDict, dict[str, Tensors]

    def of(self, name: str) -> Tensors:
        """The tensors of a record; the same object each time."""
        if name not in self._known:
            record = self._content[name]
            assert isinstance(record, ArrayRecord)
            self._known[name] = tensors_of(record)
        return self._known[name]


def pack_task(task: CohortTask) -> RecordDict:
    """One content for many clients."""
    records = _Records({JSON: task.settings})
    broadcasts: dict[int, dict[str, Any]] = {}
    rows = []
    for one in task.clients:
        sent = one.broadcast
        if id(sent) not in broadcasts:
            broadcasts[id(sent)] = {
                "number": len(broadcasts),
                "round": sent.round,
                "weights": records.name(sent.weights) if sent.weights else None,
                "extras": {name: records.name(tensors) for name, tensors in sent.extras.items()},
            }
            records.content[f"settings-{broadcasts[id(sent)]['number']}"] = ConfigRecord(dict(sent.settings))
        state = records.name(one.state) if one.state else None
        rows.append(
            {**{key: getattr(one, key) for key in ROW}, "broadcast": broadcasts[id(sent)]["number"], STATE: state}
        )
    close = None if task.close is None else asdict(task.close)
    facts = {"round": task.round, "phase": task.phase, "close": close}
    return records.packed({**facts, "broadcasts": list(broadcasts.values()), "clients": rows})


def unpack_task(content: RecordDict) -> CohortTask:
    """The inverse of `pack_task`; what clients share is one object again."""
    facts, tensors = _facts(content), _Tensors(content)
    broadcasts = [
        Broadcast(
            sent["round"],
            tensors.of(sent["weights"]) if sent["weights"] else {},
            {name: tensors.of(record) for name, record in sent["extras"].items()},
            dict(content[f"settings-{sent['number']}"]),  # type: ignore[arg-type]
        )
        for sent in facts["broadcasts"]
    ]
    clients = tuple(
        ClientTask(
            **{key: row[key] for key in ROW},
            broadcast=broadcasts[row["broadcast"]],
            state=tensors.of(row[STATE]) if row[STATE] else {},
        )
        for row in facts["clients"]
    )
    close = None if facts["close"] is None else Close(**facts["close"])
    return CohortTask(facts["round"], facts["phase"], clients, str(content[SETTINGS][JSON]), close)


def pack_answer(answer: CohortAnswer) -> RecordDict:
    """One content for many clients' answers."""
    records = _Records({})

    def weights(sent: SentWeights | None) -> dict[str, Any] | None:
        return None if sent is None else {"record": records.name(sent.tensors), "form": sent.form}

    rows = [
        {
            "client": one.client,
            "outcome": one.outcome,
            "reason": one.reason,
            "traceback": one.traceback,
            "num_examples": one.num_examples,
            "metrics": one.metrics,
            "weights": weights(one.weights),
            "extras": {name: records.name(tensors) for name, tensors in one.extras.items()},
            STATE: records.name(one.state) if one.state else None,
        }
        for one in answer.clients
    ]
    sums = [
        {"block": s.block, "clients": s.clients, "weight": s.weight, "total": weights(s.total)} for s in answer.sums
    ]
    return records.packed({"clients": rows, "sums": sums, **pack_works([one.work for one in answer.clients])})


def unpack_answer(content: RecordDict) -> CohortAnswer:
    """The inverse of `pack_answer`."""
    facts, tensors = _facts(content), _Tensors(content)

    def weights(sent: dict[str, Any] | None) -> SentWeights | None:
        return None if sent is None else SentWeights(tensors.of(sent["record"]), sent["form"])

    clients = tuple(
        ClientAnswer(
            row["client"],
            row["outcome"],
            row["reason"],
            row["traceback"],
            work,
            row["num_examples"],
            row["metrics"],
            weights(row["weights"]),
            {name: tensors.of(record) for name, record in row["extras"].items()},
            tensors.of(row[STATE]) if row[STATE] else {},
        )
        for row, work in zip(facts["clients"], unpack_works(facts), strict=True)
    )
    sums = tuple(BlockAnswer(s["block"], tuple(s["clients"]), s["weight"], weights(s["total"])) for s in facts["sums"])
    return CohortAnswer(clients, sums)


def _facts(content: RecordDict) -> dict[str, Any]:
    """What stands beside the records.

    Raises:
        ValueError: if it is not a cohort message.
    """
    if COHORT not in content:
        raise ValueError(f"not a cohort message: no {COHORT!r} record among {sorted(content)}")
    facts: dict[str, Any] = json.loads(str(content[COHORT][FACTS]))
    return facts
