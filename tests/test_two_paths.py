"""PQK and DCIL: what must hold exactly of a pruned network inside the whole one that teaches it."""

import math
from dataclasses import replace

import pytest
import torch
from conftest import answered, sent_to, task_of
from flwr.app import ConfigRecord, RecordDict
from torch import nn
from torch.func import functional_call

from clients.worker import Worker
from devices.compression.masks import global_masks, sparsity_of
from devices.compression.quantise import limits
from devices.compression.sizes import nonzero_bytes, wire_bytes
from devices.compression.two_paths import TwoPaths, norm_tensors, prunable_first, step_of, unimportant
from fedsim.errors import ConfigError
from fedsim.messages.records import record_of, tensors_of

IMAGES = ("workload.input_shape=[1,8,8]", "model=convnet", "model.channels=[6,8]", "model.batch_norm=true")
DCIL = ("method=dcil", *IMAGES, "trainer.sparsity=0.5", "trainer.refresh=1", "trainer.prune_rounds=2")
PQK = ("method=pqk", *IMAGES, "trainer.sparsity=0.5", "trainer.refresh=1", "trainer.prune_rounds=1")


def start(federation, *overrides: str, round: int = 1):
    """A federation, and of one client of a round a worker, its context and its task, ready to be trained."""
    made = federation(*overrides)
    message = made.instructions(round)[0]
    worker = Worker(made.world)
    client = worker.context(task_of(message.content, message.metadata.dst_node_id, round))
    task = sent_to(worker, client, message.content)
    worker.live.load(task.weights)
    worker.model.train()
    return made, worker, client, task


def ready(federation, *overrides: str, round: int = 1):
    """As `start`, with the run of the client as a step sees it, and a batch."""
    _, worker, client, task = start(federation, *overrides, round=round)
    run = worker.trainer.start(client, task)
    return run, run.trainer.paths, client, next(iter(run.batches()))


def teacher_norms(run) -> None:
    for name in run.trainer.learned_norms:
        run.norms[name].requires_grad_()


# --- two networks in one set of weights -------------------------------------------------------------------------------


def test_the_teachers_weight_is_the_weight_with_gradient_where_it_is_not_important():
    weight = torch.tensor([1.5, -2.0, 0.25], requires_grad=True)
    seen = unimportant(weight, torch.tensor([True, False, True]))
    assert torch.equal(seen, weight)
    seen.sum().backward()
    assert weight.grad.tolist() == [0, 1, 0]


def test_a_step_is_that_of_the_weights_that_stay_by_hand():
    """4 bits, Q = 7: rows keep |1|, |3| with mean 2, and |4|: steps 4 / sqrt 7 and 8 / sqrt 7; an empty row has one."""
    weight = torch.tensor([[1.0, -3.0, 9.0], [4.0, 7.0, 7.0], [1.0, 1.0, 1.0]])
    mask = torch.tensor([[1, 1, 0], [1, 0, 0], [0, 0, 0]]).bool()
    step = step_of(weight, mask, 4)
    assert step[:2].tolist() == pytest.approx([4 / math.sqrt(7), 8 / math.sqrt(7)])
    assert step[2] > 0


def test_convolutions_are_pruned_and_without_them_linear_layers_but_the_last():
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(2, 3))
    assert prunable_first(network) == ["0.weight"]
    assert prunable_first(nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 3), nn.Linear(3, 2))) == ["0.weight", "1.weight"]
    assert prunable_first(nn.Sequential(nn.Linear(2, 3))) == ["0.weight"]
    statistics = ["running_mean", "running_var", "num_batches_tracked"]
    assert norm_tensors(network) == [f"1.{name}" for name in ("weight", "bias", *statistics)]


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_a_students_weights_have_no_more_values_than_integers_and_the_export_is_the_same(settings, bits):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 36, 3)).eval()
    paths = TwoPaths(model, ["0.weight", "4.weight"], bits)
    masks = global_masks(paths.weights(), 0.6)
    student = paths.student(masks)
    tensors, widths = paths.exported(masks)
    assert widths == {"0.weight": bits, "4.weight": bits}
    for name, weight in student.items():
        integers, scale = tensors[name], tensors[f"{name.removesuffix('weight')}scale"]
        assert integers.dtype == torch.int8
        low, high = limits(bits)
        assert low <= int(integers.min()) <= int(integers.max()) <= high
        assert torch.equal(integers * scale.view(-1, *[1] * (weight.dim() - 1)), weight)
        assert all(len(row.unique()) <= 2**bits for row in weight.flatten(1))
        assert not weight[~masks[name]].any()
    own = {n: t for n, t in tensors.items() if not n.endswith("scale") and n not in student}
    built = {
        **own,
        **{n: tensors[n] * tensors[f"{n[:-6]}scale"].view(-1, *[1] * (student[n].dim() - 1)) for n in student},
    }
    x = torch.randn(4, 1, 8, 8)
    assert torch.equal(functional_call(model, built, (x,)), functional_call(model, student, (x,)))
    assert wire_bytes(tensors, widths) < wire_bytes(dict(model.state_dict()))


# --- invariants of the trainers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("method, round", [(DCIL, 1), (PQK, 2)])
def test_important_weights_learn_from_the_student_and_the_others_from_the_teacher(federation, method, round):
    run, paths, client, batch = ready(federation, *method, round=round)
    if round == 1:  # at the very start nothing is pruned
        run.masks = global_masks(paths.weights(), 0.5)
    teacher_norms(run)
    weights = paths.weights()
    student, teacher = run.networks()
    for network, learns in ((student, True), (teacher, False)):
        loss = client.workload.loss(network, batch)
        gradients = torch.autograd.grad(loss, list(weights.values()), retain_graph=True)
        for (name, mask), gradient in zip(((n, run.masks[n]) for n in weights), gradients, strict=True):
            assert not gradient[mask != learns].any(), name
            assert gradient[mask == learns].any(), name
    own, others = dict(client.model.named_parameters()), [run.norms[n] for n in run.trainer.learned_norms]
    assert torch.autograd.grad(client.workload.loss(student, batch), others, allow_unused=True) == (None,) * len(others)
    norms = [own[n] for n in run.trainer.learned_norms]
    assert torch.autograd.grad(client.workload.loss(teacher, batch), norms, allow_unused=True) == (None,) * len(norms)


@pytest.mark.parametrize("method", [DCIL, PQK])
def test_the_teacher_with_the_students_norms_is_the_dense_network_exactly(federation, method):
    run, paths, client, batch = ready(federation, *method)
    run.masks = {name: torch.ones_like(w, dtype=torch.bool) for name, w in paths.weights().items()}
    client.model.eval()
    run.norms = {name: client.weights[name] for name in run.norms}
    _, teacher = run.networks()
    assert torch.equal(teacher(batch["x"]), client.model(batch["x"]))


def test_without_a_teacher_unimportant_weights_stay_as_they_are_to_the_bit(federation):
    own = ("trainer.distil=0", "trainer.teacher=0", "trainer.local_epochs=3")
    _, worker, client, task = start(federation, *PQK, *own, round=2)
    run = worker.trainer.start(client, task)
    before = {name: w.detach().clone() for name, w in worker.trainer.paths.weights().items()}
    run.fit()
    for name, weight in worker.trainer.paths.weights().items():
        mask = run.masks[name]
        assert torch.equal(weight[~mask], before[name][~mask])
        assert not torch.equal(weight[mask], before[name][mask])


def test_losses_are_those_of_the_two_networks_and_their_divergence(federation):
    """DCIL: both ways from the second round on; PQK: the student alone, then with the teacher, lambda and T^2."""
    log = torch.nn.functional.log_softmax

    def kl(a, b):
        return 4 * (log(b / 2, -1).exp() * (log(b / 2, -1) - log(a / 2, -1))).sum(-1).mean()

    for round, taught in ((1, False), (2, True)):
        run, _, client, batch = ready(federation, *DCIL, "trainer.distil_after=1", round=round)
        client.model.eval()  # norms must not move between the calls
        part, full = (network(batch["x"]) for network in run.networks())
        expected = sum(torch.nn.functional.cross_entropy(logits, batch["y"]) for logits in (part, full))
        expected = expected + (kl(part, full) + kl(full, part) if taught else 0)
        torch.testing.assert_close(run.objective(run, batch), expected)
    for round, taught in ((1, False), (2, True)):
        run, _, client, batch = ready(federation, *PQK, "trainer.distil=0.5", "trainer.teacher=3", round=round)
        client.model.eval()
        student, teacher = (network(batch["x"]) for network in run.networks())
        expected = torch.nn.functional.cross_entropy(student, batch["y"])
        if taught:
            expected = (
                expected + 3 * torch.nn.functional.cross_entropy(teacher, batch["y"]) + 0.5 * kl(student, teacher)
            )
        torch.testing.assert_close(run.objective(run, batch), expected)


def test_sparsity_follows_the_schedule_and_then_masks_never_change(federation):
    """Two steps a round: cubic towards 0.5 in one round, s(1/2) = 0.875 x 0.5; from round 2 on floor(0.5 N) zeros."""
    made, worker, client, task = start(federation, *PQK)
    trainer, seen = worker.trainer, []
    run = trainer.start(client, task)
    size = sum(w.numel() for w in trainer.paths.weights().values())
    for _ in run.batches():
        seen.append(sum(int((~m).sum()) for m in run.masks.values()))
    assert seen == [0, math.floor(0.4375 * size)]
    masks = []
    for round in (2, 3):
        run = trainer.start(replace(client, round=round), replace(task, round=round))
        run.fit()
        masks.append({name: mask.clone() for name, mask in run.masks.items()})
        assert sum(int((~m).sum()) for m in masks[-1].values()) == math.floor(0.5 * size)
        worker.model.load_state_dict(made.model.state_dict())  # other magnitudes than those of the masks
    assert all(torch.equal(masks[0][name], masks[1][name]) for name in masks[0])


def test_pruned_weights_learn_in_phase_1_only_with_the_straight_through_gradient(federation):
    moved = {}
    for rule in ("masked", "ste"):
        run, paths, _, batch = ready(federation, *PQK, f"trainer.phase1_grad={rule}")
        run.masks = global_masks(paths.weights(), 0.5)
        gradients = torch.autograd.grad(run.objective(run, batch), list(paths.weights().values()))
        moved[rule] = any(bool(g[~run.masks[n]].any()) for n, g in zip(paths.names, gradients, strict=True))
    assert moved == {"masked": False, "ste": True}


@pytest.mark.parametrize("method", [DCIL, PQK])
def test_nothing_but_the_model_is_sent_and_the_teachers_norms_stay(federation, method):
    made, worker, client, task = start(federation, *method, round=2)
    before = {name: t.clone() for name, t in task.weights.items()}
    answer = answered(worker, client, RecordDict({"arrays": made.arrays}), "train")
    assert {n for n in answer if n not in ("metrics", "state")} == {"arrays"}
    kept = tensors_of(answer["state"])
    assert {n for n in kept if n.startswith("teacher.")} == {f"teacher.{n}" for n in worker.trainer.paths.norms}
    learned = [n for n in worker.trainer.learned_norms if n.endswith("weight")]
    assert all(not torch.equal(kept[f"teacher.{n}"], before[n]) for n in learned)
    assert all(not torch.equal(kept[f"teacher.{n}"], tensors_of(answer["arrays"])[n]) for n in learned)


@pytest.mark.parametrize("method, zeros", [(DCIL, ["body.0.weight", "body.3.weight"]), (PQK, None)])
def test_clients_are_judged_with_the_pruned_network(federation, method, zeros):
    own = ("evaluate_clients=6", "workload.client_test_fraction=0.5", "workload.examples_per_client=24", "rounds=3")
    made = federation(*method, *own)
    reports = [report for report, _ in made.rounds()]
    assert reports[-1].metrics["client_sparsity"] == pytest.approx(0.5, abs=0.01)
    made.instructions(4)
    message = next(iter(made.strategy.configure_evaluate(4, made.shared, ConfigRecord(), made.grid)))
    worker = Worker(made.world)
    client = worker.context(task_of(message.content, message.metadata.dst_node_id, 4))
    worker.live.load(sent_to(worker, client, message.content).weights)
    masks = worker.trainer.masks_at(4)
    metrics = answered(worker, client, message.content, "evaluate")["metrics"]
    trainer, state = worker.trainer, dict(worker.model.state_dict())
    pruned = {name: state[name] for name in zeros or trainer.paths.names}
    assert sparsity_of({n: w != 0 for n, w in pruned.items()}) >= 0.49
    tensors, bits = trainer.paths.exported(masks)
    assert metrics["nonzero_bytes"] == nonzero_bytes(tensors, bits) < metrics["dense_bytes"]
    assert metrics["wire_bytes"] == wire_bytes(tensors, bits)
    assert 0 <= metrics["accuracy_teacher"] <= 1
    passes = client.log.work().passes
    assert [(p.batch, p.forwards, p.backwards) for p in passes] == [(len(client.data.test), 1, 0)]


def test_nothing_pruned_and_no_integers_is_sgd_bit_for_bit(federation):
    own = ("trainer.sparsity=0", "trainer.floor=0", "trainer.bits=32", "trainer.activation_bits=32")
    sums = []
    for method in (("method=pqk", "trainer.prune_rounds=9", *own), ("method=fedavg",)):
        made = federation(*method, *IMAGES, "model.memory_format=contiguous")
        list(made.rounds())
        sums.append(tensors_of(made.arrays))
    for name, tensor in sums[0].items():
        torch.testing.assert_close(tensor, sums[1][name], rtol=0, atol=0)


@pytest.mark.parametrize(
    "overrides, sentence",
    [
        (("method=pqk", "trainer.sparsity=1.0"), r"trainer.sparsity must be in \[0, 1\)"),
        (("method=pqk", "trainer.sparsity=0.9", "trainer.floor=0.2"), "trainer.floor at most what it leaves"),
        (("method=pqk", "trainer.prune_rounds=0"), "trainer.prune_rounds must be at least 1"),
        (("method=dcil", "trainer.refresh=0"), "trainer.refresh must be at least 1"),
        (("method=dcil", "trainer.temperature=0"), "trainer.temperature must be greater than 0"),
        (("method=dcil", "trainer.distil_after=-1"), "trainer.distil_after must be at least 0"),
        (("method=pqk", "trainer.bits=16"), "trainer.bits must be 32 or from 2 to 8"),
        (("method=pqk", "trainer.teacher=-1"), "trainer.teacher must be at least 0"),
        (("method=pqk", "trainer.phase1_grad=stee"), "did you mean 'ste'"),
    ],
)
def test_wrong_settings_are_one_sentence(federation, overrides, sentence):
    with pytest.raises(ConfigError, match=sentence):
        list(federation(*overrides).rounds())


def test_state_of_a_client_travels_as_a_record():
    masks = {"masks.a": torch.tensor([True, False])}
    assert torch.equal(tensors_of(record_of(masks))["masks.a"], masks["masks.a"])
