"""What a run leaves in its folder, finished or not."""

from __future__ import annotations

import json
import math
import os
from dataclasses import replace

import pandas as pd
import pyarrow as pa
import pytest
import torch
import yaml
from conftest import DAILY
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from clients.app import serve
from clients.trainers.sgd import SGDTrainer
from devices.cost import Cost, ModelCost, Passes, Work
from fedsim.engines.local import LocalEngine
from fedsim.errors import ClientError, ConfigError
from fedsim.grid.edge import ClientReport
from fedsim.messages.records import record_of
from fedsim.report import client_rows, strict_json
from fedsim.report import folder as folders
from fedsim.report import place as run_place
from fedsim.report.client_rows import client_schema, client_table
from fedsim.report.place import new_run_folder
from fedsim.report.rounds import RoundReport, read_rounds, weights_sha256
from fedsim.report.text import closing_lines, closing_table
from fedsim.runs import writer
from fedsim.settings.compose import from_run_config
from fedsim.settings.run_settings import RunSettings

KEYS = {
    "price_models",
    *("method", "workload", "fleet", "seed", "rounds", "final", "best", "simulated_s", "energy_j", "down_bytes"),
    *("up_bytes", "peak_memory_bytes", "storage_bytes", "outcomes", "to_target", "host_s", "weights_sha256"),
    *("versions", "clients", "warnings"),
    *("not_finite_rounds", "classes", "confusion", "calibration"),
    "data",
}


def contents(folder) -> dict:
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- rounds ------------------------------------------------------------------------------------------------------


def test_round_survives_its_line():
    report = RoundReport(
        3, 7.5, 2.5, (1, 4), {"completed": (4,), "late": (1,)}, 10, 5, 0.1, 0.2, 0.0, 99, 7, {"loss": 0.3}, 1.0
    )
    assert RoundReport.from_json(report.to_json()) == report
    assert "\n" not in report.to_json()


def test_rounds_are_read_back_as_they_were_watched(settings, tmp_path):
    watched: list[RoundReport] = []
    writer.run(settings("fleet=mixed", "over_selection=1.5"), LocalEngine(serve), tmp_path, watch=watched.append)
    assert read_rounds(tmp_path) == watched
    assert [report.round for report in watched] == [0, 1, 2]


def test_last_line_that_was_cut_is_left_out(run, tmp_path):
    run()
    path = tmp_path / "rounds.jsonl"
    whole = read_rounds(tmp_path)
    path.write_text(path.read_text()[:-9])
    assert read_rounds(tmp_path) == whole[:-1]


def test_round_written_before_tails_were_priced_has_none():
    line = json.loads(RoundReport(1, 2.0, 2.0, joules=3.0).to_json())
    del line["tail_joules"]
    assert RoundReport.from_json(json.dumps(line)).tail_joules == 0


# --- client rows -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flush_rows", [1, 20_000])
def test_client_rows_sum_up_to_their_round(run, tmp_path, monkeypatch, flush_rows: int):
    monkeypatch.setattr(folders, "FLUSH_ROWS", flush_rows)
    run("evaluate_clients=2", "fleet=mixed", "deadline_s=5")
    files = sorted((tmp_path / "clients").iterdir())
    assert len(files) == (2 if flush_rows == 1 else 1)
    rows = pd.read_parquet(tmp_path / "clients")
    for report in read_rounds(tmp_path)[1:]:
        own = rows[rows["round"] == report.round]
        trained = own[own["phase"] == "train"]
        assert (own["joules"].sum(), own["wait_joules"].sum()) == pytest.approx((report.joules, report.wait_joules))
        assert own["tail_joules"].sum() == pytest.approx(report.tail_joules)
        parts = [f"{part}_joules" for part in ("down", "compute", "up", "tail")]
        assert own[parts].sum(axis=1).to_numpy() == pytest.approx(own["joules"].to_numpy())
        assert (own["down_bytes"].sum(), own["up_bytes"].sum()) == (report.down_bytes, report.up_bytes)
        assert own["peak_memory_bytes"].max() == report.peak_memory_bytes
        assert own["storage_bytes"].max() == report.storage_bytes
        assert tuple(trained["client"]) == report.cohort
        for outcome, clients in report.outcomes.items():
            assert tuple(trained[trained["outcome"] == outcome]["client"]) == clients


def test_client_row_tells_times_metrics_and_work(run, tmp_path):
    """7 examples in batches of 4 and 3: two passes back and forth."""
    run()
    row = pd.read_parquet(tmp_path / "clients").iloc[0]
    passes = json.loads(row["work"])["passes"]
    assert row["total_s"] == row["down_s"] + row["compute_s"] + row["up_s"]
    assert [(p["batch"], p["forwards"], p["backwards"]) for p in passes] == [(4, 1, 1), (3, 1, 1)]
    assert (row["num_examples"], row["device"], list(json.loads(row["metrics"]))) == (7, "reference", ["train_loss"])


def test_columns_of_rows_are_what_the_rows_say(monkeypatch):
    """Written from buffers and in chunks, without pandas: the same as pyarrow makes of the rows themselves."""
    network = ModelCost("net", 1.5, 2.0, 3, 4, layers=((1.0, math.inf),), step_bytes=((5, 6),))
    works = [Work(), Work((Passes(network, 4, 2, 1), Passes(replace(network, name="ß"), 3, 1)), 7, 8, 9, 10)]
    facts = [(0, "é", {}), (1, "", {"loss": math.nan, "hits": 3}), (2, "late\n", {"loss": 0.1 + 0.2})]
    clients = [
        ClientReport(
            1, "train", number, "pi", "completed", reason, 0.5, Cost(up_s=math.inf), 1.0, 2.0, work, work, 3, metrics
        )
        for number, reason, metrics in facts
        for work in works
    ]
    monkeypatch.setattr(client_rows, "AT_ONCE", 4)
    table = client_table(clients)
    assert table.schema == client_schema()
    assert table["work"].to_pylist() == [strict_json.dumps(work.to_dict()) for work in works] * 3
    assert table["metrics"].to_pylist() == [strict_json.dumps(c.metrics) for c in clients]
    assert table["reason"].to_pylist() == [c.reason for c in clients]
    for name, own in (("up_s", [math.inf] * 6), ("flops", [w.flops for w in works] * 3), ("num_examples", [3] * 6)):
        assert table[name].to_pylist() == own
    assert table.equals(pa.Table.from_pylist(table.to_pylist(), schema=client_schema()))


# --- TensorBoard -------------------------------------------------------------------------------------------------


def test_tensorboard_has_the_simulated_time_as_wall_time(run, tmp_path):
    run("evaluate_every=2", "rounds=3")
    events = EventAccumulator(str(tmp_path / "tensorboard" / "fedavg-blobs-uniform-seed1")).Reload()
    rounds = read_rounds(tmp_path)
    joules = events.Scalars("round/energy_j")
    assert [(e.step, e.wall_time) for e in joules] == [(r.round, r.now_s) for r in rounds]
    assert [e.value for e in joules] == pytest.approx([r.joules for r in rounds])
    judged = [(r.round, r.metrics["accuracy"]) for r in rounds if "accuracy" in r.metrics]
    assert [(e.step, pytest.approx(e.value)) for e in events.Scalars("metric/accuracy")] == judged
    assert [e.value for e in events.Scalars("outcome/completed")] == [3, 3, 3]


# --- summary -----------------------------------------------------------------------------------------------------


def test_summary_adds_up_what_the_rounds_say(run, tmp_path):
    summary = run(
        "fleet.network_sigma=0.6", "cohort=4", "over_selection=1.3", "evaluate_clients=1", "rounds=3", "seed=4"
    )
    rounds, rows = read_rounds(tmp_path), pd.read_parquet(tmp_path / "clients")
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    assert set(summary) == KEYS
    assert (summary["method"], summary["workload"], summary["fleet"]) == ("fedavg", "blobs", "uniform")
    assert (summary["seed"], summary["rounds"], summary["simulated_s"]) == (4, 3, rounds[-1].now_s)
    final = ("accuracy", "loss", "macro_f1", "ece", "client_accuracy_worst_tenth")
    assert summary["final"] == {key: rounds[-1].metrics[key] for key in final}
    assert summary["best"]["accuracy"] == max(r.metrics["accuracy"] for r in rounds)
    assert summary["energy_j"]["total"] == pytest.approx(rows["joules"].sum())
    assert summary["energy_j"]["max_client"] == pytest.approx(rows.groupby("client")["joules"].sum().max())
    assert (summary["down_bytes"], summary["up_bytes"]) == (rows["down_bytes"].sum(), rows["up_bytes"].sum())
    assert summary["peak_memory_bytes"] == rows["peak_memory_bytes"].max()
    assert summary["storage_bytes"] == rows["storage_bytes"].max()
    assert summary["outcomes"] == {"completed": 12, "late": 6, "offline": 0, "out_of_memory": 0, "failed": 0}
    assert summary["to_target"] is None
    assert {"python", "fedsim", "torch", "flwr", "numpy"} <= set(summary["versions"])


def test_summary_says_what_the_target_took(run, tmp_path):
    summary = run("target_accuracy=0.5", "rounds=40")
    rounds = read_rounds(tmp_path)
    target = summary["to_target"]
    assert 0 < summary["rounds"] < 40
    assert (target["round"], target["simulated_s"]) == (rounds[-1].round, rounds[-1].now_s)
    assert (target["down_bytes"], target["up_bytes"]) == (summary["down_bytes"], summary["up_bytes"])
    assert target["energy_j"] == pytest.approx(summary["energy_j"]["total"])


def test_summary_counts_who_never_took_part_also_when_the_run_was_resumed(settings, run, tmp_path):
    """12 clients, of which 3 a round are asked: by the rows, those that completed no training."""
    given = ("num_clients=12", "deadline_s=0.0418", "fleet.network_sigma=0.6", "evaluate_clients=9", "checkpoint_s=0")
    summary = run(*given)
    rows = pd.read_parquet(tmp_path / "clients")
    done = rows[(rows["phase"] == "train") & (rows["outcome"] == "completed")]["client"].nunique()
    assert 0 < done < rows["client"].nunique()
    assert summary["clients"] == {"population": 12, "took_part": done, "never": 12 - done}
    assert summary["warnings"] == []
    (tmp_path / "summary.json").unlink()
    again = writer.run(settings(*given), LocalEngine(serve), tmp_path, resume=True)
    assert again["clients"] == summary["clients"]
    assert f"clients that never took part: {12 - done} of 12" in closing_lines(again, tmp_path)


def test_a_run_shorter_than_a_day_of_its_clients_warns(run, tmp_path):
    """Two rounds of a day at least end after the second has begun, at 24 h."""
    (warning,) = run(*DAILY, out=tmp_path / "short")["warnings"]
    assert warning.startswith("clients of this fleet are online at hours of their own, and the run took 0.0")
    long = run(*DAILY, "round_every_s=86400", out=tmp_path / "long")
    assert long["simulated_s"] > 86400
    assert long["warnings"] == []
    assert f"warning: {warning}" in closing_lines({**long, "warnings": [warning]}, tmp_path)


def test_a_score_without_what_clients_keep_is_warned_of(run, tmp_path):
    """The server's model has the head that it began with; clients that judge have their own."""
    (warning,) = run("private=[head]", out=tmp_path / "silent")["warnings"]
    assert warning == (
        "the accuracy is that of the server's model, in which what is private (private=[head]) has never been trained; "
        "evaluate_clients=10 judges clients with their own"
    )
    assert run("private=[head]", "evaluate_clients=2", out=tmp_path / "judged")["warnings"] == []
    assert run(out=tmp_path / "shared")["warnings"] == []


def test_target_that_is_not_reached_took_nothing(run):
    assert run("target_accuracy=1.0", "rounds=1")["to_target"] is None


def test_method_is_named_by_its_preset_or_its_halves(run, tmp_path):
    names = ("method=fedprox", "strategy=fedadam", "trainer=fedprox")
    methods = [run(name, "rounds=1", out=tmp_path / name)["method"] for name in names]
    assert methods == ["fedprox", "fedadam", "fedavg+fedprox"]


def test_fingerprint_knows_names_types_shapes_and_numbers():
    tensors = [
        {"w": torch.zeros(4)},
        {"v": torch.zeros(4)},
        {"w": torch.zeros(2, 2)},
        {"w": torch.zeros(4, dtype=torch.int32)},
        {"w": torch.tensor([0.0, 0, 0, -0.0])},
    ]
    assert len({weights_sha256(record_of(t)) for t in tensors}) == 5
    assert weights_sha256(record_of(tensors[0])) == weights_sha256(record_of({"w": torch.zeros(4)}))


# --- the folder --------------------------------------------------------------------------------------------------


def test_config_of_a_run_repeats_it(run, tmp_path):
    out = tmp_path / "first"
    first = run("method=fedprox", "seed=9", "trainer.momentum=0.5", f"out={out}", out=out)
    config = yaml.safe_load((tmp_path / "first" / "config.yaml").read_text())
    settings = from_run_config({"config-json": json.dumps(config)})
    assert settings["out"] is None
    second = writer.run(settings, LocalEngine(serve), tmp_path / "second")
    assert second["weights_sha256"] == first["weights_sha256"]
    assert {**second, "host_s": 0} == {**first, "host_s": 0}
    assert (tmp_path / "second" / "config.yaml").read_text() == (tmp_path / "first" / "config.yaml").read_text()


class FailsLater(SGDTrainer):
    """Learns in round 1 and fails in round 2."""

    def fit(self, client, task):
        if task.round == 2:
            raise ValueError("no more")
        return super().fit(client, task)


def test_failing_run_leaves_a_note_and_everything_so_far(run, tmp_path):
    with pytest.raises(ClientError, match=r"failed in round 2 .*no more"):
        run("trainer._target_=test_report.FailsLater")
    note = json.loads((tmp_path / "failure.json").read_text())
    assert note["error"] == "ClientError"
    assert "failed in round 2 (seed 1): ValueError: no more; replay it with: fedsim replay" in note["reason"]
    assert [r.round for r in read_rounds(tmp_path)] == [0, 1]
    assert list(pd.read_parquet(tmp_path / "clients")["round"]) == [1, 1, 1]
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert len(EventAccumulator(str(events)).Reload().Scalars("metric/loss")) == 2
    assert not (tmp_path / "summary.json").exists()


def test_interrupted_run_leaves_everything_so_far(settings, tmp_path):
    def interrupt(report: RoundReport) -> None:
        if report.round == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        writer.run(settings(), LocalEngine(serve), tmp_path, watch=interrupt)
    assert json.loads((tmp_path / "failure.json").read_text()) == {"error": "KeyboardInterrupt", "reason": ""}
    assert len(read_rounds(tmp_path)) == 2
    assert len(pd.read_parquet(tmp_path / "clients")) == 3


def test_folder_of_another_run_is_refused_and_left_alone(run, tmp_path):
    run("rounds=1")
    before = contents(tmp_path)
    with pytest.raises(ConfigError, match=r"holds another run \(config\.yaml, rounds\.jsonl, .*\); name a new folder"):
        run("seed=2")
    assert contents(tmp_path) == before


def test_folder_with_other_files_is_refused_and_they_stay(run, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"holds something else \(notes\.txt\); name a new folder$"):
        run("rounds=1")
    assert os.listdir(tmp_path) == ["notes.txt"]


def test_file_in_place_of_the_folder_is_refused(run, tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(ConfigError, match=r"is a file; name a folder that is new or empty$"):
        run(out=tmp_path / "out")
    assert (tmp_path / "out").read_text() == "mine"


def test_run_that_cannot_be_built_leaves_no_folder(run, tmp_path):
    with pytest.raises(ConfigError, match="cohort must be at most the 6 clients there are, got 7"):
        run("cohort=7", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_folder_of_the_same_second_gets_a_number(settings, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run_place.time, "strftime", lambda form: "20250102-030405")
    names = []
    for _ in range(3):
        with new_run_folder(RunSettings.of(settings("method=fedprox"))) as folder:
            (folder / "config.yaml").touch()
        names.append(str(folder))
    assert names == [f"runs/20250102-030405-fedprox-blobs{end}" for end in ("", "-2", "-3")]


def test_what_clients_judge_is_beside_the_global_model(run, tmp_path):
    """Where some of the model is private, the server's copy says little."""
    summary, reports = run("method=fedrep", "evaluate_clients=6"), read_rounds(tmp_path)
    table, last = closing_table(reports), reports[-1].metrics["client_accuracy"]
    assert [column.header for column in table.columns][:3] == ["round", "accuracy %", "clients' own"]
    assert list(table.columns[2].cells)[-1] == f"{100 * last:.2f}"
    own = f"clients' own models: accuracy {100 * last:.2f} % on their own held-out examples"
    assert own in closing_lines(summary, tmp_path, reports)
