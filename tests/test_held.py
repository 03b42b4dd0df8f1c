"""What a step holds in memory, against torch's own allocations."""

import pytest
import torch
from test_models import SPEECH
from torch import nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from devices.held import fullest_moments
from devices.meter import inference_bytes, measure, most_bytes, peak_memory_bytes
from fedsim.settings import model_factory, model_settings, options
from fedsim.tangents import _half, along

SHAPES = {"char_lstm": (80,), "mlp": (784,), **dict.fromkeys(SPEECH, (1, 40, 101))}
GREY = ("lenet5", "femnist_cnn", "small_cnn")


def network_and_batch(name: str, size: int) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """A configured model at the size of its usual data, and a batch of it."""
    shape = SHAPES.get(name, (1, 28, 28) if name in GREY else (3, 32, 32))
    classes = 65 if name == "char_lstm" else 10
    model = model_factory({"model": model_settings(name)})(input_shape=shape, num_classes=classes)
    if name == "char_lstm":
        return model, {"x": torch.randint(classes, (size, *shape)), "y": torch.randint(classes, (size, *shape))}
    return model, {"x": torch.randn(size, *shape), "y": torch.randint(classes, (size,))}


def loss_of(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return F.cross_entropy(model(batch["x"]).flatten(0, -2), batch["y"].flatten())


def allocated(run) -> int:
    """Most bytes that torch's CPU allocator had given out at once during `run()`, above those before."""
    run()  # kernels that are made at their first call
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as recorded:
        run()
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    assert held == 0, "what the run allocated is freed when it ends"
    return most


def always_there(model: nn.Module, batch: dict[str, torch.Tensor]) -> int:
    return sum(t.nbytes for t in (*model.parameters(), *model.buffers(), *batch.values()))


@pytest.mark.parametrize("batch_size", [10, 64])
@pytest.mark.parametrize("name", options("model"))
def test_peak_of_a_step_is_what_torch_allocates(name: str, batch_size: int):
    """Weights, buffers and batch, and what a step of SGD allocates: predicted within 15 %."""
    model, batch = network_and_batch(name, batch_size)
    parameters = list(model.train().parameters())

    def step() -> None:
        gradients = torch.autograd.grad(loss_of(model, batch), parameters)
        with torch.no_grad():
            torch._foreach_add_(parameters, gradients, alpha=0.0)

    truth = always_there(model, batch) + allocated(step)
    cost = measure(model, loss_of, network_and_batch(name, 4)[1], name)
    assert peak_memory_bytes(cost, batch_size, 0) == pytest.approx(truth, rel=0.15)


@pytest.mark.parametrize("name", options("model"))
def test_peak_of_an_inference_is_what_torch_allocates(name: str):
    model, batch = network_and_batch(name, 64)

    @torch.no_grad()
    def judge() -> None:
        loss_of(model, batch)

    truth = always_there(model.eval(), batch) + allocated(judge)
    moments = inference_bytes(model, loss_of, network_and_batch(name, 4)[1])
    assert most_bytes(moments, 64) == pytest.approx(truth, rel=0.15)


def test_moments_are_those_that_are_fullest_for_some_batch():
    """Held: 40; 40 and 8 each; 400 and 8 each; 400 and 16 each; 16 each and 8 more: the last for large batches only."""

    def run(size: int) -> None:
        fixed, each = torch.zeros(10), torch.zeros(size, 2)
        del fixed
        large = torch.zeros(100)
        each = each + 1
        del large
        each = torch.cat([each, each])

    assert fullest_moments(run, 2, 4) == ((400, 16), (0, 24))


def test_moments_do_not_depend_on_what_the_process_ran_before():
    """A constant that is made once per size, and another that hangs in a reference cycle until it is collected."""
    made: dict[int, torch.Tensor] = {}

    def run(size: int) -> None:
        if size not in made:
            made[size] = torch.ones(size)
        constant = made[size]
        cycle: list[object] = [constant * 2]
        cycle.append(cycle)

    fresh = fullest_moments(run, 2, 4)
    assert fullest_moments(run, 2, 4) == fresh
    del made[4]
    assert fullest_moments(run, 2, 4) == fresh


def test_forward_derivatives_cost_the_same_whatever_batches_were_derived_before():
    layers = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))

    def loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        out, slope = along(model, batch["x"], torch.ones(1, 6))
        return (out + slope).sum()

    _half.cache_clear()
    fresh = measure(layers, loss, {"x": torch.randn(4, 6)}, "fresh")
    _half.cache_clear()
    along(layers, torch.randn(2, 6), torch.ones(1, 6))
    assert measure(layers, loss, {"x": torch.randn(4, 6)}, "fresh") == fresh


def test_large_gradients_and_large_activations_are_held_at_different_moments():
    """A weight of 4000 bytes: with one example its gradient counts, with 1000 examples the activations."""
    model = nn.Sequential(nn.Linear(10, 100, bias=False), nn.ReLU(), nn.Linear(100, 1, bias=False))
    cost = measure(model, lambda m, b: m(b["x"]).sum(), {"x": torch.randn(4, 10)}, "two")
    assert len(cost.step_bytes) > 1
    weights = 4 * (1000 + 100)
    assert peak_memory_bytes(cost, 1, 0) < 2 * weights + 1000
    # batch, output of the ReLU, and its gradient beside the one of what goes into it
    assert peak_memory_bytes(cost, 1000, 0) >= weights + 1000 * 4 * (10 + 3 * 100)
