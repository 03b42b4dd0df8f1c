"""What malicious clients of a run do: with their examples, with what they send, or together.

A share of the fleet is malicious, drawn from the seed, whoever is asked in a round; the server and the other clients
are not told. A malicious client pays what an honest one pays: what it does beside is free.
"""

from __future__ import annotations

from typing import Annotated

import torch
from annotated_types import Interval
from torch import Tensor, nn

from devices.bounds import Checked, is_replaced
from devices.texts import quoted
from fedsim.errors import ConfigError
from fedsim.seeding import generator
from fedsim.workloads.base import Examples, Tensors, Workload
from fedsim.workloads.classification import ClassificationWorkload, classification
from fedsim.workloads.metrics import ATTACK_SUCCESS

Share = Annotated[float, Interval(ge=0, le=1)]
IDLE = (
    "makes nobody do anything: an attack derives from fedsim.attacks.base.Attack or a class below it other than "
    "NoAttack, and has poisoned, changed or conspired"
)


class Attack(Checked, group="attack", error=ConfigError):
    """What malicious clients do; a class below has at least one of `poisoned`, `changed` and `conspired`.

    One object serves all clients in every process of a run: nothing of a client or a round may be kept on it.

    Args:
        share: of the fleet's clients that are malicious, rounded, and one at least; 0: none, and the same is judged.
    """

    def __init__(self, share: Share):
        self.share = share

    @property
    def poisons(self) -> bool:
        """Whether malicious clients train on other examples than they have."""
        return is_replaced(self.poisoned, Attack.poisoned)

    @property
    def changes(self) -> bool:
        """Whether they send other weights than they have trained."""
        return is_replaced(self.changed, Attack.changed)

    @property
    def conspires(self) -> bool:
        """Whether what they send depends on what all malicious clients of a round have trained."""
        return is_replaced(self.conspired, Attack.conspired)

    def check_hooks(self) -> None:
        """Refuses a class whose malicious clients do what honest ones do.

        Raises:
            ConfigError: says what it lacks.
        """
        if not (self.poisons or self.changes or self.conspires):
            raise ConfigError(f"attack {type(self).__name__} {IDLE}")

    def clients(self, num_clients: int, seed: int) -> frozenset[int]:
        """Returns who is malicious: the first of the fleet in a drawn order, so that a larger share has them too."""
        count = max(1, round(self.share * num_clients)) if self.share else 0
        return frozenset(generator(seed, "attack").permutation(num_clients)[:count].tolist())

    def check(self, workload: Workload) -> None:
        """Refuses data that the attack cannot be made on.

        Raises:
            ConfigError: says which.
        """

    def futile(self, workload: Workload, clients: frozenset[int], in_round: int, asked: int) -> str:
        """Says why the attack would change nothing, and what to set; empty where it changes something.

        Args:
            workload: of the run.
            clients: who is malicious.
            in_round: how many of them are expected in a round.
            asked: clients of a round.
        """
        return ""

    def poisoned(self, workload: Workload, data: Examples, draw: torch.Generator) -> Examples:
        """Returns what a malicious client trains on.

        Args:
            workload: of the run.
            data: its own examples, prepared; not to be changed in place.
            draw: random numbers of the client, the same in every round.
        """
        return data

    def changed(self, changes: Tensors, draw: torch.Generator) -> Tensors:
        """Returns by how much the weights that a malicious client sends differ from those that it was sent.

        Args:
            changes: what training has changed of each trained tensor.
            draw: random numbers of the client and round.
        """
        return changes

    def conspired(self, sent: Tensor, num_clients: int) -> Tensor:
        """Returns what all colluders of a round send.

        Args:
            sent: what each of them has trained, [colluders, ...] float64.
            num_clients: that train in the round.
        """
        raise NotImplementedError(f"{type(self).__name__} does not collude")

    def aim(self, workload: Workload) -> str:
        """Returns what the share that `judged` gives is of, as words that follow it; empty where it gives none."""
        return ""

    def judged(self, workload: Workload, model: nn.Module) -> dict[str, float]:
        """Returns how far the attack has come in the global model; nothing where the accuracy says that."""
        return {}


class NoAttack(Attack):
    """Nobody is malicious."""

    def __init__(self) -> None:
        super().__init__(share=1.0)

    def check_hooks(self) -> None:
        """Refuses a class below that would have malicious clients do something."""
        if self.poisons or self.changes or self.conspires:
            raise ConfigError(f"attack {type(self).__name__} {IDLE}")

    def clients(self, num_clients: int, seed: int) -> frozenset[int]:
        """Returns nobody."""
        return frozenset()


class TargetedAttack(Attack):
    """Wants some examples to be told as a class that they are not; `attack_success` is the share of them that are.

    Attributes:
        target: that class; None where no single one is wanted.
    """

    target: int | None

    def check(self, workload: Workload) -> None:
        """Refuses data without classes, and a stream, whose tasks have classes of their own."""
        from fedsim.workloads.streams.base import Stream

        kind, classes = type(self).__name__, classification(workload).num_classes
        if isinstance(workload, Stream):
            raise ConfigError(f"{kind} poisons examples of one task, and a stream has several; set stream=none")
        if self.target is not None and self.target >= classes:
            raise ConfigError(f"attack.target must be one of the classes 0..{classes - 1}, got {self.target}")

    def is_victim(self, labels: Tensor) -> Tensor:
        """Returns which examples are to be told as the target, by their labels, of the same shape."""
        raise NotImplementedError

    def shown(self, workload: Workload, batch: Tensors) -> Tensors:
        """Returns test examples as the attacker would show them to the model."""
        return batch

    def aim(self, workload: Workload) -> str:
        """Returns which test examples are taken for which class."""
        if self.target is None:
            return ""
        target = classification(workload).class_names()[self.target]
        return f"of {self.victims(workload)} are taken for {quoted(target)}"

    def victims(self, workload: Workload) -> str:
        """Returns in words which examples `is_victim` means, as they are `shown`."""
        return "the examples that the attacker has in mind"

    def judged(self, workload: Workload, model: nn.Module) -> dict[str, float]:
        """Returns the share of the test's victims that the model tells as the target, if there are any."""
        target = self.target
        if target is None or not isinstance(workload, ClassificationWorkload):
            return {}

        def sums(network: nn.Module, batch: Tensors) -> tuple[dict[str, int], int]:
            told = workload.logits(network, self.shown(workload, batch)).flatten(0, -2).argmax(-1)
            victims = self.is_victim(batch["y"].flatten())
            return {ATTACK_SUCCESS: int(told[victims].eq(target).sum())}, int(victims.sum())

        totals, count = workload.totals(model, workload.test, sums)
        return {ATTACK_SUCCESS: totals[ATTACK_SUCCESS] / count} if count else {}
