"""Training different widths of one network: limit cases that are FedAvg, and averages of what each client holds."""

from dataclasses import replace

import pytest
import torch
from conftest import answered, task_of
from flwr.app import ConfigRecord, RecordDict
from torch.nn import functional as F

from clients.worker import Worker
from devices.compression.bits import pack_bits, unpack_bits
from devices.profile import load_profile
from fedsim.errors import ConfigError
from fedsim.exchanges.slices import BITS, KEPT
from fedsim.grid.edge import Enrolled
from fedsim.messages.records import ARRAYS, Instructions, payload_bytes, record_of, tensors_of
from fedsim.messages.updates import ClientUpdate
from fedsim.report.rounds import weights_sha256
from strategies.coordinates import Entries, Mask, Part, mean_by_coordinate
from strategies.edge import EdgeStrategy
from strategies.widths import WidthStrategy

WIDE = ("fleet=uniform", "trainer.momentum=0.5", "trainer.weight_decay=0.001", "trainer.batch_size=4")
IMAGES = ("workload.input_shape=[1,12,12]", "model.memory_format=channels_last")
HETERO = ("method=heterofl", "trainer.mask_labels=false", "trainer.clip_norm=null")
HALF = ("strategy.tiers.host=0.5", "+strategy.tiers.reference=0.5")


def trained(federation, *overrides: str) -> str:
    made = federation(*overrides)
    list(made.rounds())
    return weights_sha256(made.arrays)


@pytest.mark.parametrize(
    "model", [("model=mlp",), ("model=lenet5", *IMAGES), ("model=resnet8", "model.width=8", *IMAGES)]
)
@pytest.mark.parametrize(
    "method",
    [HETERO, ("method=fjord", "trainer.levels=[1.0]"), ("method=fjord", "trainer.levels=[1.0]", "trainer.distil=0.5")],
)
def test_all_channels_everywhere_is_federated_averaging_bit_for_bit(federation, model, method):
    tiers = ("+strategy.tiers.reference=1.0",)
    assert trained(federation, *model, *method, *WIDE, *tiers) == trained(
        federation, *model, "strategy=edge_mean", *WIDE
    )


def test_each_coordinate_is_the_mean_of_those_who_hold_it_by_hand():
    """Rows 0-1 and 1-2 of three, with weights 1 and 3: 10, (10 + 3 x 20) / 4 = 17.5, 20; row 3 stays."""
    old = {"w": torch.full((4, 2), 7.0), "n": torch.tensor([5])}
    parts = [
        Part(1.0, {"w": torch.full((2, 2), 10.0), "n": torch.tensor([2])}, {"w": Entries({0: torch.tensor([0, 1])})}),
        Part(3.0, {"w": torch.full((2, 2), 20.0), "n": torch.tensor([4])}, {"w": Entries({0: torch.tensor([1, 2])})}),
    ]
    mean = mean_by_coordinate(old, parts)
    assert mean["w"][:, 0].tolist() == [10.0, 17.5, 20.0, 7.0]
    assert mean["n"].tolist() == [4]  # 3.5 to even
    assert mean["n"].dtype == torch.int64


def test_disjoint_parts_keep_their_owners_values_and_others_the_old_ones():
    old = {"w": torch.randn(4, 6)}
    mine, yours = torch.randn(2, 3), torch.randn(2, 3)
    a = Entries({0: torch.tensor([0, 2]), 1: torch.tensor([0, 1, 2])})
    b = Entries({0: torch.tensor([1, 3]), 1: torch.tensor([3, 4, 5])})
    mean = mean_by_coordinate(old, [Part(5.0, {"w": mine}, {"w": a}), Part(9.0, {"w": yours}, {"w": b})])["w"]
    assert torch.equal(mean[[0, 2], :3], mine)
    assert torch.equal(mean[[1, 3], 3:], yours)
    assert torch.equal(mean[[0, 2], 3:], old["w"][[0, 2], 3:])
    assert torch.equal(mean[[1, 3], :3], old["w"][[1, 3], :3])


def test_single_weights_are_averaged_over_those_whose_mask_holds_them():
    """Held by both, by one, by none: (10 + 3 x 20) / 4, 20, 7."""
    old = {"w": torch.full((3,), 7.0), "b": torch.tensor([1.0])}
    mine, yours = torch.tensor([10.0, 9.0, 9.0]), torch.full((3,), 20.0)
    masks = [Mask(torch.tensor([True, False, False])), Mask(torch.tensor([True, True, False]))]
    parts = [Part(1.0, {"w": mine, "b": torch.tensor([2.0])}, {"w": masks[0]})]
    parts += [Part(3.0, {"w": yours, "b": torch.tensor([6.0])}, {"w": masks[1]})]
    mean = mean_by_coordinate(old, parts)
    assert mean["w"].tolist() == [17.5, 20.0, 7.0]
    assert mean["b"].tolist() == [5.0]
    ones = [replace(part, places={"w": Mask(torch.ones(3, dtype=torch.bool))}) for part in parts]
    updates = [ClientUpdate(i, int(part.weight), part.tensors) for i, part in enumerate(ones)]
    plain = EdgeStrategy().combine(1, updates)
    assert all(torch.equal(mean_by_coordinate(old, ones)[name], plain[name]) for name in plain)


def start(federation, *overrides: str):
    """Federation, worker and what the strategy sends to the first client."""
    made = federation(*overrides)
    message = min(made.instructions(1), key=lambda m: m.metadata.dst_node_id)
    return made, Worker(made.world), message.metadata.dst_node_id, message.content


def named(model, gradients):
    return dict(zip([name for name, _ in model.named_parameters()], gradients, strict=True))


def test_only_the_part_travels_and_is_priced(federation):
    """MLP 6-8-3 at half width: 4 x 6 + 4 + 3 x 4 + 3 floats and 8 bits; a step is 2 x (24 + 12) FLOPs forward.

    Up go the floats, and 3 bits for the classes.
    """
    _, worker, first, part = start(
        federation, "method=heterofl", *HALF, "model.hidden=[8]", "workload.input_shape=[6]", "workload.num_classes=3"
    )
    assert payload_bytes(part) == 4 * (24 + 4 + 12 + 3) + 1
    client = worker.context(task_of(part, first, 1))
    answer = answered(worker, client, part, "train")
    assert payload_bytes(answer) == 4 * (24 + 4 + 12 + 3) + 1
    network = client.log.work().passes[0].network
    assert network.forward_flops == 2 * (24 + 12)
    assert network.parameter_bytes == 4 * (24 + 4 + 12 + 3)
    assert network.layers is not None


def test_what_nobody_was_sent_stays_as_it_was(federation):
    made = federation("method=heterofl", *HALF, "model.hidden=[8]")
    before = tensors_of(made.arrays)
    list(made.rounds())
    after = tensors_of(made.arrays)
    assert torch.equal(after["body.1.weight"][4:], before["body.1.weight"][4:])
    assert torch.equal(after["head.weight"][:, 4:], before["head.weight"][:, 4:])
    assert not torch.equal(after["body.1.weight"][:4], before["body.1.weight"][:4])
    assert not torch.equal(after["head.bias"], before["head.bias"])


def test_clients_judge_the_part_that_their_device_runs(federation):
    made = federation("method=heterofl", *HALF, "evaluate_clients=3", "rounds=1", "workload.client_test_fraction=0.5")
    rows = [client for _, clients in made.rounds() for client in clients if client.phase == "evaluate"]
    assert rows
    assert all(row.work.passes[0].network.name == "0.5 of its channels" for row in rows)
    assert all(0 <= row.metrics["accuracy"] <= 1 for row in rows)


def test_every_method_says_how_long_the_network_takes_that_a_client_runs(federation):
    """Dense and half of an MLP 6-8-3 at one rate: 2 x (48 + 24) and 2 x (24 + 12) FLOPs an example."""
    net = (
        "model.hidden=[8]",
        "workload.input_shape=[6]",
        "workload.num_classes=3",
        "workload.client_test_fraction=0.5",
    )
    found = {}
    for name, own in {"dense": ("method=fedavg",), "half": ("method=heterofl", *HALF)}.items():
        made = federation(*own, *net, "evaluate_clients=3", "rounds=1")
        found[name] = [report for report, _ in made.rounds()][-1].metrics
    assert (found["dense"]["client_flops"], found["half"]["client_flops"]) == (144, 72)
    rate = load_profile("reference")
    seconds = [found[name]["client_latency_ms"] / 1e3 for name in ("dense", "half")]
    assert seconds[0] - seconds[1] == pytest.approx(72 / rate.flops_per_s)


BESIDE = ("evaluate_clients=3", "rounds=1", "workload.client_test_fraction=0.5", "trainer.judged_at=[0.25,0.5,1.0]")


def test_one_run_tells_the_accuracy_and_the_price_of_every_width(federation):
    """MLP 6-8-3 as above: 36 FLOPs with 2 of 8 units, 72 with 4 (the clients' own part), 144 with all."""
    net = ("model.hidden=[8]", "workload.input_shape=[6]", "workload.num_classes=3")
    made = federation("method=heterofl", *HALF, *net, *BESIDE)
    (*_, (report, clients)) = made.rounds()
    found = report.metrics
    flops = [found[f"client_flops{end}"] for end in ("", "_at_0.25", "_at_0.5", "_at_1.0")]
    assert flops == [72, 36, 72, 144]
    assert found["client_accuracy"] == found["client_accuracy_at_0.5"]
    assert found["client_latency_ms_at_0.25"] < found["client_latency_ms"] == found["client_latency_ms_at_0.5"]
    judged = [client for client in clients if client.phase == "evaluate"]
    assert all(c.work.passes[0].network.name == "0.5 of its channels" and len(c.work.passes) == 1 for c in judged)
    groups, weights = made.strategy.slices.groups, tensors_of(made.arrays)
    worker = Worker(made.world)
    for client in judged:
        data = made.world.workload.client_data(client.client).test
        for ratio in (0.25, 0.5, 1.0):
            model = groups.build(worker.model, groups.first(ratio))
            model.load_state_dict(groups.slice(weights, groups.first(ratio)))
            expected = made.world.workload.evaluate(model, data)["accuracy"]
            assert client.metrics[f"accuracy_at_{ratio}"] == expected


def test_clients_networks_are_priced_on_every_kind_of_device_of_the_fleet(federation):
    """The same networks on two devices: the mean over the clients differs by device, whoever owns it."""
    devices = ("~fleet.devices.reference", "+fleet.devices.pixel2=1", "+fleet.devices.raspberry_pi_4=1")
    own = ("method=heterofl", "strategy.assign=random", "strategy.levels=[0.5,1.0]", "model=lenet5", *IMAGES)
    made = federation(*own, *devices, *BESIDE, "latency=structured", "evaluate_clients=6")
    (*_, (report, clients)) = made.rounds()
    latency, slices = made.world.latency, made.strategy.slices
    assert {made.world.fleet[client].name for client in range(6)} == {"pixel2", "raspberry_pi_4"}
    for client in (c for c in clients if c.phase == "evaluate"):
        ratio = made.strategy.own_ratio(Enrolled(client.client, made.world.fleet[client.client]))
        cost = slices.cost(slices.groups.first(ratio))
        for name in ("pixel2", "raspberry_pi_4"):
            ms = latency.inference_ms(cost, load_profile(name))
            assert client.metrics[f"latency_ms_on_{name}"] == pytest.approx(ms)
            least = latency.inference_ms(slices.cost(slices.groups.first(0.25)), load_profile(name))
            assert client.metrics[f"latency_ms_on_{name}_at_0.25"] == pytest.approx(least)
    assert report.metrics["client_latency_ms_on_pixel2"] != report.metrics["client_latency_ms_on_raspberry_pi_4"]


def test_scaler_acts_in_training_only(federation):
    _, worker, first, part = start(federation, "method=heterofl", *HALF, "trainer.mask_labels=false")
    client = worker.context(task_of(part, first, 1))
    task = Instructions().broadcast(part, 1)
    narrow = worker.trainer.narrowed(client, worker.trainer.channels_sent(task), task.weights).model
    x = client.data.train.gather(torch.arange(4))["x"]
    hidden = F.linear(x.flatten(1), task.weights["body.1.weight"], task.weights["body.1.bias"])
    head = task.weights["head.weight"], task.weights["head.bias"]
    torch.testing.assert_close(narrow.train()(x), F.linear(F.relu(2 * hidden), *head))
    torch.testing.assert_close(narrow.eval()(x), F.linear(F.relu(hidden), *head))


def test_classes_that_a_client_lacks_are_left_alone(federation):
    _, worker, first, part = start(federation, "method=heterofl", "trainer.weight_decay=0", "workload.num_classes=9")
    client = worker.context(task_of(part, first, 1))
    present = set(client.data.train.labels.tolist())
    absent = [c for c in range(9) if c not in present]
    assert absent
    task = Instructions().broadcast(part, 1)
    update = worker.trainer.fit(client, task)
    assert torch.equal(update.weights["head.weight"][absent], task.weights["head.weight"][absent])
    some = sorted(present)
    assert not torch.equal(update.weights["head.weight"][some], task.weights["head.weight"][some])


def test_a_narrow_step_is_a_step_of_the_narrow_network(federation):
    """Loss and gradients of the views are those of the static network; channels beyond the width get none."""
    _, worker, first, part = start(federation, "method=fjord", "trainer.distil=0", "model=lenet5", *IMAGES)
    trainer, client = worker.trainer, worker.context(task_of(part, first, 1))
    task = Instructions().broadcast(part, 1)
    kept = trainer.channels_sent(task)
    widths = trainer.widths(kept)
    assert [len(w["body.7"]) for w in widths] == [24, 48, 72, 96, 120]
    run = trainer.start(client, task)
    wide, batch = run.client, client.data.train.gather(torch.arange(4))
    loss = trainer.objective(run, {**batch, "width": torch.tensor(1)})
    gradients = named(wide.model, torch.autograd.grad(loss, wide.parameters))
    narrow = trainer.slices.groups.build(worker.model, widths[1])
    narrow.load_state_dict(trainer.slices.groups.slice(task.weights, widths[1]))
    alone = client.workload.loss(narrow, batch)
    torch.testing.assert_close(loss, alone)
    own = named(narrow, torch.autograd.grad(alone, list(narrow.parameters())))
    dense, masks = trainer.slices.groups.scatter(own, widths[1], gradients)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, dense[name])
        assert bool((gradient[~masks[name]] == 0).all())


@pytest.mark.parametrize("alpha", [1.0, 0.7])
def test_each_step_trains_the_widest_network_and_the_narrow_one_from_it(federation, alpha):
    """CE(full, y) + 0.3 CE(narrow, y) + 0.7 KL(full || narrow), each network by itself; with alpha 1 no labels."""
    _, worker, first, part = start(federation, "method=fjord", f"trainer.distil={alpha}")
    trainer, client, task = (
        worker.trainer,
        worker.context(task_of(part, first, 1)),
        Instructions().broadcast(part, 1),
    )
    kept = trainer.channels_sent(task)
    choice = trainer.widths(kept)[0]
    run = trainer.start(client, task)
    wide, batch = run.client, client.data.train.gather(torch.arange(4))
    loss = trainer.objective(run, {**batch, "width": torch.tensor(0)})
    gradients = named(wide.model, torch.autograd.grad(loss, wide.parameters))

    full, narrow = worker.model, trainer.slices.groups.build(worker.model, choice)
    full.load_state_dict(task.weights)
    narrow.load_state_dict(trainer.slices.groups.slice(task.weights, choice))
    logits, own = full(batch["x"]), narrow(batch["x"])
    target = logits.detach().softmax(-1)
    taught = F.cross_entropy(own, target) + (target * target.log()).sum(-1).mean()
    alone = alpha * taught + (1 - alpha) * F.cross_entropy(own, batch["y"])
    expected = F.cross_entropy(logits, batch["y"])
    torch.testing.assert_close(loss, expected + alone)
    of_full = named(full, torch.autograd.grad(expected, list(full.parameters())))
    of_narrow = named(narrow, torch.autograd.grad(alone, list(narrow.parameters())))
    zero = {name: torch.zeros_like(g) for name, g in of_full.items()}
    dense, _ = trainer.slices.groups.scatter(of_narrow, choice, zero)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, of_full[name] + dense[name])
    assert [(p.forwards, p.backwards) for p in wide.log.work().passes] == [(1, 1), (1, 1)]


def test_a_step_that_draws_the_widest_network_takes_one_pass(federation):
    """Its own outputs as a target have no gradient: softmax less target is 0."""
    _, worker, first, part = start(federation, "method=fjord")
    client, task = worker.context(task_of(part, first, 1)), Instructions().broadcast(part, 1)
    run = worker.trainer.start(client, task)
    wide, batch = run.client, client.data.train.gather(torch.arange(4))
    widest = torch.tensor(len(run.widths) - 1)
    loss = worker.trainer.objective(run, {**batch, "width": widest})
    torch.testing.assert_close(loss, client.workload.loss(wide.model, batch))
    assert [(p.forwards, p.backwards) for p in wide.log.work().passes] == [(1, 1)]


def test_rows_of_the_classifier_are_averaged_over_those_who_have_the_class(federation):
    """MLP 6-2-3, clients 0 (classes 0, 1) and 1 (class 1), 30 and 10 examples: they count alike.

    Row 0 is client 0's, row 1 the mean, row 2 stays; the body is the mean of both.
    """
    made, worker, first, part = start(
        federation, "method=heterofl", "model.hidden=[2]", "workload.input_shape=[6]", "workload.num_classes=3"
    )
    old = made.strategy.weights
    updates = []
    for client, classes, examples in ((0, [True, True, False], 30), (1, [False, True, False], 10)):
        made.strategy.broadcast(1, made.grid.client(client), old)
        weights = {name: torch.full_like(t, float(client + 1)) for name, t in old.items()}
        extras = {"classes": {BITS: pack_bits(torch.tensor(classes))}}
        updates.append(ClientUpdate(client, examples, weights, extras=extras))
    mean = made.strategy.combine(1, updates)
    for name in ("head.weight", "head.bias"):
        assert mean[name].flatten(1 if mean[name].dim() > 1 else 0)[0].unique().tolist() == [1.0]
        assert mean[name][1].unique().tolist() == [1.5]
        assert torch.equal(mean[name][2], old[name][2])
    assert mean["body.1.weight"].unique().tolist() == [1.5]
    answer = answered(worker, worker.context(task_of(part, first, 1)), part, "train")
    present = unpack_bits(tensors_of(answer["classes"])[BITS], (3,))
    own = worker.context(task_of(part, first, 1)).data.train.labels
    assert torch.equal(torch.nonzero(present).flatten(), own.unique())


def test_slower_devices_get_narrower_networks_by_predicted_latency(federation):
    made = federation(
        *("method=heterofl", "strategy.assign=latency", "strategy.step_ms=10.0", "latency=structured", "model=lenet5"),
        *("fleet=mixed", "num_clients=40", "cohort=3", *IMAGES),
    )
    made.strategy.begin_round(tensors_of(made.arrays))
    slices, latency = made.strategy.slices, made.world.latency
    slow, fast = load_profile("raspberry_pi_zero_2w"), load_profile("raspberry_pi_4")
    limit = made.strategy.step_ms = slices.step_ms(slices.groups.all(), 4, latency, fast)
    assert made.strategy.ratio(Enrolled(0, fast)) == 1.0
    ratio = made.strategy.ratio(Enrolled(0, slow))
    assert ratio < 1.0
    wider = min(level for level in made.strategy.levels if level > ratio)
    assert slices.step_ms(slices.groups.first(wider), 4, latency, slow) > limit


def test_random_widths_are_fixed_per_client_and_use_every_level(federation):
    made = federation("method=heterofl", "strategy.assign=random", "num_clients=60")
    made.strategy.begin_round(tensors_of(made.arrays))
    drawn = [made.strategy.ratio(made.grid.client(i)) for i in range(60)]
    assert set(drawn) == set(made.strategy.levels)
    assert drawn == [made.strategy.ratio(made.grid.client(i)) for i in range(60)]


def test_a_client_may_answer_with_channels_of_its_own_choice(federation):
    """What a method does whose clients prune themselves: the update's bits come before what was sent."""
    made, worker, first, part = start(federation, "method=heterofl", "model.hidden=[8]")
    groups = made.strategy.slices.groups
    kept = {"body.1": torch.tensor([1, 6])}
    client, task = worker.context(task_of(part, first, 1)), Instructions().broadcast(part, 1)
    update = worker.trainer.fit(client, task)
    own = replace(update, weights=groups.slice(update.weights, kept), extras={KEPT: {BITS: groups.pack(kept)}})
    mean = made.strategy.combine(1, [own])
    assert torch.equal(mean["body.1.weight"][[1, 6]], update.weights["body.1.weight"][[1, 6]])
    assert torch.equal(mean["body.1.weight"][[0, 7]], made.strategy.weights["body.1.weight"][[0, 7]])


@pytest.mark.parametrize(
    "overrides, sentence",
    [
        (("strategy.levels=[]",), "strategy.levels must have at least 1 entry"),
        (("strategy.levels=[0.5,2.0]",), r"in \(0, 1\]"),
        (("strategy.assign=tiers",), "did you mean 'tier'"),
        (("strategy.assign=latency",), "strategy.step_ms must be greater than 0 with strategy.assign=latency"),
        (("strategy.step_ms=3.0",), "null otherwise"),
        (("+strategy.tiers.pixel33=0.5",), "did you mean 'pixel3'"),
        (("strategy.tiers.phone=0",), r"strategy.tiers.phone must be in \(0, 1\]"),
    ],
)
def test_wrong_settings_are_one_sentence(federation, overrides, sentence):
    with pytest.raises(ConfigError, match=sentence):
        federation("method=heterofl", *overrides)


def test_halves_that_do_not_belong_together_say_so(federation):
    with pytest.raises(ConfigError, match="got no part of the network"):
        list(federation("method=heterofl", "strategy=edge_mean").rounds())


def test_wrong_ratios_to_be_judged_at_are_refused(federation):
    with pytest.raises(ConfigError, match=r"trainer\.judged_at\[0\] must be in \(0, 1\], got 1.5"):
        federation("method=heterofl", "trainer.judged_at=[1.5]")


def test_records_are_those_that_the_docstring_names(federation):
    made, _, first, part = start(federation, "method=heterofl", *HALF)
    assert {name for name, r in part.items() if not isinstance(r, ConfigRecord)} == {ARRAYS, KEPT}
    assert isinstance(part, RecordDict)
    assert record_of({BITS: made.strategy.slices.groups.pack(made.strategy.sent[first])}) == part[KEPT]


def test_tier_of_graphics_cards_may_have_its_old_name():
    assert WidthStrategy([1.0, 0.5], tiers={"desktop_gpu": 0.5}).tiers == {"gpu": 0.5}
