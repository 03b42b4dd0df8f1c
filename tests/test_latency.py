"""Latency models that know the network, and the prices that profiles carry."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml

from devices.cost import ModelCost, Passes, Work, pack_works, unpack_works
from devices.enrol.picture import zoo_cost
from devices.enrol.zoo import ZOO
from devices.errors import DeviceError
from devices.latency.columns import TABLE_KINDS
from devices.latency.models import (
    HelpLatency,
    StructuredLatency,
    _shipped_tables,
    device_prices,
    fit_references,
    reference_features,
    step_ms,
    traced_reference,
)
from devices.latency.prices import Prices
from devices.profile import SHIPPED, DeviceProfile, LatencyFacts, load_profile, parse_profile, profile_names
from devices.trace import KINDS, trace

CONV, FC = KINDS.index("conv"), KINDS.index("fc")


def prices(constant: float = 0.0, overlap: float = 1.0, **cells: float) -> Prices:
    """Milliseconds by "kind_column", the rest 0."""
    table = np.zeros((len(KINDS), 4))
    for key, value in cells.items():
        kind, column = key.split("_")
        table[KINDS.index(kind), ("macs", "activations", "weights", "calls").index(column)] = value
    return Prices.of_cells(table, constant_ms=constant, overlap=overlap)


def device(latency: LatencyFacts | None, speed: float = 1.0, **fields: object) -> DeviceProfile:
    """A device that is nothing but its latencies: no peak, so nothing comes from the prior."""
    return replace(load_profile("reference"), peak_macs_per_s=None, latency=latency, speed=speed, **fields)


def network(macs: float = 1000.0, calls: float = 2.0, kind: int = CONV) -> ModelCost:
    rows = [[0.0] * 4 for _ in KINDS]
    rows[kind] = [macs, 10.0, 5.0, calls]
    return ModelCost("net", 2 * macs, 4 * macs, 0, 0, layers=tuple(map(tuple, rows)))


def test_forward_passes_cost_their_layers():
    """Batch 4: 4 x 1000 MACs x 0.001 ms + 2 calls x 0.5 ms = 5 ms; ten on a unit twice as fast: 25 ms."""
    facts = LatencyFacts(inference=prices(conv_macs=0.001, conv_calls=0.5))
    work = Work((Passes(network(), 4, forwards=10),))
    assert StructuredLatency().compute_s(work, device(facts, speed=2.0)) == pytest.approx(0.025)


def test_backward_passes_are_the_step_less_the_forward():
    """Forward 4 ms, step 10 ms; with half of the backward pass frozen away 4 + 6 / 2 ms."""
    facts = LatencyFacts(
        forward=prices(conv_macs=0.001), step=prices(conv_macs=0.0025), inference=prices(conv_macs=9.0)
    )
    latency, own = StructuredLatency(), device(facts)
    assert latency.compute_s(Work((Passes(network(), 4, 1, 1),)), own) == pytest.approx(0.010)
    frozen = replace(network(), backward_share=0.5)
    assert latency.compute_s(Work((Passes(frozen, 4, 1, 1),)), own) == pytest.approx(0.007)


def test_inference_has_its_own_runtime():
    facts = LatencyFacts(forward=prices(conv_macs=0.001), inference=prices(conv_macs=0.0005))
    assert StructuredLatency().inference_ms(network(), device(facts)) == pytest.approx(0.5)


def test_launches_hide_behind_work_on_a_card():
    """Calls take 3 ms and work 4 ms: with p = 2 the pass takes 5 ms, as a sum 7 ms."""
    layers = network().layers
    assert layers is not None
    assert prices(conv_macs=0.004, conv_calls=1.5, overlap=2.0).ms(layers, 1) == pytest.approx(5.0)
    assert prices(conv_macs=0.004, conv_calls=1.5).ms(layers, 1) == pytest.approx(7.0)
    assert prices(conv_macs=0.004, conv_calls=1.5).calls_share(layers, 1) == pytest.approx(3 / 7)


def test_a_product_inside_a_pass_starts_nothing():
    """No call in the table: neither the constant of old profiles nor a step's own calls are charged."""
    product = network(calls=0.0).layers
    assert product is not None
    assert prices(conv_macs=0.001, constant=3.0).ms(product, 1) == pytest.approx(1.0)
    extra = replace(prices(conv_macs=0.001, elementwise_calls=1.0), extra_calls=6.0)
    assert extra.ms(product, 1) == pytest.approx(1.0)
    started = network(calls=1.0).layers
    assert started is not None
    assert extra.ms(started, 1) == pytest.approx(7.0)


def test_a_step_is_never_cheaper_than_its_forward_pass():
    facts = LatencyFacts(forward=prices(conv_macs=0.003), step=prices(conv_macs=0.001), inference=prices())
    made = device_prices(device(facts))
    assert made.step is not None
    assert made.step.ms(network().layers, 1) == made.forward.ms(network().layers, 1)  # type: ignore[arg-type]


def test_joules_of_a_card_are_base_watts_and_work():
    """2 s at 100 W, and a step of 1000 MACs and 4 x (10 + 5) bytes three times over: 3 x (1000 x 0.01 + 60 x 0.1).

    In a tenth of a second, that would be 580 W: the board draws its limit of 200 W.
    """
    facts = LatencyFacts(inference=prices())
    card = device(facts, base_watts=100.0, joules_per_mac=0.01, joules_per_byte=0.1, compute_watts=200.0)
    work = Work((Passes(network(), 1, 1, 1),))
    assert StructuredLatency().compute_joules(work, card, 2.0) == pytest.approx(200 + 3 * (10 + 6))
    assert StructuredLatency().compute_joules(work, card, 0.1) == pytest.approx(20)
    plain = replace(card, base_watts=None)
    assert StructuredLatency().compute_joules(work, plain, 2.0) == pytest.approx(2 * plain.compute_watts)


def test_a_microcontroller_cannot_train_and_says_so():
    chip = load_profile("nucleo_l4r5zi")
    net = network()
    assert StructuredLatency().compute_s(Work((Passes(net, 1, 1),)), chip) > 0
    with pytest.raises(DeviceError, match=r"'nucleo_l4r5zi' \(mcu\) runs networks in int8 only and cannot train"):
        StructuredLatency().compute_s(Work((Passes(net, 1, 1, 1),)), chip)


def test_remarks_say_what_the_references_do_not_reach():
    layers = network(kind=FC).layers
    assert layers is not None
    own = replace(prices(fc_macs=1.0), kinds=("conv",), batches=(1, 1), largest_macs=100.0)
    assert own.remarks(layers, 4) == [
        "no reference has fc layers",
        "batch 4 is outside of the references' 1 to 1",
        "0 million MACs against 0 of the largest reference",
    ]
    inside = replace(own, kinds=("fc",), largest_macs=2000.0)
    assert inside.remarks(layers, 1) == []
    assert replace(own, basis="carried").remarks(layers, 4) == ["carried from other devices by peak and bandwidth"]


def test_prices_come_back_from_yaml():
    made = replace(
        prices(conv_macs=1.23e-8, fc_calls=0.002, overlap=2.0), basis="few rows", error=0.125, batches=(1, 8)
    )
    read = Prices.from_dict(yaml.safe_load(yaml.safe_dump(made.to_dict())))
    np.testing.assert_allclose(read.matrix, made.matrix, rtol=1e-12)
    assert replace(read, cells=made.cells) == made


def test_larger_batches_and_networks_never_cost_less():
    pairs = []
    for family in ("cnn", "resnet", "mobilenet", "mlp"):
        members = [z for z in ZOO.values() if z.family == family]
        traced = (trace(z.build(), z.example(1)).rows for z in (members[0], members[-1]))
        pairs.append([ModelCost(family, 0, 0, 0, 0, layers=rows) for rows in traced])
    for name in profile_names():
        profile = load_profile(name)
        if profile.kind == "mcu":
            continue
        for costs in pairs:
            small, large = (step_ms(cost, 1, profile) for cost in costs)
            assert small[0] <= large[0]
            assert step_ms(costs[0], 8, profile)[0] >= small[0] > 0
            assert small[1] <= large[1]


def test_a_device_or_a_network_without_facts_is_refused_in_one_sentence():
    work = Work((Passes(network(), 1, 1),))
    with pytest.raises(DeviceError, match="'reference' has no measured latencies and no peak"):
        StructuredLatency().compute_s(work, device(None))
    blank = Work((Passes(replace(network(), layers=None), 1, 1),))
    with pytest.raises(DeviceError, match="network 'net' was not traced, so only latency=flops can price it"):
        StructuredLatency().compute_s(blank, load_profile("pixel2"))


def test_shared_networks_travel_once():
    shared = network()
    works = [Work((Passes(shared, 4, 2, 1),), 7), Work((Passes(shared, 3, 1),)), Work()]
    packed = json.loads(json.dumps(pack_works(works)))
    assert len(packed["networks"]) == 1
    assert unpack_works(packed) == works


def test_layer_tables_of_old_runs_are_read():
    """Seven kinds in a stored run: its convolutions are `conv`, its groups `depthwise`."""
    old = {"name": "n", "forward_flops": 1, "backward_flops": 2, "parameter_bytes": 3, "activation_bytes": 4}
    rows = [[1, 2, 3, 4], [5, 6, 7, 8], [9, 1, 1, 1], [0, 1, 0, 1], [0, 2, 0, 1], [6, 6, 6, 6], [0, 0, 0, 0]]
    layers = ModelCost.from_dict({**old, "layers": rows}).layers
    assert layers is not None
    named = dict(zip(TABLE_KINDS, layers, strict=True))
    assert (named["conv"], named["depthwise"], named["fc"]) == ((1, 2, 3, 4), (9, 1, 1, 1), (6, 6, 6, 6))
    assert named["conv3x3"] == named["grouped"] == named["foldable"] == (0, 0, 0, 0)


# --- profiles of fedsim 0.1 ----------------------------------------------------------------------------------------


def test_coefficients_of_an_old_profile_price_as_they_did():
    """29 numbers: conv 1e-6 ms per MAC and 0.5 per call, elementwise 1e-5 per element, 3 ms a pass; conv steps 2.5."""
    figures = [0.0] * 29
    figures[0], figures[3], figures[17], figures[28] = 1e-6, 0.5, 1e-5, 3.0
    own = device(LatencyFacts(coefficients_ms=tuple(figures), train_ratio=(("conv", 2.5),)))
    rows = [[0.0] * 4 for _ in KINDS]
    rows[KINDS.index("conv3x3")] = [1e6, 0.0, 0.0, 1.0]
    rows[KINDS.index("foldable")] = [0.0, 1e5, 0.0, 1.0]
    cost = ModelCost("n", 0, 0, 0, 0, layers=tuple(map(tuple, rows)))
    forward, step = step_ms(cost, 2, own)
    assert forward == pytest.approx(2 * 1.0 + 0.5 + 2 * 1.0 + 3)
    assert step == pytest.approx(2.5 * 2.5 + 3 * 2 * 1.0 + 3 * 3)


def test_measured_zeros_stay_zeros_and_constant_layers_are_paid_once():
    """Estimators: convolutions only are not free, pooling is; the classifier that all references share adds nothing."""
    words = ("333333", "111111", "222222", "341213", "131313")
    tables = [np.array(traced_reference("nb201", word).rows) for word in words]
    conv = [KINDS.index(kind) for kind in ("conv3x3", "conv", "pointwise")]
    ms = [1e-6 * t[conv, 0].sum() + 0.5 for t in tables]
    facts = LatencyFacts(references=tuple(("nb201", w, 1, m) for w, m in zip(words, ms, strict=True)))
    table, constant = fit_references(facts)
    fitted = reference_features(facts)[:, :-1] @ table.ravel() + constant
    assert np.abs(fitted / ms - 1).max() < 0.01
    assert table[FC, 0] == pytest.approx(1e-6, rel=0.2)


# --- shipped profiles ----------------------------------------------------------------------------------------------

HELP_DEVICES = [name for name in profile_names() if (own := load_profile(name).latency) and own.references]


def test_fifteen_devices_carry_the_references_of_help():
    assert len(HELP_DEVICES) == 15
    for name in HELP_DEVICES:
        facts = load_profile(name).latency
        assert facts is not None
        assert len(facts.references) in (20, 30)
        assert len(facts.embedding_ms) == 10


def test_shipped_layer_tables_are_what_a_fresh_trace_says():
    tables = _shipped_tables()
    for space, word in (("nb201", "330333"), ("fbnet", "8640726444767724242784")):
        rows = np.array(traced_reference(space, word).rows)
        np.testing.assert_allclose(rows, np.array(tables[space][word]), rtol=1e-9)


def test_a_scaled_device_is_slower_by_its_factor():
    like = {"device": "raspberry_pi_4", "factor": {"value": 2.5, "provenance": "assumed", "source": "x"}}
    tree = {**yaml.safe_load((SHIPPED / "raspberry_pi_4.yaml").read_text()), "latency": {"scaled": like}}
    slow, own = device_prices(parse_profile(tree, "slow")), device_prices(load_profile("raspberry_pi_4"))
    np.testing.assert_allclose(slow.inference.matrix, 2.5 * own.inference.matrix)
    assert slow.step is not None
    assert own.step is not None
    np.testing.assert_allclose(slow.step.matrix, 2.5 * own.step.matrix)
    for prices in (slow.inference, slow.step):  # nobody has measured this device
        assert (prices.basis, prices.error) == ("scaled", None)
        assert prices.remarks(zoo_cost("resnet-16").layers, 4) == ["another device's, scaled"]


def test_a_variant_is_the_device_run_in_another_way():
    four, one = load_profile("raspberry_pi_4"), load_profile("raspberry_pi_4@1t")
    assert (four.threads, one.threads, one.name) == (4, 1, "raspberry_pi_4@1t")
    assert one.peak_macs_per_s == pytest.approx(four.peak_macs_per_s / 4)
    assert one.compute_watts < four.compute_watts
    cost = zoo_cost("resnet-16")
    assert all(slow > fast for slow, fast in zip(step_ms(cost, 16, one), step_ms(cost, 16, four), strict=True))
    assert device_prices(one).step.basis == "carried"  # type: ignore[union-attr]
    with pytest.raises(DeviceError, match="raspberry_pi_4@2t: unknown variant '2t'"):
        load_profile("raspberry_pi_4@2t")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"references": {"nb201@1": {"34121": 3}, "provenance": "dataset", "source": "x"}}, "six|6 operation ids"),
        (
            {"references": {"nb2@1": {"341213": 3}, "provenance": "dataset", "source": "x"}},
            "nb201@BATCH or fbnet@BATCH",
        ),
        ({"references": {"nb201@1": {"341213": -3}, "provenance": "dataset", "source": "x"}}, "above 0, got -3"),
        ({"references": {"nb201@1": {"341213": math.nan}, "provenance": "dataset", "source": "x"}}, "finite number"),
        (
            {"references": {"nb201@1": {"341213": 3}, "provenance": "guess", "source": "x"}},
            "unknown provenance 'guess'",
        ),
        ({}, "latency needs one of inference, forward, step, references"),
        ({"refs": {}}, "did you mean 'latency.references'"),
        ({"inference": {"runtime": "x"}}, "'latency.inference.prices' is missing"),
        (
            {"inference": {"runtime": "x", "prices": {"conf": [1, 2, 3, 4]}}},
            "did you mean 'latency.inference.prices.conv'",
        ),
        ({"inference": {"runtime": "x", "prices": {"conv": [1, 2, 3]}}}, "must be four numbers"),
        ({"inference": {"runtime": "x", "prices": {"conv": [1, 2, 3, -4]}}}, "0 or above, got -4"),
        ({"inference": {"runtime": "x", "basis": "row", "prices": {}}}, "did you mean 'rows'"),
        ({"inference": {"runtime": [], "prices": {}}}, "runtime' must be text"),
        ({"inference": {"runtime": "x", "precision": 3, "prices": {}}}, "precision' must be text"),
        ({"inference": {"runtime": "x", "kinds": ["conf"], "prices": {}}}, "kinds' must be a list of"),
        ({"inference": {"runtime": "x", "provenance": -1, "prices": {}}}, "unknown provenance '-1'"),
        ({"coefficients_ms": {"value": [1, 2], "provenance": "measured", "source": "x"}}, "a list of 29 numbers"),
    ],
)
def test_a_broken_latency_section_is_one_sentence(change: dict, sentence: str):
    tree = {**yaml.safe_load((SHIPPED / "pixel2.yaml").read_text()), "latency": change}
    with pytest.raises(DeviceError, match=sentence) as error:
        parse_profile(tree, "my.yaml")
    assert str(error.value).startswith("my.yaml: ")


@pytest.mark.parametrize("batch", ["", "0", "-1", "1.5", "one", "²", "٣", "9" * 5000])
def test_a_batch_of_references_that_is_no_whole_number_is_one_sentence(batch: str):
    """Superscripts and other scripts have digits too, which Python's `isdigit` takes for numbers."""
    latency = {"references": {f"nb201@{batch}": {"341213": 3}, "provenance": "dataset", "source": "x"}}
    tree = {**yaml.safe_load((SHIPPED / "pixel2.yaml").read_text()), "latency": latency}
    with pytest.raises(
        DeviceError, match=r"^my.yaml: key 'latency.references.nb201@.* must be nb201@BATCH or"
    ) as error:
        parse_profile(tree, "my.yaml")
    assert len(str(error.value)) < 300


# --- HELP as a latency model ---------------------------------------------------------------------------------------


def test_help_prices_networks_of_its_space_only(tmp_path):
    from devices.latency.help.training import HelpSettings, first_weights
    from devices.latency.help.weights import save_weights

    save_weights(first_weights("nb201", HelpSettings()), tmp_path / "w.safetensors")
    latency = HelpLatency(str(tmp_path / "w.safetensors"))
    inside = replace(network(), encoding="nb201:341213")
    one = Work((Passes(inside, 1, forwards=1),))
    step = Work((Passes(inside, 4, forwards=1, backwards=1),))
    pixel = load_profile("pixel2")
    assert latency.compute_s(step, pixel) == pytest.approx(12 * latency.compute_s(one, pixel))
    for encoding, what in ((None, "of no search space"), ("fbnet:0", "of space fbnet")):
        with pytest.raises(DeviceError, match=f"{what}, and latency=help can price networks of nb201 only"):
            latency.compute_s(Work((Passes(replace(network(), encoding=encoding), 1, 1),)), pixel)
    with pytest.raises(DeviceError, match="has no measurements of nb201 that HELP could adapt to"):
        latency.compute_s(one, device(LatencyFacts(inference=prices(conv_macs=1.0))))


# --- zoo ------------------------------------------------------------------------------------------------------------


def test_the_zoo_runs_and_spans_every_layer_kind_but_groups():
    spanned = np.zeros(len(KINDS), dtype=bool)
    for name, z in ZOO.items():
        with torch.inference_mode():
            assert torch.isfinite(z.build()(z.example(2))).all(), name
        spanned |= np.array(trace(z.build(), z.example(1)).rows).any(axis=1)
    assert [kind for kind, there in zip(KINDS, spanned, strict=True) if not there] == ["grouped"]
