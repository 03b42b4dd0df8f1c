"""Gradients of single examples: every way against plain autograd, in double precision."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchs_counter import counter

from clients.trainers.base import WorkLog
from clients.trainers.rehearsal.gradients import compared_weights, head_of, per_sample, scoring
from clients.trainers.rehearsal.spaces import MODES, Mode, Space, space_of
from devices.meter import matrix_product, measure
from devices.trace import KINDS
from fedsim.models.char_lstm import CharLSTM
from fedsim.models.convnet import ConvNet
from fedsim.models.matchboxnet import MatchboxNet
from fedsim.models.mlp import MLP
from fedsim.models.resnet import ResNet
from fedsim.workloads.base import Examples, Tensors, Workload
from fedsim.workloads.blobs import Blobs
from fedsim.workloads.classification import ClassificationWorkload

LAST = ("last_layer", "features")


@pytest.fixture(autouse=True)
def _double() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


class Depthwise(nn.Module):
    """Grouped and strided convolutions with a bias, then a head."""

    def __init__(self, input_shape: tuple[int, ...], num_classes: int):
        super().__init__()
        self.first = nn.Conv2d(input_shape[0], 4, 3, stride=2, padding=1)
        self.second = nn.Conv2d(4, 8, 3, groups=4, dilation=2, padding=2)
        self.head = nn.Linear(8, num_classes, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x).relu()).relu().mean((2, 3)))


class Letters(ClassificationWorkload):
    """Sequences of tokens, for networks that take these."""

    def __init__(self) -> None:
        super().__init__(lambda **_: CharLSTM((6,), 5, hidden=7, embedding=3, layers=1), 1)
        self.name, self.num_clients, self.input_shape, self.num_classes = "letters", 1, (6,), 5
        rows = torch.arange(42).view(7, 6)
        self.test = Examples({"x": rows % 5, "y": (rows * 3 + 1) % 5})

    def client_data(self, client_id: int):
        raise NotImplementedError


def problem(name: str) -> tuple[Workload, nn.Module, Tensors]:
    make = {
        "linear": lambda **s: MLP(**s, hidden=[]),
        "mlp": lambda **s: MLP(**s, hidden=[9, 7], dropout=0.2),
        "convnet": lambda **s: ConvNet(**s, channels=[3, 5]),
        "normed": lambda **s: ConvNet(**s, channels=[4, 6], groups=2),
        "resnet": lambda **s: ResNet(**s, depth=8, width=4, groups=2),
        "depthwise": Depthwise,
        "over_time": lambda **s: MatchboxNet(**s, blocks=1, repeats=2, width=2),
    }
    if name == "letters":
        workload: Workload = Letters()
    else:
        workload = Blobs(make[name], 1, 3, num_classes=4, input_shape=(2, 8, 8))
    model = workload.build_model()
    batch = workload.sample(7)
    return workload, model, {key: t.double() if t.is_floating_point() else t for key, t in batch.items()}


def found_in(mode: Mode, workload: Workload, model: nn.Module) -> Space:
    """The space of a mode; a workload's samples are floats of the usual precision."""
    space = space_of(mode, workload, model.float(), chunk=3)
    model.double()
    return space


PROBLEMS = ("linear", "mlp", "convnet", "normed", "resnet", "depthwise", "over_time", "letters")


def by_hand(workload: Workload, model: nn.Module, batch: Tensors, weights: list[Tensor]) -> Tensor:
    """One backward pass per example, [n, weights]."""
    rows = []
    for i in range(len(batch["y"])):
        loss = workload.loss(model, {key: t[i : i + 1] for key, t in batch.items()})
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, weights)]))
    return torch.stack(rows)


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("mode", MODES)
def test_every_way_gives_the_products_of_autograd(name: str, mode: Mode):
    workload, model, batch = problem(name)
    head, space = head_of(model), found_in(mode, workload, model)
    with scoring(model):
        if mode == "features":
            seen: list[Tensor] = []
            hook = head.register_forward_pre_hook(lambda _, given: seen.append(given[0].requires_grad_()))
            total = workload.losses(model, batch).sum()
            hook.remove()
            (own,) = torch.autograd.grad(total, seen)
            # A sequence's loss is a mean over its steps, and so is its gradient here.
            expected = own if own.dim() == 2 else own.sum(1)
        else:
            weights = list(head.parameters() if mode == "last_layer" else compared_weights(model).values())
            expected = by_hand(workload, model, batch, weights)
        reference = space.mean_gradient(workload, model, {key: t[:3] for key, t in batch.items()})
        found = space.products(workload, model, batch, reference)
        assert space.products(workload, model, batch).past is None
    assert torch.allclose(reference, expected[:3].mean(0), rtol=0, atol=1e-12)
    assert torch.allclose(found.own, expected @ expected.T, rtol=0, atol=1e-10)
    assert found.past is not None
    assert torch.allclose(found.past, expected @ expected[:3].mean(0), rtol=0, atol=1e-10)
    assert found.past_norm == pytest.approx(float(expected[:3].mean(0).norm()))


@pytest.mark.parametrize("name", PROBLEMS)
def test_the_mean_of_the_gradients_is_the_gradient_of_the_mean(name: str):
    workload, model, batch = problem(name)
    space = found_in("full", workload, model)
    with scoring(model):
        single = per_sample(workload, model, batch)
        assert torch.allclose(single.mean(0), space.mean_gradient(workload, model, batch), rtol=0, atol=1e-12)


def test_norm_layers_are_left_out():
    _, model, _ = problem("resnet")
    assert not any("norm" in name for name in compared_weights(model))
    assert any("conv" in name for name in compared_weights(model))


def test_scoring_is_in_evaluation_mode_and_leaves_the_mode_as_it_was():
    _, model, batch = problem("mlp")
    model.train()
    with scoring(model):
        assert torch.equal(model(batch["x"]), model(batch["x"]))
    assert model.training
    assert not torch.equal(model(batch["x"]), model(batch["x"]))


@pytest.mark.parametrize("name", ["mlp", "convnet", "depthwise", "over_time"])
@pytest.mark.parametrize("mode", ["full", "last_layer", "features"])
def test_the_reported_flops_are_those_that_torch_counts(name: str, mode: Mode):
    workload, model, batch = problem(name)
    model = model.float()
    batch = {key: t.float() if t.is_floating_point() else t for key, t in batch.items()}
    network = measure(model, workload.loss, workload.sample(4), "net")
    log, space = WorkLog(10**9), space_of(mode, workload, model)
    space.log_products(log, network, 7, False)
    with scoring(model), counter() as counted:
        space.products(workload, model, batch)
    assert log.work().flops == pytest.approx(counted.get_total_flops(), rel=0.01)


def test_a_product_costs_its_multiply_adds_and_no_start():
    """[n, 3] @ [3, 5]: 15 per row, 30 FLOPs; no weights, activations or calls that a device would charge for."""
    product = matrix_product(3, 5)
    assert (product.forward_flops, product.parameter_bytes, product.activation_bytes, product.calls) == (30, 0, 0, 0)
    assert product.layers is not None
    assert {kind: row for kind, row in zip(KINDS, product.layers, strict=True) if any(row)} == {"fc": (15, 0, 0, 0)}


def test_masked_classes_have_no_gradient_in_the_closed_form():
    """Softmax of logits lowered by 1e4 is exactly 0."""
    workload, model, batch = problem("mlp")
    mask = torch.tensor([0.0, 0.0, -1e4, -1e4])
    workload.logits = lambda m, b: m(b["x"]) + mask  # type: ignore[method-assign]
    batch["y"] = batch["y"] % 2
    with scoring(model):
        found = found_in("last_layer", workload, model).mean_gradient(workload, model, batch)
        loss = F.cross_entropy(model(batch["x"])[:, :2], batch["y"])
        expected = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.head.parameters()))])
    assert torch.allclose(found, expected, rtol=0, atol=1e-12)
