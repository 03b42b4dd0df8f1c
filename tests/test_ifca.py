"""IFCA: who chooses which model, what is averaged with what, limits, and what is paid for."""

import json

import numpy as np
import pytest
import torch
from conftest import answered, every_way
from test_personal import TINY, alone, federate
from torchs_counter import counter

from clients.app import serve
from clients.trainers.sgd import SGDTrainer
from fedsim.engines.local import LocalEngine
from fedsim.errors import ConfigError
from fedsim.messages.records import ARRAYS, tensors_of
from fedsim.messages.updates import ClientUpdate
from fedsim.report.rounds import weights_sha256
from fedsim.runs.federation import Federation
from fedsim.settings.build import build_world
from fedsim.settings.compose import compose
from strategies.ifca import IFCA

HEAD_BYTES, MODEL_BYTES = 4 * (5 * 3 + 3), 4 * (6 * 5 + 5 + 2 * 5 + 5 * 3 + 3)  # of TINY, whose norm is a layer's


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_client_trains_the_model_that_fits_its_examples_best(seed):
    """By hand: the loss of each model over all training examples, and SGD from the lowest."""
    settings = ["method=ifca", "strategy.clusters=4", "trainer.lr=0.2", "trainer.local_epochs=1", f"seed={seed}"]
    worker, client, part = alone(*settings)
    first = tensors_of(part[ARRAYS])
    models = [{**first, **tensors_of(part[f"model-{n}"])} if n else first for n in range(4)]
    network, losses = client.workload.build_model(), []
    everything = client.data.train.gather(torch.arange(len(client.data.train)))
    for model in models:
        network.load_state_dict(model)
        losses.append(float(client.workload.loss(network, everything).detach()))
    assert len({round(loss, 3) for loss in losses}) == 4
    best = int(np.argmin(losses))
    network.load_state_dict(models[best])
    for batch in SGDTrainer(lr=0.2, batch_size=4).shuffled(client, "batches", 1):
        network.zero_grad()
        client.workload.loss(network, batch).backward()
        with torch.no_grad():
            for p in network.parameters():
                p -= 0.2 * p.grad
    answer = answered(worker, client, part, "train")
    assert int(tensors_of(answer["chosen"])["cluster"]) == best == answer["metrics"]["cluster"]
    for name, t in tensors_of(answer[ARRAYS]).items():
        assert torch.allclose(t, network.state_dict()[name], atol=1e-5), name


def test_each_model_is_the_mean_of_those_who_chose_it_and_what_is_shared_that_of_all():
    """Cluster 0: (1 x 1 + 5 x 3) / 4 = 4; 1: 9; nobody chose 2, which stays. Shared: (1 + 15 + 9 x 4) / 8 = 6.5."""
    strategy = IFCA(clusters=3)
    strategy.common = frozenset({"body"})
    strategy.models = [{"body": torch.zeros(1), "head": torch.full((1,), float(n))} for n in range(3)]

    def update(client, value, examples, cluster):
        weights = {name: torch.full((1,), value) for name in ("body", "head")}
        return ClientUpdate(client, examples, weights, {}, {"chosen": {"cluster": torch.tensor(cluster)}})

    judged = strategy.combine(1, [update(3, 1.0, 1, 0), update(5, 5.0, 3, 0), update(8, 9.0, 4, 1)])
    assert [float(model["head"]) for model in strategy.models] == [4.0, 9.0, 2.0]
    assert [float(model["body"]) for model in strategy.models] == [6.5] * 3
    assert (judged is strategy.models[0], strategy.sizes()) == (True, [2, 1, 0])
    strategy.combine(2, [update(3, 1.0, 1, 1)])  # client 5 is still in cluster 0
    assert (strategy.sizes(), strategy.largest) == ([1, 2, 0], 1)


def test_one_cluster_is_federated_averaging():
    """Bit for bit, pass for pass, and byte for byte but for the 8 of the cluster's number."""
    model = ["model.norm=batch", "model.dropout=0.2", "trainer.momentum=0.5", "evaluate_clients=2"]
    plain = federate("method=fedavg", "strategy=edge_mean", *model)
    one = federate("method=ifca", "strategy.clusters=1", *model)
    assert weights_sha256(one.arrays) == weights_sha256(plain.arrays)
    for mine, theirs in zip(one.clients, plain.clients, strict=True):
        assert mine.work.passes == theirs.work.passes
        assert mine.work.down_bytes == theirs.work.down_bytes
        assert mine.work.up_bytes - theirs.work.up_bytes == (8 if mine.phase == "train" else 0)


@pytest.mark.parametrize("shared, others", [("[]", 2 * MODEL_BYTES), ("[body]", 2 * HEAD_BYTES)])
def test_all_models_are_sent_down_and_one_comes_back(shared, others):
    run = federate("method=ifca", "strategy.clusters=3", f"strategy.shared={shared}", "evaluate_clients=3")
    for client in run.clients:
        assert client.work.down_bytes == MODEL_BYTES + others
        assert client.work.up_bytes == (MODEL_BYTES + 8 if client.phase == "train" else 0)
    models = run.strategy.models
    assert all(torch.equal(models[0]["body.1.weight"], m["body.1.weight"]) == (shared != "[]") for m in models[1:])
    assert weights_sha256(run.arrays) != weights_sha256(federate("method=fedavg").arrays)


@pytest.mark.parametrize("phase, trained", [("train", 1), ("evaluate", 0)])
def test_a_choice_costs_a_pass_through_every_model(phase, trained):
    worker, client, part = alone("method=ifca", "strategy.clusters=3", "trainer.local_epochs=1")
    with counter() as counted:
        answered(worker, client, part, phase)
    work, size = client.log.work(), len(client.data.train)
    assert work.flops == pytest.approx(counted.get_total_flops(), rel=0.01)
    chosen = sum(each.forwards * each.batch for each in work.passes) - trained * size
    assert chosen == 3 * size + (0 if trained else len(client.data.test))


def test_groups_that_disagree_part_ways(tmp_path):
    """Odd clients have the labels of even ones the other way round: one model is no better than a coin."""
    rng = np.random.default_rng(0)
    owner, y = np.repeat(np.arange(6), 40), rng.integers(2, size=240)
    x = (rng.normal(size=(240, 4)) + 3 * (2 * y[:, None] - 1)).astype(np.float32)
    for part in ("train", "test"):
        np.savez(tmp_path / f"{part}.npz", x=x, y=y ^ (owner % 2), client=owner)
    (tmp_path / "meta.json").write_text(json.dumps({"classes": ["a", "b"], "kind": "tabular"}))
    data = ["workload=bundle", f"workload.path={tmp_path}", "partition=natural", "model=mlp", "fleet=uniform"]
    data += ["cohort=6", "rounds=5", "evaluate_clients=6", "trainer.local_epochs=1", "engine.device=cpu", "seed=2"]
    accuracy = {}
    for method in ("fedavg", "ifca"):
        run = Federation(build_world(json.dumps(compose([*data, f"method={method}"]))), LocalEngine(serve))
        accuracy[method] = [report for report, _ in run.rounds()][-1].metrics["client_accuracy"]
    assert accuracy["fedavg"] < 0.7 < 0.95 < accuracy["ifca"]
    choices = run.strategy.choices
    assert [choices[client] == choices[0] for client in range(6)] == [True, False] * 3


def test_a_round_says_how_large_its_clusters_are_and_which_one_is_judged():
    settings = compose([*TINY, "method=ifca", "strategy.clusters=3", "cohort=6"])
    reports = [report for report, _ in Federation(build_world(json.dumps(settings)), LocalEngine(serve)).rounds()]
    for report in reports[1:]:
        sizes = [report.metrics[f"clients_in_cluster_{n}"] for n in range(3)]
        assert sum(sizes) == 6
        assert report.metrics["judged_cluster"] == sizes.index(max(sizes))


def test_clusters_that_would_never_part_are_refused():
    with pytest.raises(ConfigError, match=r"^the 2 clusters of IFCA would begin with equal weights, and never part;"):
        federate("method=ifca", "strategy.shared=['*']")
    with pytest.raises(ConfigError, match="would begin with equal weights"):  # what stays at home parts nobody
        federate("method=ifca", "strategy.shared=[body]", "private=[head]")
    with pytest.raises(ConfigError, match=r"strategy.shared:.*'haed'; did you mean 'head'"):
        federate("method=ifca", "strategy.shared=[haed]")


def test_it_goes_on_where_it_was_cut(tmp_path):
    one, *others = every_way(compose([*TINY, "method=ifca", "evaluate_clients=3"]), tmp_path).values()
    assert all(rounds == one for rounds in others)
