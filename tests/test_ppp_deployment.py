"""Deployment with PPP: each client is judged with the network that its own mask cuts."""

from dataclasses import replace

import pytest
import torch
from conftest import answered, sent_to, task_of
from flwr.app import ConfigRecord, RecordDict
from ppp_federation import MASKED, MODELS, PPP, uplinks
from torchs_counter import counter

from clients.trainers.widths.masks import deployed
from clients.worker import Worker
from fedsim.errors import ConfigError
from fedsim.exchanges.slices import BITS, KEPT
from fedsim.messages.records import STATE, tensors_of

JUDGED = ("workload.client_test_fraction=0.5", "workload.examples_per_client=24", "evaluate_clients=6")


def judge(made, number: int = 1, clients: int = 6):
    """A worker, and by client its context and metrics after `evaluate`."""
    made.instructions(number)
    messages = made.strategy.configure_evaluate(number, made.shared, ConfigRecord(), made.grid)
    worker, found = Worker(made.world), {}
    for message in messages:
        client = worker.context(task_of(message.content, message.metadata.dst_node_id, number))
        found[client.client_id] = (
            client,
            message.content,
            answered(worker, client, message.content, "evaluate")["metrics"],
        )
    return worker, found


def perturbed(made):
    """Fresh gates are open for all: these differ from user to user."""
    made.instructions(1)
    torch.manual_seed(1)
    made.strategy.gates = {
        n: torch.randn(t.shape) * 3 if n.endswith("2.weight") else torch.zeros_like(t) if n.endswith("2.bias") else t
        for n, t in made.strategy.gates.items()
    }
    return made


@pytest.mark.parametrize("model", ["lenet5", "resnet8"])
def test_every_client_is_judged_with_its_cut_network_and_priced_for_it(federation, model):
    made = perturbed(federation(*PPP, *MODELS[model], *JUDGED, "latency=structured", "trainer.mask_mode=topk"))
    worker, found = judge(made)
    assert len(found) == 6, "also clients that never trained"
    plan, slices = worker.trainer.plan, worker.trainer.slices
    for client, part, metrics in found.values():
        assert metrics["keep_ratio"] == pytest.approx(plan.keep_ratio(plan.at_ratio(0.5)))
        last = client.log.work().passes[-1]
        small = slices.groups.build(slices.model, plan.at_ratio(0.5))
        with counter() as counted, torch.no_grad():
            small(client.workload.sample(1)["x"])
        assert metrics["flops"] == last.network.forward_flops == counted.get_total_flops()
        assert last.network.parameter_bytes == sum(4 * p.numel() for p in small.parameters())
        assert last.network.layers != worker.network.layers
        assert (last.batch, last.forwards, last.backwards) == (len(client.data.test), 1, 0)
        assert metrics["latency_ms"] == pytest.approx(made.world.latency.inference_ms(last.network, client.profile))
        assert all(p.backwards == 0 for p in client.log.work().passes)
        assert STATE not in part


def test_equal_support_gives_equal_masks_and_personal_ones_differ(federation):
    made = perturbed(federation(*PPP, *MODELS["lenet5"], *JUDGED))
    worker, found = judge(made)
    trainer = worker.trainer
    packed = {}
    for number, (client, part, _) in found.items():
        kept = deployed(trainer, client, sent_to(worker, client, part), "personal", 0.5)
        packed[number] = trainer.slices.groups.pack(kept).tolist()
    assert len({tuple(p) for p in packed.values()}) > 1
    (a, part, _), (b, _, _) = found[0], found[1]
    twin = replace(b, client_id=0, data=a.data)
    assert (
        trainer.slices.groups.pack(deployed(trainer, twin, sent_to(worker, b, part), "personal", 0.5)).tolist()
        == packed[0]
    )


def test_control_masks_are_what_they_say(federation):
    made = perturbed(
        federation(*PPP, *MODELS["lenet5"], *JUDGED, "trainer.controls=[other,global,random,magnitude,gates,dense]")
    )
    worker, found = judge(made)
    trainer, plan = worker.trainer, worker.trainer.plan
    kept = {}
    for client, part, metrics in found.values():
        assert {f"accuracy_{c}" for c in ("other", "global", "random", "magnitude", "gates", "dense")} <= set(metrics)
        task = sent_to(worker, client, part)
        kept[client.client_id] = {
            m: deployed(trainer, client, task, m, 0.5) for m in ("personal", "other", "global", "random", "magnitude")
        }
        dense = trainer.narrowed(client, trainer.slices.groups.all(), task.weights).model
        assert metrics["accuracy_dense"] == client.workload.evaluate(dense, client.data.test)["accuracy"]
    for number, own in kept.items():
        following = kept[(number + 1) % 6]["personal"]
        assert all(torch.equal(own["other"][n], following[n]) for n in following)
        assert all(torch.equal(own["global"][n], kept[0]["global"][n]) for n in plan.names)
        for name in plan.names:
            assert len(own["random"][name]) == len(own["magnitude"][name]) == len(own["personal"][name])
    assert any(not torch.equal(own["random"][n], own["personal"][n]) for own in kept.values() for n in plan.names)


def test_magnitude_and_random_masks_need_no_gates(federation):
    """Federated averaging, then a mask at deployment: gates are neither trained nor sent."""
    for mask in ("magnitude", "random"):
        made = federation(
            *(*PPP, *MODELS["lenet5"], *JUDGED, "strategy.ratio=1.0", "strategy.deploy_ratio=0.5"),
            *(f"trainer.mask={mask}", "trainer.mask_mode=topk"),
        )
        _, found = judge(made)
        assert all("gates" not in part for _, part, _ in found.values())
        assert all(0.4 < metrics["keep_ratio"] < 0.6 for _, _, metrics in found.values())


@pytest.mark.parametrize("ratio", [0.5, 1.0])
def test_one_run_tells_what_other_masks_and_ratios_would_give(federation, ratio):
    """Each figure is that of the cut network; with ratio 1 there are no gates, and masks are chosen by magnitude."""
    mask = "personal" if ratio < 1 else "magnitude"
    made = federation(
        *(*PPP, *MODELS["lenet5"], *JUDGED, f"strategy.ratio={ratio}", "trainer.mask_mode=topk"),
        *(f"trainer.mask={mask}", "trainer.controls=[random]", "trainer.judged_at=[0.25,1.0]"),
    )
    made = perturbed(made)
    worker, found = judge(made)
    trainer, groups = worker.trainer, worker.trainer.slices.groups
    for client, part, metrics in found.values():
        task = sent_to(worker, client, part)
        for name, control, at in (
            ("_at_0.25", mask, 0.25),
            ("_random_at_0.25", "random", 0.25),
            ("_at_1.0", mask, 1.0),
        ):
            kept = deployed(trainer, client, task, control, at)
            model = groups.build(worker.model, kept)
            model.load_state_dict(groups.slice(task.weights, kept))
            assert metrics[f"accuracy{name}"] == client.workload.evaluate(model, client.data.test)["accuracy"]
            assert metrics[f"flops{name}"] == trainer.slices.cost(kept).forward_flops
        assert metrics["flops_at_0.25"] == metrics["flops_random_at_0.25"] < metrics["flops_at_1.0"]
        assert metrics["flops_at_1.0"] == worker.network.forward_flops
        judged = [p for p in client.log.work().passes if not p.network.name.endswith("gated")]
        assert len(judged) == 1, "masks that are only compared with are no work of the device"


def test_personal_masks_without_gates_are_refused(federation):
    made = federation(*PPP, *JUDGED, "strategy.ratio=1.0", "strategy.deploy_ratio=0.5")
    with pytest.raises(ConfigError, match="needs trained gates"):
        judge(made)


def test_a_private_head_learns_in_the_channels_that_the_mask_keeps(federation):
    """Columns of removed channels stay as they were; the client is judged with its own head, cut by its own mask."""
    own = ("private=[head]", "trainer.mask_mode=topk", "model=mlp", "model.hidden=[8]", "trainer.weight_decay=0.1")
    made = federation(*MASKED, *own, "workload.client_test_fraction=0.5", "evaluate_clients=6")
    head, stored = "head.weight", {}
    for _, worker, replies in uplinks(made, 3):
        for client, content, answer in replies:
            after = tensors_of(answer[STATE])[f"private.{head}"]
            kept = worker.trainer.slices.groups.unpack(tensors_of(answer[KEPT])[BITS])["body.1"]
            gone = [channel for channel in range(8) if channel not in kept.tolist()]
            assert len(gone) == 4
            assert torch.equal(after[:, gone], worker.initial[head][:, gone]), "decay would have moved them too"
            assert not torch.equal(after[:, kept], worker.initial[head][:, kept])
            stored[client] = RecordDict({**content, STATE: answer[STATE]})
    made.instructions(4)
    worker = Worker(made.world)
    for message in made.strategy.configure_evaluate(4, made.shared, ConfigRecord(), made.grid):
        client = message.metadata.dst_node_id
        if client not in stored:
            continue
        part = RecordDict({**message.content, STATE: stored[client][STATE]})
        context = worker.context(task_of(part, client, 4))
        metrics = answered(worker, context, part, "evaluate")["metrics"]
        task, groups = (
            sent_to(worker, context, part),
            worker.trainer.slices.groups,
        )
        assert torch.equal(task.weights[head], tensors_of(stored[client][STATE])[f"private.{head}"])
        kept = deployed(worker.trainer, context, task, "personal", 0.5)
        model = groups.build(worker.model, kept)
        model.load_state_dict(groups.slice(task.weights, kept))
        assert metrics["accuracy"] == context.workload.evaluate(model, context.data.test)["accuracy"]
