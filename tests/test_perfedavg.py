"""Per-FedAvg: the step through an inner step, its limit, what is paid for, and how clients are judged."""

import pytest
import torch
from conftest import answered, every_way
from test_personal import TINY, alone, federate
from torchs_counter import counter

from clients.trainers.sgd import SGDTrainer
from fedsim.report.rounds import weights_sha256
from fedsim.settings.compose import compose

LARGE = ["trainer.inner_lr=0.5", "trainer.lr=0.3"]  # so that every part of a step shows


def batches(client, purpose, steps=1):
    return SGDTrainer(lr=0.3, batch_size=4).shuffled(client, purpose, 1, steps)


@pytest.mark.parametrize("form", ["fo", "hf"])
def test_a_step_is_that_of_the_paper(form):
    """By double backward: w - beta (I - alpha H) g(w - alpha g(w)); the first-order form without H."""
    worker, client, part = alone("method=perfedavg", *LARGE, f"trainer.form={form}", "trainer.local_steps=1")
    model = client.workload.build_model()
    weights = list(model.parameters())

    def gradients(purpose, **create):
        return torch.autograd.grad(client.workload.loss(model, next(batches(client, purpose))), weights, **create)

    start = [w.detach().clone() for w in weights]
    inner = gradients("inner-batches")
    with torch.no_grad():
        torch._foreach_sub_(weights, torch._foreach_mul(inner, 0.5))
    outer = gradients("batches")
    with torch.no_grad():
        torch._foreach_copy_(weights, start)
    along = gradients("curvature-batches", create_graph=True)
    hessian = torch.autograd.grad(along, weights, grad_outputs=outer)
    answered(worker, client, part, "train")
    for new, w, g, h in zip(client.parameters, start, outer, hessian, strict=True):
        expected = w - 0.3 * (g - (0.5 * h if form == "hf" else 0))
        assert torch.allclose(new, expected, atol=2e-4)
    assert max(float(h.abs().max()) for h in hessian) > 0.1  # it would show


@pytest.mark.parametrize("form", ["fo", "hf"])
def test_without_an_inner_step_it_is_fedavg_bit_for_bit_and_pass_for_pass(form):
    """Masks of dropout and statistics of batch norms are those of FedAvg, too."""
    model = ["model.norm=batch", "model.dropout=0.2", "trainer.momentum=0.5", "evaluate_clients=2"]
    plain = federate("method=fedavg", *model)
    limit = federate("method=perfedavg", "trainer.inner_lr=0", f"trainer.form={form}", *model)
    assert weights_sha256(limit.arrays) == weights_sha256(plain.arrays)
    assert limit.clients == plain.clients


@pytest.mark.parametrize("phase", ["train", "evaluate"])
@pytest.mark.parametrize("form, passes", [("fo", 2), ("hf", 4)])
def test_every_pass_of_a_step_and_of_an_adaptation_is_reported(form, passes, phase):
    worker, client, part = alone("method=perfedavg", f"trainer.form={form}", "trainer.adapt_steps=3")
    with counter() as counted:
        answered(worker, client, part, phase)
    work, epochs = client.log.work(), worker.trainer.local_epochs
    assert work.flops == pytest.approx(counted.get_total_flops(), rel=0.01)
    steps = passes * epochs * -(-len(client.data.train) // 4) if phase == "train" else 3
    assert sum(each.backwards for each in work.passes) == steps


def test_a_client_is_judged_after_its_inner_steps_and_the_federation_never_sees_them():
    worker, client, part = alone("method=perfedavg", *LARGE, "trainer.adapt_steps=2")
    model = client.workload.build_model()
    for batch in batches(client, "adapt-batches", 2):
        model.zero_grad()
        client.workload.loss(model, batch).backward()
        with torch.no_grad():
            for p in model.parameters():
                p -= 0.5 * p.grad
    by_hand = client.workload.evaluate(model, client.data.test)
    assert dict(answered(worker, client, part, "evaluate")["metrics"])["loss"] == pytest.approx(by_hand["loss"])
    runs = [federate("method=perfedavg", f"trainer.adapt_steps={n}", "evaluate_clients=2") for n in (0, 2)]
    assert weights_sha256(runs[0].arrays) == weights_sha256(runs[1].arrays)


def test_it_goes_on_where_it_was_cut(tmp_path):
    one, *others = every_way(compose([*TINY, "method=perfedavg", "trainer.form=hf"]), tmp_path).values()
    assert all(rounds == one for rounds in others)
