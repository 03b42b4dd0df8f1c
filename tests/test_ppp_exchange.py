"""What clients of PPP are sent and send, and how it is averaged."""

from dataclasses import replace

import pytest
import torch
from conftest import answered, task_of
from flwr.app import ArrayRecord, RecordDict
from ppp_federation import IMAGES, MASKED, MODELS, PPP, start, uplinks

from fedsim.exchanges.slices import BITS, KEPT
from fedsim.messages.records import ARRAYS, METRICS, STATE, payload_bytes, record_bytes, tensors_of


@pytest.mark.parametrize("mode", ["full", "masked"])
def test_no_support_prototype_or_label_is_sent_up(federation, mode):
    """Names and sizes: the network or its part, the gate modules, and one bit per channel; nothing of another size."""
    own = (*PPP, "model=lenet5", *IMAGES, f"strategy.train_mode={mode}")
    made = federation(*own)
    for _, worker, replies in uplinks(made, 3):
        groups = worker.trainer.slices.groups
        channels = sum(g.channels for g in groups.groups.values())
        for _, _, answer in replies:
            arrays = {n: r for n, r in answer.items() if isinstance(r, ArrayRecord)}
            assert set(arrays) <= {ARRAYS, "gates", "mask", "kept", STATE}
            assert STATE not in arrays, "there is nothing to keep"
            assert set(answer) - set(arrays) == {METRICS}
            assert set(answer[METRICS]) == {"num-examples", "train_loss", "keep_ratio"}
            gates = sum(p.numel() for p in worker.trainer.plan.parameters())
            assert record_bytes(arrays["gates"]) == 4 * gates
            bits = [record_bytes(arrays[n]) for n in ("mask", "kept") if n in arrays]
            assert bits
            assert all(size == -(-channels // 8) for size in bits)
            kept = groups.unpack(tensors_of(arrays["kept"])[BITS]) if mode == "masked" else groups.all()
            part = groups.slice(worker.trainer.slices.model.state_dict(), kept)
            assert record_bytes(arrays[ARRAYS]) == sum(t.numel() * t.itemsize for t in part.values())


def test_masked_training_sends_and_trains_only_the_clients_own_channels(federation):
    made = federation(*MASKED, "trainer.mask_mode=topk", "model=lenet5", *IMAGES, "cohort=6", "rounds=3")
    sizes = {}
    for number, worker, replies in uplinks(made, 2):
        sizes[number] = [payload_bytes(content) for _, content, _ in replies]
        plan, groups = worker.trainer.plan, worker.trainer.slices.groups
        for client, content, answer in replies:
            held = groups.unpack(tensors_of(content[KEPT])[BITS])
            own = groups.unpack(tensors_of(answer[KEPT])[BITS])
            assert all(bool(torch.isin(own[n], held[n]).all()) for n in own)
            assert {n: len(own[n]) for n in own} == {n: groups.count(n, 0.5) for n in plan.names}
            client_context = worker.context(task_of(content, client, number))
            answered(worker, client_context, content, "train")
            trained_passes = [p for p in client_context.log.work().passes if p.backwards]
            assert all(
                p.network.parameter_bytes < worker.network.parameter_bytes
                for p in trained_passes
                if not p.network.name.endswith("gated")
            )
        before = tensors_of(made.arrays)
        kept = [groups.mask_of(groups.unpack(tensors_of(a[KEPT])[BITS])) for _, _, a in replies]
    assert max(sizes[2]) < min(sizes[1])
    after = tensors_of(made.arrays)
    assert set(after) == set(before)
    name = made.strategy.plan.names[0]
    nobody = ~torch.stack([masks[name] for masks in kept]).any(0)
    assert torch.equal(after[f"{name}.weight"][nobody], before[f"{name}.weight"][nobody])
    assert not torch.equal(after[f"{name}.weight"][~nobody], before[f"{name}.weight"][~nobody])


def test_disjoint_masks_leave_each_coordinate_to_its_owner(federation):
    made, worker, _part, client, task = start(federation, *MASKED, "model=mlp", "model.hidden=[8]")
    groups = made.strategy.slices.groups
    update = worker.trainer.fit(client, task)
    parts, kepts = [], ([0, 3], [1, 6])
    for number, channels in enumerate(kepts):
        kept = {"body.1": torch.tensor(channels)}
        tensors = {n: torch.randn(t.shape) for n, t in groups.slice(task.weights, kept).items()}
        extras = {**update.extras, KEPT: {BITS: groups.pack(kept)}}
        extras.pop("mask", None)
        parts.append(replace(update, client_id=number, num_examples=3 + 5 * number, weights=tensors, extras=extras))
    mean = made.strategy.combine(1, parts)["body.1.weight"]
    for one, channels in zip(parts, kepts, strict=True):
        assert torch.equal(mean[channels], one.weights["body.1.weight"])
    assert torch.equal(mean[[2, 4, 5, 7]], made.strategy.weights["body.1.weight"][[2, 4, 5, 7]])
    assert made.strategy.distance == 1.0


def test_gates_are_averaged_over_all_clients_by_their_examples(federation):
    made, worker, _part, client, task = start(federation, *PPP)
    update = worker.trainer.fit(client, task)
    gates = {n: t.clone() for n, t in update.extras["gates"].items()}
    more = {n: t + 1 for n, t in gates.items()}
    other = next(number for number in made.strategy.sent if number != client.client_id)
    a, b = replace(update, num_examples=3), replace(update, client_id=other, num_examples=1)
    made.strategy.combine(
        1, [replace(a, extras={**a.extras, "gates": gates}), replace(b, extras={**b.extras, "gates": more})]
    )
    for name, tensor in made.strategy.gates.items():
        torch.testing.assert_close(tensor, gates[name] + 0.25)


@pytest.mark.parametrize("mode", ["full", "masked"])
def test_a_private_head_stays_whole_on_the_device(federation, mode):
    made = federation(
        *PPP, *MODELS["lenet5"], "private=[head]", f"strategy.train_mode={mode}", "trainer.mask_mode=topk"
    )
    head = {n for n in tensors_of(made.arrays) if n not in tensors_of(made.shared)}
    assert head
    for _, worker, replies in uplinks(made, 2):
        for client, content, answer in replies:
            assert not head & set(content[ARRAYS])
            assert not head & set(answer[ARRAYS])
            stored = RecordDict({**content, STATE: answer[STATE]})
            kept = worker.context(task_of(stored, client, 9)).state.restored("private", worker.initial)
            for name in head:
                assert kept[name].shape == tensors_of(made.arrays)[name].shape
                assert not torch.equal(kept[name], tensors_of(made.arrays)[name])
