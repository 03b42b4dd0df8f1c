"""Trainers that compress one network: integers on a grid, dropped bits, attention by magnitude, attribution."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import answered, task_of
from flwr.app import ConfigRecord, RecordDict
from test_methods import bundles, fitting, spoken  # noqa: F401 - a fixture: text for char_lstm
from test_prolong import PHONES, comparable, longer, made
from test_stateless import BASE, answers, attributes
from test_two_paths import IMAGES, start
from torch import nn
from torch.nn import functional as F
from torchs_counter import counter

from clients.app import serve
from clients.trainers.compressing import dropbits
from clients.trainers.compressing.taught import TEACHER
from clients.worker import Worker
from devices.compression.attribution import (
    Attributed,
    cosine,
    distance,
    feature_layer,
    in_boxes,
    overlap,
    pointing,
    unit,
)
from devices.compression.categorical import (
    categorical,
    chance_open,
    drawn_gates,
    levels,
    nearest,
    nested,
    probability,
    usual_gates,
)
from devices.compression.masks import attended, filter_masks, sparsity_of
from devices.compression.quantise import fake_quantise, limits
from devices.compression.sizes import pack, unpack
from devices.errors import DeviceError
from fedsim.engines.local import LocalEngine
from fedsim.errors import ConfigError
from fedsim.messages.records import tensors_of
from fedsim.report.rounds import weights_sha256
from fedsim.runs.federation import Federation
from fedsim.settings.build import build_world
from fedsim.settings.compose import compose

SMALL = ("workload.input_shape=[1,8,8]", "model=convnet", "model.channels=[6,8]", "model.memory_format=contiguous")
ONE = torch.ones(1)
PRUNED = ("trainer.sparsity=0.5", "trainer.refresh=1", "trainer.prune_rounds=2")
COMPRESSING = {
    "gradual": ("method=gradual", "trainer.bits=8", *PRUNED),
    "magnitude_attention": ("method=magnitude_attention", "trainer.bits=3", *PRUNED),
    "cpq": ("method=cpq", "trainer.dense_rounds=0", *PRUNED),
    "dropbits": ("method=dropbits", "trainer.dense_rounds=0", "trainer.gate_rounds=1", "trainer.penalty=3", *PRUNED),
}


def explicit(x: torch.Tensor, step: float, noise: float, kept: list[float]) -> torch.Tensor:
    """Returns pi over all grid points, summed one by one, [..., points]; kept is v by width."""
    low, high = levels(len(kept))[-1]
    v = [kept[next(w for w, (a, b) in enumerate(levels(len(kept))) if a <= k <= b)] for k in range(low, high + 1)]
    grid = torch.arange(low, high + 1, dtype=x.dtype) * step
    mass = torch.sigmoid((grid + step / 2 - x[..., None]) / noise)
    mass = mass - torch.sigmoid((grid - step / 2 - x[..., None]) / noise)
    mass = mass * torch.tensor(v, dtype=x.dtype)
    return mass / mass.sum(-1, keepdim=True)


# --- quantising by categories ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("noise", [1e-6, 0.02, 3.0])
def test_values_are_those_of_uniform_quantisation_exactly(bits: int, noise: float):
    """The likeliest cell is the nearest point, whatever the noise; 2^bits values at most."""
    x, step = torch.randn(5000, generator=torch.Generator().manual_seed(bits)), torch.tensor([0.07])
    x = torch.cat([x, step * torch.arange(-200, 200) / 2])  # points and borders of cells
    rounded = categorical(x, step, torch.tensor([noise]), torch.ones(bits))
    assert torch.equal(rounded, fake_quantise(x, step, *limits(bits)))
    assert len(rounded.unique()) <= 2**bits


def test_the_chosen_point_is_the_likeliest_of_the_grid():
    x = torch.linspace(-5, 4, 301, dtype=torch.float64)
    shares = explicit(x.clamp(-4.5, 3.5), 1.0, 1 / 3, [1.0] * 3)
    integer = nearest(x, ONE.double(), -4, 3)
    chosen = probability(x, integer, ONE.double(), ONE.double() / 3, torch.ones(3, dtype=torch.float64))
    torch.testing.assert_close(chosen, shares.max(-1).values)
    inner = (x % 1 - 0.5).abs() > 0.01  # borders belong to both
    assert torch.equal(shares.argmax(-1)[inner] - 4, integer.long()[inner])


def test_the_pull_is_nothing_at_a_grid_point_and_grows_towards_the_border():
    x = torch.tensor([1.0, 1.1, 1.3, 1.49], requires_grad=True)
    chosen = probability(x, torch.ones(4), ONE, ONE / 3, torch.ones(3))
    (slope,) = torch.autograd.grad(chosen.sum(), x)
    assert slope.tolist() == pytest.approx([0.001, -0.167, -0.456, -0.609], abs=5e-4)


@pytest.mark.parametrize("kept", [[1.0, 1.0, 1.0], [1.0, 0.8, 0.3], [1.0, 0.6, 0.0]])
def test_gradients_of_five_weights_are_those_of_the_probability_of_their_point(kept: list[float]):
    """By differences of the sum over all points: below the grid, the cell of 0, two inside, beyond the grid.

    dL/dx = g k step dpi/dx, likewise for noise and widths; the step has k besides. Beyond the cells x is on a border.
    """
    x = torch.tensor([-9.0, -0.2, 1.1, 2.3, 7.0], dtype=torch.float64, requires_grad=True)
    step, noise = (torch.tensor([v], dtype=torch.float64, requires_grad=True) for v in (0.9, 0.4))
    widths = torch.tensor(kept, dtype=torch.float64, requires_grad=True)
    upstream = torch.tensor([1.0, 2.0, 3.0, -1.0, 0.5], dtype=torch.float64)
    found = torch.autograd.grad((categorical(x, step, noise, widths) * upstream).sum(), [x, step, noise, widths])
    low, high = levels(3)[sum(v > 0 for v in kept) - 1]
    k = (x.detach() / 0.9).round().clamp(low, high)

    def mass(x: torch.Tensor, step: float, noise: float, kept: list[float]) -> torch.Tensor:
        clamped = x.detach().clamp((low - 0.5) * step, (high + 0.5) * step)
        return explicit(clamped, step, noise, kept).gather(-1, (k.long() + 4)[:, None])[:, 0]

    h, weight = 1e-6, upstream * k * 0.9
    slope = (mass(x + h, 0.9, 0.4, kept) - mass(x - h, 0.9, 0.4, kept)) / (2 * h)
    assert slope[[0, 4]].tolist() == [0, 0]
    torch.testing.assert_close(found[0], weight * slope, rtol=1e-6, atol=1e-8)
    assert float(found[0][1]) == 0  # the zero cell
    by_step = (mass(x, 0.9 + h, 0.4, kept) - mass(x, 0.9 - h, 0.4, kept)) / (2 * h)
    torch.testing.assert_close(found[1][0], (upstream * k + weight * by_step).sum(), rtol=1e-6, atol=1e-8)
    by_noise = (mass(x, 0.9, 0.4 + h, kept) - mass(x, 0.9, 0.4 - h, kept)) / (2 * h)
    torch.testing.assert_close(found[2][0], (weight * by_noise).sum(), rtol=1e-6, atol=1e-8)
    for width in range(3 if all(kept) else 2):
        more, less = ([v + s * h * (n == width) for n, v in enumerate(kept)] for s in (1, -1))
        by_width = (mass(x, 0.9, 0.4, more) - mass(x, 0.9, 0.4, less)) / (2 * h)
        torch.testing.assert_close(found[3][width], (weight * by_width).sum(), rtol=1e-6, atol=1e-8)


def test_all_widths_kept_is_the_plain_grid_in_values_and_gradients():
    torch.manual_seed(0)
    found = []
    for gated in (False, True):
        x, step, noise = (t.clone().requires_grad_() for t in (torch.randn(20000).sort().values, ONE / 9, ONE / 20))
        rounded = categorical(x, step, noise, torch.ones(4, requires_grad=gated))
        found.append([rounded, *torch.autograd.grad((rounded * rounded.detach()).sum(), [x, step, noise])])
        torch.manual_seed(0)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_dropped_width_takes_its_points_and_those_beyond():
    x = torch.linspace(-6, 6, 99)
    assert categorical(x, ONE, ONE, torch.tensor([1.0, 1.0, 0.0])).unique().tolist() == [-2, -1, 0, 1]
    assert categorical(x, ONE, ONE, torch.tensor([1.0, 0.0, 0.0])).unique().tolist() == [-1, 0]


def test_gates_are_nested_and_their_chance_is_that_of_draws():
    assert nested(torch.tensor([1.0, 0.5, 0.0, 1.0])).tolist() == [1, 1, 0.5, 0, 0]
    logits = torch.tensor([-2.0, 0.0, 2.0])
    drawn = torch.stack([drawn_gates(logits, torch.Generator().manual_seed(n)) for n in range(4000)])
    assert (drawn > 0).float().mean(0).tolist() == pytest.approx(chance_open(logits).tolist(), abs=0.03)
    assert 0 <= float(drawn.min()) <= float(drawn.max()) <= 1
    assert (usual_gates(logits) > 0.5).tolist() == [False, False, True]


# --- masks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention, factor", [("magnitude", 0.25), ("none", 0.0), ("all", 1.0)])
def test_attention_is_the_factor_of_a_pruned_weight_forward_and_backward(attention: str, factor: float):
    weight = torch.tensor([4.0, -1.0, 0.0, -4.0, 2.0], requires_grad=True)
    mask = torch.tensor([True, False, False, True, True])
    seen = attended(weight, mask, attention)
    assert seen.tolist() == [4, -factor, 0, -4, 2]
    seen.sum().backward()
    zero = factor if attention == "all" else 0
    assert weight.grad.tolist() == [1, factor, zero, 1, 1]
    with pytest.raises(DeviceError, match="magnitude"):
        attended(weight, mask, "magnitud")


def test_filters_with_the_smallest_mean_go_whole_and_each_layer_keeps_one():
    weights = {"a": torch.tensor([[9.0, -9.0], [1.0, 1.0]]), "b": torch.tensor([[0.1], [0.2], [-0.3]])}
    masks = filter_masks(weights, 0.6)
    assert {name: mask[:, 0].tolist() for name, mask in masks.items()} == {
        "a": [True, False],
        "b": [False, False, True],
    }
    assert torch.equal(masks["a"][:, 0], masks["a"][:, 1])
    assert filter_masks(weights, 0.4, 0)["b"].flatten().tolist() == [False, False, True]


# --- maps -----------------------------------------------------------------------------------------------------------


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    body = [nn.Conv2d(1, 3, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(3, 4, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)).double()


X = torch.randn(5, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def seen(model: nn.Module, kind: str = "swa", classes: torch.Tensor | None = None, **rest) -> torch.Tensor:
    attributed = Attributed(model, *feature_layer(model, (X,)), **rest)
    logits = attributed({}, X)
    return attributed.map(kind, logits.argmax(-1) if classes is None else classes)


def test_features_are_the_last_with_positions_before_pooling_or_what_the_head_reads():
    assert feature_layer(network(), (X,)) == ("4", True)
    block = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Identity(), nn.ReLU())
    pooled = nn.Sequential(block, nn.Sequential(nn.Conv2d(2, 2, 3), nn.MaxPool2d(2)), nn.Flatten(), nn.Linear(8, 3))
    assert feature_layer(pooled.double(), (X,)) == ("1.0", True)
    resnet = build_world(json.dumps(compose(fitting("resnet8")))).workload
    assert feature_layer(resnet.build_model(), resnet.inputs(resnet.sample(2))) == ("blocks.2", True)
    flat = nn.Sequential(nn.Flatten(), nn.Linear(64, 5), nn.ReLU(), nn.Linear(5, 3)).double()
    assert feature_layer(flat, (X,)) == ("3", False)
    with pytest.raises(DeviceError, match="has no features to attribute to"):
        feature_layer(nn.Sequential(nn.Flatten()), (X,))


def test_maps_of_an_average_and_a_linear_head_by_hand():
    """Over positions, the slope of a logit by f_c sums to the head's weight: the map is ReLU(sum_c W[y, c] f_c)."""
    model = network()
    f, y = model[:5](X), model(X).argmax(-1)
    by_hand = torch.einsum("bc,bchw->bhw", model[7].weight[y], f).relu().flatten(1)
    torch.testing.assert_close(seen(model), by_hand)
    torch.testing.assert_close(seen(model, "ewa"), (f**2).mean(1).flatten(1))
    attributed = Attributed(model, "4", True)
    attributed({}, X)
    gone = torch.tensor([True, False, False, True])
    left = torch.einsum("bc,bchw->bhw", model[7].weight[y] * ~gone, f).relu().flatten(1)
    torch.testing.assert_close(attributed.map("sswa", y, gone), left)
    with pytest.raises(DeviceError, match="swa"):
        attributed.map("swaa", y)


@pytest.mark.parametrize("kind", ["swa", "ewa"])
def test_the_distance_of_maps_is_nothing_for_equals_bounded_and_free_of_scale(kind: str):
    model, other = network(), network(1)
    classes = model(X).argmax(-1)
    own, theirs = (seen(m, kind, classes, detached=True) for m in (model, other))
    assert float(distance(own, seen(model, kind, classes, detached=True))) == 0
    assert 0 < float(distance(own, theirs)) <= 2 / own.shape[1]
    torch.testing.assert_close(distance(own, 37 * theirs), distance(own, theirs))
    apart = torch.eye(2).repeat(1, 8)
    assert float(distance(apart[:1], apart[1:])) == pytest.approx(2 / 16)
    assert unit(torch.zeros(1, 4)).tolist() == [[0, 0, 0, 0]]


def test_only_the_student_learns_from_its_map_and_its_head_by_the_second_derivative():
    student, teacher = network(), network(1)
    classes = teacher(X).argmax(-1)
    own, theirs = seen(student, "swa", classes), seen(teacher, "swa", classes)
    parameters = [*student.parameters(), *teacher.parameters()]
    gradients = torch.autograd.grad(distance(own, theirs), parameters, allow_unused=True)
    split = len(list(student.parameters()))
    assert gradients[split:] == (None,) * split
    h, head = 1e-6, student[7].weight
    expected = torch.zeros_like(head)
    for at in torch.cartesian_prod(torch.arange(3), torch.arange(4)):
        for sign in (1, -1):
            with torch.no_grad():
                head[tuple(at)] += sign * h
            expected[tuple(at)] += sign * distance(seen(student, "swa", classes), theirs).detach() / (2 * h)
            with torch.no_grad():
                head[tuple(at)] -= sign * h
    assert expected.any()
    torch.testing.assert_close(gradients[split - 2], expected, rtol=1e-4, atol=1e-8)


def test_agreement_with_a_box_by_hand():
    """A 4x4 image with its object in rows 0 and 1, columns 2 and 3; maps of 2x2 have it top right."""
    inside = in_boxes(torch.tensor([[0, 2, 2, 4], [0, 0, 4, 2]]), (4, 4), (2, 2))
    assert inside.tolist() == [[False, True, False, False], [True, False, True, False]]
    maps = torch.tensor([[0.0, 3.0, 4.0, 0.0], [0.0, 0.0, 5.0, 1.0]])
    assert pointing(maps, inside).tolist() == [False, True]
    assert pointing(torch.zeros(2, 4), inside).tolist() == [False, False]
    assert overlap(maps, inside).tolist() == pytest.approx([0, 1 / 3])
    assert overlap(inside.float(), inside).tolist() == [1, 1]
    assert cosine(maps, torch.tensor([[0.0, 1.0, 0.0, 0.0], [0.0] * 4])).tolist() == pytest.approx([0.6, 0])


# --- trainers -------------------------------------------------------------------------------------------------------


def weights_after(federation, *overrides: str) -> str:
    made = federation(*SMALL, "rounds=3", *overrides)
    list(made.rounds())
    return weights_sha256(made.arrays)


NOTHING = ("trainer.sparsity=0", "trainer.floor=0")


@pytest.mark.parametrize(
    "overrides, same",
    [
        pytest.param(("method=gradual", *NOTHING), ("method=fedavg",), id="nothing is compressed"),
        pytest.param(("method=cpq", "trainer.dense_rounds=3"), ("method=fedavg",), id="dense rounds"),
        pytest.param(
            ("method=magnitude_attention", "trainer.attention=all", "trainer.sparsity=0.5", "trainer.prune_rounds=3"),
            ("method=fedavg",),
            id="attention 1 is dense training",
        ),
        pytest.param(
            ("method=magnitude_attention", "trainer.attention=none", *PRUNED),
            ("method=gradual", *PRUNED),
            id="0 gradual",
        ),
        pytest.param(
            (
                "method=pqk",
                "trainer.bits=32",
                "trainer.activation_bits=32",
                "trainer.distil=0",
                "trainer.teacher=0",
                *PRUNED,
            ),
            ("method=gradual", *PRUNED),
            id="gradual pruning is a student alone",
        ),
        pytest.param(
            ("method=attribution", "trainer.attribution_weight=0", "trainer.dense_rounds=1", *PRUNED),
            ("method=gradual", "trainer.dense_rounds=1", *PRUNED),
            id="maps without a weight",
        ),
    ],
)
def test_the_limits_of_a_method_are_other_methods_to_the_byte(federation, overrides, same):
    assert weights_after(federation, *overrides) == weights_after(federation, *same)


def test_gates_that_never_shut_are_cpq_to_the_byte(federation, monkeypatch):
    monkeypatch.setattr(dropbits, "OPEN", 1e3)
    grid = ("trainer.dense_rounds=1", "trainer.lr=0.01")
    dropping = ("method=dropbits", "trainer.penalty=0", "trainer.gate_rounds=1", *grid)
    cpq = weights_after(federation, "method=cpq", *grid)
    assert weights_after(federation, *dropping) == cpq
    monkeypatch.setattr(dropbits, "OPEN", -1e3)
    assert weights_after(federation, *dropping) != cpq


def test_one_shot_prunes_at_once_behind_the_dense_rounds_and_masks_stay(federation):
    own = ("method=gradual", "trainer.sparsity=0.7", "trainer.prune_rounds=0", "trainer.dense_rounds=1")
    _, worker, client, task = start(federation, *own, *SMALL)
    trainer, seen = worker.trainer, []
    for round in (1, 2, 3):
        run = trainer.start(replace(client, round=round), replace(task, round=round))
        run.fit()
        seen.append(run.masks)
    total = sum(mask.numel() for mask in seen[1].values())
    assert sparsity_of(seen[0]) == 0
    assert sum(int((~mask).sum()) for mask in seen[1].values()) == math.floor(0.7 * total)
    assert all(torch.equal(seen[1][name], seen[2][name]) for name in seen[1])


@pytest.mark.parametrize("method", COMPRESSING)
def test_the_judged_network_is_what_is_stored_and_its_sizes_are_of_the_bytes(federation, method):
    made, worker, client, task = start(federation, *COMPRESSING[method], *IMAGES, round=4)
    state = answered(worker, client, RecordDict({"arrays": made.arrays}), "train")["state"]
    client.state.update(tensors_of(state))
    worker.live.load(task.weights)
    trainer = worker.trainer
    run = trainer.run(trainer, client, task)
    with torch.no_grad():
        run.settle(task)
        judged, (tensors, bits) = run.tensors(), trainer.exported(run)
    assert set(bits) == set(judged) == set(trainer.pruned)
    stored = unpack(pack(tensors, bits))
    for name, weight in judged.items():
        scale = stored[f"{name.removesuffix('weight')}scale"]
        assert torch.equal(stored[name] * scale.view(-1, *[1] * (weight.dim() - 1)), weight), name
        assert all(len(row.unique()) <= 2 ** bits[name] for row in weight.flatten(1))
        assert not weight[~run.masks[name]].any()
    assert sparsity_of(run.masks) == pytest.approx(0.5, abs=0.01)
    metrics = trainer.evaluate(client, task)
    assert metrics["wire_bytes"] == len(pack(tensors, bits)) < metrics["dense_bytes"]
    assert {name: t.tolist() for name, t in judged.items()} == {n: client.weights[n].tolist() for n in judged}
    entries = {name: mask.numel() for name, mask in run.masks.items()}
    assert metrics["mean_bits"] == sum(bits[n] * size for n, size in entries.items()) / sum(entries.values())


@pytest.mark.parametrize("method", [*COMPRESSING, "attribution"])
def test_nothing_but_the_dense_model_is_sent_and_what_compresses_it_stays(federation, method):
    """Masks, steps, widths and the teacher are the client's own; names of weights never change."""
    own = COMPRESSING.get(method, ("method=attribution", "trainer.dense_rounds=0", *PRUNED))
    made = federation(*own, *IMAGES, "rounds=4")
    names, size = list(made.world.workload.build_model().state_dict()), 0
    for number, (_, clients) in enumerate(made.rounds()):
        size = sum(t.nbytes for t in tensors_of(made.arrays).values())
        assert list(made.arrays) == names
        assert {client.work.up_bytes for client in clients} <= {size}
        assert {client.work.down_bytes for client in clients} <= {size}
        assert len(clients) > 0 or number == 0
    kept = {name.split(".")[0] for client in range(7) for name in made.grid.store.get(client)}
    beside = {"gradual": {"quantiser"}, "attribution": {TEACHER}, "dropbits": {"quantiser", "widths"}}
    assert kept == {"masks", *beside.get(method, {"quantiser"})}


@pytest.mark.parametrize("method", ["gradual", "magnitude_attention", "cpq"])
def test_pruned_weights_stay_to_the_bit_once_masks_are_final(federation, monkeypatch, method):
    """With attention they learn until then, by as much as they take part; otherwise not even then."""
    pruned = ("trainer.sparsity=0.5", "trainer.prune_rounds=1", "trainer.dense_rounds=0")
    _, worker, client, task = start(federation, f"method={method}", *pruned, *SMALL)
    masks = worker.trainer.masks_at(1)
    monkeypatch.setattr(worker.trainer, "masks_at", lambda rounds: masks)
    for number, learns in ((1, method == "magnitude_attention"), (2, False)):
        worker.live.load(task.weights)
        before = {name: w.detach().clone() for name, w in worker.trainer.weights().items()}
        worker.trainer.start(replace(client, round=number), replace(task, round=number)).fit()
        for name, weight in worker.trainer.weights().items():
            gone = ~masks[name]
            assert gone.any()
            assert torch.equal(weight[gone], before[name][gone]) != learns
            assert not torch.equal(weight, before[name])


@pytest.mark.parametrize("strategy", ["fedadam", "qfedavg", "fedmedian"])
@pytest.mark.parametrize("trainer", COMPRESSING)
def test_they_train_under_other_strategies(federation, trainer, strategy):
    short = [s for s in COMPRESSING[trainer] if s.startswith("trainer.")]
    made = federation(f"strategy={strategy}", f"trainer={trainer}", *short, "rounds=2")
    before = weights_sha256(made.arrays)
    for report, clients in made.rounds():
        assert math.isfinite(report.metrics["loss"])
        assert all(client.outcome == "completed" for client in clients)
    assert weights_sha256(made.arrays) != before


def test_a_share_of_the_teachers_channels_is_left_out_anew_in_each_step(federation):
    own = ("method=attribution", "trainer.attribution=sswa", "trainer.left_out=0.3", "trainer.dense_rounds=0")
    run, _, batch = taught(federation, *own, *SMALL)
    seen_by = run.taught(batch)
    seen_by.features = torch.zeros(1, 5000, 2, 2)
    first, second = run.left_out(seen_by), run.left_out(seen_by)
    assert not torch.equal(first, second)
    assert [float(mask.float().mean()) for mask in (first, second)] == pytest.approx([0.3, 0.3], abs=0.03)
    assert taught(federation, "method=attribution", *SMALL)[0].left_out(seen_by) is None


ON_BOARDS = ("fleet=sbc", "fleet.devices={raspberry_pi_4: 1, pixel3: 1}", "latency=flops", "evaluate_clients=6")


@pytest.mark.parametrize("method", COMPRESSING)
def test_a_tier_that_all_devices_are_of_is_the_usual_one_to_the_byte(federation, method):
    own = (*COMPRESSING[method], *ON_BOARDS)
    same = [f"trainer.{key}={value}" for key, value in (("sparsity", 0.7), ("bits", 2), ("activation_bits", 4))]
    tiers = "{phone: {sparsity: 0.7, bits: 2, activation_bits: 4}, raspberry_pi_4: {sparsity: 0.7, bits: 2, "
    tiers += "activation_bits: 4}, sbc: {bits: 8}}"
    assert weights_after(federation, *own, f"trainer.tiers={tiers}") == weights_after(federation, *own, *same)
    assert weights_after(federation, *own, "trainer.tiers={mcu: {bits: 2}}") == weights_after(federation, *own)


def test_devices_of_other_tiers_have_other_masks_and_bits(federation):
    own = ("method=gradual", "trainer.sparsity=0.5", "trainer.prune_rounds=1", "trainer.bits=8", *ON_BOARDS, *SMALL)
    tiers = "trainer.tiers={phone: {sparsity: 0.9, bits: 3, activation_bits: 8}}"
    made = federation(*own, tiers, "rounds=2", "workload.client_test_fraction=0.3")
    rows = [c for _, clients in made.rounds() for c in clients if c.phase == "evaluate" and c.round == 2]
    found = {made.world.fleet.device_name(c.client): (c.metrics["sparsity"], c.metrics["mean_bits"]) for c in rows}
    assert found["pixel3"] == (pytest.approx(0.9, abs=0.01), 3)
    assert found["raspberry_pi_4"] == (pytest.approx(0.5, abs=0.01), 8)
    trainer = Worker(made.world).trainer
    assert trainer.device_reads
    profiles = {profile.name: profile for profile in made.world.fleet.profiles}
    assert [trainer.integer_bits(1, profiles[name]) for name in ("pixel3", "raspberry_pi_4")] == [8, 32]


def test_a_budget_of_bytes_is_met_and_spares_what_it_can(federation):
    """Every limit between the least that any widths take, which is refused below, and what gates alone leave."""
    own = ("method=dropbits", "trainer.dense_rounds=0", "trainer.gate_rounds=1", "trainer.bits=8", *SMALL)

    def stored(limit: str) -> int:
        _, worker, client, task = start(federation, *own, f"trainer.size_limit_bytes={limit}", round=2)
        run = worker.trainer.start(client, task)
        run.settle(task)
        return len(pack(*worker.trainer.exported(run)))

    with pytest.raises(ConfigError, match=r"size_limit_bytes must be at least \d+, what ConvNet takes with") as refused:
        stored("100")
    least, most = int(str(refused.value).partition("at least ")[2].partition(",")[0]), stored("null")
    assert most - least > 300
    found = [stored(str(limit)) for limit in range(least, most + 40, 40)]
    assert all(size <= limit for limit, size in zip(range(least, most + 40, 40), found, strict=True))
    assert found == sorted(found)
    assert len(set(found)) > 4
    assert found[-1] == most


def test_budgets_go_by_device_and_say_so(federation):
    own = ("method=dropbits", *SMALL, "trainer.size_limit_bytes={phone: 5000, raspberry_pi_4: 4000}")
    trainer = start(federation, *own)[1].trainer
    assert trainer.device_reads
    profile = start(federation, *own)[2].profile
    assert trainer.limit_of(replace(profile, name="somebody", kind="phone")) == 5000
    assert trainer.limit_of(replace(profile, name="somebody", kind="sbc")) is None
    assert not start(federation, "method=dropbits", *SMALL, "trainer.size_limit_bytes=5000")[1].trainer.device_reads
    with pytest.raises(ConfigError, match="phone"):
        start(federation, "method=dropbits", *SMALL, "trainer.size_limit_bytes={phon: 5000}")


def test_a_penalty_drops_bits_and_widths_then_stay(federation):
    own = ("method=dropbits", "trainer.dense_rounds=0", "trainer.gate_rounds=1", "trainer.penalty=30", *SMALL)
    _, worker, client, task = start(federation, *own)
    kept = []
    for round in (1, 2, 3):
        run = worker.trainer.start(replace(client, round=round), replace(task, round=round))
        run.fit()
        kept.append(run.widths)
        worker.live.load(task.weights)
    assert kept[0] == {}
    assert kept[1] == kept[2]
    assert max(kept[1].values()) < 4


def taught(federation, *overrides: str):
    """A run whose teacher is what it received, its client and a batch."""
    _, worker, client, task = start(federation, *overrides)
    run = worker.trainer.start(client, task)
    run.teacher = {name: t.clone() for name, t in client.weights.items()}
    batch = next(iter(run.batches()))
    run.masks = run.trainer.masks_at(1)
    return run, client, batch


def test_losses_are_those_of_student_teacher_and_maps(federation):
    """(1 - a) CE + a T^2 KL + beta R, by hand; R and KL are nothing while nothing is compressed."""
    own = ("method=attribution", "trainer.dense_rounds=0", "trainer.distil=0.25", "trainer.temperature=3", *SMALL)
    for sparsity in (0.0, 0.6):
        run, _, batch = taught(federation, *own, f"trainer.sparsity={sparsity}", "trainer.prune_rounds=0")
        student, teacher = run.student(), run.taught(batch)
        logits = student(batch["x"])
        classes = teacher.logits.argmax(-1)
        soft, log = (teacher.logits / 3).softmax(-1), F.log_softmax
        kl = 9 * (soft * (soft.log() - log(logits / 3, -1))).sum(-1).mean()
        r = distance(student.network.map("swa", classes), teacher.map("swa", classes))
        expected = 0.75 * F.cross_entropy(logits, batch["y"]) + 0.25 * kl + 100 * r
        torch.testing.assert_close(run.objective(run, batch), expected)
        assert (float(r.detach()) == 0) == (sparsity == 0)


def test_without_compression_the_maps_add_nothing_to_the_loss(federation):
    own = ("trainer.dense_rounds=0", *NOTHING, *SMALL)
    run, client, batch = taught(federation, "method=attribution", *own)
    assert torch.equal(run.objective(run, batch), client.workload.loss(client.model, batch))


def test_the_teacher_is_what_was_received_behind_the_dense_rounds_and_stays(federation):
    own = ("method=attribution", "trainer.dense_rounds=1", "trainer.prune_rounds=1", *SMALL)
    _, worker, client, task = start(federation, *own)
    for round in (1, 2, 3):
        moved = {name: t + round for name, t in task.weights.items()}
        worker.live.load(moved)
        worker.trainer.start(replace(client, round=round), replace(task, round=round, weights=moved)).fit()
        assert (f"{TEACHER}.head.weight" in client.state) == (round > 1)
    assert torch.equal(client.state[f"{TEACHER}.head.weight"], task.weights["head.weight"] + 2)


@pytest.mark.parametrize("weight", [0, 100])
def test_a_client_is_judged_by_how_its_maps_agree_and_matching_costs_passes(federation, weight):
    """With a weight of 0 maps are compared after training only: a step costs what it costs without them."""
    judged = ("rounds=3", "evaluate_clients=3", "workload.client_test_fraction=0.5", "trainer.lr=0.01")
    short = ("trainer.dense_rounds=1", "trainer.prune_rounds=1", *SMALL, *judged)
    reports, rows = [], []
    for report, clients in federation("method=attribution", f"trainer.attribution_weight={weight}", *short).rounds():
        reports.append(report)
        rows.append([c.work.flops for c in clients if c.phase == "train"])
    assert "client_attribution_cosine" not in reports[1].metrics
    assert 0 < reports[-1].metrics["client_attribution_cosine"] <= 1
    assert (max(rows[3]) > 1.2 * max(rows[1])) == (weight > 0)


def test_maps_are_compared_with_boxes_where_examples_have_them(federation):
    """A digit lies in its box as it is, whatever lies around it; student and teacher are both judged by it."""
    placed = (
        "workload=placed_digits",
        "num_clients=4",
        "partition=iid",
        "cohort=2",
        "workload.client_test_fraction=0.3",
    )
    cut = ("trainer.local_epochs=1", "engine.device=cpu", "fleet=uniform", "trainer.batch_size=100", "rounds=2")
    short = ("method=attribution", "trainer.dense_rounds=1", "trainer.prune_rounds=0", "evaluate_clients=2")
    settings = compose([*placed, *cut, *short])
    made = Federation(build_world(json.dumps(settings)), LocalEngine(serve))
    batch = made.world.workload.test.gather(torch.arange(50))
    plain = build_world(json.dumps(compose(["workload=digits", *placed[1:]]))).workload.test.gather(torch.arange(50))
    for image, (top, left, bottom, right), digit in zip(batch["x"], batch["box"], plain["x"], strict=True):
        assert torch.equal(image[:, top:bottom, left:right], digit)
    assert (batch["x"].sum((1, 2, 3)) > plain["x"].sum((1, 2, 3))).all()
    metrics = [report for report, _ in made.rounds()][-1].metrics
    for name in ("pointing", "attribution_iou"):
        assert all(0 < metrics[f"client_{name}{whose}"] <= 1 for whose in ("", "_teacher"))


@pytest.mark.parametrize(
    "overrides, sentence",
    [
        (("method=gradual", "trainer.prune=filter"), "did you mean 'filters'"),
        (("method=gradual", "trainer.bits=16"), "trainer.bits must be 32 or from 2 to 8"),
        (("method=gradual", "trainer.distil=1.5"), r"trainer.distil must be in \[0, 1\]"),
        (("method=gradual", "trainer.attribution=sw"), "did you mean 'swa'"),
        (("method=cpq", "trainer.bits=32"), r"trainer.bits must be"),
        (("method=cpq", "trainer.tiers={phone: {bits: 32}}"), r"trainer.tiers.phone.bits must be from 2 to 8"),
        (("method=gradual", "trainer.tiers={phon: {bits: 8}}"), "did you mean 'phone'"),
        (("method=gradual", "trainer.tiers={phone: {bit: 8}}"), "did you mean 'bits'"),
        (("method=gradual", "trainer.tiers={phone: {sparsity: 1}}"), r"trainer.tiers.sparsity must be in \[0, 1\)"),
        (("method=gradual", "trainer.tiers={phone: {sparsity: 0.99}}"), "trainer.floor at most what it leaves"),
        (("method=dropbits", "trainer.gate_rounds=0"), "trainer.gate_rounds must be at least 1"),
        (("method=dropbits", "trainer.size_limit_bytes=0"), "trainer.size_limit_bytes must be"),
        (("method=magnitude_attention", "trainer.attention=al"), "did you mean 'all'"),
    ],
)
def test_wrong_settings_are_one_sentence(federation, overrides, sentence):
    with pytest.raises(ConfigError, match=sentence):
        list(federation(*overrides).rounds())


# --- what every method keeps, while it compresses -------------------------------------------------------------------

TAUGHT = ("trainer.attribution=sswa", "trainer.distil=0.3", "trainer.activation_bits=8")
AT_ONCE = {
    "gradual": ("method=gradual", "trainer.prune_rounds=2", "trainer.bits=8", *TAUGHT),
    "magnitude_attention": ("method=magnitude_attention", "trainer.prune_rounds=2"),
    "cpq": ("method=cpq", "trainer.dense_rounds=0", *TAUGHT),
    "dropbits": ("method=dropbits", "trainer.dense_rounds=1", "trainer.gate_rounds=1", "trainer.penalty=1"),
    "attribution": ("method=attribution", "trainer.dense_rounds=1", "trainer.prune_rounds=1", "trainer.prune=filters"),
}


@pytest.mark.parametrize("kind", ["swa", "ewa", "sswa"])
@pytest.mark.parametrize("model", ["convnet", "mlp", "char_lstm", "resnet8"])
def test_flops_of_a_step_with_maps_are_those_that_torch_counts(model: str, kind: str):
    own = ("trainer=attribution", f"trainer.attribution={kind}", "trainer.dense_rounds=0", "trainer.bits=8")
    settings = compose([*fitting(model), *own])
    federated = Federation(build_world(json.dumps(settings)), LocalEngine(serve))
    worker, (first, part) = Worker(federated.world), spoken(federated)
    client = worker.context(task_of(part, first, 1))
    with counter() as counted:
        answered(worker, client, part, "train")
    work = client.log.work()
    assert work.flops == pytest.approx(counted.get_total_flops(), rel=0.01)


@pytest.mark.parametrize("method", AT_ONCE)
def test_a_run_that_goes_on_is_the_longer_one(tmp_path: Path, method: str):
    base = [*PHONES, "evaluate_clients=3", *AT_ONCE[method]]
    run, straight = made(tmp_path / "run", *base, "rounds=3"), made(tmp_path / "straight", *base, "rounds=5")
    assert comparable(longer(run, 5)) == comparable(straight)


@pytest.mark.parametrize("method", AT_ONCE)
def test_clients_answer_alike_in_any_order_and_leave_the_trainer_as_it_is(method: str):
    federated = Federation(build_world(json.dumps(compose([*BASE, *AT_ONCE[method]]))), LocalEngine(serve))
    messages = federated.strategy.configure_train(1, federated.arrays, ConfigRecord(), federated.grid)
    parts = {message.metadata.dst_node_id: message.content for message in messages}
    first, second = Worker(federated.world), Worker(federated.world)
    before = attributes(vars(first.trainer))
    there, back = dict(answers(first, parts, [0, 1])), dict(answers(second, parts, [1, 0]))
    assert attributes(vars(first.trainer)) == before
    assert there == back
