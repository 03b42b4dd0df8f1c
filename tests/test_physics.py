"""Laws of nature: no shipped device computes faster than its datasheet allows, and more work never takes less time."""

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from test_models import SPEECH

from devices.cost import FlopsLatency, Jitter, ModelCost, Passes, Work
from devices.enrol.picture import zoo_cost
from devices.enrol.zoo import ZOO
from devices.latency.columns import MAC_ROWS, STEP_MACS, TABLE_KINDS, WINOGRAD_GAIN, Physics
from devices.latency.limits import peak_in, physics_of
from devices.latency.models import StructuredLatency, device_prices, step_ms
from devices.latency.prices import Prices
from devices.profile import LatencyFacts, load_profile, profile_names
from fedsim.cli.devices.own_model import named_model, trace_cost

BATCHES = (1, 8, 64, 512)


@cache
def zoo_costs() -> dict[str, ModelCost]:
    return {name: zoo_cost(name) for name in ZOO}


@cache
def speech_costs() -> dict[str, ModelCost]:
    return {name: trace_cost(named_model(name, shape)) for name, shape in SPEECH.items()}


SILICON = [name for name in profile_names() if load_profile(name).peak_macs_per_s is not None]
CPUS = [name for name in SILICON if load_profile(name).kind not in ("gpu", "mcu")]
MANY_CORES = {"epyc_7742", "vm_xeon", "xeon_gold_6226", "xeon_gold_6240"}  # see `test_time_grows_with_the_batch`


def phases(name: str) -> dict[str, Prices]:
    made = device_prices(load_profile(name))
    found = {"inference": made.inference, "forward": made.forward}
    return found if made.step is None else {**found, "step": made.step}


def layers_of(cost: ModelCost) -> tuple[tuple[float, ...], ...]:
    assert cost.layers is not None
    return cost.layers


@pytest.mark.parametrize("name", SILICON)
def test_nothing_is_faster_than_the_peak(name: str):
    """Any network, image size and batch: multiply-adds at the peak are the least; Winograd saves three of four."""
    profile = load_profile(name)
    assert profile.peak_macs_per_s is not None
    for phase, prices in phases(name).items():
        peak = peak_in(profile, prices.precision)
        assert peak is not None
        for cost in (*zoo_costs().values(), *speech_costs().values()):
            for side in (1, 4, 49):  # pixels of the image, in times those of the zoo
                table = np.array(layers_of(cost)) * [side, side, 1, 1]
                macs = table[MAC_ROWS, 0]
                saved = macs[0] * (1 - 1 / WINOGRAD_GAIN) if phase == "inference" or profile.kind == "gpu" else 0.0
                for batch in BATCHES:
                    least_ms = 1e3 * batch * (macs.sum() - saved) / peak * (STEP_MACS if phase == "step" else 1)
                    ms = prices.ms(tuple(map(tuple, table)), batch)
                    assert ms >= least_ms * 0.999, (name, phase, cost.name, batch, side)


def layers_of_one_kind(kind: str) -> tuple[tuple[float, ...], ...]:
    """Four layers of a kind, large enough that arithmetic counts, and the norms between them."""
    table = np.zeros((len(TABLE_KINDS), 4))
    table[TABLE_KINDS.index(kind)] = [3e8, 2e6, 4e6, 4]
    table[TABLE_KINDS.index("foldable")] += [2e6, 4e6, 1e3, 4]
    return tuple(map(tuple, table))


def test_bytes_of_a_pass_are_never_faster_than_the_memory():
    """A fully connected layer of 400 MB on a Pi 4 (12.8 GB/s), on a unit a thousand times as fast: 31 ms at least."""
    table = np.zeros((len(TABLE_KINDS), 4))
    table[TABLE_KINDS.index("fc")] = [1e8, 0, 1e8, 1]
    cost = ModelCost("fc", 2e8, 4e8, 0, 0, layers=tuple(map(tuple, table)))
    unit = replace(load_profile("raspberry_pi_4"), speed=1000.0)
    spent = StructuredLatency().cost(Work((Passes(cost, 1, 1),)), unit, Jitter(compute=0.1))
    assert spent.compute_s == pytest.approx(4e8 / 12.8e9)


KIND_COSTS = {k: ModelCost(k, 6e8, 12e8, 16_000_000, 8_000_000, layers=layers_of_one_kind(k)) for k in TABLE_KINDS}


@pytest.mark.parametrize("name", profile_names())
def test_no_unit_and_no_round_is_beyond_the_datasheet(name: str):
    """A unit three times as fast or slow as its model, in the luckiest round, is held to peak, bandwidth and limit."""
    model = load_profile(name)
    step = device_prices(model).step
    trains, peak = step is not None, None if step is None else peak_in(model, step.precision)
    for latency in (StructuredLatency(), FlopsLatency()):  # the naive one counts FLOPs and knows no bytes
        for factor in (1 / 3, 1.0, 3.0):
            unit = replace(model, speed=model.speed * factor, flops_per_s=model.flops_per_s * factor)
            for cost in KIND_COSTS.values():
                for batch in (1, 64):
                    macs = batch * sum(cost.layers[row][0] for row in MAC_ROWS)  # type: ignore[index]
                    work = Work((Passes(cost, batch, 1, int(trains)),))
                    spent = latency.cost(work, unit, Jitter(compute=1 / factor))
                    if peak is not None:
                        assert spent.compute_s * peak >= STEP_MACS * macs * 0.999
                    least, most = (spent.compute_s * watts for watts in (unit.idle_watts, unit.compute_watts))
                    assert least * 0.999 <= spent.compute_joules <= most * 1.001, (cost.name, batch, factor)


@pytest.mark.parametrize("name", profile_names())
def test_more_pixels_examples_or_layers_never_take_less_time(name: str):
    one_more = np.zeros((len(TABLE_KINDS), 4))
    one_more[TABLE_KINDS.index("conv")] = [1e6, 1e4, 1e3, 1]
    for prices in phases(name).values():
        assert min(min(row) for row in prices.cells) >= 0
        for cost in zoo_costs().values():
            table = layers_of(cost)
            taller = tuple(map(tuple, np.array(table) * [2, 2, 1, 1]))
            deeper = tuple(map(tuple, np.array(table) + one_more))
            for batch in BATCHES:
                ms = prices.ms(table, batch)
                assert prices.ms(table, 2 * batch) >= ms > 0
                assert prices.ms(taller, batch) >= ms
                assert prices.ms(deeper, batch) >= ms


@pytest.mark.parametrize("name", CPUS)
def test_time_grows_with_the_batch(name: str):
    """Batch 64 takes 8 to 64 times as long as batch 1 in networks of 50 million multiply-adds or more.

    On processors with eight threads and more such a network is overhead at batch 1, as it is in nature: a 41 million
    MAC ResNet-20 was measured at 6.4 times on eight threads of a Xeon, a 150 million MAC ShuffleNet's step at 6.9.
    """
    least = 2 if name in MANY_CORES else 8
    for phase, prices in phases(name).items():
        for cost in zoo_costs().values():
            if cost.forward_flops / 2 >= 50e6:
                ratio = prices.ms(layers_of(cost), 64) / prices.ms(layers_of(cost), 1)
                assert least <= ratio <= 64.001, (name, phase, cost.name, ratio)


@pytest.mark.parametrize("name", [n for n in SILICON if load_profile(n).kind != "mcu"])
def test_a_step_costs_more_than_its_forward_pass(name: str):
    made = phases(name)
    for cost in zoo_costs().values():
        for batch in BATCHES:
            assert made["step"].ms(layers_of(cost), batch) >= made["forward"].ms(layers_of(cost), batch)


@pytest.mark.parametrize("name", [n for n in profile_names() if load_profile(n).kind != "mcu"])
def test_a_step_costs_more_than_a_forward_pass_in_any_runtime(name: str):
    """Measured steps hold down what the datasheet says of inference, on this unit and on one that is faster."""
    for speed in (1.0, 4.0):
        unit = replace(load_profile(name), speed=speed)
        for cost in (*KIND_COSTS.values(), *zoo_costs().values()):
            for batch in (1, 1024):
                forward, step = step_ms(cost, batch, unit)
                assert step >= forward * 0.999, (cost.name, batch, forward, step)


def test_measurements_stay_where_the_datasheet_disagrees():
    """A measured step ten thousand times as fast holds its forward pass: the datasheet's comes down to it."""
    pi = load_profile("raspberry_pi_4")
    assert pi.latency is not None
    assert pi.latency.step is not None
    quick = pi.latency.step.scaled(1e-4)
    own = replace(pi, name="quick", latency=LatencyFacts(step=quick))
    made, layers = device_prices(own), layers_of(zoo_costs()["resnet-16"])
    assert made.step is not None
    assert made.step.ms(layers, 8) == quick.ms(layers, 8) == made.inference.ms(layers, 8) == made.forward.ms(layers, 8)


def test_devices_of_one_chip_without_rows_agree():
    """Training steps of phones with a Snapdragon 835 come from the datasheet: within a factor 2 at equal threads."""
    phones = [load_profile(name) for name in ("pixel2", "essential_ph1", "mi_6")]
    assert {p.soc for p in phones} == {"Snapdragon 835"}
    assert len({p.threads for p in phones}) == 1
    for one in phones:
        for other in phones:
            ratios = [step_ms(c, 16, one)[1] / step_ms(c, 16, other)[1] for c in zoo_costs().values()]
            assert 0.5 < np.median(ratios) < 2


def test_a_mobilenet_trains_slower_than_a_resnet_on_a_pi():
    """Measured on a Pi 4, batch 16: a MobileNetV2 step takes 15.3 s, a ResNet-18 step 10.9 s."""
    import torch
    from torchvision import models

    from devices.enrol.picture import traced_cost

    pi, image = load_profile("raspberry_pi_4"), torch.zeros(1, 3, 224, 224)
    mobilenet, resnet = (traced_cost("n", m(weights=None), image) for m in (models.mobilenet_v2, models.resnet18))
    seconds = [step_ms(cost, 16, pi)[1] / 1e3 for cost in (mobilenet, resnet)]
    assert seconds == [pytest.approx(15.3, rel=0.15), pytest.approx(10.9, rel=0.15)]


def test_bounds_hold_for_a_device_that_claims_the_impossible():
    """A datasheet a hundred times slower makes everything slower, whatever the prior says."""
    fast = load_profile("pixel4")
    assert fast.peak_macs_per_s is not None
    slow = replace(fast, peak_macs_per_s=fast.peak_macs_per_s / 100, latency=None, name="slow")
    for cost in zoo_costs().values():
        assert step_ms(cost, 8, slow)[1] > step_ms(cost, 8, fast)[1]


def test_a_card_with_tensor_cores_says_which_peak_its_rows_had():
    """An A100 does 9.7 TMAC/s in fp32 and eight times that in TF32, which its rows were measured in."""
    card = load_profile("a100")
    assert (card.peak_macs_per_s, peak_in(card, "tf32")) == (9745e9, pytest.approx(77960e9))
    assert {prices.precision for prices in phases("a100").values()} == {"tf32"}


def test_physics_of_a_profile_are_its_datasheet():
    pi = load_profile("raspberry_pi_4")
    known = physics_of(pi)
    assert known is not None
    physics, facts = known
    assert physics == Physics(28.8e9, 12.8e9, "arm", 4, 1.8)
    assert (facts.threads, facts.in_order, facts.isa) == (4, False, "arm")
    little = physics_of(load_profile("raspberry_pi_3b_plus"))
    assert little is not None
    assert little[1].in_order
