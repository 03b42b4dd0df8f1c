"""APFL: both models' steps, the share that is learned, limits, and what is paid for."""

import pytest
import torch
from conftest import answered, every_way, task_of
from flwr.app import RecordDict
from test_personal import TINY, alone, federate, of, state_of
from torch.func import functional_call
from torchs_counter import counter

from clients.state import ClientState
from clients.trainers.sgd import SGDTrainer
from fedsim.messages.records import ARRAYS, record_of, tensors_of
from fedsim.report.rounds import weights_sha256
from fedsim.settings.compose import compose

FIXED = "trainer.adaptive=false"


def by_hand(client, received, personal, alpha, adaptive, lr=0.2):
    """Global and personal weights and alpha after an epoch, by the autograd of the mixture itself."""
    w, v, alpha = dict(received), dict(personal), torch.tensor(alpha)
    model = client.workload.build_model()
    for step, batch in enumerate(SGDTrainer(lr=lr, batch_size=4).shuffled(client, "batches", 1)):
        inputs = [{n: t.clone().requires_grad_() for n, t in weights.items()} for weights in (w, v)]
        share = alpha.clone().requires_grad_()
        mixture = {n: share * inputs[1][n] + (1 - share) * inputs[0][n] for n in w}

        def loss(weights, batch=batch):
            return client.workload.loss(lambda x: functional_call(model, weights, (x,)), batch)

        slope, *of_v = torch.autograd.grad(loss(mixture), [share, *inputs[1].values()])
        of_w = torch.autograd.grad(loss(inputs[0]), list(inputs[0].values()))
        if adaptive and step == 0:
            alpha = (alpha - lr * slope).clamp(0, 1).detach()
        w = {n: (t - lr * g).detach() for (n, t), g in zip(inputs[0].items(), of_w, strict=True)}
        v = {n: (t - lr * g).detach() for (n, t), g in zip(inputs[1].items(), of_v, strict=True)}
    return w, v, float(alpha)


@pytest.mark.parametrize("adaptive", [False, True])
def test_a_round_follows_the_gradients_of_the_mixture(adaptive):
    """A client that comes back: its model is elsewhere than the received one, so that alpha has a slope."""
    kept = {n: t + 0.3 for n, t in alone("method=apfl")[1].workload.build_model().state_dict().items()}
    state = ClientState()
    state.store("personal", kept)
    state.store("mixing", {"alpha": torch.tensor(0.4, dtype=torch.float64)})
    settings = ["method=apfl", f"trainer.adaptive={adaptive}", "trainer.lr=0.2", "trainer.local_epochs=1"]
    worker, client, part = alone(*settings, state=state)
    w, v, alpha = by_hand(client, tensors_of(part[ARRAYS]), kept, 0.4, adaptive)
    answer = answered(worker, client, part, "train")
    for name, t in tensors_of(answer[ARRAYS]).items():
        assert torch.allclose(t, w[name], atol=1e-5), name
        assert torch.allclose(client.state[f"personal.{name}"], v[name], atol=1e-5), name
    assert float(client.state["mixing.alpha"]) == pytest.approx(alpha, abs=1e-5)
    assert (abs(alpha - 0.4) > 0.01) == adaptive
    # Judged with what it then receives: here the same weights again.
    judged = answered(worker, worker.context(task_with(client.state, part, client)), part, "evaluate")
    received = tensors_of(part[ARRAYS])
    model = client.workload.build_model()
    model.load_state_dict({n: alpha * v[n] + (1 - alpha) * received[n] for n in v})
    assert dict(judged["metrics"])["loss"] == pytest.approx(
        client.workload.evaluate(model, client.data.test)["loss"], rel=1e-4
    )


def task_with(state, part, client):
    return task_of(RecordDict({**part, "state": record_of(state)}), client.client_id, 2)


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_the_global_model_is_fedavgs_and_with_alpha_0_it_is_what_clients_judge(alpha):
    """Bit for bit, with dropout, momentum and statistics; with alpha 1 the personal models are of their clients."""
    model = ["model.norm=batch", "model.dropout=0.2", "trainer.momentum=0.5", "evaluate_clients=3"]
    plain = federate("method=fedavg", *model)
    mixed = federate("method=apfl", FIXED, f"trainer.alpha={alpha}", *model)
    assert weights_sha256(mixed.arrays) == weights_sha256(plain.arrays)
    judged = [[c.metrics["loss"] for c in run.clients if c.phase == "evaluate"] for run in (plain, mixed)]
    assert (judged[0] == judged[1]) == (alpha == 0)


def test_with_alpha_1_a_personal_model_sees_the_federation_once():
    """It begins as the received weights, and another server changes it no more."""
    one, other = (federate("method=apfl", FIXED, "trainer.alpha=1", f"strategy={s}") for s in ("fedavg", "fedadam"))
    assert weights_sha256(one.arrays) != weights_sha256(other.arrays)
    first = {c.client for c in one.clients if c.round == 1}
    for client in first:
        mine, theirs = (of("personal", state_of(run, client)) for run in (one, other))
        assert all(torch.equal(t, theirs[name]) for name, t in mine.items())


def test_the_passes_of_both_models_are_reported_and_nothing_more_travels():
    worker, client, part = alone("method=apfl")
    with counter() as counted:
        answered(worker, client, part, "train")
    assert client.log.work().flops == pytest.approx(counted.get_total_flops(), rel=0.01)
    plain, mixed = federate("method=fedavg"), federate("method=apfl")
    for one, both in zip(plain.clients, mixed.clients, strict=True):
        assert both.work.flops == 2 * one.work.flops
        assert (both.work.down_bytes, both.work.up_bytes) == (one.work.down_bytes, one.work.up_bytes)
        assert both.work.storage_bytes == one.work.up_bytes + 8  # the personal model, and alpha


def test_it_goes_on_where_it_was_cut(tmp_path):
    one, *others = every_way(compose([*TINY, "method=apfl", "model.norm=batch"]), tmp_path).values()
    assert all(rounds == one for rounds in others)
    assert 0 < one[-1]["metrics"]["mixing"] < 1
