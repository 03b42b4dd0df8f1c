"""Forward derivatives by twice the batch, against torch's own forward mode in float64."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import pytest
import torch
from test_models import CONFIGS, batch_for, from_config
from torch import Tensor, nn
from torch.nn import functional as F

from clients.trainers.mixing.tangents import Dual, jvp


@pytest.fixture(autouse=True)
def _seeded():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        yield


def assert_as_torch(model: nn.Module, x: Tensor) -> None:
    """Output, derivative, and the gradients of both; torch's own has no channels-last group norm."""
    direction, plain = torch.randn_like(x[:1]), deepcopy(model).to(memory_format=torch.contiguous_format)
    ours = jvp(model, x, direction)
    torchs = torch.func.jvp(plain, (x,), (direction.expand_as(x),))
    spread = torch.randn_like(ours[0])
    for mine, other in zip(ours, torchs, strict=True):
        assert torch.allclose(mine, other, atol=1e-9)
        for a, b in zip(gradients(mine * spread, model), gradients(other * spread, plain), strict=True):
            assert torch.allclose(a, b, atol=1e-9)


def gradients(result: Tensor, model: nn.Module) -> list[Tensor]:
    weights = list(model.parameters())
    found = torch.autograd.grad(result.sum(), weights, retain_graph=True, allow_unused=True)
    return [torch.zeros_like(w) if g is None else g for g, w in zip(found, weights, strict=True)]


@pytest.mark.parametrize("path", [p for p in CONFIGS if p.stem != "char_lstm"], ids=lambda path: path.stem)
def test_every_model_as_torch_has_it(path: Path):
    model = from_config(path).double()
    assert_as_torch(model, batch_for(path).double()[:3])


class Odd(nn.Module):
    """What layers of ours do not do, and others may: operators, methods, means, joins, in place."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(2, 4, 3, padding=1, stride=2), nn.Linear(4, 3)
        self.one = nn.Conv1d(4, 4, 3, groups=2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu_(self.first(x))
        x = torch.cat([x, -2 * x.tanh()], 1)[:, 2:6]
        x = 1.5 - (x + x * x) / 3
        x = F.max_pool2d(F.pad(x, (1, 1, 0, 0)), (2, 1), stride=1, padding=(1, 0))
        same = x
        x += x.mean((2, 3), keepdim=True)
        x.clamp_(max=1.5)
        x = x + same
        x = self.one(x.view(x.shape[0], 4, -1)).sum(-1)
        return self.last(F.group_norm(x, 2)).sigmoid()


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_operators_and_methods_as_torch_has_them(memory_format: torch.memory_format):
    assert_as_torch(Odd().double().to(memory_format=memory_format), torch.randn(3, 2, 9, 8).double())


def test_dropout_is_the_same_for_values_and_derivatives():
    """Of a linear network: the derivative along x is the output less the bias."""
    model = nn.Sequential(nn.Linear(30, 40, bias=False), nn.Dropout(0.5), nn.Linear(40, 2, bias=False)).double()
    x = torch.randn(1, 30).double()
    value, slope = jvp(model, x, x)
    assert torch.allclose(value, slope)


def test_a_network_that_forgets_its_input_has_no_derivative():
    with pytest.raises(NotImplementedError, match="does not pass on forward derivatives"):
        jvp(lambda x: torch.ones(2), torch.ones(1, 3), torch.ones(1, 3))


def test_a_dual_looks_like_its_value():
    dual = Dual(torch.arange(12.0).view(4, 3))
    assert (dual.shape, dual.dim(), dual.size(0), dual.dtype) == ((2, 3), 2, 2, torch.float32)
    assert (dual.argmax(1) == 2).all()
