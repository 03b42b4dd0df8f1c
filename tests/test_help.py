"""HELP: encodings, gates, inner loop and calibration against hand numbers, and the authors' weights."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from help_space import SETTINGS
from scipy.stats import spearmanr
from torch.nn import functional as F

from devices.errors import DeviceError
from devices.latency.evaluate import evaluate
from devices.latency.few_shot import Trial
from devices.latency.help.encodings import encode, graph_adjacency
from devices.latency.help.predictor import (
    HelpPredictor,
    adapt,
    gate_divergence,
    hardware_embedding,
    help_predictions,
    label_range,
    labels,
    modulate,
    predict,
    rising_line,
    source_labels,
)
from devices.latency.help.training import first_weights
from devices.latency.help.weights import GATES, load_weights
from devices.latency.spaces import Space, load_space


@pytest.fixture(params=["nb201", "fbnet"])
def start(request: pytest.FixtureRequest):
    """First weights of a space, three encoded networks on two devices, their labels and the devices' embeddings."""
    weights = first_weights(request.param, SETTINGS)
    networks = np.random.default_rng(1).integers(0, 5, (6, {"nb201": 6, "fbnet": 22}[request.param]))
    x = encode(request.param, networks).unflatten(0, (2, 3))
    return weights, x, torch.linspace(0.1, 0.9, 6).reshape(2, 3), torch.rand(2, 10, generator=torch.manual_seed(0))


def test_nb201_nodes_are_input_six_operations_output_and_global():
    """Ids none, skip, 1x1, 3x3, pool, none are columns 4, 5, 2, 3, 1, 4; input is 0, output 6, global 7."""
    x = encode("nb201", np.array([[0, 1, 2, 3, 4, 0]]))
    assert x.shape == (1, 9, 8)
    assert x.argmax(-1).tolist() == [[0, 4, 5, 2, 3, 1, 4, 6, 7]]
    assert x.sum(-1).eq(1).all()


def test_nb201_nodes_sum_themselves_and_what_feeds_them_and_the_global_node_sums_all():
    """Node 7, the output, is fed by the edges into the cell's last state: 0>3, 1>3 and 2>3, nodes 4, 5 and 6."""
    adjacency = graph_adjacency()
    assert adjacency[7].nonzero().flatten().tolist() == [4, 5, 6, 7]
    assert adjacency[0].nonzero().flatten().tolist() == [0]
    assert adjacency[8].eq(1).all()
    assert adjacency[:8, 8].eq(0).all()


def test_fbnet_layers_are_kernel_and_expansion_slots_and_a_skip_is_empty():
    """Id 2 is kernel 3 (slot 0) and variant 2 (slot 4); id 5 is kernel 5 (slot 1) and variant 1 (slot 3)."""
    x = encode("fbnet", np.array([[2, 5, 8] + [0] * 19])).reshape(22, 6)
    assert x[:4].int().tolist() == [[1, 0, 0, 0, 1, 0], [0, 1, 0, 1, 0, 0], [0] * 6, [1, 0, 1, 0, 0, 0]]


def test_ofa_leaves_out_blocks_beyond_the_depth():
    """Depth 2 keeps blocks 0 and 1 of stage 0; resolution 136 is slot (136 - 128) / 4 = 2 behind 120 others."""
    network = [3, 7, 5, 5] + [5] * 16 + [6, 3, 4, 4] + [4] * 16 + [2, 4, 4, 4, 4] + [136]
    x = encode("ofa", np.array([network]))[0]
    assert x.shape == (145,)
    assert x[:12].int().tolist() == [1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0]
    assert x[60:72].int().tolist() == [0, 0, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0]
    assert x[120:].nonzero().flatten().tolist() == [2]


@pytest.mark.parametrize(
    "space, network, message",
    [
        ("nb201", [0, 1, 2, 3, 4, 5], "network 0 is outside the space nb201: operation 5 is 5"),
        ("fbnet", [9] + [0] * 21, "network 0 is outside the space fbnet: operation 0 is 9"),
        ("fbnet", [0] * 6, r"integers \[n, 22\]"),
        ("ofa", [3] * 40 + [5] * 5 + [128], "depth of stage 0 is 5"),
        ("ofa", [3] * 40 + [2] * 5 + [130], "resolution 0 is 130"),
        ("nb2001", [0] * 6, "did you mean 'nb201'"),
    ],
)
def test_networks_outside_the_space_are_refused(space: str, network: list[int], message: str):
    with pytest.raises(DeviceError, match=message):
        encode(space, np.array([network]))


def test_embedding_runs_from_the_fastest_to_the_slowest_reference():
    assert hardware_embedding(np.array([2.0, 4, 6, 2, 2, 2, 2, 2, 2, 2])).tolist() == [0, 0.5, 1, 0, 0, 0, 0, 0, 0, 0]
    for wrong in ([1.0] * 10, [1.0, 2.0], [1.0] * 9 + [-2.0], [1.0] * 9 + [float("nan")]):
        with pytest.raises(DeviceError, match=r"references|positive"):
            hardware_embedding(np.array(wrong))


def test_predictor_equals_its_layers_written_one_by_one(start):
    weights, x, _, h = start
    p, device = weights.model, 1
    one, rows = x[device], h[device].repeat(3, 1)
    if weights.space == "nb201":
        for layer in ("gc1", "gc2", "gc3", "gc4"):
            one = F.relu(graph_adjacency() @ (one @ p[f"{layer}.weight"]) + p[f"{layer}.bias"])
        one = one[:, -1]
    else:
        for layer in ("fc1", "fc2"):
            one = F.relu(F.linear(one, p[f"{layer}.weight"], p[f"{layer}.bias"]))
    for layer in ("fc_hw1", "fc_hw2"):
        rows = F.relu(F.linear(rows, p[f"{layer}.weight"], p[f"{layer}.bias"]))
    one = torch.cat([one, rows], -1)
    for layer in ("fc3", "fc4"):
        one = F.relu(F.linear(one, p[f"{layer}.weight"], p[f"{layer}.bias"]))
    expected = F.linear(one, p["fc5.weight"], p["fc5.bias"])[:, 0]
    torch.testing.assert_close(predict(modulate(p, torch.zeros(2, GATES)), x, h)[device], expected)


def test_gates_of_zero_change_nothing(start):
    weights = start[0]
    for name, tensor in modulate(weights.model, torch.zeros(2, GATES)).items():
        assert torch.equal(tensor, weights.model[name].expand(2, *tensor.shape[1:]))


def test_gates_scale_input_features_and_shift_biases(start):
    """Gate 207 is input 7 of fc4: z = 5 is a factor 1.05 on its column; gate 601 its bias: z = -2 adds -0.02."""
    model = start[0].model
    z = torch.zeros(1, GATES)
    z[0, 207], z[0, 601] = 5, -2
    params = modulate(model, z)
    factor = params["fc4.weight"][0] / model["fc4.weight"]
    torch.testing.assert_close(factor[:, 7], torch.full((200,), 1.05))
    assert factor[:, :7].eq(1).all()
    assert factor[:, 8:].eq(1).all()
    torch.testing.assert_close(params["fc4.bias"][0], model["fc4.bias"] - 0.02)
    assert torch.equal(params["fc3.weight"][0], model["fc3.weight"])


def test_divergence_is_zero_at_the_prior_and_right_by_hand():
    """One gate with mean 1 and deviation 2: (1 + 4 - 1) / 2 - ln 2 = 1.3069."""
    assert gate_divergence(torch.zeros(1, GATES), torch.ones(1, GATES)).item() == 0
    found = gate_divergence(torch.tensor([[1.0]]), torch.tensor([[2.0]]))
    assert found.item() == pytest.approx(2 - np.log(2), rel=1e-6)


def test_no_rates_no_adaptation(start):
    weights, x, y, h = start
    params = modulate(weights.model, torch.zeros(2, GATES))
    still = {name: torch.zeros_like(rate) for name, rate in weights.rates.items()}
    assert all(torch.equal(a, params[name]) for name, a in adapt(params, still, x, y, h).items())


def test_one_inner_step_is_a_gradient_step_of_each_device_alone(start):
    """The last layer is linear, so that the slope of the mean square by its bias is 2 mean(f - y)."""
    weights, x, y, h = start
    rates = {name: torch.full_like(rate, -0.5 if name == "fc5.bias" else 0.1) for name, rate in weights.rates.items()}
    params = modulate(weights.model, torch.zeros(2, GATES))
    adapted = adapt(params, rates, x, y, h, steps=1)
    error = predict(params, x, h) - y
    expected = params["fc5.bias"] - -0.5 * 2 * error.mean(1, keepdim=True)
    torch.testing.assert_close(adapted["fc5.bias"], expected)
    for device in range(2):
        own = {name: tensor.clone().requires_grad_() for name, tensor in weights.model.items()}
        lone = {name: tensor.unsqueeze(0) for name, tensor in own.items()}
        F.mse_loss(predict(lone, x[device][None], h[device][None])[0], y[device]).backward()
        for name, tensor in own.items():
            torch.testing.assert_close(adapted[name][device], (tensor - rates[name] * tensor.grad).detach())


def test_training_differentiates_through_the_inner_steps(start):
    """The slope of the query loss by a rate is minus the product of two gradients: checked by a finite difference."""
    weights, x, y, h = start
    rate = torch.tensor(0.05, dtype=torch.float64, requires_grad=True)
    model, x, y, h = {n: t.double() for n, t in weights.model.items()}, x.double(), y.double(), h.double()

    def loss(step: torch.Tensor, train: bool) -> torch.Tensor:
        rates = {name: step.expand(tensor.shape) for name, tensor in model.items()}
        params = {n: p.requires_grad_() for n, p in modulate(model, torch.zeros(2, GATES, dtype=torch.float64)).items()}
        return (predict(adapt(params, rates, x, y, h, train=train), x.flip(1), h) - y).square().mean()

    (slope,) = torch.autograd.grad(loss(rate, True), rate)
    nudge = torch.tensor(1e-6, dtype=torch.float64)
    expected = (loss(rate.detach() + nudge, False) - loss(rate.detach() - nudge, False)) / (2 * nudge)
    torch.testing.assert_close(slope, expected.detach(), rtol=1e-4, atol=1e-9)


def test_label_range_reaches_one_gap_beyond_the_measured_networks():
    """Three networks over 4 ms: half of it, 2 ms, on either side. Labels put the ends at 0.05 and 0.95."""
    assert label_range(np.array([10.0, 12.0, 14.0]), np.array([1.0])) == (8.0, 16.0)
    assert label_range(np.array([5.0, 5.0]), np.array([1.0, 9.0])) == (1.0, 9.0)
    torch.testing.assert_close(labels(np.array([8.0, 12.0, 16.0]), 8.0, 16.0), torch.tensor([0.05, 0.5, 0.95]))


def test_known_labels_of_the_support_give_the_range():
    """Labels 0.5, 1 and 1.4 took 10, 20 and 28 ms: 20 ms per label, so that 0.05..0.95 is 1..19 ms."""
    known, ms = np.array([0.5, 1.0, 1.4]), np.array([10.0, 20.0, 28.0])
    assert label_range(ms, ms, known) == pytest.approx((1.0, 19.0))
    assert label_range(ms, ms, known[::-1]) == (1.0, 37.0)  # a line that falls says nothing: extremes and a margin of 9


def test_range_is_wider_for_a_device_that_the_sources_do_not_resemble():
    """The line from milliseconds to label rises by 1/2: labels 0.05 and 0.95 are 1.8 ms apart, and not 0.9."""
    known = np.array([0.0, 1.0, 0.0, 1.0])
    assert label_range(np.array([0.0, 1.0, 1.0, 2.0]), known, known) == pytest.approx((0.1, 1.9))


def test_source_labels_are_means_over_the_source_devices(tiny: Space):
    """Device b is half of a here, so that both give the same labels; c, a validation device, has no say."""
    latency = np.stack([tiny.latency_ms[0], tiny.latency_ms[0] / 2, tiny.latency_ms[2]])
    space, pool = replace(tiny, latency_ms=latency), latency[0, tiny.pool("a")]
    np.testing.assert_allclose(source_labels(space), labels(latency[0], pool.min(), pool.max()), rtol=1e-6)
    assert not np.allclose(source_labels(space, ["c"]), source_labels(space))


def test_line_is_the_least_squares_line_or_nothing():
    """(0, 1), (1, 3), (2, 8): slope 7 / 2, offset 4 - 3.5."""
    assert rising_line(np.array([0.0, 1.0, 2.0]), np.array([1.0, 3.0, 8.0])) == pytest.approx((3.5, 0.5))
    assert rising_line(np.array([0.0, 1.0]), np.array([2.0, 1.0])) is None
    assert rising_line(np.array([1.0, 1.0]), np.array([2.0, 1.0])) is None


def test_milliseconds_come_from_references_and_support_only(tiny: Space):
    """Latencies of all other networks may be anything."""
    weights, support = first_weights("nb201", SETTINGS), tiny.pool("c")[:20:2]
    first = help_predictions(tiny, "c", support, 1, weights)
    latency = tiny.latency_ms.copy()
    hidden = np.setdiff1d(np.arange(100), np.concatenate([support, tiny.references]))
    latency[2, hidden] *= 3
    assert np.array_equal(help_predictions(replace(tiny, latency_ms=latency), "c", support, 1, weights), first)
    latency[2, support[0]] *= 3
    assert not np.array_equal(help_predictions(replace(tiny, latency_ms=latency), "c", support, 1, weights), first)


def test_same_seed_same_milliseconds_and_one_per_judged_network(tiny: Space):
    weights, support = first_weights("nb201", SETTINGS), np.arange(10, 20)
    first = help_predictions(tiny, "c", support, 1, weights)
    assert first.shape == (800,)
    assert np.isfinite(first).all()
    assert np.array_equal(help_predictions(tiny, "c", support, 1, weights), first)
    assert not np.array_equal(help_predictions(tiny, "c", support, 2, weights), first)


@pytest.mark.parametrize("support", [[0, 1100], [-1, 3], [[1, 2]], [0.5, 1.5], [4]])
def test_wrong_support_is_refused(tiny: Space, support: list):
    with pytest.raises(DeviceError, match=r"support|measured"):
        help_predictions(tiny, "c", np.array(support), 1, first_weights("nb201", SETTINGS))


def test_weights_of_another_space_are_refused(tiny: Space):
    with pytest.raises(DeviceError, match="fbnet cannot predict networks of space nb201"):
        help_predictions(tiny, "c", np.arange(10), 1, first_weights("fbnet", SETTINGS))


@pytest.fixture(scope="module")
def tables() -> Path:
    if "FEDSIM_NAS" not in os.environ:
        pytest.skip("set FEDSIM_NAS to the folder with help_nb201.npz and the like")
    return Path(os.environ["FEDSIM_NAS"])


@pytest.mark.data
@pytest.mark.parametrize("name, least", [("nb201", 0.930), ("fbnet", 0.905)])
def test_authors_weights_rank_unseen_devices(tables: Path, name: str, least: float):
    """Found with 16 seeds: 0.940 and 0.911."""
    space, weights = load_space(name, tables / f"help_{name}.npz"), tables / f"help_checkpoint_{name}.npz"
    assert evaluate(space, Trial("help", 20, "chosen", 3, weights=weights))["mean"]["spearman"] > least


@pytest.mark.data
def test_authors_weights_rank_ofa_networks(tables: Path):
    with np.load(tables / "help_ofa.npz", allow_pickle=False) as file:
        networks = np.concatenate([file["ks"], file["e"], file["d"], file["r"][:, None]], axis=1)
        ms = file["latency_ms"][file["devices"].tolist().index("titan_rtx_64")]
        references = file["hw_embed_idx"]
    support = np.random.default_rng(1).choice(4000, 10, replace=False)
    weights = load_weights(tables / "help_checkpoint_ofa.npz", "ofa")
    fitted = HelpPredictor.fit(weights, ms[references], networks[support], ms[support], seed=1)
    judged = 4000 + np.argsort(ms[4000:5000], kind="stable")[100:900]
    assert spearmanr(fitted.predict(networks[judged]), ms[judged]).statistic > 0.97
