"""What loggers beside the run folder are told: a made-up one always, the real ones offline where they are installed."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from conftest import Ended, assert_refused

from clients.app import serve
from fedsim.engines.local import LocalEngine
from fedsim.errors import ConfigError
from fedsim.report import loggers
from fedsim.report.rounds import RoundReport, read_rounds, running_costs
from fedsim.runs import writer
from fedsim.settings.compose import compose

LABEL = "fedavg-blobs-uniform-seed1"


class Notebook:
    """A service that writes down what it is told, by the id of the run."""

    def __init__(self, folder: Path, label: str, parameters: Mapping[str, Any], known: str | None):
        self.id = known or f"{len(self.entries):08x}"
        self.entries.setdefault(self.id, []).append(("began", label, dict(parameters)))

    entries: dict[str, list[Any]] = {}
    refuses = ""

    def log(self, values: Mapping[str, float], step: int, now_s: float) -> None:
        self.tell("log", step, dict(values))

    def end(self, figures: Mapping[str, float], step: int, now_s: float) -> None:
        self.tell("end", step, dict(figures))

    def close(self, ended: bool) -> None:
        self.tell("close", ended)

    def tell(self, what: str, *content: Any) -> None:
        if what == self.refuses:
            raise OSError("nobody\nthere")
        self.entries[self.id].append((what, *content))


@pytest.fixture
def notebook(monkeypatch: pytest.MonkeyPatch) -> type[Notebook]:
    own = type("Own", (Notebook,), {"entries": {}})
    monkeypatch.setattr(loggers, "SERVICES", {"wandb": own, "mlflow": own})
    monkeypatch.setattr(loggers, "find_spec", lambda name: name)
    return own


def cut(settings: Any, out: Path, *overrides: str) -> None:
    def watch(report: RoundReport) -> None:
        if report.round == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        writer.run(settings(*overrides), LocalEngine(serve), out, watch)


def told(entry: list[Any], what: str) -> list[tuple[int, dict[str, float]]]:
    return [tuple(rest) for kind, *rest in entry if kind == what]


# --- any logger ------------------------------------------------------------------------------------------------------


def test_a_logger_is_told_every_round_and_the_end(run, tmp_path: Path, notebook: type[Notebook]):
    summary, rounds = run("logger=wandb", "rounds=3"), read_rounds(tmp_path)
    (entry,) = notebook.entries.values()
    kind, label, parameters = entry[0]
    assert (kind, label, parameters["method"], parameters["rounds"]) == ("began", LABEL, "fedavg", 3)
    assert "logger" not in parameters
    logged = told(entry, "log")
    assert [step for step, _ in logged] == [0, 1, 2, 3]
    assert [values["total/energy_j"] for _, values in logged] == pytest.approx(running_costs(rounds)["joules"])
    assert [values["metric/accuracy"] for _, values in logged] == [r.metrics["accuracy"] for r in rounds]
    ((step, figures),) = told(entry, "end")
    assert (step, figures["final/accuracy"]) == (3, summary["final"]["accuracy"])
    assert entry[-1] == ("close", True)


def test_results_are_those_without_a_logger(run, tmp_path: Path, notebook: type[Notebook]):
    runs = [{**run(*given, out=tmp_path / str(n)), "host_s": 0} for n, given in enumerate([(), ("logger=mlflow",)])]
    assert runs[0] == runs[1]
    assert not (tmp_path / "0" / "logger.json").exists()


def test_a_run_that_goes_on_continues_its_entry(settings, tmp_path: Path, notebook: type[Notebook]):
    given = ("logger=mlflow", "rounds=4", "checkpoint_s=0")
    cut(settings, tmp_path, *given)
    writer.run(settings(*given), LocalEngine(serve), tmp_path, resume=True)
    (entry,) = notebook.entries.values()
    assert [one[1] for one in entry if one[0] in ("log", "close")] == [0, 1, 2, False, 2, 3, 4, True]
    again = dict(told(entry, "log"))
    assert [again[n]["total/energy_j"] for n in range(5)] == pytest.approx(
        running_costs(read_rounds(tmp_path))["joules"]
    )


def test_a_logger_that_comes_later_is_told_what_was_before(settings, tmp_path: Path, notebook: type[Notebook]):
    cut(settings, tmp_path, "rounds=4", "checkpoint_s=0")
    writer.run(settings("rounds=4", "checkpoint_s=0", "logger=wandb"), LocalEngine(serve), tmp_path, resume=True)
    (entry,) = notebook.entries.values()
    assert [step for step, _ in told(entry, "log")] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("what", ["log", "end", "close"])
def test_a_run_goes_on_without_a_logger_that_refuses(
    run, tmp_path: Path, notebook: type[Notebook], monkeypatch: pytest.MonkeyPatch, what: str
):
    monkeypatch.setattr(notebook, "refuses", what)
    with pytest.warns(UserWarning, match=r"^logger=wandb takes no more: nobody there; the run goes on$") as warned:
        summary = run("logger=wandb")
    assert summary["rounds"] == 2
    assert len([one for one in warned if "logger" in str(one.message)]) == 1


def test_a_logger_that_cannot_begin_leaves_nothing(run, tmp_path: Path, monkeypatch, notebook: type[Notebook]):
    def refuse(*given: Any) -> None:
        raise OSError("no key")

    monkeypatch.setattr(loggers, "SERVICES", {"wandb": refuse})
    with pytest.raises(ConfigError, match=r"^logger=wandb cannot begin: no key; or set logger=null$"):
        run("logger=wandb", out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("content", ["[]", '{"wandb": 3}', '{"wandb": "../../x"}', '{"wandb": ""}'])
def test_an_id_that_is_none_is_not_used(settings, tmp_path: Path, monkeypatch, notebook: type[Notebook], content: str):
    given = ("logger=wandb", "rounds=4", "checkpoint_s=0")
    cut(settings, tmp_path, *given)
    (tmp_path / "logger.json").write_text(content)
    writer.run(settings(*given), LocalEngine(serve), tmp_path, resume=True)
    assert list(notebook.entries) == ["00000000", "00000001"]


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
@pytest.mark.usefixtures("place")
def test_a_logger_that_is_not_installed_is_named_with_its_command(
    name: str, fedsim: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(loggers, "find_spec", lambda name: None)
    assert_refused(fedsim("run", f"logger={name}"), f"logger={name}", f"pip install 'fedsim-edge[{name}]'")


@pytest.mark.usefixtures("place")
def test_an_unknown_logger_is_refused(fedsim: Callable[..., Ended]):
    assert_refused(fedsim("run", "logger=tensorbord"), "unknown value for logger 'tensorbord'", "mlflow, null, wandb")


@pytest.mark.usefixtures("place")
def test_a_run_goes_on_with_another_logger(
    settings, tmp_path: Path, fedsim: Callable[..., Ended], notebook: type[Notebook]
):
    cut(settings, tmp_path / "run", "rounds=4", "checkpoint_s=0", "logger=wandb")
    assert fedsim("resume", str(tmp_path / "run"), "logger=null").code == 0
    (entry,) = notebook.entries.values()
    assert [step for step, _ in told(entry, "log")] == [0, 1, 2]


# --- the real ones ---------------------------------------------------------------------------------------------------


def test_mlflow_has_every_number_once(settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    mlflow = pytest.importorskip("mlflow", reason="the extra mlflow is not installed")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    given, out = ("logger=mlflow", "rounds=4", "checkpoint_s=0"), tmp_path / "run"
    cut(settings, out, *given)
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name("fedsim").experiment_id
    assert [one.info.status for one in client.search_runs([experiment])] == ["FAILED"]
    summary = writer.run(settings(*given), LocalEngine(serve), out, resume=True)
    (one,) = client.search_runs([experiment])
    assert (one.info.status, one.info.run_name, one.data.params["trainer.lr"]) == ("FINISHED", LABEL, "0.1")
    assert one.data.metrics["final/accuracy"] == summary["final"]["accuracy"]
    history = client.get_metric_history(one.info.run_id, "total/energy_j")
    found = sorted((point.step, point.value) for point in history)
    costs = running_costs(read_rounds(out))["joules"]
    assert [step for step, _ in found][:5] == [0, 1, 2, 3, 4]
    assert dict(found) == pytest.approx(dict(enumerate(costs)))


def test_wandb_keeps_the_run_in_its_folder(settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("wandb", reason="the extra wandb is not installed")
    for name in ("WANDB_MODE", "WANDB_DIR", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    given, out = ("logger=wandb", "rounds=4", "checkpoint_s=0"), tmp_path / "run"
    cut(settings, out, *given)
    summary = writer.run(settings(*given), LocalEngine(serve), out, resume=True)
    files = sorted((out / "wandb").glob("offline-run-*/run-*.wandb"))
    assert {path.name for path in files} == {f"run-{json.loads((out / 'logger.json').read_text())['wandb']}.wandb"}
    records = [record for path in files for record in of_wandb(path)]
    energy = {int(values["_step"]): values["total/energy_j"] for values in map(history_of, records) if values}
    assert energy == pytest.approx(dict(enumerate(running_costs(read_rounds(out))["joules"])))
    ended = [json.loads(i.value_json) for r in records for i in r.summary.update if i.key == "final/accuracy"]
    assert ended[-1] == summary["final"]["accuracy"]
    assert {record.run.display_name for record in records if record.HasField("run")} == {LABEL}
    assert compose(["logger=wandb"])["logger"] == "wandb"


def of_wandb(path: Path) -> list[Any]:
    """The records of an offline file: a LevelDB log behind seven bytes of wandb's own."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, part, found = path.read_bytes(), 7, b"", []
    while place + 7 <= len(data):
        if (left := 2**15 - place % 2**15) < 7:  # no header fits into the rest of a block
            place += left
            continue
        size, kind = struct.unpack_from("<HB", data, place + 4)  # behind a checksum
        part += data[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # a whole record, or its last part
            found.append(Record.FromString(part))
            part = b""
    return found


def history_of(record: Any) -> dict[str, Any]:
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
