"""A run that was cut short goes on to the same bytes, whatever it was doing when it ended."""

import json
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
import torch
from conftest import DAILY, honest
from flwr.app import ArrayRecord, ConfigRecord
from test_methods import TINY as BLOBS

from clients.app import serve
from fedsim.engines.local import LocalEngine
from fedsim.errors import ConfigError
from fedsim.messages.records import record_of, tensors_of
from fedsim.report.checksums import Beginning, Checksums
from fedsim.report.rounds import read_rounds, weights_sha256
from fedsim.runs import checkpoint, writer
from fedsim.runs import federation as federations
from fedsim.runs.checkpoint import NotKeptError, Saved, decode, encode, load
from fedsim.runs.federation import Federation
from fedsim.runs.recorded import settings_of_run
from fedsim.settings.build import build_world
from fedsim.settings.compose import compose, on_engine
from fedsim.settings.groups import options

FEDSIM = str(Path(sys.executable).parent / "fedsim")
# Late and absent clients, personal layers, clients that judge: all that a run can keep between rounds.
RICH = ("method=ditto", "evaluate_clients=2", "deadline_s=2", "fleet=phones", *DAILY, "rounds=5")
# Two of six replies are not taken: what is private goes on all the same, what the upload owes does not.
SURPLUS = ("method=ditto", "uplink=topk", "cohort=4", "over_selection=1.5", "fleet.network_sigma=0.6", "rounds=5")


class EndError(Exception):
    """The run is cut short here."""


def ends_after(number: int):
    def watch(report) -> None:
        if report.round == number:
            raise EndError

    return watch


def comparable(folder: Path) -> tuple:
    """Everything that a finished run folder says, but for host times."""
    rounds = [{**json.loads(r.to_json()), "host_s": 0} for r in read_rounds(folder)]
    tables = [pandas.read_parquet(path) for path in sorted((folder / "clients").iterdir())]
    summary = {**json.loads((folder / "summary.json").read_text()), "host_s": 0}
    return rounds, pandas.concat(tables).to_csv(index=False), summary


@pytest.fixture
def go(settings, tmp_path: Path):
    """Runs or resumes a tiny experiment in a folder by that name, perhaps only so far; the rounds that were run."""

    def make(name: str, *overrides: str, until: int | None = None, resume: bool = False, **more: Any) -> list[int]:
        rounds: list[int] = []
        end = ends_after(until if until is not None else -1)

        def watch(report) -> None:
            rounds.append(report.round)
            end(report)

        chosen = settings_of_run(tmp_path / name) if resume else settings("checkpoint_s=0", *overrides)
        try:
            writer.run(chosen, LocalEngine(serve), tmp_path / name, watch, resume=resume, **more)
        except EndError:
            assert until is not None
        return rounds

    return make


# --- the same bytes ----------------------------------------------------------------------------------------------


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
    events = [steps for path in (tmp_path / "cut").glob("tensorboard") for steps in steps_of(path)]
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


def everything() -> list[str]:
    return [f"{group}={option}" for group in ("method", "strategy") for option in options(group)]


@pytest.mark.parametrize("choice", everything())
def test_every_method_goes_on_from_what_it_wrote_down(choice: str):
    """State as JSON and arrays into a new federation after every round: the next rounds are the same.

    With batch norm: numbers without a dimension are on their way, too.
    """
    norm = "model.norm=null" if choice.endswith("=fjord") else "model.norm=batch"
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


# --- the command -------------------------------------------------------------------------------------------------


def test_a_killed_command_goes_on_elsewhere(tmp_path: Path, monkeypatch):
    """SIGKILL at some moment, then the rest on Ray; the other run was never stopped."""
    monkeypatch.chdir(tmp_path)
    common = ["rounds=60", "cohort=5", "checkpoint_s=0"]
    subprocess.run([FEDSIM, "run", *common, "out=whole"], check=True, stdout=subprocess.DEVNULL)
    run = subprocess.Popen([FEDSIM, "run", *common, "out=cut"], stdout=subprocess.DEVNULL)
    rounds, end = tmp_path / "cut" / "rounds.jsonl", time.monotonic() + 60
    while not (rounds.exists() and rounds.read_bytes().count(b"\n") > 8) and time.monotonic() < end:
        time.sleep(0.01)
    run.send_signal(signal.SIGKILL)
    run.wait()
    assert not (tmp_path / "cut" / "summary.json").exists()
    resumed = subprocess.run([FEDSIM, "resume", "cut"], capture_output=True, text=True)
    assert resumed.returncode == 0, resumed.stderr
    assert "run folder: cut" in resumed.stdout
    assert comparable(tmp_path / "cut") == comparable(tmp_path / "whole")
    again = subprocess.run([FEDSIM, "resume", "cut"], capture_output=True, text=True)
    assert (again.returncode, again.stdout) == (0, "cut has finished: nothing is left to do\n")


@pytest.mark.ray
@pytest.mark.parametrize("given", [RICH, pytest.param(SURPLUS, marks=pytest.mark.slow)], ids=["rich", "surplus"])
def test_the_rest_may_run_on_another_engine(go, tmp_path: Path, given: tuple[str, ...]):
    from fedsim.engines.ray.engine import RayEngine

    go("whole", *given)
    go("cut", *given, until=2)
    chosen = on_engine(settings_of_run(tmp_path / "cut"), ["engine=ray", "engine.workers=2"])
    with RayEngine(serve, workers=2) as engine:
        writer.run(chosen, engine, tmp_path / "cut", resume=True)
    assert comparable(tmp_path / "cut") == comparable(tmp_path / "whole")


def test_what_cannot_be_resumed_is_one_sentence(go, tmp_path: Path, fedsim):
    def say(*arguments: str) -> str:
        ended = fedsim("resume", *arguments)
        assert ended.code == 2
        return str(ended.err)

    assert "holds no run: there is no config.yaml in it" in say(str(tmp_path / "nowhere"))
    go("cut", *RICH, until=3)
    cut = str(tmp_path / "cut")
    assert "rounds=9 cannot be given: only the engine of a run may change, e.g. engine=ray" in say(cut, "rounds=9")
    assert "engine.threads cannot change: the last bits of results depend on it" in say(cut, "engine.threads=2")
    for point in (tmp_path / "cut" / "checkpoint").iterdir():
        (point / "weights.safetensors").write_bytes(b"no weights")
    assert f"{point / 'weights.safetensors'} is damaged: it is not what the run wrote" in (said := say(cut))
    assert said.endswith(f"no checkpoint is whole: remove {point.parent}, and the run starts anew\n")
    for point in (tmp_path / "cut" / "checkpoint").iterdir():
        (point / "checksums.json").unlink()
        (point / "state.json").write_text('{"format": 7}')
    assert f"{point} cannot be read: ValueError: it has format 7, this version reads 2" in say(cut)
    assert len(read_rounds(tmp_path / "cut")) == 4  # nothing was lost


def test_a_run_that_is_going_on_is_left_alone(go, tmp_path: Path, settings):
    go("cut", *RICH, until=3)
    before = (tmp_path / "cut" / "rounds.jsonl").read_bytes()
    from fedsim.report.folder import RunFolder

    folder = RunFolder(tmp_path / "cut", settings(*RICH), resume=True, last=2)
    with pytest.raises(ConfigError, match=r"the run in .*cut is going on just now; wait for it, or end it"):
        go("cut", resume=True)
    folder.close()
    assert before.startswith((tmp_path / "cut" / "rounds.jsonl").read_bytes())


def test_only_settings_of_the_engine_that_cannot_change_results_may_change(settings):
    given = settings("engine.batch_clients=2")
    moved = on_engine(given, ["engine=ray", "engine.workers=3"])
    assert moved["engine"]["workers"] == 3
    assert moved["engine"]["batch_clients"] == 2
    assert moved["choices"]["engine"] == "ray"
    assert on_engine(moved, ["engine.workers=1"])["engine"] == {**moved["engine"], "workers": 1}
    assert on_engine(given, []) == given


def test_settings_of_an_earlier_version_get_what_came_later(settings, tmp_path: Path):
    import yaml

    old = {key: value for key, value in settings().items() if key not in ("checkpoint_s", "stream", "private")}
    old["choices"] = {key: value for key, value in old["choices"].items() if key != "stream"}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(old))
    assert settings_of_run(tmp_path) == settings()


# --- what is written ---------------------------------------------------------------------------------------------


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


def test_a_finished_run_keeps_its_weights_alone(go, tmp_path: Path):
    go("run", *RICH)
    (point,) = (tmp_path / "run" / "checkpoint").iterdir()
    assert point.name == "round-000005"
    found = load(tmp_path / "run")
    assert found is not None
    assert list(found.state) == ["totals", "data"]
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
