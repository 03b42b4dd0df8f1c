"""The losses of the mixup family, held to their equations in float64 on tiny networks.

Yoon et al., "FedMix", ICLR 2021. u = (1 - r) x is the shrunk input, r the mixing ratio, T the Taylor term.
"""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from conftest import task_of
from torch import Tensor, nn
from torch.nn import functional as F
from torchs_counter import counter

from clients.trainers.mixing.fedmix import FORMS, STEP, FedMixTrainer, central_difference, double_backward
from clients.trainers.mixing.global_mixup import GlobalMixupTrainer
from clients.trainers.mixing.mixup import MixupTrainer, cross_entropy
from clients.trainers.mixing.naivemix import NaiveMixTrainer
from clients.worker import Worker
from fedsim.errors import ConfigError
from fedsim.models.char_lstm import CharLSTM
from fedsim.models.mlp import MLP
from fedsim.settings.build import build_world
from fedsim.settings.compose import compose
from fedsim.workloads.base import Tensors
from fedsim.workloads.classification import ClassificationWorkload

CLASSES, FEATURES = 3, 4
SGD = {"lr": 0.1, "batch_size": 4}


@pytest.fixture(autouse=True)
def _seeded():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        yield


def tanh_net() -> nn.Module:
    return nn.Sequential(nn.Linear(FEATURES, 6), nn.Tanh(), nn.Linear(6, CLASSES)).double()


def relu_net() -> nn.Module:
    return MLP((FEATURES,), CLASSES, [6]).double()


def examples(size: int = 6) -> Tensors:
    """A batch with one averaged partner for all."""
    pair = {"partner_x": torch.rand(1, FEATURES).double(), "partner_y": torch.rand(1, CLASSES).double()}
    pair["partner_y"] /= pair["partner_y"].sum()
    return {"x": torch.randn(size, FEATURES).double(), "y": torch.randint(CLASSES, (size,)), **pair}


def fedmix(ratio: float, form: str = "double", scale: str = "l1") -> FedMixTrainer:
    return FedMixTrainer(ratio, taylor_form=form, taylor_scale=scale, **SGD)


def loss_of(trainer: MixupTrainer, model: nn.Module, batch: Tensors) -> Tensor:
    return trainer.mixture.mixed(model, batch)[0]


def gradient(trainer: MixupTrainer, model: nn.Module, batch: Tensors) -> Tensor:
    found = torch.autograd.grad(loss_of(trainer, model, batch), list(model.parameters()))
    return torch.cat([g.flatten() for g in found])


def terms(form: str, model: nn.Module, batch: Tensors) -> dict[str, float]:
    return {name: float(term.detach()) for name, term in fedmix(0.2, form).mixture.mixed(model, batch)[1].items()}


def assert_agrees_with_double_backward(form: str, model: nn.Module, batch: Tensors) -> None:
    error = STEP**2 if form == "central" else 1e-6  # what a difference of both sides leaves of the series
    assert terms(form, model, batch) == pytest.approx(terms("double", model, batch), abs=error)
    assert torch.allclose(gradient(fedmix(0.2, form), model, batch), gradient(fedmix(0.2), model, batch), atol=error)


def slope(model: nn.Module, batch: Tensors, direction: Tensor) -> Tensor:
    """T of a batch along a direction."""
    return double_backward(model, 0.9 * batch["x"], direction, batch["y"], batch["partner_y"])[2].detach()


# --- the Taylor term -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("net", [tanh_net, relu_net])
def test_taylor_term_is_the_central_difference(net):
    model, batch, h = net(), examples(), 1e-5
    u, direction = 0.9 * batch["x"], batch["partner_x"]
    sides = [F.cross_entropy(model(u + e * direction), batch["y"]).item() for e in (h, -h)]
    assert float(slope(model, batch, direction)) == pytest.approx((sides[0] - sides[1]) / (2 * h), abs=1e-8)


@pytest.mark.parametrize(
    "net, form", [(n, f) for n in (tanh_net, relu_net) for f in FORMS if n is tanh_net or f != "central"]
)
def test_forms_agree_in_terms_and_gradients(net, form: str):
    model, batch = net(), examples()
    assert_agrees_with_double_backward(form, model, batch)


def test_taylor_term_is_linear_in_the_mean_and_zero_for_a_zero_mean():
    model, batch = tanh_net(), examples()
    a, b = torch.randn(2, 1, FEATURES).double()
    sum_of_parts = 2 * slope(model, batch, a) - 3 * slope(model, batch, b)
    assert torch.allclose(slope(model, batch, 2 * a - 3 * b), sum_of_parts, rtol=1e-10)
    assert slope(model, batch, torch.zeros(1, FEATURES).double()) == 0
    nothing = central_difference(model, batch["x"], torch.zeros(1, FEATURES).double(), batch["y"], batch["partner_y"])
    assert nothing[2] == 0


@pytest.mark.parametrize("form", FORMS)
def test_repeating_the_batch_changes_nothing(form: str):
    """Public code divides the term by the batch size twice and fails here."""
    model, batch, trainer = tanh_net(), examples(), fedmix(0.2, form)
    twice = batch | {name: torch.cat([batch[name], batch[name]]) for name in ("x", "y")}
    close = {"rtol": 1e-10, "atol": 1e-12} if form != "central" else {"rtol": 1e-8, "atol": 1e-9}
    once_terms, twice_terms = trainer.mixture.mixed(model, batch)[1], trainer.mixture.mixed(model, twice)[1]
    assert all(torch.allclose(once_terms[name], twice_terms[name], **close) for name in once_terms)
    assert torch.allclose(gradient(trainer, model, batch), gradient(trainer, model, twice), **close)


@pytest.mark.parametrize("form", ["double", "forward"])
def test_gradient_of_the_whole_loss_is_that_of_finite_differences(form: str):
    model, batch, trainer = tanh_net(), examples(3), fedmix(0.2, form)
    names = [name for name, _ in model.named_parameters()]

    def of_weights(*weights: Tensor) -> Tensor:
        replaced = torch.nn.utils.stateless._reparametrize_module(model, dict(zip(names, weights, strict=True)))
        with replaced:
            return loss_of(trainer, model, batch)

    start = [p.detach().clone().requires_grad_() for p in model.parameters()]
    assert torch.autograd.gradcheck(of_weights, start)


def test_scale_is_ratio_times_its_complement_or_the_ratio():
    assert fedmix(0.2).scale == pytest.approx(0.16)
    assert fedmix(0.2, scale="paper").scale == 0.2
    with pytest.raises(ConfigError, match=r"trainer\.taylor_scale .*'l2'"):
        fedmix(0.2, scale="l2")


def test_without_its_scale_the_term_is_left_out_and_a_step_is_one_pass(settings):
    """The same loss as with a mean of zero, whose term is zero."""
    model, batch = tanh_net(), examples()
    zero = batch | {"partner_x": torch.zeros_like(batch["partner_x"])}
    assert torch.allclose(
        loss_of(fedmix(0.2, scale="none"), model, batch), loss_of(fedmix(0.2), model, zero), rtol=1e-12
    )
    worker = Worker(build_world(json.dumps(settings("method=fedmix", "trainer.taylor_scale=none"))))
    assert worker.trainer.mixture.passes == 1
    assert worker.trainer.mixed_cost.forward_flops == worker.network.forward_flops


# --- against the methods that it approximates ------------------------------------------------------------------------


def global_mixup_over(model: nn.Module, batch: Tensors, partners: Tensors, ratio: float) -> Tensor:
    """Mean of Global Mixup's loss over a pool of single partners."""
    mixup = GlobalMixupTrainer(ratio, **SGD)
    ones = [batch | {"partner_x": x[None], "partner_y": y[None]} for x, y in zip(*partners.values(), strict=True)]
    expanded = [one | {"partner_y": one["partner_y"].expand(len(batch["y"]))} for one in ones]
    return torch.stack([loss_of(mixup, model, one) for one in expanded]).mean()


def pool_of(partners: Tensors) -> Tensors:
    y = F.one_hot(partners["y"], CLASSES).double()
    return {"partner_x": partners["x"].mean(0, keepdim=True), "partner_y": y.mean(0, keepdim=True)}


@pytest.mark.parametrize("scale", ["l1", "paper"])
def test_fedmix_is_global_mixup_up_to_second_order(scale: str):
    model, batch = tanh_net(), examples()
    partners = {"x": 2 * torch.randn(5, FEATURES).double(), "y": torch.randint(CLASSES, (5,))}
    mean = batch | pool_of(partners)
    gaps = []
    for ratio in (0.05, 0.025):
        gap = global_mixup_over(model, batch, partners, ratio) - loss_of(fedmix(ratio, scale=scale), model, mean)
        gaps.append(gap.item() / ratio**2)
    assert gaps[0] == pytest.approx(gaps[1], rel=0.2)
    assert abs(gaps[1]) > 1e-4


def test_fedmix_is_naivemix_up_to_second_order():
    model, batch = tanh_net(), examples()
    gaps = []
    for ratio in (0.05, 0.025):
        naive = loss_of(NaiveMixTrainer(ratio, **SGD), model, batch)
        gaps.append((naive - loss_of(fedmix(ratio), model, batch)).item() / ratio**2)
    assert gaps[0] == pytest.approx(gaps[1], rel=0.2)
    assert abs(gaps[1]) > 1e-4


def test_naivemix_with_one_raw_partner_is_global_mixup():
    model, batch = tanh_net(), examples()
    partners = {"x": torch.rand(1, FEATURES).double(), "y": torch.tensor([2])}
    naive = loss_of(NaiveMixTrainer(0.3, **SGD), model, batch | pool_of(partners))
    assert torch.allclose(naive, global_mixup_over(model, batch, partners, 0.3), rtol=1e-14)


def test_naivemix_by_hand():
    """A linear network with weights 1, x = 2, mean = 0, ratio 1/4: the logits are (1.5, 0), the loss softplus(-1.5)."""
    model = nn.Linear(1, 2, bias=False).double()
    model.weight.data = torch.tensor([[1.0], [0.0]]).double()
    zero, half = torch.zeros(1, 1).double(), torch.full((1, 2), 0.5).double()
    batch = {"x": torch.tensor([[2.0]]).double(), "y": torch.tensor([0]), "partner_x": zero, "partner_y": half}
    own = float(F.softplus(torch.tensor(-1.5)))
    other = own + 0.75  # half of it has the other label: softplus(1.5) = softplus(-1.5) + 1.5
    assert loss_of(NaiveMixTrainer(0.25, **SGD), model, batch).item() == pytest.approx(0.75 * own + 0.25 * other)


def test_cross_entropy_of_a_one_hot_label_is_that_of_its_class():
    z, y = torch.randn(5, 7, CLASSES).double(), torch.randint(CLASSES, (5, 7))
    assert torch.allclose(cross_entropy(z, F.one_hot(y, CLASSES).double()), cross_entropy(z, y), rtol=1e-14)


# --- tokens, dropout -------------------------------------------------------------------------------------------------


def tokens() -> tuple[CharLSTM, Tensors]:
    model = CharLSTM((4,), 5, embedding=3, hidden=4, layers=1).double()
    mean = torch.rand(1, 4, 5).double().softmax(-1)
    return model, {
        "x": torch.randint(5, (2, 4)),
        "y": torch.randint(5, (2, 4)),
        "partner_x": mean,
        "partner_y": mean.flip(1),
    }


@pytest.mark.parametrize("form", FORMS)
def test_tokens_are_mixed_behind_the_embedding(form: str):
    model, batch = tokens()
    assert_agrees_with_double_backward(form, model, batch)


def test_means_of_one_sequence_are_that_sequence():
    model, batch = tokens()
    one = batch["x"][:1]
    raw = batch | {"partner_x": one, "partner_y": batch["y"][:1].expand(2, 4)}
    means = batch | {"partner_x": F.one_hot(one, 5).double(), "partner_y": F.one_hot(batch["y"][:1], 5).double()}
    naive = NaiveMixTrainer(0.3, **SGD)
    assert torch.allclose(loss_of(naive, model, means), loss_of(naive, model, raw), rtol=1e-12)
    assert torch.equal(model.embedding(one), model.embedding(batch["x"][:1]))  # its own forward is back


def test_both_sides_of_the_difference_draw_the_same_dropout():
    model, batch = nn.Sequential(nn.Linear(FEATURES, 40), nn.Dropout(0.5), nn.Linear(40, CLASSES)).double(), examples()
    found = {}
    for form in ("double", "central"):
        torch.manual_seed(1)
        found[form] = terms(form, model, batch)["taylor"]
    assert found["central"] == pytest.approx(found["double"], abs=STEP**2)


# --- in a run --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["fedmix", "naivemix", "local_mixup", "global_mixup"])
def test_ratio_zero_is_fedavg_bit_for_bit(run, tmp_path, method: str):
    def weights(*overrides: str) -> str:
        return run(*overrides, "trainer.local_epochs=2", out=tmp_path / "-".join(overrides))["weights_sha256"]

    plain = weights("method=fedavg")
    assert weights(f"method={method}", "trainer.mix_ratio=0") == plain
    assert weights(f"method={method}", "trainer.mix_ratio=0.1") != plain


@pytest.mark.parametrize("method", ["fedmix", "naivemix", "local_mixup", "global_mixup"])
def test_proximal_term_comes_by_config_alone(run, tmp_path, method: str):
    def weights(*overrides: str) -> str:
        return run(f"method={method}", *overrides, out=tmp_path / "-".join(["a", *overrides]))["weights_sha256"]

    assert weights("trainer.proximal_mu=0.5") != weights("trainer.proximal_mu=0")
    zero = ("trainer.mix_ratio=0", "trainer.proximal_mu=0.5")
    assert weights(*zero) == run("method=fedprox", zero[1], out=tmp_path / "prox")["weights_sha256"]


def test_penalty_is_added_once_to_the_mixed_loss(settings):
    worker = Worker(build_world(json.dumps(settings("method=local_mixup", "trainer.proximal_mu=2"))))
    trainer, batch = worker.trainer, worker.workload.sample(4)
    from flwr.app import RecordDict

    from fedsim.messages.updates import Broadcast

    client = worker.context(task_of(RecordDict(), 0, 1))
    sent = {name: p.detach() + 0.1 for name, p in worker.model.named_parameters()}
    batch |= trainer.sample_partner(worker.workload, worker.model, batch)
    count = sum(p.numel() for p in sent.values())
    loss = trainer.objective(trainer.start(client, Broadcast(1, sent)), batch)
    mixed = trainer.mixture.mixed(worker.model, batch)[0]
    assert float(loss - mixed) == pytest.approx(2 / 2 * count * 0.01, rel=1e-4)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_reports_the_flops_that_torch_counts(settings, form: str):
    worker = Worker(build_world(json.dumps(settings("method=fedmix", f"trainer.taylor_form={form}"))))
    trainer, batch = worker.trainer, worker.workload.sample(4)
    batch |= trainer.sample_partner(worker.workload, worker.model, batch)
    with counter() as counted:
        torch.autograd.grad(loss_of(trainer, worker.model, batch), worker.live.parameters)
    assert (
        trainer.mixed_cost.forward_flops * 2 * 4 + trainer.mixed_cost.backward_flops * 2 * 4
        == counted.get_total_flops()
    )
    assert trainer.mixed_cost.activation_bytes > worker.network.activation_bytes


@pytest.mark.parametrize("model, shape", [("lenet5", "[1,28,28]"), ("vgg", "[3,32,32]")])
def test_a_step_of_the_usual_form_is_two_of_plain_sgd(model: str, shape: str):
    """As torch counts them, and as they are priced; measured here: 2.1 for lenet5, 2.0 for vgg."""
    data = ["workload=blobs", f"workload.input_shape={shape}", "num_clients=2", "cohort=1", f"model={model}"]
    worker = Worker(build_world(json.dumps(compose([*data, "engine.device=cpu", "method=fedmix"]))))
    trainer, batch = worker.trainer, worker.workload.sample(4)
    batch |= trainer.sample_partner(worker.workload, worker.model, batch)
    losses = {
        "plain": lambda: worker.workload.loss(worker.model, batch),
        "mixed": lambda: loss_of(trainer, worker.model, batch),
    }
    flops = {}
    for name, loss in losses.items():
        with counter() as counted:
            torch.autograd.grad(loss(), worker.live.parameters)
        flops[name] = counted.get_total_flops()
    assert (trainer.mixture.form, trainer.mixture.passes) == ("forward", 2)
    assert flops["mixed"] == pytest.approx(2 * flops["plain"], rel=0.01)
    assert trainer.mixed_cost.forward_flops == pytest.approx(worker.network.forward_flops, rel=0.01)
    assert trainer.mixed_cost.backward_flops == pytest.approx(worker.network.backward_flops, rel=0.01)


class Fake(ClassificationWorkload):
    """Classes without data: all that the set-up of a trainer looks at is a sample and its loss."""

    def __init__(self):
        pass

    def client_data(self, client_id: int):
        raise NotImplementedError


def test_a_recurrent_network_takes_the_form_that_needs_no_second_derivative():
    world = build_world(json.dumps(compose(["method=fedmix", "engine.device=cpu"])))
    trainer = fedmix(0.1, "auto")
    model = CharLSTM((6,), 5, embedding=3, hidden=4, layers=1)

    class Text(Fake):
        num_classes = 5

        def sample(self, batch: int) -> Tensors:
            return {"x": torch.randint(5, (batch, 6)), "y": torch.randint(5, (batch, 6))}

        def loss(self, model: nn.Module, batch: Tensors) -> Tensor:
            return cross_entropy(model(batch["x"]), batch["y"])

    trainer.setup(Text(), model, replace(Worker(world).network, layers=None))
    assert (trainer.mixture.form, trainer.mixture.passes) == ("central", 2)


@pytest.mark.parametrize("net", [tanh_net, relu_net])
@pytest.mark.parametrize("recurrent", [False, True])
def test_differences_are_never_taken_by_themselves_where_a_network_has_kinks(net, recurrent, monkeypatch):
    """Even where no other form works; who asks for them gets them."""

    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.lstm = net().float(), nn.LSTM(CLASSES, CLASSES) if recurrent else nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            out = self.lstm(self.net(x))
            return out[0] if recurrent else out

    class Vectors(Fake):
        num_classes = CLASSES

        def sample(self, batch: int) -> Tensors:
            return {"x": torch.randn(batch, FEATURES), "y": torch.randint(CLASSES, (batch,))}

        def loss(self, model: nn.Module, batch: Tensors) -> Tensor:
            return cross_entropy(model(batch["x"]), batch["y"])

    settings = compose(["method=fedmix", "workload=blobs", "engine.device=cpu"])
    network = replace(Worker(build_world(json.dumps(settings))).network, layers=None)
    reason = FedMixTrainer._reason_against
    monkeypatch.setattr(
        FedMixTrainer, "_reason_against", lambda t, form, w, m: "no" if form != "central" else reason(t, form, w, m)
    )
    asked, auto = fedmix(0.1, "central"), fedmix(0.1, "auto")
    asked.setup(Vectors(), Own(), network)
    assert asked.mixture.form == "central"
    if net is relu_net:
        with pytest.raises(
            ConfigError, match=r"taylor_form=auto .*auto leaves out central, which is no gradient at the"
        ):
            auto.setup(Vectors(), Own(), network)
    else:
        auto.setup(Vectors(), Own(), network)
        assert auto.mixture.form == "central"


def test_the_step_of_differences_does_not_depend_on_the_precision():
    """That is STEP |u| / sqrt(b) / |direction|, also in float64, where a finer one would be worse at kinks."""
    seen: list[Tensor] = []
    u, direction = torch.ones(4, FEATURES).double(), torch.full((1, FEATURES), 2.0).double()

    def logits(x: Tensor) -> Tensor:
        seen.append(x)
        return x[:, :CLASSES]

    central_difference(logits, u, direction, torch.zeros(4).long(), torch.ones(1, CLASSES).double() / CLASSES)
    step = torch.finfo(torch.float32).eps ** (1 / 3)
    torch.testing.assert_close(seen[0] - u, (step * 2 / 4 * direction).expand(4, -1), rtol=1e-9, atol=0)


def test_a_form_that_the_model_does_not_support_is_refused_in_a_sentence():
    class Blind(torch.autograd.Function):
        @staticmethod
        def forward(context, x):
            return x.clone()

        @staticmethod
        def backward(context, slope):
            return slope

    class Odd(MLP):
        def forward(self, x: Tensor) -> Tensor:
            return Blind.apply(super().forward(x))

    world = build_world(json.dumps(compose(["method=fedmix", "workload=blobs", "engine.device=cpu"])))
    with pytest.raises(ConfigError, match=r"trainer\.taylor_form=forward does not work with Odd: .*; take another of"):
        fedmix(0.1, "forward").setup(world.workload, Odd((16,), 10), Worker(world).network)


def test_terms_of_the_loss_are_reported(federation):
    report = list(federation("method=fedmix").rounds())[-1][0]
    assert {"own_loss", "partner_loss", "taylor", "pool_pairs", "train_loss"} <= set(report.metrics)
    m = report.metrics
    expected = 0.95 * m["own_loss"] + 0.05 * m["partner_loss"] + 0.05 * 0.95 * m["taylor"]
    assert m["train_loss"] == pytest.approx(expected, rel=1e-5)


def test_the_oracle_says_so_in_its_results(federation):
    assert list(federation("method=global_mixup").rounds())[-1][0].metrics["oracle"] == 1.0
