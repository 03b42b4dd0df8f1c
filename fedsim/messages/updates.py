"""What the two halves of a method say to each other, as methods see it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from flwr.app import RecordDict

from fedsim.errors import ConfigError
from fedsim.workloads.base import Tensors

Scalar = int | float | bool | str


def _extra(owner: Broadcast | ClientUpdate, who: str, name: str) -> Tensors:
    if name not in owner.extras:
        raise ConfigError(
            f"{who} brought no {name!r} (only {sorted(owner.extras)}); use a pair of strategy and trainer that sends it"
        )
    return owner.extras[name]


@dataclass(frozen=True)
class Broadcast:
    """What one client gets: the weights, and whatever a method sends beside them."""

    round: int
    weights: Tensors
    extras: dict[str, Tensors] = field(default_factory=dict)
    settings: dict[str, Scalar] = field(default_factory=dict)

    def extra(self, name: str) -> Tensors:
        """The extra record `name`; ConfigError names what did come when it is missing."""
        return _extra(self, f"round {self.round}", name)


@dataclass(frozen=True)
class ClientUpdate:
    """What one client answers. `weights` may be the live model's: they are packed before the next client."""

    client_id: int
    num_examples: int
    weights: Tensors
    metrics: dict[str, float] = field(default_factory=dict)
    extras: dict[str, Tensors] = field(default_factory=dict)

    def extra(self, name: str) -> Tensors:
        """The extra record `name`; ConfigError names what did come when it is missing."""
        return _extra(self, f"client {self.client_id}", name)


@dataclass(frozen=True)
class Instruction:
    """What one client was sent.

    Attributes:
        phase: "train", "evaluate" or "query.<question>".
        content: its records, with what the client kept from earlier rounds under `state`.
        data: fingerprint of the run's data, where it is kept for later.
        repeat: how often the client was sent out in that round before.
    """

    round: int
    client: int
    phase: str
    content: RecordDict
    data: Mapping[str, str] = field(default_factory=dict)
    repeat: int = 0
