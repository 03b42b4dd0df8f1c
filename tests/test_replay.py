"""One client of one round again: the same numbers, or the same traceback."""

import json
import shlex
from pathlib import Path

import pandas
import pytest
import torch
import yaml

from clients.app import serve
from clients.trainers.sgd import SGDTrainer
from fedsim.cli import main as cli
from fedsim.engines.local import LocalEngine
from fedsim.errors import ClientError, ConfigError
from fedsim.report.instructions import read_instruction
from fedsim.runs.replay import instruction_of, replay, settings_of


class Remembering(SGDTrainer):
    """Learns faster with every round that the client remembers, and breaks when it remembers two."""

    def fit(self, client, task):
        rounds = client.state.get("rounds", torch.tensor(0))
        if rounds == 2:
            raise OSError("disk is gone")
        client.state["rounds"] = rounds + 1
        self.lr = 0.1 * (1 + int(rounds))
        return super().fit(client, task)


@pytest.fixture
def two_rounds(run, tmp_path: Path) -> Path:
    """A finished run of two rounds in which every client takes part."""
    run("trainer._target_=test_replay.Remembering", "cohort=6")
    return tmp_path


def again(folder: Path, round: int, client: int):
    settings, engine = settings_of(folder), LocalEngine(serve)
    return replay(settings, engine, instruction_of(settings, engine, folder, round, client, lambda _: None))


def test_a_client_replays_to_the_same_numbers(two_rounds: Path):
    """Client 4 in round 2 has the state of round 1, or its learning rate and loss would be others."""
    rows = pandas.concat(pandas.read_parquet(path) for path in (two_rounds / "clients").iterdir())
    for round in (1, 2):
        (row,) = rows[(rows["round"] == round) & (rows["client"] == 4)].to_dict("records")
        result = again(two_rounds, round, 4)
        assert (result.outcome, result.reason) == ("completed", "")
        assert result.metrics["train_loss"] == json.loads(row["metrics"])["train_loss"]


@pytest.mark.parametrize(
    "overrides",
    [("participants=least_often",), ("method=fedbuff", "loop.concurrency=2", "loop.buffer_size=3")],
    ids=["rule", "buffer"],
)
def test_the_clients_that_a_rule_or_a_buffer_sent_out_replay_to_the_same_numbers(run, tmp_path: Path, overrides):
    """A row of a buffer stands where its client arrived; it was sent out in an earlier round, by its staleness."""
    run("rounds=4", "cohort=2", *overrides)
    rows = pandas.concat(pandas.read_parquet(path) for path in sorted((tmp_path / "clients").iterdir()))
    rows = rows[rows["phase"] == "train"]
    metrics = rows["metrics"].map(json.loads)
    rows["sent"] = rows["round"] - metrics.map(lambda of: int(of.get("staleness", 0)))
    rows["loss"] = metrics.map(lambda of: of["train_loss"])
    first = rows.drop_duplicates(["sent", "client"])
    asked = first[first["sent"] == 2]
    for row in asked.itertuples():
        assert again(tmp_path, 2, row.client).metrics["train_loss"] == row.loss
    (other, *_) = set(range(6)) - set(asked["client"])
    with pytest.raises(ConfigError, match=f"client {other} was not asked in round 2"):
        again(tmp_path, 2, other)


def test_a_failed_client_replays_at_once_with_its_traceback(run, tmp_path: Path, monkeypatch):
    with pytest.raises(ClientError, match=r"client 0 \(reference\) failed in round 3 \(seed 1\): OSError") as caught:
        run("trainer._target_=test_replay.Remembering", "cohort=6", "rounds=5")
    (note,) = caught.value.__notes__
    assert note == f"replay it with: fedsim replay {shlex.quote(str(tmp_path))} --round 3 --client 0"
    monkeypatch.setattr("fedsim.runs.federation.Federation.rounds", lambda self: pytest.fail("no round is run again"))
    result = again(tmp_path, 3, 0)
    assert (result.outcome, result.reason) == ("failed", "OSError: disk is gone")
    assert 'raise OSError("disk is gone")' in result.traceback


def test_what_was_sent_survives_the_folder(run, tmp_path: Path):
    with pytest.raises(ClientError) as caught:
        run("trainer._target_=test_replay.Remembering", "cohort=6", "rounds=3")
    sent, kept = caught.value.instruction, read_instruction(tmp_path)
    assert (kept.round, kept.client, kept.phase) == (sent.round, sent.client, sent.phase)
    assert kept.content == sent.content
    assert set(kept.content) == {"arrays", "config", "state"}


def test_a_round_that_was_never_run_is_refused(two_rounds: Path):
    with pytest.raises(ConfigError, match=r"--round must be in 1\.\.2, got 3"):
        again(two_rounds, 3, 0)
    settings = yaml.safe_load((two_rounds / "config.yaml").read_text())
    (two_rounds / "config.yaml").write_text(yaml.safe_dump({**settings, "rounds": 3, "target_accuracy": 0.001}))
    with pytest.raises(ConfigError, match="the run ended in round 1, before round 3"):
        again(two_rounds, 3, 0)


def test_a_client_that_was_not_asked_is_refused(run, tmp_path: Path):
    run("cohort=1", "rounds=1")
    (asked,) = json.loads((tmp_path / "rounds.jsonl").read_text().splitlines()[1])["cohort"]
    other = (asked + 1) % 6
    with pytest.raises(ConfigError, match=rf"client {other} was not asked in round 1; asked were \[{asked}\]"):
        again(tmp_path, 1, other)


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        ("config.yaml", None, "holds no run: there is no config.yaml in it"),
        ("config.yaml", "a: [", "config.yaml is not valid YAML"),
        ("config.yaml", "[]", "holds no settings"),
        ("config.yaml", "{}", "is missing from the settings"),
        ("failed-client.json", "{", "failed-client.json and .safetensors in .* cannot be read"),
        ("failed-client.json", '{"round": 1}', "failed-client.json and .safetensors in .* cannot be read"),
    ],
)
def test_folders_that_cannot_be_used_are_refused_in_one_sentence(two_rounds: Path, name: str, text, sentence: str):
    if text is None:
        (two_rounds / name).unlink()
    else:
        (two_rounds / name).write_text(text)
    with pytest.raises(ConfigError, match=sentence):
        again(two_rounds, 1, 0)


def test_the_command_prints_metrics_and_says_by_its_code_how_it_went(two_rounds: Path, capsys, monkeypatch):
    for client, code in ((2, 0), (9, 2)):
        argv = ["fedsim", "replay", str(two_rounds), "--round", "1", "--client", str(client)]
        monkeypatch.setattr("sys.argv", argv)
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert ended.value.code == code
    shown = capsys.readouterr()
    assert "client 2 in round 1: completed" in shown.out
    assert "train_loss" in shown.out
    assert shown.err == "fedsim: client 9 was not asked in round 1; asked were [0, 1, 2, 3, 4, 5]\n"
