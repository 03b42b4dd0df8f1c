"""A neural complexity measure: what its result may depend on, where gradients go, and a regression of sinusoids."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

from devices.nas.neural_complexity import Behaviour, NeuralComplexity, complexity_loss, regularised_loss

FEATURES, WIDTH = 6, 8


@pytest.fixture(autouse=True)
def _seeded():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def behaviour(networks: int = 3, classes: int = 4, train: int = 7, test: int = 5) -> Behaviour:
    y = F.one_hot(torch.randint(classes, (1, train)), classes).float()
    h, h_test = (torch.randn(networks, count, classes).softmax(2) for count in (train, test))
    return Behaviour(torch.randn(1, train, FEATURES), y, h, torch.randn(1, test, FEATURES), h_test)


def measure() -> NeuralComplexity:
    return NeuralComplexity(FEATURES, WIDTH)


def same(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one, other, atol=1e-5)


# --- what the result depends on --------------------------------------------------------------------------------------


def test_order_of_training_and_test_examples_and_of_classes_does_not_matter():
    model, seen = measure(), behaviour()
    train, test, classes = torch.randperm(7), torch.randperm(5), torch.tensor([2, 0, 3, 1])
    x, y, h, x_test, h_test = seen
    for mixed in (
        seen._replace(x=x[:, train], y=y[:, train], h=h[:, train]),
        seen._replace(x_test=x_test[:, test], h_test=h_test[:, test]),
        seen._replace(y=y[..., classes], h=h[..., classes], h_test=h_test[..., classes]),
    ):
        assert same(model(mixed), model(seen))


def test_every_part_of_the_behaviour_counts():
    """Swapping two examples, or two classes, in one part alone is another behaviour; so is another label."""
    model, seen = measure(), behaviour()
    for field, part in seen._asdict().items():
        assert not same(model(seen._replace(**{field: part.roll(1, 1)})), model(seen)), field
    for field in ("y", "h", "h_test"):
        assert not same(model(seen._replace(**{field: seen._asdict()[field].roll(1, 2)})), model(seen)), field


@pytest.mark.parametrize("classes", [1, 2, 8])
def test_batched_networks_are_measured_as_each_by_itself(classes: int):
    model, seen = measure(), behaviour(classes=classes)
    each = [model(seen._replace(h=seen.h[i : i + 1], h_test=seen.h_test[i : i + 1])) for i in range(3)]
    assert same(model(seen), torch.cat(each))
    own = seen._replace(x=seen.x.expand(3, -1, -1), y=seen.y.expand(3, -1, -1), x_test=seen.x_test.expand(3, -1, -1))
    assert same(model(own), model(seen))


# --- gradients -------------------------------------------------------------------------------------------------------


def learner_step(weight: float | None) -> tuple[nn.Linear, NeuralComplexity]:
    """Takes the gradient of a linear learner, by its plain loss where `weight` is None."""
    torch.manual_seed(1)
    model, learner, seen = measure(), nn.Linear(FEATURES, 4), behaviour()
    said = [learner(x) for x in (seen.x, seen.x_test)]
    loss = F.cross_entropy(said[0][0], seen.y[0])
    told = seen._replace(h=said[0].softmax(2), h_test=said[1].softmax(2))
    (loss if weight is None else regularised_loss(model, loss[None], told, weight)).backward()
    return learner, model


def test_measure_gets_no_gradient_in_a_learners_step_and_the_learner_does():
    (plain, _), (learner, model) = learner_step(None), learner_step(0.5)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert not same(learner.weight.grad, plain.weight.grad)


def test_weight_0_trains_as_without_the_measure():
    (plain, _), (learner, _) = learner_step(None), learner_step(0.0)
    assert torch.equal(plain.weight.grad, learner.weight.grad)


def test_gradient_of_the_regulariser_is_the_measures_own():
    """The part that the weight brings, per unit of it, is the slope of NC along the learner's parameters."""
    learner, model = learner_step(0.0)[0], learner_step(2.0)
    torch.manual_seed(1)
    free, again, seen = measure(), nn.Linear(FEATURES, 4), behaviour()
    free(seen._replace(h=again(seen.x).softmax(2), h_test=again(seen.x_test).softmax(2))).sum().backward()
    wanted = (model[0].weight.grad - learner.weight.grad) / 2
    assert torch.allclose(again.weight.grad, wanted, atol=1e-6)


def test_learner_gets_no_gradient_in_the_measures_step():
    model, seen = measure(), behaviour()
    told = seen._replace(h=seen.h.requires_grad_(), h_test=seen.h_test.requires_grad_())
    complexity_loss(model, told, torch.zeros(3)).backward()
    assert told.h.grad is None
    assert told.h_test.grad is None
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_loss_has_squared_errors_and_those_around_their_mean():
    """Errors 1, 2, 0: mean square 5/3; around their mean 2/3, over the variance of the true gaps."""
    model, seen = measure(), behaviour()
    with torch.no_grad():
        gaps = model(seen) + torch.tensor([1.0, 2.0, 0.0])
    wanted = 5 / 3 + 2 / 3 / gaps.var(correction=0).item()
    assert complexity_loss(model, seen, gaps).item() == pytest.approx(wanted, 1e-4)


# --- learning --------------------------------------------------------------------------------------------------------


def test_constant_gap_is_learned():
    model, seen = measure(), behaviour()
    adam = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(100):
        adam.zero_grad()
        complexity_loss(model, seen, torch.full((3,), 0.7)).backward()
        adam.step()
    unseen = behaviour(classes=3)
    with torch.no_grad():
        assert model(seen).tolist() == pytest.approx([0.7] * 3, abs=0.02)
        assert model(unseen).tolist() == pytest.approx([0.7] * 3, abs=0.2)


class Sinusoids:
    """The paper's regression: amplitude and phase of each task are drawn; ten points to train on, fifteen to judge."""

    def __init__(self, tasks: int):
        amplitude, phase = torch.empty(tasks, 1, 1).uniform_(0.1, 5), torch.empty(tasks, 1, 1).uniform_(0, 3.14)
        self.x, self.x_test = (torch.empty(tasks, count, 1).uniform_(-5, 5) for count in (10, 15))
        self.y, self.y_test = (amplitude * torch.sin(x - phase) for x in (self.x, self.x_test))
        self.learner = nn.Sequential(nn.Linear(1, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 1))
        first = dict(self.learner.named_parameters())
        self.weights = {name: part.detach().expand(tasks, *part.shape).clone() for name, part in first.items()}

    def step(self, weights: dict[str, Tensor], x: Tensor, y: Tensor) -> dict[str, Tensor]:
        """Takes a step of SGD of one learner."""
        slope = grad(lambda own: F.mse_loss(functional_call(self.learner, own, (x,)), y))(weights)
        return {name: part - 1e-2 * slope[name] for name, part in weights.items()}

    def trainings(self, steps: int = 16) -> list[tuple[Behaviour, Tensor]]:
        """Trains all learners at once, and returns what they say after each step, with their gaps."""
        taken = []
        for _ in range(steps):
            self.weights = vmap(self.step)(self.weights, self.x, self.y)
            h, h_test = (
                vmap(lambda own, x: functional_call(self.learner, own, (x,)))(self.weights, x).detach()
                for x in (self.x, self.x_test)
            )
            gap = (h_test - self.y_test).square().mean((1, 2)) - (h - self.y).square().mean((1, 2))
            taken.append((Behaviour(self.x, self.y, h, self.x_test, h_test), gap))
        return taken


def test_batched_learners_are_those_of_a_loop():
    tasks = Sinusoids(3)
    looped = [{name: part[i] for name, part in tasks.weights.items()} for i in range(3)]
    (seen, gap) = tasks.trainings(4)[-1]
    for i, weights in enumerate(looped):
        for _ in range(4):
            weights = tasks.step(weights, tasks.x[i], tasks.y[i])
        assert same(functional_call(tasks.learner, weights, (tasks.x[i],)), seen.h[i])
    assert gap.std() > 0


@pytest.fixture(scope="module")
def learned() -> tuple[NeuralComplexity, float]:
    """Learns a measure on 256 sinusoids; returns it, and the mean gap after their trainings."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        bank, model = Sinusoids(256).trainings(), NeuralComplexity(1, 32)
    adam, draw = torch.optim.Adam(model.parameters(), lr=2e-3), np.random.default_rng(0)
    for _ in range(100):
        seen, gap = bank[draw.integers(len(bank))]
        rows = torch.from_numpy(draw.permutation(256)[:64])
        adam.zero_grad()
        complexity_loss(model, Behaviour(*(part[rows] for part in seen)), gap[rows]).backward()
        adam.step()
    return model, bank[-1][1].mean().item()


def test_gaps_of_sinusoids_are_predicted_on_tasks_that_were_not_seen(learned: tuple[NeuralComplexity, float]):
    model, usual = learned
    seen, gap = Sinusoids(200).trainings()[-1]
    with torch.no_grad():
        predicted = model(seen)
    assert torch.corrcoef(torch.stack([predicted, gap]))[0, 1] > 0.5
    assert (predicted - gap).abs().mean() < 0.8 * (gap - usual).abs().mean()


def test_learners_that_the_measure_regularises_do_better_on_test_points(learned: tuple[NeuralComplexity, float]):
    """As in the paper: a larger loss on the training points, a smaller one on those of the test."""
    model, tasks, losses = learned[0], Sinusoids(100), []
    say = vmap(lambda own, x: functional_call(tasks.learner, own, (x,)))
    for weight in (0.0, 1.0):
        weights = tasks.weights
        for _ in range(16):
            own = {name: part.clone().requires_grad_() for name, part in weights.items()}
            h, h_test = (say(own, x) for x in (tasks.x, tasks.x_test))
            train, test = ((a - b).square().mean((1, 2)) for a, b in ((h, tasks.y), (h_test, tasks.y_test)))
            regularised_loss(model, train, Behaviour(tasks.x, tasks.y, h, tasks.x_test, h_test), weight).backward()
            weights = {name: (part - 1e-2 * part.grad).detach() for name, part in own.items()}
        losses.append((train.mean().item(), test.mean().item()))
    (plain, plain_test), (held_back, held_back_test) = losses
    assert held_back > plain
    assert held_back_test < 0.95 * plain_test
