"""Checkpoints: what they keep and refuse, that they are there whole or not at all, and when they are due."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from cut_short import RICH
from flwr.app import ArrayRecord, ConfigRecord

from fedsim.messages.records import record_of, tensors_of
from fedsim.report.checksums import Beginning, Checksums
from fedsim.report.rounds import weights_sha256
from fedsim.runs import checkpoint
from fedsim.runs import federation as federations
from fedsim.runs.checkpoint import NotKeptError, Saved, decode, encode, load


def test_trees_come_back_as_they_were():
    tree = {
        "numbers": [1, 2.5, float("inf"), True, None, "text", b"\x00\xff"],
        3: (1, (2, "a")),
        "sets": {3, 1, 2},
        "counted": Counter({7: 0.1}),
        "records": ConfigRecord({"a": 1, "b": [1.5, 2.5]}),
        "tensor": torch.arange(6, dtype=torch.int64).view(2, 3).T,
        "scalar": np.float32(0.1),
        "array": np.array([[True], [False]]),
        "empty": torch.zeros(0, 4),
        "arrays": record_of({"b": torch.ones(2), "a": torch.tensor(3)}),
    }
    arrays: dict[str, np.ndarray] = {}
    back = decode(json.loads(json.dumps(encode(tree, arrays, "tree"))), arrays)
    assert list(back) == list(tree)
    for key in ("numbers", 3, "sets", "counted", "records", "scalar"):
        assert back[key] == tree[key]
        assert type(back[key]) is type(tree[key])
    assert torch.equal(back["tensor"], tree["tensor"])
    assert torch.equal(back["empty"], tree["empty"])
    assert np.array_equal(back["array"], tree["array"])
    assert isinstance(back["arrays"], ArrayRecord)
    assert list(back["arrays"]) == ["b", "a"]


def test_what_is_no_data_is_named():
    with pytest.raises(NotKeptError, match=r"^state\.strategy\.model\[1\] is a torch\.nn\.modules\.linear\.Linear$"):
        encode({"strategy": {"model": [1, torch.nn.Linear(1, 1)]}}, {}, "state")


def test_a_strategy_with_more_than_data_runs_without_checkpoints(go, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(federations, "strategy_state", lambda strategy: {"model": object()})
    with pytest.warns(UserWarning, match=r"^this run keeps no checkpoints: state\.federation\.strategy\.model is a"):
        go("run", "rounds=3")
    assert (tmp_path / "run" / "summary.json").exists()
    assert not list((tmp_path / "run").glob("checkpoint/*"))


def test_a_finished_run_keeps_its_weights_and_what_a_longer_one_goes_on_from(go, tmp_path: Path):
    go("run", *RICH)
    (point,) = (tmp_path / "run" / "checkpoint").iterdir()
    assert point.name == "round-000005"
    found = load(tmp_path / "run")
    assert found is not None
    assert list(found.state) == ["totals", "data", "federation"]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert weights_sha256(found.weights) == summary["weights_sha256"]


def no_sums() -> Checksums:
    return Checksums(Beginning(), {})


def test_a_checkpoint_is_there_whole_or_not_at_all(tmp_path: Path, monkeypatch):
    (tmp_path / "rounds.jsonl").touch()
    kept = checkpoint.Checkpoints(tmp_path, 0)
    weights = record_of({"w": torch.arange(3.0)})
    kept.write(Saved(1, weights, {"a": torch.ones(2)}, {"torch": "1"}), no_sums)
    monkeypatch.setattr(checkpoint.os, "rename", lambda *_: (_ for _ in ()).throw(OSError("no space left")))
    with pytest.raises(OSError, match="no space left"):
        kept.write(Saved(2, weights, {}, {}), no_sums)
    found = load(tmp_path)
    assert found is not None
    assert (found.round, found.versions) == (1, {"torch": "1"})
    assert torch.equal(tensors_of(found.weights)["w"], torch.arange(3.0))
    monkeypatch.undo()
    for number in (3, 4):
        kept.write(Saved(number, weights, {}, {}), no_sums)
    assert sorted(path.name for path in (tmp_path / "checkpoint").iterdir()) == ["round-000003", "round-000004"]


def test_writing_takes_its_share_of_the_time_and_no_more(tmp_path: Path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(checkpoint.time, "monotonic", lambda: now[0])
    kept = checkpoint.Checkpoints(tmp_path, 30)
    assert not kept.due
    now[0] = 130.0
    assert kept.due
    monkeypatch.setattr(checkpoint.os, "rename", lambda *_: now.__setitem__(0, now[0] + 2.0))
    kept.write(Saved(1, record_of({"w": torch.ones(1)}), {}, {}), no_sums)
    now[0] = 132.0 + 99.0
    assert not kept.due
    now[0] = 132.0 + 100.0
    assert kept.due
    assert not checkpoint.Checkpoints(tmp_path, None).due
