"""NaN and infinity: nobody is judged by them, sent them, blamed for them, and no file holds them."""

import ast
import json
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, Message, MetricRecord
from flwr.serverapp.strategy import FedAvg
from torch import nn

from clients.trainers.sgd import SGDTrainer
from fedsim.errors import ClientError, ConfigError, NotFiniteError, RunError
from fedsim.grid.edge import Enrolled
from fedsim.messages.records import all_finite, array_record, from_array, record_of, to_array
from fedsim.messages.updates import Broadcast
from fedsim.report import strict_json
from fedsim.report.rounds import RoundReport, read_rounds
from fedsim.report.text import closing_table, final_score
from fedsim.runs.checkpoint import decode, encode
from fedsim.study.paired import score
from fedsim.workloads import metrics as figures
from fedsim.workloads.base import Tensors
from strategies.edge import EdgeStrategy

PACKAGES = Path(__file__).parent.parent


class Loud(FedAvg):
    """Makes the mean 10 ** `power` times as large from round 2 on: infinite, or too large to compute with."""

    def __init__(self, power: int, **sampling: Any):
        super().__init__(**sampling)
        self.power = power

    def aggregate_train(
        self, number: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        arrays, metrics = super().aggregate_train(number, replies)
        if arrays is None or number < 2:
            return arrays, metrics
        return array_record(
            {n: to_array(from_array(a).astype(float) * 10.0**self.power) for n, a in arrays.items()}
        ), metrics


class Telling(EdgeStrategy):
    """Sends NaN beside the weights."""

    def broadcast(self, round: int, client: Enrolled, weights: Tensors) -> Broadcast:
        return Broadcast(round, weights, {"hint": {"a": torch.tensor(float("nan"))}} if round == 2 else {})


class Wild(SGDTrainer):
    """What is kept of its head is infinite; what is sent is not."""

    def fit(self, client, task):
        update = super().fit(client, task)
        client.weights["head.weight"].fill_(torch.inf)
        return update


def loud(power: int) -> tuple[str, ...]:
    return (f"strategy._target_={__name__}.Loud", f"+strategy.power={power}", "rounds=4")


def strict(text: str) -> Any:
    def refuse(word: str) -> None:
        raise ValueError(f"{word} is no JSON")

    return json.loads(text, parse_constant=refuse)


# --- the server ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("goes_on", ["stop", "drop"])
def test_a_server_update_that_is_not_finite_stops_the_run_and_names_its_setting(run, goes_on: str):
    """Whatever becomes of failing clients: none has failed."""
    sentence = r"Loud made NaN or infinite weights .* in round 2; change .*\(strategy.power=60\)"
    with pytest.raises(RunError, match=sentence):
        run(*loud(60), f"on_client_error={goes_on}")


def test_nobody_is_sent_what_is_not_finite(run):
    with pytest.raises(RunError, match="the 'hint' that the server would send in round 2 are NaN or infinite"):
        run("strategy=edge_mean", f"strategy._target_={__name__}.Telling", "on_client_error=drop")


def test_the_clients_setting_is_named_where_theirs_is_not_finite(run):
    with pytest.raises(ClientError, match=r"failed in round 1 .*NaN or infinite weights; lower trainer.lr"):
        run("trainer.lr=1e30")


def test_what_stays_with_a_client_must_be_finite_too(run):
    with pytest.raises(ClientError, match=r"head.weight of what it keeps holds NaN or infinite"):
        run("private=[head]", f"trainer._target_={__name__}.Wild")


# --- judging ---------------------------------------------------------------------------------------------------------


class Nan(nn.Module):
    """A model that was broken from the start."""

    def __init__(self, input_shape: tuple[int, ...], num_classes: int, **mlp: Any):
        super().__init__()
        self.head = nn.Linear(input_shape[0], num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x) / 0.0


def test_a_model_whose_output_is_not_finite_has_no_accuracy(federation):
    """Of NaN, torch takes the first for the largest: the share of class 0."""
    made = federation()
    made.model.load_state_dict({n: t * 1e38 for n, t in made.model.state_dict().items()})
    with pytest.raises(NotFiniteError, match="its model's output on held-out examples is NaN or infinite"):
        made.world.workload.evaluate(made.model, made.world.workload.test)


def test_a_judged_model_that_is_not_finite_stops_the_run(run):
    with pytest.raises(RunError, match=r"output .* is NaN or infinite after round 2; change .*\(strategy.power=37\)"):
        run(*loud(37))


def test_an_untrained_model_that_is_not_finite_is_a_wrong_setting(run, tmp_path: Path):
    with pytest.raises(ConfigError, match="NaN or infinite before any training; look at model"):
        run(f"model._target_={__name__}.Nan", out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_that_shall_go_on_is_marked_and_no_round_of_it_counts(run, tmp_path: Path):
    summary = run(*loud(37), "on_client_error=drop", "target_accuracy=0.99", "evaluate_clients=3", out=tmp_path / "run")
    reports = read_rounds(tmp_path / "run")
    assert figures.not_finite(reports) == [2, 3, 4]
    assert summary["not_finite_rounds"] == 3
    assert summary["final"] == {"accuracy": None, "loss": None}
    assert summary["best"]["round"] <= 1
    assert summary["to_target"] is None
    assert "NaN or infinite after 3 rounds, the first 2" in summary["warnings"][0]
    assert math.isnan(score(reports, 1))
    assert final_score(summary) == "not finite"
    assert list(closing_table(reports).columns[1].cells)[2:] == ["not finite"] * 3
    # Their models are the global one: none of the three has an accuracy, and none is averaged.
    assert [r.metrics.get("client_failed") for r in reports] == [None, None, 3.0, 3.0, 3.0]
    assert "client_accuracy" not in reports[-1].metrics


# --- files -----------------------------------------------------------------------------------------------------------


def test_files_of_a_run_with_nan_are_json(run, tmp_path: Path):
    out = tmp_path / "run"
    run(*loud(37), "on_client_error=drop", "checkpoint_s=0", "evaluate_clients=2", out=out)
    found = [*out.rglob("*.json"), out / "rounds.jsonl"]
    assert {path.name for path in found} >= {"summary.json", "state.json", "rounds.jsonl"}
    for path in found:
        text = re.sub(r"\n[0-9a-f]{64}\n$", "", path.read_text())  # some end with their checksum
        for part in text.splitlines() if path.suffix == ".jsonl" else [text]:
            strict(part)


def test_null_stands_for_nan_and_is_read_as_it():
    report = RoundReport(3, 1.0, 1.0, metrics={"train_loss": math.inf, "accuracy": 0.5, "loss": 0.1})
    assert strict(report.to_json())["metrics"] == {"train_loss": None, "accuracy": 0.5, "loss": 0.1}
    back = RoundReport.from_json(report.to_json())
    assert math.isnan(back.metrics["train_loss"])
    assert back.to_json() == report.to_json()


@pytest.mark.parametrize("word", ["NaN", "Infinity", "null"])
def test_an_accuracy_beside_a_loss_of_nan_is_none_in_older_files_too(word: str):
    line = RoundReport(3, 1.0, 1.0, metrics={"accuracy": 0.784, "loss": 0.25}).to_json().replace("0.25", word)
    assert RoundReport.from_json(line).metrics == {figures.NOT_FINITE: 1.0}
    assert figures.best([RoundReport.from_json(line)])["accuracy"] is None
    assert figures.to_target([RoundReport.from_json(line)], 0.7) is None


def test_a_checkpoint_keeps_nan_and_infinity_in_json():
    tree = {"a": [math.inf, -math.inf, 1.5]}
    text = strict_json.dumps(encode(tree, {}, "state"))
    assert decode(strict(text), {}) == tree
    assert math.isnan(decode(encode(math.nan, {}, "state"), {}))


# What goes to our own processes, never into a file.
INSIDE = {"settings", "name", "named", "facts", "folders"}


@pytest.mark.parametrize("path", sorted((PACKAGES / "fedsim").rglob("*.py")), ids=lambda path: path.stem)
def test_what_is_printed_or_written_is_strict_json(path: Path):
    """By its source: `json.dumps` itself is for settings and headers that our own workers read."""
    if path.name == "strict_json.py" or path.parts[-2:] == ("flower", "runtime.py"):
        return
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("json.dumps", "json.dump"):
            given = ast.unparse(node.args[0])
            if any(ast.unparse(keyword) == "allow_nan=False" for keyword in node.keywords):
                continue  # raises rather than write what JSON does not have
            assert given in INSIDE or given.startswith("settings") or "state" in given, f"{path.name}: {given}"


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "int64", "bool"])
def test_all_finite_finds_a_single_one(dtype: str):
    values = np.ones(70_000, dtype)
    assert all_finite(record_of({"a": torch.from_numpy(values.copy())}))
    if np.dtype(dtype).kind == "f":
        values[-1] = np.nan
        assert not all_finite(record_of({"a": torch.from_numpy(values)}))
