"""Whether a network fits on a device: parts of memory, the largest batch and what would help, by hand."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from clients.trainers.sgd import SGDTrainer
from devices.cost import ModelCost
from devices.enrol.picture import traced_cost
from devices.fit import (
    StepMemory,
    fit,
    integer_bytes,
    largest_batch,
    powers_of_two,
    step_memory,
    width_that_fits,
)
from devices.latency.predictions import predict
from devices.meter import inference_bytes, measure
from devices.profile import load_profile
from devices.reserved import with_memory
from devices.units import energy, short_size
from fedsim.cli.devices.own_model import measure_cost, named_model

# 1000 bytes of weights. At the turn 1000 + 100 are there whatever the batch and 50 an example; at the end of the step
# all gradients, 2000, and 10 an example.
NETWORK = ModelCost("net", 200.0, 400.0, 1000, 0, step_bytes=((2000, 10), (1100, 50)), inference_bytes=((1000, 24),))


def test_parts_are_those_of_the_fullest_moment():
    """One example: 2010 against 1150. A hundred: 3000 against 6100, of which 5000 grow with the batch."""
    assert step_memory(NETWORK, 1, 0.0) == StepMemory(1000, 1000, 0, 10)
    assert step_memory(NETWORK, 100, 1.0) == StepMemory(1000, 100, 1000, 5000)
    assert step_memory(NETWORK, 100, 1.0).total == 7100


@pytest.mark.parametrize("name", ["lenet5", "resnet8", "mlp"])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("batch", [1, 20])
def test_total_is_what_a_run_reserves(name: str, momentum: float, batch: int):
    network = measure_cost(named_model(name, (1, 28, 28)))
    trainer = SGDTrainer(0.1, 20, momentum=momentum)
    assert step_memory(network, batch, float(momentum > 0)).total == trainer.step_bytes(network, batch)


def _loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return F.cross_entropy(model(batch["x"]).flatten(0, -2), batch["y"].flatten())


@pytest.mark.parametrize("name", ["small_cnn", "speech_resnet", "char_lstm"])
def test_shapes_alone_hold_what_is_measured(name: str):
    model = named_model(name, (1, 28, 28), 10, 12 if name == "char_lstm" else None)
    x = model.examples(4)
    batch = {"x": x, "y": torch.zeros(model.module(x).shape[:-1], dtype=torch.long)}
    network = with_memory(traced_cost(name, model.module, x), model.module, _loss, batch)
    assert network.step_bytes == measure(model.module, _loss, batch, name).step_bytes
    assert network.inference_bytes == inference_bytes(model.module, _loss, batch)


def test_attention_is_measured_for_real():
    """A CPU's fused kernel keeps less than the parts of attention that the meta device runs."""
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    batch = {"x": torch.zeros(4, 5, 8), "y": torch.zeros(4, 5, dtype=torch.long)}
    network = with_memory(NETWORK, model, _loss, batch)
    assert network.step_bytes == measure(model, _loss, batch, "attention").step_bytes


def test_largest_batch_is_the_last_that_fits():
    """4000 bytes: (4000 - 1100) / 50 = 58 at the turn, (4000 - 2000) / 10 = 200 at the end."""
    assert largest_batch(NETWORK, 0.0, 4000) == 58
    assert step_memory(NETWORK, 58, 0.0).total <= 4000 < step_memory(NETWORK, 59, 0.0).total
    assert largest_batch(NETWORK, 1.0, 4000) == 38
    assert largest_batch(NETWORK, 1.0, 3009) == largest_batch(NETWORK, 0.0, 2009) == 0
    assert powers_of_two(58) == [1, 2, 4, 8, 16, 32]
    assert powers_of_two(0) == []


def test_width_solves_weights_and_activations():
    """2000 w^2 + 10 w = 503 at the end of a step gives w near 0.499; the turn needs less."""
    width = width_that_fits(NETWORK, 0.0, 503)
    assert width == pytest.approx(0.499, abs=0.001)
    assert 2000 * width**2 + 10 * width == pytest.approx(503)
    assert width_that_fits(NETWORK, 0.0, 10_000) == 1.0


def test_integers_take_a_byte_for_each_element():
    assert integer_bytes(NETWORK) == (250, 6)


@pytest.fixture
def network() -> ModelCost:
    return measure_cost(named_model("lenet5", (1, 28, 28)))


def test_batches_are_powers_of_two_up_to_the_largest(network: ModelCost):
    device = replace(load_profile("raspberry_pi_4"), memory_bytes=step_memory(network, 9, 0.0).total)
    result = fit(network, device)
    assert (result.largest_batch, [row.batch for row in result.rows]) == (9, [1, 2, 4, 8])
    assert [row.batch for row in fit(network, load_profile("raspberry_pi_4")).rows][-1] == 512
    assert [row.fits for row in fit(network, device, (9, 10)).rows] == [True, False]


def test_joules_are_watts_times_seconds(network: ModelCost):
    device = load_profile("raspberry_pi_4")
    step = fit(network, device, (4,)).rows[0].prediction.step
    assert step is not None
    assert step.joules == pytest.approx(device.compute_watts * step.ms / 1e3)


def test_what_does_not_fit_gets_advice(network: ModelCost):
    """Memory for plain SGD with three examples, but not for one with momentum."""
    device = replace(load_profile("pixel3"), memory_bytes=step_memory(network, 3, 0.0).total)
    others = [load_profile(name) for name in ("raspberry_pi_4", "nucleo_h7a3zi", "galaxy_a50")]
    result = fit(network, device, momentum=True, others=others)
    assert (result.largest_batch, result.rows) == (0, ())
    needed, plain, narrower, other = result.advice
    assert needed.startswith(f"one example needs {short_size(result.needs_bytes)}")
    assert plain == "without momentum it fits, with batches up to 3"
    assert "times as wide" in narrower
    assert other.startswith("galaxy_a50 (phone) has")  # the same kind first, and no microcontroller
    assert fit(network, load_profile("pixel3")).advice == ()


@pytest.mark.parametrize(
    ("lacking", "words"),
    [
        (0.999, ["slightly more than", "a slightly narrower network would fit"]),
        (0.5, ["2.0 times the", "times as wide"]),
    ],
)
def test_factors_have_two_digits_and_are_left_out_at_one(lacking: float, words: list[str], network: ModelCost):
    needs = step_memory(network, 1, 0.0).total
    advice = "; ".join(fit(network, replace(load_profile("pixel3"), memory_bytes=int(needs * lacking))).advice)
    assert all(word in advice for word in words), advice
    assert " 1 times" not in advice
    assert " 1.0 times" not in advice


def test_microcontroller_runs_integers_and_cannot_train(network: ModelCost):
    """61706 parameters are as many bytes, of the 2 MB of flash."""
    result = fit(network, load_profile("nucleo_h7a3zi"))
    assert result.integers is not None
    assert (result.largest_batch, result.integers.weights, result.integers.fits) == (None, 61706, True)
    assert result.rows[0].prediction.step is None
    small = replace(load_profile("nucleo_h7a3zi"), memory_bytes=result.integers.activations - 1)
    assert fit(network, small).advice[0].startswith("activations are slightly more than the SRAM: ")
    half = replace(small, memory_bytes=result.integers.activations // 2)
    assert fit(network, half).advice[0].startswith("activations are 2.0 times the SRAM: ")


def test_prediction_says_how_far_it_is_known(network: ModelCost):
    step = predict(network, 64, load_profile("raspberry_pi_4")).step
    assert step is not None
    assert step.remarks == ("batch 64 is outside of the references' 16 to 16",)
    assert 0 < step.calls_share < 1
    carried = predict(network, 16, load_profile("pixel3")).step
    assert carried is not None
    assert (carried.error, carried.basis) == (None, "carried")
    assert predict(network, 1, load_profile("nucleo_h7a3zi")).step is None


def test_memory_reads_well():
    assert [short_size(n) for n in (12, 1536, 3e6, 1e9, 2e12)] == ["12 B", "1.54 kB", "3 MB", "1 GB", "2000 GB"]
    assert [energy(joules) for joules in (0, 0.0123, 1, 999, 2500)] == [
        "0.0 J",
        "12.3 mJ",
        "1.0 J",
        "999.0 J",
        "2.50 kJ",
    ]
    assert math.isclose(step_memory(NETWORK, 1, 0.0).total, 2010)
