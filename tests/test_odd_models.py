"""Models that other people write: what every method makes of them, or says of them before the first round.

A model is trained to finite weights in the dtypes that it came with, or refused in one sentence; see `test_buffers.py`
for what stands beside trained weights.
"""

from math import prod
from typing import Any

import pytest
import torch
from test_methods import HIDING, STOOD_FOR, Outcome, assert_contract, federate
from torch import Tensor, nn
from torch.nn import functional as F

from clients.trainers.rehearsal.agem import project
from clients.trainers.sgd import SGDTrainer
from devices.errors import UserError
from fedsim.errors import ConfigError
from fedsim.messages.records import all_finite, from_array
from fedsim.report.rounds import weights_sha256
from fedsim.settings.groups import options


class Plain(nn.Module):
    """Two layers and a norm in one dtype: what the odd ones are made of."""

    dtype = torch.float32

    def __init__(self, input_shape: tuple[int, ...], num_classes: int, **_: Any):
        super().__init__()
        self.inner = nn.Linear(prod(input_shape), 5, dtype=self.dtype)
        self.norm = self.make_norm()
        self.outer = nn.Linear(5, num_classes, dtype=self.dtype)

    def make_norm(self) -> nn.Module:
        return nn.GroupNorm(1, 5, dtype=self.dtype)

    def hidden(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.inner(x.flatten(1).to(self.inner.weight.dtype))))

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(self.hidden(x)).float()


class Double(Plain):
    dtype = torch.float64


class Half(Plain):
    dtype = torch.float16


class Mixed(Plain):
    """Layers of different precision."""

    def __init__(self, *args: Any, **more: Any):
        super().__init__(*args, **more)
        self.outer.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(self.hidden(x).to(self.outer.weight.dtype))


class Unused(Plain):
    """A trained layer that the forward pass leaves out, such as an auxiliary head."""

    def __init__(self, *args: Any, **more: Any):
        super().__init__(*args, **more)
        self.auxiliary = nn.Linear(3, 2)


class Scalar(Plain):
    """A trained number without dimensions."""

    def __init__(self, *args: Any, **more: Any):
        super().__init__(*args, **more)
        self.scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.scale


class Counting(Plain):
    """An integer buffer, and complex numbers that are not part of what is saved."""

    def __init__(self, *args: Any, **more: Any):
        super().__init__(*args, **more)
        self.register_buffer("steps", torch.tensor(0))
        self.register_buffer("turns", torch.ones(5, dtype=torch.complex64), persistent=False)

    def hidden(self, x: Tensor) -> Tensor:
        if self.training:
            self.steps += 1
        return super().hidden(x) * self.turns.real


class Everything(Counting, Scalar, Unused, Mixed):
    """All of these in one."""


class Untracked(Plain):
    """Normalised by each batch, in evaluation too."""

    def make_norm(self) -> nn.Module:
        return nn.BatchNorm1d(5, track_running_stats=False)


class Functional(Plain):
    """The same by a function, which no module shows."""

    def hidden(self, x: Tensor) -> Tensor:
        return F.relu(
            F.batch_norm(self.norm(self.inner(x.flatten(1).to(self.inner.weight.dtype))), None, None, training=True)
        )


class BFloat(Plain):
    dtype = torch.bfloat16


class Complex(Plain):
    def __init__(self, *args: Any, **more: Any):
        super().__init__(*args, **more)
        self.turned = nn.Parameter(torch.ones(5, dtype=torch.complex64))

    def hidden(self, x: Tensor) -> Tensor:
        return (super().hidden(x) * self.turned).abs()


class ComplexBuffer(Plain):
    def __init__(self, *args: Any, **more: Any):
        super().__init__(*args, **more)
        self.register_buffer("turns", torch.ones(5, dtype=torch.complex64))


class Lazy(Plain):
    def __init__(self, *args: Any, **more: Any):
        super().__init__(*args, **more)
        self.inner = nn.LazyLinear(5)


TRAINED = (Double, Half, Mixed, Unused, Scalar, Counting, Everything)
BATCHED = (Untracked, Functional)
REFUSED = {
    BFloat: r"^inner.weight of model BFloat is bfloat16, and weights that are sent and averaged must be float16, .*",
    Complex: r"^turned of model Complex is complex64, and .*; keep it as two real parts$",
    ComplexBuffer: r"^turns of model ComplexBuffer is complex64, and ",
    Lazy: r"^inner.weight of model Lazy has no shape before a first input \(a lazy layer\); give",
}
CONTINUAL = ("agem", "coreset", "ewc", "gss", "joint", "lwf", "ocs", "reservoir")  # with more to do when a task ends


def of(model: type[nn.Module]) -> str:
    return f"model._target_={__name__}.{model.__name__}"


def tried(*overrides: str) -> Outcome | str:
    """How a run ended, or the sentence that refused it."""
    try:
        return federate(*overrides)
    except UserError as error:
        return str(error)


def tasks(method: str) -> list[str]:
    return (
        ["stream=split_classes", "stream.tasks=3", "workload.num_classes=6", "workload.examples_per_client=42"]
        if method in CONTINUAL
        else []
    )


def overrides(method: str, model: type[nn.Module]) -> list[str]:
    """Three rounds with all that a step of SGD can do to a gradient."""
    step = ["trainer.clip_norm=1.0", "trainer.weight_decay=0.01", "trainer.momentum=0.5"]
    step += ["trainer.option=1"] if method == "scaffold" else []  # the other one refuses momentum and clipping
    return [f"method={method}", of(model), "model.hidden=null", "rounds=3", *step, *tasks(method)]


# Methods that look for the last linear layer, which is the unused one.
HEADLESS = {
    "fedrep": "FedRepTrainer has nothing to train in its private phase: the private parameters of model ",
    **dict.fromkeys(("fedproto", "gss", "moon"), "the last linear layer of model "),
}
EVERY = [
    pytest.param(method, model, marks=[] if model is Everything and method not in STOOD_FOR else [pytest.mark.slow])
    for method in options("method")
    for model in TRAINED
]


@pytest.mark.parametrize("method, model", EVERY)
def test_every_method_trains_odd_models_in_their_own_dtypes(method: str, model: type[nn.Module]):
    result = tried(*overrides(method, model))
    if isinstance(result, str) and method in HIDING:
        assert "would be averaged without noise" in result
        return
    if isinstance(result, str):
        assert issubclass(model, Unused)
        assert result.startswith(HEADLESS[method])
        return
    assert_contract(result, rounds=3)
    assert all_finite(result.federation.arrays)
    only_unused_is_shared = method == "lg_fedavg" and issubclass(model, Unused)
    nothing_used_is_shared = only_unused_is_shared or result.federation.roles.keeps_all
    assert (weights_sha256(result.federation.arrays) == weights_sha256(result.first)) == nothing_used_is_shared


@pytest.mark.parametrize(
    "method, model",
    [
        pytest.param(method, model, marks=[] if method == "fedavg" else [pytest.mark.slow])
        for method in options("method")
        for model in REFUSED
    ],
)
def test_what_cannot_be_sent_or_averaged_is_refused_before_the_first_round(method: str, model: type[nn.Module]):
    with pytest.raises(ConfigError, match=REFUSED[model]):
        federate(*overrides(method, model))


@pytest.mark.parametrize("together", [1, 3])
@pytest.mark.parametrize("step", ["trainer.weight_decay=0.5", "trainer.momentum=0.9", "trainer.clip_norm=0.1"])
def test_a_parameter_that_no_pass_uses_stays_as_it_was(step: str, together: int):
    """As torch.optim.SGD leaves it, trained alone or together with other clients; weights that are used move."""
    result = federate(of(Unused), "model.hidden=null", step, f"engine.batch_clients={together}")
    for name, array in result.federation.arrays.items():
        assert (array.data == result.first[name].data) == name.startswith("auxiliary")


def test_a_parameter_that_is_used_at_times_moves_as_in_torch():
    """Three steps of which the second does not use b: its momentum and decay rest, as in torch.optim.SGD."""
    trainer = SGDTrainer(lr=0.1, batch_size=1, momentum=0.9, weight_decay=0.1)
    ours, theirs = ([torch.tensor([1.0]), torch.tensor([2.0])] for _ in range(2))
    optimiser, velocity = torch.optim.SGD(theirs, lr=0.1, momentum=0.9, weight_decay=0.1), None
    for gradients in ([0.3, None], [0.5, 0.7], [-0.2, None], [0.1, 0.4]):
        given = [None if g is None else torch.tensor([g]) for g in gradients]
        velocity = trainer.step(ours, given, 0.1, velocity)
        for p, g in zip(theirs, given, strict=True):
            p.grad = None if g is None else g.clone()
        optimiser.step()
    assert torch.equal(torch.cat(ours), torch.cat(theirs))


def test_a_projection_leaves_what_one_of_the_passes_did_not_use():
    """G = (1, -, 2), r = (-1, 3, -): g.r = -1 and r.r = 10, so g + r / 10 where both are known."""
    g, r = (torch.tensor([1.0]), None, torch.tensor([2.0])), (torch.tensor([-1.0]), torch.tensor([3.0]), None)
    assert [float(p) for p in project(g, r)] == pytest.approx([0.9, 0.3, 2.0])
    assert project((g[0], None), (r[0], None))[1] is None


@pytest.mark.parametrize("uplink", ["int8", "topk", "randomk", "sparse_mask"])
@pytest.mark.parametrize("model", [Double, Half])
def test_uplinks_compress_weights_of_any_precision(model: type[nn.Module], uplink: str):
    """The bytes of the same network in float32, since changes travel as float32 or less; all of them in their dtype."""
    short = ["model.hidden=null", f"uplink={uplink}", "rounds=1"]
    odd, plain = federate(of(model), *short), federate(of(Plain), *short)
    assert_contract(odd, rounds=1)
    sent, usual = ([c.work.up_bytes for c in r.clients if c.phase == "train"] for r in (odd, plain))
    if uplink == "sparse_mask":  # of a half, more changes are none
        assert all(0 < a <= b for a, b in zip(sent, usual, strict=True))
    else:
        assert sent == usual
    whole = federate(of(model), "model.hidden=null", "rounds=1")
    if uplink in ("int8", "sparse_mask"):
        for name, array in whole.federation.arrays.items():
            assert from_array(odd.federation.arrays[name]) == pytest.approx(from_array(array), abs=0.01)


@pytest.mark.parametrize("model", BATCHED)
def test_a_last_batch_of_one_is_foreseen_where_no_running_statistics_help(model: type[nn.Module]):
    """13 examples (one of 14 is held out): batches of 4 and 6 leave one, of 5 and 13 do not; 3 steps end before it."""
    refused = rf"^client 0 has 13 examples to train on and ends in a batch of one, which model {model.__name__} cannot"
    for size in (1, 4, 6):
        with pytest.raises(ConfigError, match=refused + ".*; change trainer.batch_size, or "):
            federate(of(model), "model.hidden=null", f"trainer.batch_size={size}")
    for fits in ("trainer.batch_size=5", "trainer.batch_size=13", "trainer.local_steps=3"):
        assert_contract(federate(of(model), "model.hidden=null", fits), rounds=2)


@pytest.mark.slow
@pytest.mark.parametrize("model", BATCHED)
@pytest.mark.parametrize("method", options("method"))
def test_every_method_takes_or_refuses_norms_without_statistics(method: str, model: type[nn.Module]):
    for size in (4, 5):
        result = tried(*overrides(method, model), f"trainer.batch_size={size}")
        if not isinstance(result, str):
            assert_contract(result, rounds=3)
