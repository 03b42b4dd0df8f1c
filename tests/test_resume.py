"""A run that was cut short goes on to the same bytes, whatever it was doing when it ended."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import honest
from cut_short import RICH, SURPLUS, comparable
from test_methods import TINY as BLOBS
from test_methods import everything

from clients.app import serve
from fedsim.engines.local import LocalEngine
from fedsim.errors import ConfigError
from fedsim.messages.records import record_of, tensors_of
from fedsim.report.rounds import read_rounds, weights_sha256
from fedsim.runs import writer
from fedsim.runs.checkpoint import decode, encode
from fedsim.runs.federation import Federation
from fedsim.settings.build import build_world
from fedsim.settings.compose import compose


def test_what_is_kept_of_replies_that_were_not_taken_goes_on_too(go, tmp_path: Path):
    go("whole", *SURPLUS)
    go("cut", *SURPLUS, until=2)
    go("cut", resume=True)
    assert comparable(tmp_path / "cut") == comparable(tmp_path / "whole")
    assert comparable(tmp_path / "cut")[2]["outcomes"]["late"] == 10


@pytest.mark.parametrize("until", [0, 1, 3])
def test_resumed_run_ends_like_the_one_that_never_stopped(go, tmp_path: Path, until: int):
    go("whole", *RICH)
    assert go("cut", *RICH, until=until) == list(range(until + 1))
    assert (tmp_path / "cut" / "failure.json").exists()
    # The watch raised before the last round's checkpoint was written: that round is run again.
    assert go("cut", resume=True) == list(range(until, 6))
    assert comparable(tmp_path / "cut") == comparable(tmp_path / "whole")
    assert not (tmp_path / "cut" / "failure.json").exists()


def test_what_was_written_after_the_checkpoint_is_written_once(go, tmp_path: Path):
    """Two cuts, and on the second one half a line of the next round: as after a kill."""
    go("whole", *RICH)
    go("cut", *RICH, until=2)
    go("cut", resume=True, until=4)
    with (tmp_path / "cut" / "rounds.jsonl").open("a") as file:
        file.write('{"round": 5, "now')
    (tmp_path / "cut" / "clients" / "rounds-000005-000005.part").write_text("half")
    go("cut", resume=True)
    assert comparable(tmp_path / "cut") == comparable(tmp_path / "whole")
    events = [steps for path in (tmp_path / "cut").glob("tensorboard/*") for steps in steps_of(path)]
    assert events == [0, 1, 2, 3, 4, 5]


def steps_of(folder: Path) -> list[int]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(folder))
    accumulator.Reload()
    return [event.step for event in accumulator.Scalars("round/energy_j")]


def test_killed_between_the_last_round_and_the_summary(go, tmp_path: Path):
    go("whole", *RICH)
    go("cut", *RICH)
    (tmp_path / "cut" / "summary.json").unlink()
    assert go("cut", resume=True) == []
    assert comparable(tmp_path / "cut") == comparable(tmp_path / "whole")


def test_a_reached_limit_stays_reached(go, tmp_path: Path):
    go("whole", "rounds=50", "target_accuracy=0.01")
    ran = [r.round for r in read_rounds(tmp_path / "whole")]
    (tmp_path / "whole" / "summary.json").unlink()
    assert len(ran) < 50
    assert go("whole", resume=True) == []
    assert [r.round for r in read_rounds(tmp_path / "whole")] == ran


@pytest.mark.parametrize("until", [1, 8, 10])
def test_patience_goes_on_where_it_was(go, tmp_path: Path, until: int):
    """The lowest loss comes after some rounds, and no lower one in the four behind it."""
    given = ("rounds=60", "patience_rounds=4", "trainer.lr=0.5", "cohort=1")
    go("whole", *given)
    losses = [r.metrics["loss"] for r in read_rounds(tmp_path / "whole")]
    assert losses.index(min(losses)) == len(losses) - 5 > 4
    assert until < len(losses) - 1 < 60
    go("cut", *given, until=until)
    go("cut", resume=True)
    assert comparable(tmp_path / "cut") == comparable(tmp_path / "whole")
    (tmp_path / "cut" / "summary.json").unlink()
    assert go("cut", resume=True) == []


@pytest.mark.parametrize("limit", ["max_simulated_s=null", "max_simulated_s=300"])
def test_rounds_with_time_between_them_go_on_where_they_were(go, tmp_path: Path, limit: str):
    """Also where the last round has ended long before the limit that no other one can start before."""
    given = (*RICH, "round_every_s=100.1", limit)
    go("whole", *given)
    assert len(read_rounds(tmp_path / "whole")) == (4 if "300" in limit else 6)
    go("cut", *given, until=1)
    go("cut", resume=True, until=2)
    go("cut", resume=True)
    assert comparable(tmp_path / "cut") == comparable(tmp_path / "whole")
    (tmp_path / "cut" / "summary.json").unlink()
    assert go("cut", resume=True) == []
    assert comparable(tmp_path / "cut") == comparable(tmp_path / "whole")


def test_a_checkpoint_from_before_there_was_an_interval_is_read(federation):
    run = federation("deadline_s=2")
    list(run.rounds())
    state = run.state()
    del state["grid"]["round_began_s"], state["lowest"]
    other = federation("deadline_s=2")
    other.restore(run.arrays, state)
    assert (other.grid.clock.now_s, other.grid.clock.round_began_s) == (run.grid.clock.now_s, None)


def test_other_libraries_than_before_are_named(go, monkeypatch):
    now = writer.versions()
    monkeypatch.setattr(writer, "versions", lambda: {**now, "torch": "1.0"})
    go("cut", until=2)
    monkeypatch.setattr(writer, "versions", lambda: now)
    with pytest.warns(UserWarning, match=f"this run began with torch 1.0, now {torch.__version__}".split("+")[0]):
        go("cut", resume=True)


def test_a_resumed_run_is_never_discarded(go, tmp_path: Path, monkeypatch):
    """Not even by an error that would leave nothing of a run that begins."""

    def refuse(*args, **kwargs):
        raise ConfigError("no")

    go("cut", until=0)
    monkeypatch.setattr(Federation, "train", refuse)
    with pytest.raises(ConfigError, match="no"):
        go("cut", resume=True)
    assert (tmp_path / "cut" / "rounds.jsonl").exists()
    with pytest.raises(ConfigError, match="no"):
        go("new")
    assert not (tmp_path / "new").exists()


def test_without_a_checkpoint_the_run_starts_anew(go, tmp_path: Path):
    go("whole", *RICH)
    go("cut", *RICH, "checkpoint_s=null", until=2)
    assert not (tmp_path / "cut" / "checkpoint").exists()
    told: list[str] = []
    assert go("cut", resume=True, announce=told.append) == list(range(6))
    assert told == [f"{tmp_path / 'cut'} has no checkpoint: this run starts anew"]
    assert comparable(tmp_path / "cut") == comparable(tmp_path / "whole")


@pytest.mark.parametrize("group, option", everything("method", "strategy"))
def test_every_method_goes_on_from_what_it_wrote_down(group: str, option: str):
    """State as JSON and arrays into a new federation after every round: the next rounds are the same.

    With batch norm: numbers without a dimension are on their way, too.
    """
    choice = f"{group}={option}"
    norm = "null" if option == "fjord" else "layer" if option.startswith("dp_") else "batch"
    norm = f"model.norm={norm}"
    given = [*BLOBS, *honest([choice]), choice, norm, "rounds=4", "evaluate_clients=2", "cohort=4"]
    settings = compose(given)

    def federation() -> Federation:
        return Federation(build_world(json.dumps(settings)), LocalEngine(serve))

    whole = federation()
    straight = [said(report) for report, _ in whole.rounds()]
    report, current, resumed = None, federation(), []
    for _ in straight:
        report, _ = next(current.rounds(report))
        resumed.append(said(report))
        arrays: dict[str, np.ndarray] = {}
        state = json.loads(json.dumps(encode(current.state(), arrays, "state")))
        weights, current = record_of(tensors_of(current.arrays)), federation()
        current.restore(weights, decode(state, {name: a.copy() for name, a in arrays.items()}))
    assert resumed == straight
    assert weights_sha256(current.arrays) == weights_sha256(whole.arrays)


def said(report) -> dict:
    return {**json.loads(report.to_json()), "host_s": 0}


STREAM = (
    "workload.num_classes=4",
    "workload.examples_per_client=24",
    "stream=split_classes",
    "stream.tasks=2",
    "rounds=4",
)


@pytest.mark.parametrize(
    "method", ["ocs", "ocs stream.fresh_noise=0.5 trainer.store=samples", "ewc", "agem", "lwf", "gss"]
)
def test_a_stream_goes_on_in_the_middle_of_a_task_and_between_two(go, tmp_path: Path, method: str):
    chosen = [*STREAM, *f"method={method}".split()]
    go("whole", *chosen)
    go("cut", *chosen, until=2)
    go("cut", resume=True, until=4)
    go("cut", resume=True)
    assert comparable(tmp_path / "cut") == comparable(tmp_path / "whole")
