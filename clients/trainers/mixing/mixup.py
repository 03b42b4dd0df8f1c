"""What all mixup trainers share: mixed examples and labels, their loss, and the price of a step on them.

A mixed example is (1 - mix_ratio) times an own one plus mix_ratio times a partner; its loss is the same mixture of the
losses for both labels. Partners are single examples, or means that other clients shared (NaiveMix, FedMix). Tokens are
mixed behind the model's embedding. Source: Yoon et al., "FedMix: Approximation of Mixup under Mean Augmented Federated
Learning", ICLR 2021 (equations as third parties transcribed them: the paper itself was not at hand); Zhang et al.,
"mixup: Beyond Empirical Risk Minimization", ICLR 2018.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Annotated, Any, ClassVar

import torch
from annotated_types import Ge, Interval
from torch import Tensor, nn
from torch.nn import functional as F

from clients.trainers.base import ClientContext
from clients.trainers.fedprox import FedProxTrainer, Proximal
from clients.trainers.sgd import Objective, SGDRun, SGDTrainer
from devices.cost import ModelCost
from devices.meter import measure
from fedsim.errors import ConfigError
from fedsim.messages.updates import Broadcast
from fedsim.workloads.base import Tensors, Workload

OWN, PARTNER = "own_loss", "partner_loss"


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """Returns the mean cross-entropy over examples (and steps), linear in the label.

    Args:
        logits: [batch, classes] or [batch, steps, classes].
        y: class numbers [batch] or [batch, steps] int64, or probabilities [batch or 1, ..., classes].
    """
    flat = logits.flatten(0, -2)
    return F.cross_entropy(flat, y.expand_as(logits).flatten(0, -2) if y.is_floating_point() else y.flatten())


class Entrance:
    """Where examples are mixed: at the input, or behind the embedding of a model that takes tokens.

    Args:
        model: the network.
        x: a batch of it, [batch, ...]; integers are tokens.

    Raises:
        ConfigError: for tokens and a model that has not exactly one embedding.
    """

    def __init__(self, model: nn.Module, x: Tensor):
        self.model, self.x, self.embedding = model, x, embedding_of(model) if not x.is_floating_point() else None

    def __call__(self, x: Tensor) -> Tensor:
        """Returns what is mixed: numbers stay; tokens [n, steps] or their means [n, steps, vocabulary] are embedded."""
        if self.embedding is None:
            return x
        embedded: Tensor = x @ self.embedding.weight if x.is_floating_point() else self.embedding(x)
        return embedded

    def logits(self, mixed: Tensor) -> Tensor:
        """Returns the model's output for mixed examples [batch, ...]."""
        output: Tensor
        if self.embedding is None:
            output = self.model(mixed)
            return output
        self.embedding.forward = lambda _: mixed  # type: ignore[method-assign, assignment]
        try:
            output = self.model(self.x)
        finally:
            del self.embedding.forward
        return output


def embedding_of(model: nn.Module) -> nn.Embedding:
    """Returns the one embedding of a model that takes tokens."""
    found = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    if len(found) != 1:
        what = f"{type(model).__name__} has {len(found)} embeddings"
        raise ConfigError(f"{what}; token inputs are mixed behind the one embedding of a model, such as char_lstm")
    return found[0]


class Mixed(Objective):
    """(1 - ratio) CE(f(v), y) + ratio CE(f(v), y') at v = (1 - ratio) x + ratio x', for partners (x', y').

    For means as partners that is equation 1 of the paper. A batch without partners gets the workload's loss.

    Args:
        ratio: lambda.

    Attributes:
        parts: names of what the loss is made of, reported as metrics.
        passes: forward and backward passes of a step, in those of plain SGD.
    """

    is_pure = True
    parts: tuple[str, ...] = (OWN, PARTNER)
    passes = 1

    def __init__(self, ratio: float):
        self.ratio = ratio

    def __call__(self, run: MixupRun, batch: Tensors) -> Tensor:
        if "partner_x" in batch:
            loss, parts = self.mixed(run.client.model, batch)
        else:
            loss = run.client.workload.loss(run.client.model, batch)
            parts = {name: torch.zeros_like(loss) for name in self.parts} | {OWN: loss}
        run.note(**parts)
        return loss

    def mixed(self, model: nn.Module, batch: Tensors) -> tuple[Tensor, Tensors]:
        """Returns the loss of a batch with partners, and its parts.

        Args:
            model: the network.
            batch: "x" [b, ...], "y" [b] or [b, steps], "partner_x" and "partner_y" with leading size b or 1; a
                partner's label is a class number or probabilities.
        """
        ratio, entrance = self.ratio, Entrance(model, batch["x"])
        logits = entrance.logits((1 - ratio) * entrance(batch["x"]) + ratio * entrance(batch["partner_x"]))
        own, partner = cross_entropy(logits, batch["y"]), cross_entropy(logits, batch["partner_y"])
        return (1 - ratio) * own + ratio * partner, {OWN: own, PARTNER: partner}


class MixupRun(SGDRun):
    """The local loop of SGD on mixed examples; reports the mean parts of the loss beside it.

    Attributes:
        mixes: whether the client's examples are mixed in this round.
    """

    trainer: MixupTrainer

    def __init__(self, trainer: MixupTrainer, client: ClientContext, broadcast: Broadcast):
        super().__init__(trainer, client, broadcast)
        self.mixes = trainer.mixes(client)
        if self.mixes:
            assert trainer.mixed_cost is not None
            self.client = replace(client, step_cost=trainer.mixed_cost)

    def batches(self) -> Iterator[Tensors]:
        """Yields the batches of plain SGD, each with its partners, drawn from a stream of their own."""
        draw = self.client.stream("partners")
        for batch in super().batches():
            yield {**batch, **self.trainer.partner(self.client, batch, draw)} if self.mixes else batch

    def log_step(self, batch: int) -> None:
        passes = self.trainer.mixture.passes if self.mixes else 1
        self.client.log.add(self.client.step_cost, batch, forwards=passes, backwards=passes)


class MixupTrainer(SGDTrainer):
    """SGD on mixed examples, with the proximal term of FedProx where `proximal_mu` asks for it.

    A class below says in `partner` whom to mix with.

    Args:
        mix_ratio: lambda, share of the partner, a constant in [0, 1); 0 is plain SGD, bit for bit.
        proximal_mu: as for FedProxTrainer.
        sgd: arguments of SGDTrainer.

    Attributes:
        mixture: the loss of mixed examples.
        mixed_cost: what a step on them costs.
    """

    needs_classes = True
    run: ClassVar[type[SGDRun]] = MixupRun
    known_settings = FedProxTrainer.known_settings

    def __init__(
        self, mix_ratio: Annotated[float, Interval(ge=0, lt=1)], proximal_mu: Annotated[float, Ge(0)] = 0.0, **sgd: Any
    ):
        super().__init__(**sgd)
        self.mix_ratio, self.proximal_mu = mix_ratio, proximal_mu
        self.mixed_cost: ModelCost | None = None
        self.minimise(Mixed(mix_ratio))

    def minimise(self, mixture: Mixed) -> None:
        """Takes the loss of mixed examples, and its proximal form as the objective."""
        self.mixture, self.objective = mixture, Proximal(mixture, self.proximal_mu)

    def setup(self, workload: Workload, model: nn.Module, network: ModelCost) -> None:
        """Prices a step on mixed examples, from one that runs on a copy of the model."""
        super().setup(workload, model, network)
        if not self.mix_ratio:
            return

        def loss(model: nn.Module, batch: Tensors) -> Tensor:
            return self.mixture.mixed(model, {**batch, **self.sample_partner(workload, model, batch)})[0]

        cost, passes = measure(model, loss, workload.sample(4), network.name), self.mixture.passes
        self.mixed_cost = replace(
            network,
            name=f"{network.name}, {type(self).__name__}",
            forward_flops=cost.forward_flops / passes,
            backward_flops=cost.backward_flops / passes,
            activation_bytes=cost.activation_bytes,
            step_bytes=cost.step_bytes,
        )

    def mixes(self, client: ClientContext) -> bool:
        """Returns whether the client's examples are mixed in this round."""
        return self.mix_ratio > 0

    def partner(self, client: ClientContext, batch: Tensors, draw: torch.Generator) -> Tensors:
        """Returns `partner_x` and `partner_y`, with leading size 1 (one for the whole batch) or that of the batch."""
        raise NotImplementedError(f"{type(self).__name__} does not say whom to mix with")

    def sample_partner(self, workload: Workload, model: nn.Module, sample: Tensors) -> Tensors:
        """Returns a partner of the kind that `partner` gives, for pricing; here single examples."""
        return {"partner_x": sample["x"].flip(0), "partner_y": sample["y"].flip(0)}
