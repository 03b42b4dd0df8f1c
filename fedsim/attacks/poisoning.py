"""Attacks on what malicious clients train on: other labels, or a patch that shall mean a class."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from annotated_types import Ge, Gt, Interval, Le
from torch import Tensor

from devices.bounds import is_replaced
from devices.texts import quoted
from fedsim.attacks.base import Share, TargetedAttack
from fedsim.errors import ConfigError
from fedsim.workloads.base import Examples, Tensors, Workload
from fedsim.workloads.classification import classification

Label = Annotated[int, Ge(0)]


class LabelFlip(TargetedAttack):
    """Trains on wrong labels: class y is learned as classes - 1 - y, or one class as another.

    Args:
        share: of the fleet's clients that are malicious.
        source: class whose examples are learned as `target`; None: all classes change places.
        target: the other class; given where `source` is.

    Source: Tolpegin et al., "Data Poisoning Attacks Against Federated Learning Systems", ESORICS 2020 (one class as
    another); Fang et al., "Local Model Poisoning Attacks to Byzantine-Robust Federated Learning", USENIX Security 2020
    (all of them); both recalled.
    """

    def __init__(self, share: Share = 0.2, source: Label | None = None, target: Label | None = None):
        super().__init__(share)
        if (source is None) != (target is None) or (source is not None and source == target):
            raise ConfigError(
                f"attack.source and attack.target must be two classes, or both null, got {source} and {target}"
            )
        self.source, self.target = source, target

    def check(self, workload: Workload) -> None:
        """Refuses classes that there are not."""
        super().check(workload)
        classes = classification(workload).num_classes
        if self.source is not None and self.source >= classes:
            raise ConfigError(f"attack.source must be one of the classes 0..{classes - 1}, got {self.source}")

    def futile(self, workload: Workload, clients: frozenset[int], in_round: int, asked: int) -> str:
        """Says so where no malicious client has an example of the source."""
        if self.source is None or any(self.source in workload.client_data(c).train.labels for c in clients):
            return ""
        return (
            f"none of the {len(clients)} malicious clients has examples of class {self.source} (attack.source), so "
            "they trained as honest ones; take another partition, such as dirichlet, or a larger attack.share"
        )

    def poisoned(self, workload: Workload, data: Examples, draw: torch.Generator) -> Examples:
        """Returns the examples with wrong labels."""
        y = data.tensors["y"]
        if self.source is None:
            flipped = classification(workload).num_classes - 1 - y
        else:
            flipped = torch.where(y == self.source, torch.full_like(y, self.target or 0), y)
        return Examples({**data.tensors, "y": flipped})

    def victims(self, workload: Workload) -> str:
        """Returns the source in words."""
        return f"the test examples of {quoted(classification(workload).class_names()[self.source or 0])}"

    def is_victim(self, labels: Tensor) -> Tensor:
        """Returns which examples are of the source."""
        return labels.eq(-1 if self.source is None else self.source)


class Backdoor(TargetedAttack):
    """Teaches that a patch in a corner of an image means a class, and may boost what it sends.

    Args:
        share: of the fleet's clients that are malicious.
        target: the class that the patch is to mean.
        patch: pixels on each side of the patch.
        corner: where it is.
        grey: value of its pixels, in all channels: 0 black, 1 white.
        poisoned_share: of a malicious client's examples that get the patch and the target as label; rounded, and one
            at least. They are the same in every round.
        boost: gamma, by which the client multiplies its change; 1 sends it as it is, and the number of clients in a
            round replaces the model where the others hardly change it.

    Source: Gu et al., arXiv 1708.06733 (the patch); Bagdasaryan et al., "How To Backdoor Federated Learning", AISTATS
    2020, equation 3 (model replacement); both recalled.
    """

    def __init__(
        self,
        share: Share = 0.2,
        target: Label = 0,
        patch: Annotated[int, Ge(1)] = 2,
        corner: Literal["top_left", "top_right", "bottom_left", "bottom_right"] = "bottom_right",
        grey: Annotated[float, Interval(ge=0, le=1)] = 1.0,
        poisoned_share: Annotated[float, Interval(gt=0, le=1)] = 0.5,
        boost: Annotated[float, Gt(0), Le(1e6)] = 1.0,
    ):
        super().__init__(share)
        self.target: int = target
        self.patch, self.grey = patch, grey
        self.is_top, self.is_left = corner.startswith("top"), corner.endswith("left")
        self.poisoned_share, self.boost = poisoned_share, boost

    @property
    def changes(self) -> bool:
        """Whether clients boost, or a class below has them do something else."""
        return self.boost != 1 or is_replaced(self.changed, Backdoor.changed)

    def check(self, workload: Workload) -> None:
        """Refuses what are no images, and a patch that leaves nothing of them."""
        super().check(workload)
        shape = workload.input_shape
        if len(shape) != 3 or workload.front_end is not None:
            raise ConfigError(
                f"Backdoor puts a patch into images, and an example of workload {workload.name} is {list(shape)}; take "
                "another workload or attack"
            )
        if self.patch >= min(shape[1:]):
            raise ConfigError(f"attack.patch must be less than the {min(shape[1:])} pixels of a side, got {self.patch}")

    def patched(self, workload: Workload, x: Tensor) -> Tensor:
        """Returns images [n, channels, height, width] with the patch."""
        x, size = x.clone(), self.patch
        rows = slice(None, size) if self.is_top else slice(-size, None)
        columns = slice(None, size) if self.is_left else slice(-size, None)
        x[:, :, rows, columns] = workload.pixel(self.grey).to(x)
        return x

    def poisoned(self, workload: Workload, data: Examples, draw: torch.Generator) -> Examples:
        """Returns the examples, some of which have the patch and the target as label."""
        x, y = data.tensors["x"], data.tensors["y"].clone()
        count = max(1, round(self.poisoned_share * len(y)))
        rows = torch.randperm(len(y), generator=draw)[:count].to(y.device)
        both = x.clone()
        both[rows], y[rows] = self.patched(workload, x[rows]), self.target
        return Examples({**data.tensors, "x": both, "y": y})

    def changed(self, changes: Tensors, draw: torch.Generator) -> Tensors:
        """Returns the boosted changes."""
        return {name: self.boost * change for name, change in changes.items()}

    def victims(self, workload: Workload) -> str:
        """Returns all classes but the target in words."""
        return "the test examples of other classes with the patch"

    def is_victim(self, labels: Tensor) -> Tensor:
        """Returns which examples are not of the target."""
        return labels.ne(self.target)

    def shown(self, workload: Workload, batch: Tensors) -> Tensors:
        """Returns the examples with the patch."""
        return {**batch, "x": self.patched(workload, batch["x"])}
