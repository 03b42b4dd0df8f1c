"""What each device runs of the trained network: recipes by tier, sizes by hand, prices of the true shape."""

import json

import numpy as np
import pytest
import torch
from hydra.utils import get_class

from clients.trainers.base import LocalTrainer
from devices.compression.plan import CompressionPlan, Recipe
from devices.cost import ModelCost
from devices.errors import DeviceError
from devices.latency.models import StructuredLatency, deployed_ms, int8_ms
from devices.profile import LatencyFacts, load_profile
from devices.trace import KINDS, trace
from fedsim.errors import ConfigError
from fedsim.messages.records import tensors_of
from fedsim.models.lenet import LeNet5
from fedsim.models.mlp import MLP
from fedsim.runs.deployment import calibration
from fedsim.settings.groups import options, preset, target_of
from fedsim.workloads.base import Examples, Workload
from fedsim.workloads.blobs import Blobs

LENET = ("model=lenet5", "workload.input_shape=[1,12,12]", "latency=structured")


def test_a_device_follows_its_name_before_its_kind_and_inherits_the_rest():
    plan = CompressionPlan(sparsity=0.5, tiers={"phone": {"keep": 0.5}, "pixel3": {"bits": 8, "sparsity": 0.0}})
    assert plan.recipe(load_profile("pixel3")) == Recipe(1.0, 0.0, 8)
    assert plan.recipe(load_profile("galaxy_s7")) == Recipe(0.5, 0.5, 32)
    assert plan.recipe(load_profile("raspberry_pi_4")) == Recipe(1.0, 0.5, 32)
    assert not CompressionPlan().active
    assert not CompressionPlan(tiers={"phone": {"keep": 1.0}}).active


def test_sizes_of_a_pruned_and_masked_network_by_hand():
    """LeNet-5 for 12x12 and 3 classes at half width: 3, 8, 60, 42 channels; then 80 % of its weights are zero."""
    model, x = LeNet5((1, 12, 12), 3).eval(), torch.randn(2, 1, 12, 12)
    plan = CompressionPlan(round_to=1)
    done = plan.apply(model, x, Recipe(keep=0.5, sparsity=0.8))
    weights = 3 * 25 + 8 * 3 * 25 + 60 * 8 + 42 * 60 + 3 * 42
    biases = 3 + 8 + 60 + 42 + 3
    assert done.dense_bytes == 4 * (weights + biases)
    assert done.nonzero_bytes == 4 * (weights - int(0.8 * weights) + biases)
    assert done.nonzero_bytes < done.wire_bytes < done.dense_bytes
    assert done.keep_ratio == 113 / 226
    assert trace(done.shape, x).macs == trace(done.model, x).macs < trace(model, x).macs
    assert sum(int((p == 0).sum()) for p in done.model.parameters()) == int(0.8 * weights)
    assert all(bool((p != 0).all()) for p in done.shape.parameters())


def test_zeros_save_bytes_and_no_time():
    model, x = LeNet5((1, 12, 12), 3).eval(), torch.randn(2, 1, 12, 12)
    sparse = CompressionPlan().apply(model, x, Recipe(sparsity=0.9))
    assert trace(sparse.shape, x) == trace(model, x)
    assert sparse.wire_bytes < 0.2 * sparse.dense_bytes


def test_nothing_to_do_is_the_network_itself():
    model, x = LeNet5((1, 12, 12), 3).eval(), torch.randn(2, 1, 12, 12)
    done = CompressionPlan().apply(model, x, Recipe())
    assert done.model is model
    assert done.dense_bytes == done.nonzero_bytes == sum(4 * p.numel() for p in model.parameters())


def test_integers_take_a_quarter_of_the_bytes():
    model, x = LeNet5((1, 12, 12), 3).eval(), torch.randn(2, 1, 12, 12)
    done = CompressionPlan().apply(model, x, Recipe(bits=8), [torch.randn(8, 1, 12, 12) for _ in range(8)])
    assert 3.3 < done.dense_bytes / done.wire_bytes < 4
    assert not torch.equal(done.model(x), model(x))
    torch.testing.assert_close(done.model(x), model(x), rtol=0.05, atol=0.02)


def test_calibration_sees_the_first_examples_only():
    data = Examples({"x": torch.arange(300.0).view(300, 1), "y": torch.zeros(300, dtype=torch.int64)})
    workload = Blobs(MLP, 1, seed=0)
    batches = list(calibration(workload, data))
    assert [len(b) for b in batches] == [16] * 8
    assert torch.equal(torch.cat(batches).flatten(), torch.arange(128.0))
    few = Examples({"x": torch.ones(20, 1), "y": torch.ones(20)})
    assert [len(b) for b in calibration(workload, few)] == [16, 4]


def test_every_tier_of_the_fleet_is_judged_weighed_and_priced(run):
    summary = run(*LENET, "fleet=mixed", "num_clients=40", "compression=tiered", "workload.num_classes=3")
    entries = summary["compression"]
    assert sum(sum(e["devices"].values()) for e in entries) == 40
    by_keep = {e["keep"]: e for e in entries}
    assert set(by_keep) == {0.25, 0.5, 1.0}
    dense = by_keep[1.0]
    assert "raspberry_pi_4" in by_keep[0.25]["devices"]
    assert by_keep[0.25]["wire_bytes"] < by_keep[0.5]["wire_bytes"] < 0.3 * dense["wire_bytes"]
    assert by_keep[0.25]["flops"] < by_keep[0.5]["flops"] < dense["flops"]
    assert dense["accuracy"] == summary["final"]["accuracy"]
    for entry in entries:
        assert set(entry["latency_ms"]) == set(entry["devices"])
        assert all(ms > 0 for ms in entry["latency_ms"].values())


def test_a_smaller_network_is_predicted_to_be_faster_on_the_same_device(run, tmp_path):
    ms = {}
    for keep in (1.0, 0.25):
        own = ("compression.sparsity=0.1", f"compression.keep={keep}", "compression.round_to=1")
        (entry,) = run(*LENET, "fleet=phones", "rounds=1", *own, out=tmp_path / str(keep))["compression"]
        ms[keep] = entry["latency_ms"]
    assert ms[0.25].keys() == ms[1.0].keys()
    assert all(ms[0.25][device] < ms[1.0][device] for device in ms[1.0])


def test_client_rows_say_what_their_device_runs(federation):
    made = federation(
        *(*LENET, "fleet=mixed", "num_clients=40", "evaluate_clients=20", "rounds=1", "compression=tiered"),
        "workload.client_test_fraction=0.25",
    )
    rows = [c for _, clients in made.rounds() for c in clients if c.phase == "evaluate" and c.outcome == "completed"]
    assert len({row.metrics["keep_ratio"] for row in rows}) > 1
    plan = CompressionPlan(tiers=made.settings.groups["compression"]["tiers"])
    for row in rows:
        recipe = plan.recipe(made.world.fleet[row.client])
        assert (row.metrics["keep_ratio"] < 1) == (recipe.keep < 1)
        assert row.metrics["wire_bytes"] > 0
        assert row.metrics["latency_ms"] > 0
        assert row.work.flops > 0


def test_clients_share_what_does_not_depend_on_their_data(federation, monkeypatch):
    """Six clients of one recipe: one pruning an exchange; integers are each client's own."""
    pruned, calls = CompressionPlan.prune, []
    monkeypatch.setattr(CompressionPlan, "prune", lambda *a, **k: calls.append(1) or pruned(*a, **k))
    own = ("compression=quantise", "compression.keep=0.5", "evaluate_clients=6", "rounds=2")
    made = federation(*LENET, *own, "workload.client_test_fraction=0.25")
    rows = [c for _, clients in made.rounds() for c in clients if c.phase == "evaluate"]
    assert (len(rows), len(calls)) == (12, 2)
    plan = CompressionPlan(keep=0.5, bits=8)
    made.model.load_state_dict(tensors_of(made.arrays))
    example = made.world.workload.sample(2)["x"]
    for row in rows[6:]:
        data = made.world.workload.client_data(row.client)
        alone = plan.apply(made.model, example, Recipe(0.5, 0.0, 8), calibration(made.world.workload, data.train))
        assert made.world.workload.evaluate(alone.model, data.test)["loss"] == pytest.approx(row.metrics["loss"])


def test_a_run_without_compression_says_nothing_of_it(run):
    assert "compression" not in run()


def test_integer_kernels_are_priced_where_they_were_measured():
    """One millisecond per call of a pointwise layer, half of that in integers, on a device twice as fast."""
    from dataclasses import replace

    from devices.latency.prices import Prices

    rows = [[0.0] * 4 for _ in KINDS]
    rows[KINDS.index("pointwise")][3] = 6.0
    network = ModelCost("six", 1.0, 2.0, 4, 4, layers=tuple(map(tuple, rows)))
    cells = np.zeros((len(KINDS), 4))
    cells[KINDS.index("pointwise"), 3] = 0.5
    profile = load_profile("pixel3")
    measured = replace(profile, speed=2.0, latency=LatencyFacts(int8=Prices.of_cells(cells)))
    assert int8_ms(network, 1, measured) == pytest.approx(1.5)
    assert int8_ms(network, 1, replace(profile, latency=LatencyFacts())) is None


@pytest.mark.parametrize("device, slower", [("raspberry_pi_4", False), ("rock_5b", True), ("mi_max_3", None)])
def test_eight_bits_move_time_where_they_were_measured_in_either_direction(device: str, slower: bool | None):
    profile, latency = load_profile(device), StructuredLatency()
    network = ModelCost("one", 1.0, 2.0, 4, 4, layers=trace(LeNet5((1, 12, 12), 3), torch.randn(2, 1, 12, 12)).rows)
    ms = latency.inference_ms(network, profile)
    assert deployed_ms(latency, network, profile, 32) == deployed_ms(latency, network, profile, 4) == ms
    if slower is None:
        assert int8_ms(network, 1, profile) is None
        assert deployed_ms(latency, network, profile, 8) == ms
    else:
        ratio = profile.latency.int8_over_float
        assert deployed_ms(latency, network, profile, 8) == pytest.approx(ratio * ms)
        assert (ratio > 1) == slower


def test_a_run_prices_its_quantised_network_so(federation):
    fleet = "fleet.devices={raspberry_pi_4: 1, mi_max_3: 1}"
    common = (*LENET, "fleet=sbc", fleet, "evaluate_clients=6", "workload.client_test_fraction=0.25", "rounds=1")
    plain, made = (federation(*common, "compression=quantise", f"compression.bits={bits}") for bits in (4, 8))
    ratio = load_profile("raspberry_pi_4").latency.int8_over_float
    judged = [[c for _, clients in one.rounds() for c in clients if c.phase == "evaluate"] for one in (plain, made)]
    for before, after in zip(*judged, strict=True):
        factor = ratio if made.world.fleet.device_name(after.client) == "raspberry_pi_4" else 1.0
        assert after.metrics["latency_ms"] == pytest.approx(factor * before.metrics["latency_ms"])
    (entry,) = made.deploy()
    assert entry["no_int8"] == ["mi_max_3"]


@pytest.mark.parametrize(
    "own, in_int8",
    [
        (("trainer.bits=8", "trainer.activation_bits=8"), True),
        (("trainer.bits=4", "trainer.activation_bits=8"), True),
        (("trainer.bits=8",), False),
        (("trainer.bits=4", "trainer.activation_bits=4"), False),
        (("trainer.sparsity=0.9",), False),
    ],
)
def test_a_network_that_a_trainer_compressed_is_priced_so_behind_the_dense_rounds(federation, own, in_int8):
    """Zeros, fewer bits and integers of weights alone move no time, and neither do rounds in floats."""
    common = (*LENET, "fleet=sbc", "fleet.devices={raspberry_pi_4: 1, mi_max_3: 1}", "evaluate_clients=6", "rounds=2")
    common += ("method=gradual", "trainer.sparsity=0", "trainer.dense_rounds=1", "trainer.prune_rounds=0")
    made = federation(*common, *own, "workload.client_test_fraction=0.25")
    latency, judged = made.world.latency, []
    for number, (_, clients) in enumerate(made.rounds()):
        for client in (c for c in clients if c.phase == "evaluate"):
            profile = made.world.fleet[client.client]
            (network,) = {p.network for p in client.work.passes}
            factor = profile.latency.int8_over_float if in_int8 and number == 2 else None
            expected = latency.inference_ms(network, profile) * (factor or 1.0)
            assert client.metrics["latency_ms"] == pytest.approx(expected)
            judged.append((number, profile.name))
    assert {(number, name) for number in (1, 2) for name in ("raspberry_pi_4", "mi_max_3")} <= set(judged)


@pytest.mark.parametrize(
    "overrides, sentence",
    [
        (("compression.keep=0.0",), r"compression.keep must be in \(0, 1\]"),
        (("compression.sparsity=1.0",), r"compression.sparsity must be in \[0, 1\)"),
        (("compression.bits=16",), "compression.bits must be 32 or from 2 to 8, got 16"),
        (("compression.order=fist",), "did you mean 'first'"),
        (("compression.round_to=0",), "compression.round_to must be at least 1"),
        (("+compression.tiers.fone={keep:0.5}",), "did you mean 'phone'"),
        (("+compression.tiers.phone={kept:0.5}",), "did you mean 'keep'"),
        (("compression=tierd",), "did you mean 'tiered'"),
    ],
)
def test_wrong_settings_are_one_sentence_before_the_run(federation, overrides, sentence):
    with pytest.raises((DeviceError, ConfigError), match=sentence):
        federation(*overrides)


def test_a_network_that_cannot_be_narrowed_is_refused_before_the_run(settings):
    from clients.app import serve
    from fedsim.engines.local import LocalEngine
    from fedsim.models.char_lstm import CharLSTM
    from fedsim.runs.federation import Federation
    from fedsim.settings.build import build_world

    world = build_world(json.dumps(settings("compression=prune")))
    world.workload.build_model = lambda: CharLSTM((7,), 5)
    world.workload.sample = lambda batch: {"x": torch.zeros(batch, 7, dtype=torch.int64)}
    with pytest.raises(DeviceError, match=r"cannot be narrowed.*take compression=magnitude or quantise"):
        Federation(world, LocalEngine(serve))
    build_world.cache_clear()


def test_networks_of_the_devices_own_are_not_compressed_again(federation):
    with pytest.raises(ConfigError, match="a network of its own already; set compression=none"):
        list(federation("method=heterofl", "compression=prune").rounds())


def personalises(method: str) -> bool:
    """Whether clients judge a model that they make of the one that they receive."""
    trainer = get_class(target_of("trainer", preset(method).get("trainer", "sgd")))
    return trainer.personalise is not LocalTrainer.personalise


@pytest.mark.parametrize("method", sorted(method for method in options("method") if personalises(method)))
def test_what_is_compressed_is_the_clients_own_model(federation, monkeypatch, method: str):
    """What is judged without compression is what is pruned and quantised with it, to the bit."""
    own = (f"method={method}", "evaluate_clients=6", "cohort=6", "rounds=2", "workload.client_test_fraction=0.25")

    def judged(model) -> bytes:
        return b"".join(t.numpy().tobytes() for t in model.state_dict().values())

    plain, compressed = [], []
    evaluate, prune = Workload.evaluate, CompressionPlan.prune

    def noted(workload, model, data):
        plain.extend([judged(model)] * (len(data) != len(workload.test)))  # the server's is not a client's
        return evaluate(workload, model, data)

    monkeypatch.setattr(Workload, "evaluate", noted)
    list(federation(*own).rounds())
    monkeypatch.setattr(Workload, "evaluate", evaluate)
    monkeypatch.setattr(CompressionPlan, "prune", lambda p, m, *a: compressed.append(judged(m)) or prune(p, m, *a))
    list(federation(*own, "compression=quantise").rounds())
    assert compressed == plain
    assert len(compressed) == 2 * 6
