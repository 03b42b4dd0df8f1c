"""Methods against a second, independent account of their equations: a network of two layers in float64, three rounds.

Data, initial weights, cohorts and the order of the examples are the run's own; all arithmetic is written out here.
"""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from fedsim.messages.records import tensors_of
from fedsim.runs.federation import Federation
from fedsim.seeding import torch_generator

Weights = list[Tensor]
LR, BATCH, EPOCHS, N, CLASSES = 0.1, 4, 2, 4, 3
RUN = (
    *("workload.num_classes=3", "workload.input_shape=[6]", "workload.examples_per_client=14", "model.hidden=[5]"),
    *("workload.alpha=0.5", "workload.size_alpha=1.0", "num_clients=4", "rounds=3", f"trainer.lr={LR}"),
    *(f"trainer.batch_size={BATCH}", f"trainer.local_epochs={EPOCHS}"),
)


class Account:
    """What the server and the clients of a run do, written out."""

    def __init__(self, federation: Federation):
        self.workload, self.seed = federation.world.workload, federation.settings.seed
        self.x: Weights = [t.double() for t in tensors_of(federation.arrays).values()]
        self.sizes: dict[int, int] = {}
        self.lr = LR

    def batches(self, client: int, number: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of a client's round, in order."""
        data, draw = self.workload.client_data(client).train, torch_generator(self.seed, "batches", number, client)
        self.sizes[client] = len(data)
        for _ in range(EPOCHS):
            for rows in torch.randperm(len(data), generator=draw).split(BATCH):
                batch = data.gather(rows)
                yield batch["x"].double(), batch["y"]

    def gradient(self, w: Weights, x: Tensor, y: Tensor) -> Weights:
        """The gradient of the mean cross-entropy, by the chain rule."""
        w1, b1, w2, b2 = w
        before = x @ w1.T + b1
        hidden = before.clamp(min=0)
        error = (torch.softmax(hidden @ w2.T + b2, 1) - torch.eye(CLASSES)[y]) / len(y)
        back = (error @ w2) * (before > 0)
        return [back.T @ x, back.sum(0), error.T @ hidden, error.sum(0)]

    def local(self, client: int, number: int, direction: Callable[[Weights, Weights], Weights]) -> tuple[Weights, int]:
        """A client's weights after its steps along `direction(gradient, weights)`, and how many these were."""
        y, steps = [t.clone() for t in self.x], 0
        for x, label in self.batches(client, number):
            y = [w - self.lr * d for w, d in zip(y, direction(self.gradient(y, x, label), y), strict=True)]
            steps += 1
        return y, steps

    def mean(self, some: dict[int, Weights], shares: dict[int, float] | None = None) -> Weights:
        """The mean over clients, by examples where no shares are given."""
        total = sum(self.sizes[i] for i in some)
        shares = shares or {i: self.sizes[i] / total for i in some}
        return [sum(shares[i] * w[n] for i, w in some.items()) for n in range(4)]


def fedavg(a: Account, number: int, cohort: tuple[int, ...]) -> Weights:
    return a.mean({i: a.local(i, number, lambda g, y: g)[0] for i in cohort})


def fedprox(a: Account, number: int, cohort: tuple[int, ...]) -> Weights:
    def pulled(g: Weights, y: Weights) -> Weights:
        return [gradient + 0.5 * (w - x) for gradient, w, x in zip(g, y, a.x, strict=True)]

    return a.mean({i: a.local(i, number, pulled)[0] for i in cohort})


def scaffold(a: Account, number: int, cohort: tuple[int, ...]) -> Weights:
    """Algorithm 1 with option II; every client counts the same, the server steps half of the way.

    The local rate halves with every round, and a weight decay is a part of the loss.
    """
    a.lr = LR * 0.5 ** (number - 1)
    if number == 1:
        a.c, a.own = [0 * t for t in a.x], {i: [0 * t for t in a.x] for i in range(N)}
    ends, change = {}, [0 * t for t in a.x]
    for i in cohort:
        drift = [c - o for c, o in zip(a.c, a.own[i], strict=True)]
        ends[i], steps = a.local(
            i, number, lambda g, y, drift=drift: [d + 0.1 * w + e for d, w, e in zip(g, y, drift, strict=True)]
        )
        new = [(x - y) / (steps * a.lr) - e for x, y, e in zip(a.x, ends[i], drift, strict=True)]
        change = [s + n - o for s, n, o in zip(change, new, a.own[i], strict=True)]
        a.own[i] = new
    a.c = [c + s / N for c, s in zip(a.c, change, strict=True)]
    mean = a.mean(ends, dict.fromkeys(cohort, 1 / len(cohort)))
    return [x + 0.5 * (m - x) for x, m in zip(a.x, mean, strict=True)]


def fednova(a: Account, number: int, cohort: tuple[int, ...]) -> Weights:
    """With momentum: the sum of the gradients' weights by the paper's formula."""
    ways, norms, m = {}, {}, 0.9
    for i in cohort:
        velocity = [0 * t for t in a.x]

        def rolled(g: Weights, y: Weights, velocity: Weights = velocity) -> Weights:
            velocity[:] = [m * v + d for v, d in zip(velocity, g, strict=True)]
            return velocity

        end, tau = a.local(i, number, rolled)
        norms[i] = (tau - m * (1 - m**tau) / (1 - m)) / (1 - m)
        ways[i] = [(y - x) / norms[i] for y, x in zip(end, a.x, strict=True)]
    total = sum(a.sizes[i] for i in cohort)
    tau_eff = sum(a.sizes[i] / total * norms[i] for i in cohort)
    return [x + tau_eff * d for x, d in zip(a.x, a.mean(ways), strict=True)]


def feddyn(a: Account, number: int, cohort: tuple[int, ...]) -> Weights:
    """Algorithm 1 with the paper's h and gradients of the clients."""
    alpha = 0.5
    if number == 1:
        a.h, a.own = [0 * t for t in a.x], {i: [0 * t for t in a.x] for i in range(N)}
    ends = {}
    for i in cohort:
        ends[i], _ = a.local(
            i,
            number,
            lambda g, y, i=i: [d - o + alpha * (w - x) for d, o, w, x in zip(g, a.own[i], y, a.x, strict=True)],
        )
        a.own[i] = [o - alpha * (w - x) for o, w, x in zip(a.own[i], ends[i], a.x, strict=True)]
        a.h = [h - alpha / N * (w - x) for h, w, x in zip(a.h, ends[i], a.x, strict=True)]
    mean = a.mean(ends, dict.fromkeys(cohort, 1 / len(cohort)))
    return [m - h / alpha for m, h in zip(mean, a.h, strict=True)]


CASES = {
    "strategy=edge_mean": fedavg,
    "method=fedprox trainer.proximal_mu=0.5": fedprox,
    "method=scaffold strategy.server_lr=0.5 strategy.weight=equal trainer.lr_decay=0.5 "
    "trainer.weight_decay=0.1": scaffold,
    "method=fednova trainer.momentum=0.9": fednova,
    "method=feddyn trainer.alpha=0.5": feddyn,
}


@pytest.mark.parametrize("case", CASES)
def test_three_rounds_are_those_of_the_equations(federation, case: str):
    made = federation(*RUN, *case.split())
    account = Account(made)
    for report, _ in made.rounds():
        if report.round:
            account.x = CASES[case](account, report.round, report.cohort)
            for own, weights in zip(account.x, tensors_of(made.arrays).values(), strict=True):
                assert torch.allclose(weights.double(), own, rtol=1e-6, atol=1e-6)
    assert len(set(account.sizes.values())) > 1, "clients are alike"
