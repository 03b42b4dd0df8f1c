"""Differential privacy: what is clipped, how much noise there is, and what a run refuses with it."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from cut_short import comparable
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg
from test_methods import federate

from clients.app import serve
from clients.trainers.sgd import SGDRun, SGDTrainer
from fedsim.engines.local import LocalEngine
from fedsim.errors import ConfigError
from fedsim.messages.records import from_array, record_of
from fedsim.report.rounds import read_rounds, weights_sha256
from fedsim.runs import writer
from fedsim.runs.checkpoint import load
from strategies.dp import AdaptiveDPFedAvg, DPFedAvg

FLOWER = "flwr.serverapp.strategy"
HUGE = "strategy.clipping_norm=1e9"


def wrapped(kind: str, inside: str = f"{{_target_: {FLOWER}.FedAvg}}", **settings: float) -> list[str]:
    """Overrides that take a wrapper of Flower's, with FedAvg inside."""
    given = {"noise_multiplier": 0.1, "num_sampled_clients": 5, **settings}
    target = f"strategy._target_={FLOWER}.DifferentialPrivacy{kind}Clipping"
    return [target, *(f"+strategy.{key}={value}" for key, value in given.items()), f"+strategy.strategy={inside}"]


BARE = wrapped("ServerSideFixed", clipping_norm=0.5)


class Told:
    """A context that knows the seed alone."""

    seed = 7


def mean(strategy: DPFedAvg, *updates: list[float], number: int = 1, examples: int = 3) -> np.ndarray:
    """What a round makes of zero weights when clients change them by `updates`."""
    start = record_of({"w": torch.zeros(len(updates[0]))})
    strategy.context = Told()  # type: ignore[assignment]
    strategy.server.configure_train = lambda *_: []  # type: ignore[method-assign]
    list(strategy.configure_train(number, start, ConfigRecord(), None))  # type: ignore[arg-type]
    replies = []
    for client, update in enumerate(updates):
        content = {"arrays": record_of({"w": torch.tensor(update, dtype=torch.float64)})}
        numbers = MetricRecord({"num-examples": examples * (client + 1)})
        sent = Message(RecordDict(), client, "train")
        replies.append(Message(RecordDict({**content, "metrics": numbers}), reply_to=sent))
    arrays, strategy.told = strategy.aggregate_train(number, replies)  # type: ignore[attr-defined]
    assert isinstance(arrays, ArrayRecord)
    return from_array(arrays["w"])


def test_updates_are_clipped_to_the_norm_and_count_the_same():
    """[3, 4] has norm 5 and becomes [0.6, 0.8]; [0, 0.5] stays; [0, 0] has no norm to divide by."""
    strategy = DPFedAvg(FedAvg, noise_multiplier=0, clipping_norm=1.0)
    found = mean(strategy, [3.0, 4.0], [0.0, 0.5], [0.0, 0.0])
    np.testing.assert_allclose(found, [0.6 / 3, 1.3 / 3], rtol=1e-15)
    assert strategy.told["clipped_rate"] == pytest.approx(1 / 3)
    assert strategy.told["clipping_norm"] == 1.0


def test_noise_of_the_mean_has_the_deviation_of_the_paper():
    """Z S / n = 0.5 * 2 / 4 = 0.25, of 40,000 draws: its own deviation is 0.25 / sqrt(80,000) < 0.001."""
    still = [0.0] * 40_000
    found = mean(DPFedAvg(FedAvg, noise_multiplier=0.5, clipping_norm=2.0), still, still, still, still)
    assert float(found.std()) == pytest.approx(0.25, abs=0.004)
    assert float(found.mean()) == pytest.approx(0.0, abs=0.006)


def test_noise_is_that_of_the_seed_and_the_round():
    def drawn(number: int) -> np.ndarray:
        np.random.seed(number)  # nothing hangs on the global generator
        return mean(DPFedAvg(FedAvg), [0.0] * 9, number=number)

    assert drawn(1).tolist() == drawn(1).tolist()
    assert not np.isin(drawn(1), drawn(2)).any()


def test_the_adaptive_norm_follows_the_quantile():
    """Without noise: of norms 1, 2, 3, 4 none is below 0.5, C becomes 0.5 exp(0.1); at last half are."""
    norms = [[1.0], [2.0], [3.0], [4.0]]
    strategy = AdaptiveDPFedAvg(FedAvg, noise_multiplier=0, clipping_norm=0.5, num_sampled_clients=4)
    assert mean(strategy, *norms)[0] == pytest.approx(0.5)
    assert strategy.told["clipping_norm"] == 0.5  # that of the round
    assert strategy.clipping_norm == pytest.approx(0.5 * math.exp(0.1))
    for number in range(2, 60):
        mean(strategy, *norms, number=number)
    assert 2.0 <= strategy.clipping_norm <= 3.0
    strategy.clipping_norm = 10.0
    mean(strategy, *norms, number=60)
    assert strategy.clipping_norm == pytest.approx(10 * math.exp(-0.1))  # all below: b = 1


def test_weights_get_more_noise_where_the_norm_is_noised_too():
    """N = 20: the count's deviation is 1; z_delta = (0.5^-2 - (2 * 1)^-2)^-1/2 = 3.75^-1/2; over n."""
    strategy = AdaptiveDPFedAvg(FedAvg, noise_multiplier=0.5, clipping_norm=1.0, num_sampled_clients=20)
    found = mean(strategy, *[[0.0] * 40_000] * 20)
    assert float(found.std()) == pytest.approx(3.75**-0.5 / 20, rel=0.02)
    drawn = -math.log(strategy.clipping_norm) / 0.2 + 0.5  # b of the round: 1 and noise of deviation 1 / 20
    assert drawn != 1.0
    assert abs(drawn - 1.0) < 5 / 20


@pytest.mark.parametrize("strategy", ["dp_fedavg", "dp_adaptive"])
def test_without_noise_and_clipping_it_is_federated_averaging(strategy: str):
    ours = federate(f"strategy={strategy}", HUGE, "strategy.noise_multiplier=0")
    assert weights_sha256(ours.federation.arrays) == weights_sha256(federate().federation.arrays)


@pytest.mark.parametrize("server", ["fedadam", "fedavgm"])
def test_another_strategy_takes_its_step_by_the_mean(server: str):
    """Noise goes into the mean, before the step; without noise and clipping the step is that of the strategy alone."""
    made = [f"strategy@strategy.server={server}", HUGE, "strategy.noise_multiplier=0"]
    ours = federate("strategy=dp_fedavg", *made).federation.arrays
    alone = federate(f"strategy={server}").federation.arrays
    for name, array in alone.items():
        np.testing.assert_allclose(from_array(ours[name]), from_array(array), rtol=0, atol=1e-6)


def test_flowers_wrapper_without_noise_and_clipping_is_federated_averaging():
    made = federate(*wrapped("ServerSideFixed", noise_multiplier=0, clipping_norm=1e9))
    for name, array in federate().federation.arrays.items():
        np.testing.assert_allclose(from_array(made.federation.arrays[name]), from_array(array), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "chosen",
    [["strategy=dp_fedavg"], ["strategy=dp_adaptive"], BARE, wrapped("ServerSideAdaptive")],
    ids=["dp_fedavg", "dp_adaptive", "Flower, fixed", "Flower, adaptive"],
)
def test_a_resumed_run_has_the_noise_and_the_norm_of_one_that_never_stopped(go, tmp_path: Path, chosen: list[str]):
    base = [*chosen, "cohort=5", "num_clients=6", "rounds=4"]
    go("whole", *base)
    go("cut", *base, until=2)
    saved = load(tmp_path / "cut")
    assert saved is not None
    assert saved.state["federation"]["strategy"]["clipping_norm"] > 0
    np.random.seed(1)  # where another process may stand
    go("cut", resume=True)
    assert comparable(tmp_path / "cut") == comparable(tmp_path / "whole")


class Chatty(SGDTrainer):
    """Sends a record beside its weights."""

    class run(SGDRun):  # noqa: N801
        def update(self, train_loss):
            found = super().update(train_loss)
            found.extras["means"] = {"x": torch.zeros(2)}
            return found


CHATTY = f"trainer._target_={__name__}.Chatty"


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["strategy=dp_fedavg", CHATTY], "the clients sent ['means'] beside their weights"),
        ([*BARE, CHATTY], "the clients sent ['means'] beside their weights"),
        (["strategy=dp_fedavg", "model.norm=batch"], "would be averaged without noise"),
        ([*BARE, "model.norm=batch"], "would be averaged without noise"),
        (["strategy=dp_fedavg", "strategy@strategy.server=fedmedian"], "takes more of the clients than a mean"),
        (["strategy=dp_fedavg", "strategy@strategy.server=mafl"], "takes more of the clients than a mean"),
        (["strategy=mafl", "strategy@strategy.server=dp_fedavg"], "Mafl around it shows more of them"),
        (["strategy=dp_adaptive", "strategy.noise_multiplier=0.5"], "less than a tenth of the 5 clients"),
        (["strategy=dp_fedavg", "strategy.noise_multiplier=-1"], "strategy.noise_multiplier must be at least 0"),
        (wrapped("ServerSideFixed", clipping_norm=0), "strategy.clipping_norm must be in (0, "),
        (wrapped("ServerSideFixed"), "strategy.clipping_norm must be given"),
        (wrapped("ClientSideFixed", clipping_norm=1), "strategy=dp_client_fedavg and strategy=dp_client_adaptive"),
        (wrapped("ClientSideAdaptive"), "strategy=dp_client_fedavg and strategy=dp_client_adaptive"),
        (wrapped("ServerSideAdaptive", "{_target_: strategies.edge.EdgeStrategy}"), "nothing of its run"),
        (wrapped("ServerSideAdaptive", f"{{_target_: {FLOWER}.FedAvg, fraction: 1}}"), "strategy.strategy.fraction"),
    ],
)
def test_what_noise_would_not_hide_is_refused(overrides: list[str], words: str):
    with pytest.raises(ConfigError) as refused:
        federate(*overrides)
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


def test_private_statistics_need_no_noise():
    federate("strategy=dp_fedavg", "model.norm=batch", "private=[norm]")


def test_rounds_say_the_norm_and_whom_it_clipped(settings, tmp_path: Path):
    writer.run(settings("method=dp_adaptive", "cohort=5", "num_clients=6"), LocalEngine(serve), tmp_path / "run")
    rounds = [json.loads(report.to_json())["metrics"] for report in read_rounds(tmp_path / "run")]
    assert [m.get("clipping_norm") for m in rounds][:2] == [None, 0.1]
    assert all(0 <= m["clipped_rate"] <= 1 for m in rounds[1:])
