"""The exchange of averages: who is asked, what is sent to whom, how often, and what it costs.

Six clients train on 7 examples of 16 numbers in 10 classes each (`conftest.TINY`). A pair is 4 * (16 + 10) = 104 bytes;
the model is 6952 bytes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

from clients.trainers.mixing.naivemix import NaiveMixTrainer
from devices.fleet import Fleet
from devices.profile import Units
from fedsim.errors import ClientError, ConfigError
from fedsim.exchanges.averages import averages, exposures, from_uint8, to_uint8
from fedsim.grid.exchange import ClientReport
from fedsim.report.plots.averages import averages_picture
from fedsim.report.rounds import weights_sha256
from fedsim.runs.federation import Federation
from fedsim.settings.build import build_world
from fedsim.settings.compose import compose
from fedsim.workloads.base import Examples
from strategies.mafl import RETIRED, Mafl

PAIR, MODEL, ROOM, UINT8_PAIR = 104, 6952, 8 + 8, 16 + 4 * 10 + 8
EVERYBODY = ("method=naivemix", "cohort=6")


def watched(federation: Federation) -> list[ClientReport]:
    return [client for _, clients in federation.rounds() for client in clients]


def of(reports: list[ClientReport], round: int, phase: str) -> list[ClientReport]:
    return [r for r in reports if (r.round, r.phase) == (round, phase)]


# --- means -----------------------------------------------------------------------------------------------------------


def some(size: int = 7) -> Examples:
    return Examples({"x": torch.rand(size, 2, 2), "y": torch.arange(size) % 3})


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(1)


def test_one_average_of_all_is_the_plain_mean():
    data = some()
    pairs = averages(data, None, 3, seeded())
    assert torch.allclose(pairs["x"], data.tensors["x"].mean(0, keepdim=True), atol=1e-6)
    assert torch.allclose(pairs["y"], torch.tensor([[3.0, 2.0, 2.0]]) / 7)


@pytest.mark.parametrize("size, groups", [(1, 7), (2, 3), (7, 1), (8, 0)])
def test_groups_are_disjoint_and_a_short_last_one_is_dropped(size: int, groups: int):
    data = Examples({"x": torch.eye(7), "y": torch.arange(7)})
    pairs = averages(data, size, 7, seeded())
    assert pairs["x"].shape == pairs["y"].shape == (groups, 7)
    assert torch.equal(pairs["x"], pairs["y"])  # the same examples in both means
    assert torch.allclose((pairs["x"] > 0).sum(1).float(), torch.full((groups,), float(size)))
    assert ((pairs["x"] > 0).sum(0) <= 1).all()  # nobody is in two groups


def test_label_means_are_probabilities():
    pairs = averages(some(60), 7, 3, seeded())
    assert torch.allclose(pairs["y"].sum(1), torch.ones(8), atol=1e-6)
    assert (pairs["y"] >= 0).all()


def test_means_of_tokens_are_frequencies_of_each_step():
    data = Examples({"x": torch.tensor([[0, 1], [2, 1]]), "y": torch.tensor([[1, 2], [1, 0]])})
    pairs = averages(data, None, 3, seeded(), vocabulary=3)
    assert torch.equal(pairs["x"], torch.tensor([[[0.5, 0, 0.5], [0, 1, 0]]]))
    assert torch.equal(pairs["y"], torch.tensor([[[0, 1, 0], [0.5, 0, 0.5]]]))
    with pytest.raises(ConfigError, match="means of token ids mean nothing"):
        averages(data, None, 3, seeded())


def test_uint8_means_are_within_half_a_level():
    x = torch.randn(5, 1, 4, 4)
    x[3] = 0.25  # a flat one has no levels
    packed = to_uint8(x)
    assert packed["x"].dtype == torch.uint8
    error = (from_uint8(packed) - x).abs().flatten(1).amax(1)
    assert (error <= packed["step"] / 2 + 1e-6).all()
    assert error[3] == 0


# --- the exchange ----------------------------------------------------------------------------------------------------


def test_bytes_are_those_of_the_pairs_once_up_and_once_down(federation):
    reports = watched(federation(*EVERYBODY))
    asked, first, second = of(reports, 1, "query.averages"), of(reports, 1, "train"), of(reports, 2, "train")
    assert [(r.client, r.work.down_bytes, r.work.up_bytes) for r in asked] == [(c, 0, PAIR + ROOM) for c in range(6)]
    assert {r.work.down_bytes for r in first} == {MODEL + 6 * PAIR}
    assert {r.work.down_bytes for r in second} == {MODEL}
    assert {r.work.up_bytes for r in first + second} == {MODEL}
    assert {r.work.storage_bytes for r in first + second} == {6 * PAIR}
    assert not of(reports, 2, "query.averages")


def test_smaller_groups_and_uint8_change_the_bytes_as_computed(federation):
    """7 examples in groups of 3 are 2 pairs; a uint8 pair has 16 levels, 10 float32 frequencies, low and step."""
    overrides = ("strategy.group_size=3", "strategy.min_group_size=3", "strategy.pool_dtype=uint8")
    reports = watched(federation(*EVERYBODY, *overrides))
    assert {r.work.up_bytes for r in of(reports, 1, "query.averages")} == {2 * UINT8_PAIR + ROOM}
    assert {r.work.down_bytes for r in of(reports, 1, "train")} == {MODEL + 12 * UINT8_PAIR}
    assert {r.work.storage_bytes for r in of(reports, 2, "train")} == {12 * UINT8_PAIR}


def test_own_averages_can_be_left_out(federation):
    reports = watched(federation(*EVERYBODY, "strategy.exclude_own=true"))
    assert {r.work.down_bytes for r in of(reports, 1, "train")} == {MODEL + 5 * PAIR}
    assert {r.metrics["pool_pairs"] for r in of(reports, 2, "train")} == {5.0}


def test_pool_is_every_client_s_mean_in_client_order(federation):
    run = federation(*EVERYBODY, "rounds=1")
    list(run.rounds())
    data = [run.world.workload.client_data(c).train for c in range(6)]
    means = torch.stack([d.gather(torch.arange(7))["x"].mean(0) for d in data])
    assert torch.allclose(run.strategy.pool["x"], means, atol=1e-6)
    assert run.strategy.owners.tolist() == list(range(6))
    kept = run.grid.store.get(2)
    assert torch.equal(kept["reply.pool_x"], run.strategy.pool["x"])


def test_a_client_that_shares_too_few_examples_shares_nothing(federation):
    reports = watched(federation(*EVERYBODY, "strategy.min_group_size=8"))
    assert {r.work.up_bytes for r in of(reports, 1, "query.averages")} == {ROOM}
    assert {r.work.down_bytes for r in of(reports, 1, "train")} == {MODEL}
    assert {r.metrics["pool_pairs"] for r in of(reports, 1, "train")} == {0.0}


def test_without_a_pool_training_is_fedavg(federation):
    run, plain = federation(*EVERYBODY, "strategy.min_group_size=8"), federation("method=fedavg", "cohort=6")
    list(run.rounds()), list(plain.rounds())
    assert weights_sha256(run.arrays) == weights_sha256(plain.arrays)


def test_a_late_joiner_is_asked_when_it_is_in_a_cohort_and_others_get_what_is_new(federation, monkeypatch):
    run = federation(*EVERYBODY, "rounds=3")
    offline = {1: {4, 5}, 2: {5}, 3: set()}
    monkeypatch.setattr(type(run.grid.fleet), "online", lambda fleet, c, now_s: c not in offline[run.grid.round])
    reports = watched(run)
    asked = {n: [r.client for r in of(reports, n, "query.averages")] for n in (1, 2, 3)}
    assert asked == {1: [0, 1, 2, 3], 2: [4], 3: [5]}
    down = {n: [r.work.down_bytes - MODEL for r in of(reports, n, "train") if r.work.down_bytes] for n in (1, 2, 3)}
    assert down == {1: [4 * PAIR] * 4, 2: [PAIR] * 4 + [5 * PAIR], 3: [PAIR] * 5 + [6 * PAIR]}


def slow_down(
    monkeypatch: pytest.MonkeyPatch, run: Federation, client: int, up_bytes_per_s: float, when: Callable[[], bool]
) -> None:
    """Gives one client's device another upload for as long as `when` holds."""
    units = type(run.grid.fleet).units

    def slower(fleet: Fleet, clients: Sequence[int]) -> Units:
        found = units(fleet, clients)
        if client not in clients or not when():
            return found
        place, model = list(clients).index(client), found.model.copy()
        slow = replace(found.models[model[place]], up_bytes_per_s=up_bytes_per_s / found.bandwidth[place])
        model[place] = len(found.models)
        return replace(found, models=(*found.models, slow), model=model)

    monkeypatch.setattr(type(run.grid.fleet), "units", slower)


def test_a_reply_that_was_late_leaves_the_pool_unsent(federation, monkeypatch):
    """Who misses the deadline has lost what it was sent, and gets it again."""
    run = federation(*EVERYBODY, "rounds=3", "deadline_s=100")
    # The averages take 3 s, the weights 200 s.
    slow_down(monkeypatch, run, 3, MODEL / 200, lambda: run.grid.round < 3)
    reports = [r for r in watched(run) if r.client == 3]
    assert [(r.phase, r.outcome) for r in reports] == [
        ("query.averages", "completed"), ("train", "late"), ("train", "late"), ("train", "completed")
    ]  # fmt: skip
    assert [r.work.down_bytes for r in reports[1:]] == [MODEL + 6 * PAIR] * 3


def test_a_deadline_that_nobody_meets_stops_the_question_not_the_run(federation):
    run = federation(*EVERYBODY, "deadline_s=0.001")
    reports = watched(run)
    assert {r.outcome for r in reports} == {"late"}
    assert {r.client for r in of(reports, 2, "query.averages")} == set(range(6))


def test_a_device_without_room_gets_a_draw_that_grows_with_the_pool_slowly():
    strategy = Mafl(lambda **_: None)
    strategy.add(0, {"x": torch.zeros(40, 3), "y": torch.zeros(40, 2)})  # 20 bytes a pair
    strategy.room = {7: 10 * 20 + 19}
    before = strategy.wanted(7, seed=1)
    assert len(before) == len(set(before.tolist())) == 10
    assert before.tolist() == sorted(before.tolist())
    assert before.tolist() == strategy.wanted(7, seed=1).tolist() != strategy.wanted(7, seed=2).tolist()
    strategy.add(1, {"x": torch.zeros(10, 3), "y": torch.zeros(10, 2)})
    after = strategy.wanted(7, seed=1)
    assert len(after) == 10
    assert len(set(before.tolist()) & set(after.tolist())) >= 5  # a fifth of the pool is new
    assert len(strategy.wanted(8, seed=1)) == 50  # has not said how much room it has


def test_draws_are_uniform():
    strategy = Mafl(lambda **_: None)
    strategy.add(0, {"x": torch.zeros(20, 3), "y": torch.zeros(20, 2)})
    strategy.room = dict.fromkeys(range(400), 5 * 20)
    counts = np.bincount(np.concatenate([strategy.wanted(c, seed=1) for c in range(400)]), minlength=20)
    assert counts.sum() == 2000
    assert counts.min() > 60  # 100 each on average, 8.7 standard deviation
    assert counts.max() < 140


def test_a_small_device_trains_with_the_part_that_fits(federation, monkeypatch):
    """Room for two pairs beside a training step; the peak is what the device has, to the byte below a pair."""
    probe = watched(federation(*EVERYBODY, "rounds=1"))
    step_bytes = of(probe, 1, "train")[0].work.peak_memory_bytes - 6 * PAIR
    run = federation(*EVERYBODY, "rounds=2")
    own = type(run.grid.fleet).__getitem__
    memory = step_bytes + 2 * PAIR + 50
    monkeypatch.setattr(type(run.grid.fleet), "__getitem__", lambda f, c: replace(own(f, c), memory_bytes=memory))
    reports = watched(run)
    assert {r.outcome for r in reports} == {"completed"}
    assert {r.metrics["pool_pairs"] for r in of(reports, 2, "train")} == {2.0}
    assert {r.work.peak_memory_bytes for r in of(reports, 2, "train")} == {step_bytes + 2 * PAIR}


@pytest.mark.parametrize("server", ["fedadam", "fedavgm", "fedmedian", "krum"])
def test_another_server_strategy_averages_the_weights(federation, server: str):
    """With ratio 0 the run is that strategy's own, bit for bit."""
    mixed = federation("method=naivemix", f"strategy@strategy.server={server}", "trainer.mix_ratio=0", "cohort=5")
    plain = federation(f"strategy={server}", "cohort=5")
    list(mixed.rounds()), list(plain.rounds())
    assert weights_sha256(mixed.arrays) == weights_sha256(plain.arrays)
    assert mixed.grid.averages == plain.grid.averages


class Changing(NaiveMixTrainer):
    """Client 2 has other data from round 2 on: each input one more."""

    def data_version(self, client):
        return int(client.client_id == 2 and client.round > 1)

    def fit(self, client, task):
        return super().fit(self.renewed(client), task)

    def answer(self, client, question, task):
        return super().answer(self.renewed(client), question, task)

    def renewed(self, client):
        train = client.data.train
        x = train.tensors["x"] + self.data_version(client)
        return replace(client, data=replace(client.data, train=Examples({**train.tensors, "x": x})))


def test_the_other_strategy_finishes_the_weights_before_they_are_judged(federation):
    """As HeteroFL does with its batch norms; one without that step, as Flower's, leaves them."""
    made = federation("method=naivemix")
    assert made.strategy.complete(1, made.arrays, made.grid) is made.arrays
    made = federation("method=naivemix", "strategy@strategy.server=edge_mean")
    made.strategy.server.complete = lambda round, arrays, grid: (round, len(arrays), grid)
    assert made.strategy.complete(3, made.arrays, made.grid) == (3, len(made.arrays), made.grid)


def test_who_has_new_data_is_asked_again_and_everybody_drops_its_old_averages(federation):
    """Its reply of round 2 says so; in round 3 it alone is asked, and the new pair goes to all, behind the others."""
    run = federation(*EVERYBODY, "trainer._target_=test_mafl.Changing", "rounds=4")
    reports = watched(run)
    asked = {n: [r.client for r in of(reports, n, "query.averages")] for n in (1, 2, 3, 4)}
    assert asked == {1: list(range(6)), 2: [], 3: [2], 4: []}
    down = {n: {r.work.down_bytes for r in of(reports, n, "train")} for n in (2, 3, 4)}
    assert down == {2: {MODEL}, 3: {MODEL + PAIR + 8}, 4: {MODEL}}  # 8: which of the six is no more
    assert run.strategy.owners.tolist() == [0, 1, RETIRED, 3, 4, 5, 2]
    pool = run.strategy.pool["x"]
    assert torch.allclose(pool[6], pool[2] + 1, atol=1e-5)
    assert torch.equal(run.grid.store.get(4)["reply.pool_x"], pool[[0, 1, 3, 4, 5, 6]])
    assert {r.metrics["pool_pairs"] for r in of(reports, 4, "train")} == {6.0}


# --- what the pool is worth -------------------------------------------------------------------------------------------


def test_a_local_pool_is_a_client_s_own_averages(federation):
    run = federation(*EVERYBODY, "strategy.pool_source=local")
    reports = watched(run)
    assert {r.work.down_bytes for r in of(reports, 1, "train")} == {MODEL + PAIR}
    for client in range(6):
        kept = run.grid.store.get(client)
        assert torch.equal(kept["reply.pool_x"], run.strategy.pool["x"][client : client + 1])


@pytest.mark.parametrize("dtype", ["float32", "uint8"])
def test_noise_has_the_mean_and_deviation_of_the_pool_and_its_labels(dtype: str):
    made = {source: Mafl(lambda **_: None, pool_source=source, pool_dtype=dtype) for source in ("global", "noise")}
    x, y = 3 + 2 * torch.randn(4000, 2, generator=seeded()), torch.rand(4000, 3)
    for strategy in made.values():
        strategy.add(0, {"y": y, **(to_uint8(x) if dtype == "uint8" else {"x": x})})
    made["noise"].replace_with_noise(0, seed=1)
    pools = {name: strategy.pool for name, strategy in made.items()}
    told = {name: from_uint8(pool) if dtype == "uint8" else pool["x"] for name, pool in pools.items()}
    assert torch.equal(pools["noise"]["y"], y)
    assert {n: (t.shape, t.dtype) for n, t in pools["noise"].items()} == {
        n: (t.shape, t.dtype) for n, t in pools["global"].items()
    }
    assert torch.allclose(told["noise"].mean(0), told["global"].mean(0), atol=0.15)  # deviation 2 / sqrt(4000) = 0.03
    assert torch.allclose(told["noise"].std(0), told["global"].std(0), atol=0.15)
    assert abs(float(torch.corrcoef(torch.stack([told["noise"][:, 0], told["global"][:, 0]]))[0, 1])) < 0.1


def test_noise_of_a_late_joiner_does_not_show_its_average():
    strategy = Mafl(lambda **_: None, pool_source="noise")
    x = torch.randn(50, 2, generator=seeded())
    strategy.add(0, {"x": x, "y": torch.ones(50, 1)})
    strategy.replace_with_noise(0, seed=1)
    before = strategy.pool["x"].clone()
    strategy.add(1, {"x": torch.zeros(1, 2), "y": torch.ones(1, 1)})
    strategy.replace_with_noise(50, seed=1)
    assert torch.equal(strategy.pool["x"][:50], before)
    assert (strategy.pool["x"][50].abs() > 0.01).all()


def test_who_was_late_with_its_averages_and_trains_all_the_same_is_asked_again(federation, monkeypatch):
    """Its first answer takes 200 s, its later ones a moment: it trains in round 1 with the pool of the others."""
    run = federation(*EVERYBODY, "deadline_s=100")
    asking = type(run.strategy).collect
    now = {"asking": False}

    def collect(strategy, cohort, grid):
        now["asking"] = grid.round == 1
        asking(strategy, cohort, grid)
        now["asking"] = False

    monkeypatch.setattr(type(run.strategy), "collect", collect)
    slow_down(monkeypatch, run, 3, PAIR / 200, lambda: now["asking"])
    reports = watched(run)
    assert [(r.round, r.phase, r.outcome) for r in reports if r.client == 3] == [
        (1, "query.averages", "late"),
        (1, "train", "completed"),
        (2, "query.averages", "completed"),
        (2, "train", "completed"),
    ]
    assert {r.metrics["pool_pairs"] for r in of(reports, 1, "train")} == {5.0}
    assert {r.metrics["pool_pairs"] for r in of(reports, 2, "train")} == {6.0}


def test_noise_is_drawn_once(federation):
    run = federation(*EVERYBODY, "strategy.pool_source=noise", "rounds=3")
    reports = watched(run)
    assert {r.work.down_bytes for r in of(reports, 2, "train")} == {MODEL}
    assert torch.equal(run.grid.store.get(1)["reply.pool_x"], run.strategy.pool["x"])
    plain = federation(*EVERYBODY)
    list(plain.rounds())
    assert not torch.allclose(plain.strategy.pool["x"], run.strategy.pool["x"], atol=0.1)


# --- the client's side -----------------------------------------------------------------------------------------------


def test_clipping_and_noise_change_what_leaves_the_device():
    x, y = torch.full((2, 4), 3.0), torch.tensor([[1.0, 0.0], [0.5, 0.5]])
    clipped = NaiveMixTrainer(0.1, average_clip=2.0, lr=0.1, batch_size=1).protect({"x": x, "y": y}, seeded())
    assert torch.allclose(clipped["x"], torch.ones(2, 4))  # of length 6, then 2
    assert torch.equal(clipped["y"], y)
    noisy = NaiveMixTrainer(0.1, average_noise=0.5, lr=0.1, batch_size=1).protect({"x": x, "y": y}, seeded())
    assert not torch.equal(noisy["x"], x)
    assert torch.allclose(noisy["y"].sum(1), torch.ones(2))
    assert (noisy["y"] >= 0).all()


@pytest.mark.parametrize(
    "wrong, sentence",
    [
        ("strategy.group_size=4", r"strategy\.group_size must be all or at least 5 .*, got 4"),
        ("strategy.group_size=some", r"strategy\.group_size must be all or a whole number of at least 1, got 'some'"),
        ("strategy.min_group_size=0", r"strategy\.min_group_size must be at least 1, got 0"),
        ("strategy.pool_source=own", r"strategy\.pool_source.*'own'.*local"),
        ("strategy.pool_source=local strategy.exclude_own=true", r"exclude_own=true leaves nothing of"),
        ("strategy.pool_dtype=int8", r"strategy\.pool_dtype.*'int8'.*uint8"),
        ("trainer.mix_ratio=1", r"trainer\.mix_ratio must be in \[0, 1\), got 1"),
        ("trainer.average_noise=-1", r"trainer\.average_noise must be at least 0"),
        ("trainer.average_clip=0", r"trainer\.average_clip must be null or greater than 0"),
        ("engine.batch_clients=2", r"engine\.batch_clients=2 cannot be used"),
    ],
)
def test_wrong_settings_are_refused_in_a_sentence(run, wrong: str, sentence: str):
    with pytest.raises(ConfigError, match=sentence):
        run("method=naivemix", *wrong.split())


def test_halves_of_different_methods_say_what_is_missing(run, tmp_path):
    with pytest.raises(ConfigError, match="NaiveMixTrainer got no pool of averages; take its server half"):
        run("trainer=naivemix", out=tmp_path / "a")
    with pytest.raises(ClientError, match="SGDTrainer has no answer to 'averages'"):
        run("strategy=mafl", "trainer=sgd", out=tmp_path / "b")


# --- what a server would see -----------------------------------------------------------------------------------------


def test_exposure_falls_with_the_size_of_the_groups(tmp_path):
    world = build_world(json.dumps(compose(["workload=digits", "cohort=1"])))
    found = exposures(world.workload, [1, 5, 20, None], clients=3, seed=1)
    sizes = [len(world.workload.client_data(c).train) for c in range(3)]
    assert [e.pairs for e in found] == [sum(sizes), sum(s // 5 for s in sizes), sum(s // 20 for s in sizes), 3]
    assert [e.pair_bytes for e in found] == [4 * (64 + 10)] * 4
    assert found[0].nearest == pytest.approx(0, abs=1e-3)
    assert found[0].nearest < found[1].nearest < found[2].nearest
    averages_picture(world.workload, tmp_path / "seen.png", [1, 5, None], clients=2, seed=1)
    assert (tmp_path / "seen.png").stat().st_size > 5000
