"""A rule of `architecture=` that goes by what clients tell of their images, and what TANS learned from a zoo."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from fedsim.grid.edge import Enrolled
from fedsim.meta.tans import Catalogue, Tans, with_classes
from fedsim.meta.zoo import Zoo
from strategies.architectures import Family, WithinLimits

FLOAT_BYTES = 4
NEAREST = 10  # networks of a zoo that stand for one of a family


class ByQuery(WithinLimits):
    """The network that fits the device and is predicted to suit the client's images best.

    A client tells the mean features of some of its images once, 512 bytes, and nothing else of them. TANS predicts what
    each network of a zoo would reach on such images; a network of the family is given the mean of those that are
    nearest to it in size. One that did not answer gets the largest.

    Args:
        weights: file of TANS, by `fedsim devices train-tans`.
        zoo: folder of its networks, by `fedsim devices make-zoo`.
        limits: arguments of WithinLimits.

    Source: Jeong et al., TANS, NeurIPS 2021, for what is predicted. Differs: networks of the zoo stand for those of the
        family by their numbers of parameters.
    """

    asks: ClassVar[bool] = True

    def __init__(self, weights: str, zoo: str, **limits: Any):
        super().__init__(**limits)
        self.weights, self.zoo = weights, zoo

    def read(self) -> None:
        nets = Zoo.open(Path(self.zoo)).nets
        self.tans, self.catalogue = Tans.load(Path(self.weights)), Catalogue.of(nets)
        self.sizes = np.log([net.parameters for net in nets])

    def begin(self, family: Family, clients: Iterable[Enrolled]) -> None:
        """Finds the networks of the zoo that stand for those of the family."""
        super().begin(family, clients)
        own = np.log([member.cost.parameter_bytes / FLOAT_BYTES for member in family.members])
        self.nearest = np.argsort(np.abs(self.sizes - own[:, None]), axis=1, kind="stable")[:, :NEAREST]

    def scores(self, told: Tensor) -> list[float]:
        """Predicts the accuracy of each network on a client's images, in percent, from their mean features [128]."""
        predicted = self.tans.judge(with_classes(told[None], self.family.num_outputs), self.catalogue)[1]
        found: list[float] = predicted[self.nearest].mean(1).tolist()
        return found

    def choose(self, client: Enrolled, told: Tensor | None) -> int:
        return self.fitting(client)[-1] if told is None else self.best(client, self.scores(told))
