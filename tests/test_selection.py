"""Rules that pick examples, against small cases worked out by hand."""

import pytest
import torch
from torch import Tensor

from clients.trainers.rehearsal.selection import RULES, Pool, balanced, farthest, herd, pick, quotas, seeding
from fedsim.models.mlp import MLP
from fedsim.workloads.blobs import Blobs


def draw(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pool(n: int = 30) -> Pool:
    workload = Blobs(lambda **s: MLP(**s, hidden=[8]), 1, 3, num_classes=3, input_shape=(6,))
    return Pool(workload, workload.build_model(), workload.sample(n))


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("class_balanced", [True, False])
def test_every_rule_picks_as_many_distinct_examples_and_repeats(name: str, class_balanced: bool):
    for size in (0, 1, 7, 30, 40):
        picked = pick(name, pool(), size, draw(), class_balanced)
        assert len(picked) == len(set(picked.tolist())) == min(size, 30)
        assert torch.equal(picked, pick(name, pool(), size, draw(), class_balanced))


@pytest.mark.parametrize("name", RULES)
def test_balanced_counts_differ_by_at_most_one(name: str):
    some = pool(60)
    counts = some.labels[pick(name, some, 14, draw(), True)].bincount(minlength=3)
    assert counts.max() - counts.min() <= 1


def test_leftovers_go_to_the_classes_that_have_more():
    labels = torch.tensor([0] * 10 + [1] * 1 + [2] * 4)
    assert quotas(labels, 9, draw()) == {0: 4, 1: 1, 2: 4}
    assert quotas(labels, 50, draw()) == {0: 10, 1: 1, 2: 4}


@pytest.mark.parametrize("name", RULES)
def test_with_more_classes_than_places_every_class_has_its_chance(name: str):
    """Two of three classes, and each of them with some seeds: no class is left out because of its number."""
    some = pool()
    chosen = [some.labels[pick(name, some, 2, draw(seed), True)].tolist() for seed in range(30)]
    assert all(len(set(classes)) == 2 for classes in chosen)
    assert {c for classes in chosen for c in classes} == {0, 1, 2}
    assert {classes[0] for classes in chosen} == {0, 1, 2}


def test_balanced_takes_the_first_of_every_class_in_turn():
    labels = torch.tensor([0, 0, 0, 1, 1, 2])
    order = torch.tensor([5, 2, 1, 0, 4, 3])
    assert balanced(labels, order, 5).tolist() == [5, 2, 4, 1, 3]
    assert balanced(labels, order, 2).tolist() == [5, 2]


def test_seeding_never_takes_a_copy_while_anything_else_is_left():
    points = torch.tensor([[0.0], [0.0], [0.0], [5.0], [9.0]])
    for seed in range(20):
        picked = points[seeding(points, 3, draw(seed))].flatten().tolist()
        assert sorted(picked) == [0, 5, 9]
    assert sorted(seeding(points, 5, draw()).tolist()) == [0, 1, 2, 3, 4]


def test_seeding_draws_by_squared_distance():
    """From 0, the points at 1 and 3 are drawn next with odds 1 : 9."""
    points = torch.tensor([[0.0], [1.0], [3.0]])
    second = [picked[1] for seed in range(2000) if (picked := seeding(points, 2, draw(seed)).tolist())[0] == 0]
    share = sum(place == 2 for place in second) / len(second)
    assert share == pytest.approx(0.9, abs=4 * (0.9 * 0.1 / len(second)) ** 0.5)


def test_the_farthest_point_comes_next():
    points = torch.tensor([[0.0], [1.0], [10.0], [4.0]])
    assert farthest(points, 4).tolist() == [0, 2, 3, 1]


def brute_force_herding(points: Tensor, size: int) -> list[int]:
    unit = points / points.norm(dim=1, keepdim=True)
    chosen: list[int] = []
    for _ in range(size):
        rest = [i for i in range(len(unit)) if i not in chosen]
        chosen.append(min(rest, key=lambda i: float((unit.mean(0) - unit[[*chosen, i]].mean(0)).norm())))
    return chosen


def test_herding_keeps_the_mean():
    points = torch.randn(12, 3, generator=draw(), dtype=torch.float64)
    assert herd(points, 6).tolist() == brute_force_herding(points, 6)


def test_entropy_and_loss_take_the_largest():
    some = pool()
    p = some.probabilities
    assert torch.allclose(p, some.model(some.batch["x"]).softmax(-1), atol=1e-6)
    uncertain = -(p * p.log()).sum(1)
    picked = RULES["entropy"](some, 5, draw())
    assert set(picked.tolist()) == set(uncertain.topk(5).indices.tolist())
    losses = some.workload.losses(some.model, some.batch)
    assert set(RULES["hardest"](some, 5, draw()).tolist()) == set(losses.topk(5).indices.tolist())


def test_gradients_are_those_of_the_last_layer():
    some = pool(4)
    for i in range(4):
        loss = some.workload.loss(some.model, {key: t[i : i + 1] for key, t in some.batch.items()})
        weight, bias = torch.autograd.grad(loss, list(some.model.head.parameters()))
        expected = torch.cat([weight, bias[:, None]], 1).flatten()
        assert torch.allclose(some.gradients[i], expected, atol=1e-6)


def test_only_rules_that_look_at_the_model_pay_for_it():
    for name, passes in (("uniform", 0), ("kmeans_features", 0), ("icarl", 30), ("grad_matching", 30)):
        some = pool()
        pick(name, some, 6, draw(), True)
        assert some.passed == passes
