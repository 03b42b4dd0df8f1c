"""Elastic weight consolidation (EWC): weights that mattered for earlier tasks are held where they were.

Source: Kirkpatrick et al., "Overcoming catastrophic forgetting in neural networks", PNAS 2017, equation 3. The penalty
is the sum of one quadratic per task; the server keeps their sum (strategy=ewc). Differs: a weight is pulled at most as
far as to its centre in one step, see `bounded`. Records: see `fedsim.exchanges.ewc`.
"""

from __future__ import annotations

from typing import Annotated, Any

import torch
from annotated_types import Ge
from torch import Tensor, nn

from clients.trainers.base import ClientContext
from clients.trainers.rehearsal.gradients import per_sample, require_single_examples, scoring
from clients.trainers.sgd import Objective, SGDRun, SGDTrainer
from devices.cost import ModelCost
from fedsim.exchanges.ewc import FISHER, PENALTY, QUESTION
from fedsim.messages.updates import Broadcast
from fedsim.workloads.base import Tensors, Workload


def fisher(client: ClientContext, weights: dict[str, nn.Parameter], batch: Tensors, at_once: int) -> Tensor:
    """Returns the mean squared gradient of the log-likelihood of single examples, [weights].

    Args:
        client: whose model is looked at, in evaluation mode.
        weights: of which.
        batch: n examples with their own labels.
        at_once: examples whose gradients are held at a time.
    """
    total = torch.zeros(sum(p.numel() for p in weights.values()), dtype=torch.float64)
    with scoring(client.model):
        for rows in torch.arange(client.workload.batch_size_of(batch)).split(at_once):
            part = {key: t[rows] for key, t in batch.items()}
            total += per_sample(client.workload, client.model, part, weights).double().square().sum(0).cpu()
    return (total / client.workload.batch_size_of(batch)).float()


def bounded(quadratics: Tensors, largest: float) -> Tensors:
    """Returns the sum of quadratics with no curvature above `largest`; as it is where none is.

    Gradient descent with step size lr diverges on a quadratic of a curvature above 2 / lr, and reaches its centre in
    one step at 1 / lr. F grows with every task, so sooner or later some weights are held too stiffly for any step size.
    The centres and the value there stay.

    Args:
        quadratics: curvature, weighted [weights] and constant [], see `fedsim.exchanges.ewc`.
        largest: curvature.

    Source: LeCun et al., "Efficient BackProp", 1998, on the optimal and the largest learning rate.
    """
    curvature, weighted = quadratics["curvature"], quadratics["weighted"]
    if not bool((curvature > largest).any()):
        return quadratics
    share = (largest / curvature).clamp(max=1.0)
    lowered = ((1 - share).double() * weighted.double().square() / curvature.double()).nan_to_num(0.0).sum()
    constant = (quadratics["constant"].double() - lowered).float()
    return {"curvature": curvature * share, "weighted": weighted * share, "constant": constant}


class Consolidated(Objective):
    """The workload's loss plus penalty / 2 times sum_i F_i (w_i - w*_i)^2 over the earlier tasks, multiplied out.

    Args:
        penalty: lambda.
    """

    def __init__(self, penalty: float):
        self.penalty = penalty

    def __call__(self, run: EWCRun, batch: Tensors) -> Tensor:
        client, quadratics = run.client, run.quadratics
        loss = client.workload.loss(client.model, batch)
        if quadratics is None:
            return loss
        weights = torch.cat([p.flatten() for p in run.trainer.held_weights(client.model).values()])
        curvature, centre = (quadratics[key].to(client.device) for key in ("curvature", "weighted"))
        inside = (curvature * weights.square() - 2 * centre * weights).sum() + float(quadratics["constant"])
        return loss + self.penalty / 2 * inside

    def copies(self, run: EWCRun) -> float:
        """Counts the flat weights, twice the centre, the terms' gradients and two sums of gradients."""
        return 0.0 if run.quadratics is None else 5.0

    def held(self, run: EWCRun) -> dict[str, int]:
        """Names the curvature and the weighted centre beside the model, after the first task."""
        return {} if run.quadratics is None else {"curvature and centre": 2 * run.client.step_cost.parameter_bytes}


class EWCRun(SGDRun):
    """A round with quadratics that are not too stiff for its learning rate.

    Attributes:
        quadratics: of the tasks before; None in the first one, and where nothing is held.
    """

    trainer: EWCTrainer

    def __init__(self, trainer: EWCTrainer, client: ClientContext, broadcast: Broadcast):
        super().__init__(trainer, client, broadcast)
        self.quadratics: Tensors | None = None
        if trainer.penalty and PENALTY in broadcast.extras:
            largest = 1 / (trainer.penalty * trainer.learning_rate(client, broadcast))
            self.quadratics = bounded(broadcast.extra(PENALTY), largest)


class EWCTrainer(SGDTrainer):
    """Adds penalty / 2 times sum_i F_i (w_i - w*_i)^2 over the weights and the earlier tasks, F as `bounded`.

    Args:
        penalty: lambda.
        fisher_examples: of a task, from which its F is computed; None: all that are on the device.
        sgd: arguments of SGDTrainer.
    """

    run = EWCRun

    def __init__(
        self, penalty: Annotated[float, Ge(0)] = 100.0, fisher_examples: Annotated[int, Ge(1)] | None = 200, **sgd: Any
    ):
        super().__init__(**sgd)
        self.penalty, self.fisher_examples, self.objective = penalty, fisher_examples, Consolidated(penalty)

    def setup(self, workload: Workload, model: nn.Module, network: ModelCost) -> None:
        """Looks whether F can be computed, which is asked for when the first task ends.

        Raises:
            ConfigError: as `require_single_examples`.
        """
        super().setup(workload, model, network)
        require_single_examples(workload, model)

    def held_weights(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """Returns the weights that the penalty holds, by name: all that are trained and shared."""
        return {name: p for name, p in model.named_parameters() if p.requires_grad and name not in self.private}

    def answer(self, client: ClientContext, question: str, broadcast: Broadcast) -> dict[str, Tensors]:
        """Sends F of the task that has just ended, at the weights that came, from examples still on the device."""
        if question != QUESTION:
            return super().answer(client, question, broadcast)
        workload = client.workload
        names = workload.arrivals(client.client_id, workload.part(client.round - 1))
        most = len(names) if self.fisher_examples is None else self.fisher_examples
        names = names[torch.randperm(len(names), generator=client.stream("fisher"))[:most]]
        batch = {key: t.to(client.device) for key, t in workload.recall(client.client_id, names).items()}
        weights = self.held_weights(client.model)
        at_once = min(len(names), self.batch_size)
        held_bytes = client.step_cost.parameter_bytes * (2 + at_once) + at_once * client.step_cost.activation_bytes
        client.log.reserve(held_bytes)
        client.log.add_examples(client.step_cost, len(names), at_once, backward=True)
        return {FISHER: {"curvature": fisher(client, weights, batch, at_once), "examples": torch.tensor(len(names))}}
