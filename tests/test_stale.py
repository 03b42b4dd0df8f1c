"""What stale replies make of the weights (FedBuff, FedAsync); nothing depends on where and when clients train.

Hand-worked updates start from two versions of one number.
"""

import json
from collections.abc import Sequence

import pytest
import torch
from conftest import every_way
from cut_short import comparable
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from clients.app import serve
from clients.trainers.sgd import SGDTrainer
from devices.errors import FileError
from fedsim.engines.local import LocalEngine
from fedsim.errors import ClientError, ConfigError, RunError
from fedsim.grid.exchange import Origin
from fedsim.messages.records import record_of, tensors_of
from fedsim.report.files import read_all_rows, read_summary
from fedsim.report.page import write_page
from fedsim.report.text import closing_lines
from fedsim.runs import writer
from fedsim.runs.federation import Federation
from fedsim.settings.build import build_world, instantiate
from fedsim.settings.groups import options
from strategies.stale import FedAsync, FedBuff, Stale, StaleStrategy

EQUAL = ("partition=iid", "trainer.batch_size=4", "rounds=3")  # clients of equal devices and shards
BUFFERED = ("method=fedbuff", "loop.concurrency=4", "cohort=4", "loop.buffer_size=2", "fleet=phones", "rounds=3")


def strategy(kind: str, **given) -> StaleStrategy:
    tree = {"_target_": f"strategies.stale.{kind}", **given}
    server = {"_target_": "flwr.serverapp.strategy.FedAvg", "_partial_": True}
    made = instantiate({"strategy": {**tree, "server": server}}, "strategy")
    assert isinstance(made, FedBuff | FedAsync)
    return made


def stale(weights: float, examples: int, start: float, staleness: int, weight: float = 1.0) -> Stale:
    origin = Origin(record_of({"w": torch.tensor([start])}), staleness, weight)
    return Stale({"w": torch.tensor([weights])}, examples, origin)


def made(kind: StaleStrategy, *replied: Stale, present: float = 1.0) -> float:
    return float(kind.made({"w": torch.tensor([present])}, replied)["w"])


def test_fedbuff_adds_the_mean_of_what_clients_changed():
    """Clients went from 1 to 4 and, stale and half counted, from 0 to 2: 1 + (3 + 0.5 * 2) / 2 = 3."""
    fresh, old = stale(4.0, 3, 1.0, 0), stale(2.0, 1, 0.0, 2, 0.5)
    assert made(strategy("FedBuff"), fresh, old) == pytest.approx(3.0)
    assert made(strategy("FedBuff", server_lr=0.1), fresh, old) == pytest.approx(1.2)
    assert made(strategy("FedBuff", weight="examples"), fresh, old) == pytest.approx(1 + (9 + 0.5 * 2) / 4)


def test_it_does_not_matter_whether_clients_share_what_they_started_from():
    """After a resume each that is in flight has a copy of it: the same bits, in a sum that rounds nearly everywhere."""
    draw = torch.Generator().manual_seed(1)
    start, present, *weights = (torch.randn(5000, generator=draw) for _ in range(6))
    shared = Origin(record_of({"w": start}), 3, 0.3)
    each = [Origin(record_of({"w": start.clone()}), 3, 0.3) for _ in weights]
    found = [
        strategy("FedBuff", server_lr=0.7).made(
            {"w": present}, [Stale({"w": w}, 1, origin) for w, origin in zip(weights, origins, strict=True)]
        )["w"]
        for origins in ([shared] * len(weights), each)
    ]
    assert torch.equal(*found)


def test_fedasync_mixes_the_reply_into_the_present_weights():
    """(1 - 0.5 * 0.6) 1 + 0.3 * 4 = 1.9, whatever the client started from."""
    old = stale(4.0, 3, 0.0, 2, 0.5)
    assert made(strategy("FedAsync", mixing=0.6), old) == pytest.approx(1.9)
    assert made(strategy("FedBuff", server_lr=0.6), old) == pytest.approx(1 + 0.3 * 4)


def test_fedasync_is_fedbuff_with_a_buffer_of_one_where_nothing_is_stale():
    fresh = stale(4.3, 3, 1.1, 0)
    assert made(strategy("FedAsync", mixing=0.7), fresh, present=1.1) == made(
        strategy("FedBuff", server_lr=0.7), fresh, present=1.1
    )


def arrays(federation: Federation) -> dict[str, bytes]:
    return {name: t.numpy().tobytes() for name, t in tensors_of(federation.arrays).items()}


def told(federation: Federation) -> list[tuple]:
    """All that rounds report, but for how stale replies were and how long the host took."""
    found = []
    for report, clients in federation.rounds():
        metrics = {name: value for name, value in report.metrics.items() if name != "staleness"}
        costs = [(c.client, c.outcome, c.start_s, c.cost, c.work) for c in clients]
        found.append((report.round, report.now_s, report.round_s, report.cohort, report.joules, metrics, costs))
    return found


@pytest.mark.parametrize("norm", ["null", "batch"])
def test_fedbuff_with_a_buffer_of_all_at_work_is_fedavg_to_the_byte(federation, norm: str):
    given = (*EQUAL, f"model.norm={norm}")
    rounds = federation("method=fedavg", *given)
    buffered = federation("method=fedbuff", "loop.buffer_size=3", "strategy.weight=examples", *given)
    assert told(rounds) == told(buffered)
    assert arrays(rounds) == arrays(buffered)


def test_fedbuff_hands_an_optimiser_what_rounds_would(federation):
    given = (*EQUAL, "rounds=2")
    rounds = federation("method=fedadam", *given)
    server = ("strategy@strategy.server=fedadam", "strategy.weight=examples", "loop.buffer_size=3")
    buffered = federation("method=fedbuff", *server, *given)
    assert told(rounds) == told(buffered)
    assert arrays(rounds) == arrays(buffered)


def test_fedasync_one_client_at_a_time_is_sgd_from_client_to_client(federation):
    one = ("cohort=1", "fleet=phones", "rounds=5")
    alone = ("loop.concurrency=1", "strategy.mixing=1", "loop.staleness_weight=constant")
    sequential, asynchronous = federation("method=fedavg", *one), federation("method=fedasync", *alone, *one)
    assert told(sequential) == told(asynchronous)
    assert arrays(sequential) == arrays(asynchronous)


def test_it_does_not_matter_where_clients_train_or_whether_the_run_was_cut_short(settings, tmp_path):
    ways = every_way(settings(*BUFFERED, "checkpoint_s=0"), tmp_path)
    assert all(rows == ways["one"] for rows in ways.values())
    assert any(row["metrics"]["staleness"] > 0 for row in ways["one"][1:])


@pytest.mark.parametrize("trainer", ["sgd", "ditto"])
@pytest.mark.parametrize("until", [0, 1, 2])
def test_who_is_in_flight_is_in_the_checkpoint(go, tmp_path, until: int, trainer: str):
    """Ditto keeps a model on each client, and nobody can tell its work beforehand."""
    given = (*BUFFERED, f"trainer={trainer}", "evaluate_clients=2")
    go("whole", *given)
    go("cut", *given, until=until)
    go("cut", *given, resume=True)
    assert comparable(tmp_path / "cut") == comparable(tmp_path / "whole")


def test_the_clock_may_be_told_before_or_after_the_training(settings, tmp_path, monkeypatch):
    """The same rounds, clients and weights, where work is planned and where clients train when they are sent out."""
    given = settings(*BUFFERED, "deadline_s=3", "on_client_error=drop")
    writer.run(given, LocalEngine(serve), tmp_path / "planned")
    monkeypatch.setattr(SGDTrainer, "plan_work", lambda self, client, broadcast: False)
    writer.run(given, LocalEngine(serve), tmp_path / "at once")
    assert comparable(tmp_path / "planned") == comparable(tmp_path / "at once")


def reason_of(made: Federation) -> str:
    """Why a federation goes no further; empty where it comes to its end."""
    try:
        list(made.rounds())
    except (ConfigError, RunError, ClientError) as error:
        return str(error)
    return ""


@pytest.mark.parametrize("trainer", sorted(set(options("trainer")) - {"tune_only"}))  # which trains nothing
def test_what_a_trainer_plans_is_what_it_does(federation, trainer: str):
    """A round compares the two; a trainer that needs a strategy of its own says so."""
    reason = reason_of(federation("strategy=fedbuff", "loop=buffer", f"trainer={trainer}", "fleet=phones", "rounds=2"))
    assert "plan_work" not in reason
    assert not reason or "strategy" in reason or "trainer" in reason


@pytest.mark.parametrize("trainer", ["sgd", "fedprox"])
def test_trainers_of_the_loop_alone_can_tell_their_work(federation, trainer: str):
    made = federation("strategy=fedbuff", "loop=buffer", f"trainer={trainer}", "fleet=phones", "rounds=1")
    list(made.rounds())
    assert all(contact.can_be_planned for _, contact in made.grid.in_flight)


def test_a_client_that_is_sent_out_twice_under_one_version_draws_anew(run, tmp_path):
    """With one client at work and a buffer of three, some clients train on the same weights again."""
    run("method=fedbuff", "cohort=1", "loop.buffer_size=3", "num_clients=2", "rounds=4", "fleet=phones")
    rows = read_all_rows(tmp_path)
    twice = rows[rows.duplicated(["round", "client"], keep=False)]
    assert len(twice)
    for _, same in twice.groupby(["round", "client"]):
        losses = [json.loads(text)["train_loss"] for text in same["metrics"]]
        assert len(set(losses)) == len(losses)
        assert same["compute_s"].nunique() == len(same)


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["strategy=fedavg"], "FedAvg takes all replies for fresh ones"),
        (["method=fedbuff", "cohort=2"], "cohort=2 is the size of synchronous rounds"),
        (["method=fedbuff", "over_selection=2"], "over_selection=2"),
        (["method=fedbuff", "round_every_s=5"], "round_every_s=5"),
        (["method=fedasync", "loop.buffer_size=2"], "FedAsync takes single replies, and loop.buffer_size=2"),
        (["method=fedbuff", "strategy@strategy.server=krum"], "takes more of the clients than a mean"),
        (["method=fedbuff", "trainer=fedmix"], "take its server half, strategy=mafl"),
        (["method=fedbuff", "trainer=sub_fedavg"], "which FedBuff cannot use"),
    ],
)
def test_what_does_not_go_with_buffers_is_refused(settings, overrides: Sequence[str], sentence: str):
    tree = settings("loop=buffer", *overrides)
    tree = {**tree, "loop": {**tree["loop"], "concurrency": 3}}
    with pytest.raises((ConfigError, RunError, ClientError), match=sentence):
        list(Federation(build_world(json.dumps(tree)), LocalEngine(serve)).rounds())


def test_single_replies_need_a_buffer(settings):
    tree = {**settings("method=fedasync"), "loop": settings()["loop"]}
    with pytest.raises(ConfigError, match="FedAsync takes single replies as they come; set loop=buffer"):
        Federation(build_world(json.dumps(tree)), LocalEngine(serve))


def test_a_run_says_how_stale_replies_were_and_who_was_at_work(run, tmp_path):
    """Every second of every client that arrived, or is at work at the end, over all seconds of all clients."""
    summary = run(*BUFFERED, "rounds=5")
    found, rows = summary["asynchrony"], read_all_rows(tmp_path)
    used = [int(json.loads(text)["staleness"]) for text in rows["metrics"]]
    assert found["staleness"] == {str(age): used.count(age) for age in sorted(set(used))}
    assert sum(found["staleness"].values()) == 5 * 2
    assert found["mean_staleness"] == pytest.approx(sum(used) / 10)
    of_pixel = [age for age, name in zip(used, rows["device"], strict=True) if name == rows["device"][0]]
    assert found["device_staleness"][rows["device"][0]] == pytest.approx(sum(of_pixel) / len(of_pixel))
    assert found["at_work"] == pytest.approx(4)  # one that arrives is replaced at once
    assert found["busy"]["all"] == pytest.approx(4 / 6)
    assert (found["server_idle_s"], found["in_flight"]) == (pytest.approx(0, abs=1e-9), 3)
    folder = tmp_path / "tensorboard" / "fedbuff-blobs-phones-seed1"
    events = EventAccumulator(str(folder), size_guidance={"histograms": 0}).Reload()
    drawn = events.Histograms("staleness")
    final = EventAccumulator(str(folder / "final")).Reload().Scalars("asynchrony/mean_staleness")
    assert [event.value for event in final] == pytest.approx([found["mean_staleness"]])
    assert [event.step for event in drawn] == [1, 2, 3, 4, 5]
    assert sum(event.histogram_value.num for event in drawn) == 10
    write_page(tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert "Replies by their staleness" in page
    at_the_end = "at the end 3 clients were at work: their energy and bytes are in no round"
    assert f"A{at_the_end[1:]}." in page
    assert at_the_end in closing_lines(summary, tmp_path)
    assert "filled the buffer" in page
    assert "waited for:" not in page
    assert "took as long as they did" not in page


def test_a_summary_of_before_says_the_mean_staleness_too(run, tmp_path):
    summary = run(*BUFFERED, out=tmp_path / "run")
    path = tmp_path / "run" / "summary.json"
    told = summary["asynchrony"].pop("mean_staleness")
    del summary["asynchrony"]["device_staleness"]
    path.write_text(json.dumps(summary))
    assert read_summary(path.parent)["asynchrony"]["mean_staleness"] == pytest.approx(told)
    summary["asynchrony"]["mean_staleness"] = "much"
    path.write_text(json.dumps(summary))
    with pytest.raises(FileError, match="asynchrony"):
        read_summary(path.parent)


def test_what_a_method_sets_of_its_loop_is_explained(fedsim):
    said = fedsim("explain", "method", "fedasync").out
    assert "loop.buffer_size=1" in said
    assert "loop.staleness_power=0.5" in said
