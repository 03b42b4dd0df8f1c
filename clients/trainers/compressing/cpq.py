"""Cluster-promoting quantisation: weights are drawn to a learned grid as they train.

After Lee et al., "Cluster-Promoting Quantization With Bit-Drop for Minimizing Network Quantization Loss", ICCV 2021: a
reconstruction (see `devices.compression.categorical`), no figure here is the paper's. Differs: what layers read is
rounded by the range of each batch, not by a learned grid; the gradients of grid and noise are scaled as LSQ does.
"""

from __future__ import annotations

from typing import Annotated, Any

import torch
from annotated_types import Ge, Interval
from torch import Tensor
from torch.nn import functional as F

from clients.trainers.compressing.gradual import GradualRun, GradualTrainer
from devices.compression.categorical import AT_ONCE, categorical, levels, nearest
from devices.compression.masks import Masks
from devices.compression.quantise import above_zero
from fedsim.errors import ConfigError
from fedsim.workloads.base import Tensors

CATEGORICAL_COPIES, SCRATCH_TENSORS = 2.4, 22
STEP, NOISE = "step", "noise"  # names of what each layer learns, behind its own


class CPQTrainer(GradualTrainer):
    """SGD through a grid with a step and a noise for each layer; the gradient pulls weights towards grid points.

    Each is the softplus of what is learned: the step begins at 2 mean |w| / sqrt(2^(bits - 1)), the noise at a third of
    it. A weight in the cell of 0 gets no gradient, and that of any other grows with its integer: give it dense rounds.
    Weight decay acts on what is learned, too.

    Args:
        sparsity: final share of zeros; 0 prunes nothing.
        prune_rounds: rounds until it is reached.
        bits: of weights.
        gradual: arguments of GradualTrainer.
    """

    def __init__(
        self,
        sparsity: Annotated[float, Interval(ge=0, lt=1)] = 0.0,
        prune_rounds: Annotated[int, Ge(0)] = 0,
        bits: Annotated[int, Interval(ge=2, le=8)] = 4,
        **gradual: Any,
    ):
        super().__init__(sparsity=sparsity, prune_rounds=prune_rounds, bits=bits, **gradual)
        if floats := [name for name, tier in self.tiers.items() if tier.bits == 32]:
            raise ConfigError(f"trainer.tiers.{floats[0]}.bits must be from 2 to 8, got 32")

    def first_learned(self, masks: Masks) -> Tensors:
        """Returns what each layer's step and noise are the softplus of."""
        learned: Tensors = Tensors()
        for name, weight in self.weights().items():
            mask = masks[name].to(weight)
            mean = (weight.detach().abs() * mask).sum() / mask.sum().clamp(min=1)
            step = above_zero(2 * mean[None] / 2 ** ((self.bits - 1) / 2))
            learned[f"{name}.{STEP}"], learned[f"{name}.{NOISE}"] = inverse_softplus(step), inverse_softplus(step / 3)
        return learned

    def grid(self, run: GradualRun, name: str, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Returns step and noise of a layer, [1] each in the weight's type, with gradients for what is learned."""
        share = (weight.numel() * 2 ** (self.bits - 1)) ** -0.5
        step, noise = (F.softplus(scaled(run.learned[f"{name}.{what}"], share)).to(weight) for what in (STEP, NOISE))
        return step, noise

    def weight_copies(self, run: GradualRun) -> float:
        """Counts mask, product and the rounded weight; probabilities are computed for some weights at a time."""
        return CATEGORICAL_COPIES

    def scratch_bytes(self, run: GradualRun) -> int:
        """Counts the tensors of those at once."""
        entries = max(weight.numel() for weight in self.weights().values())
        return 4 * min(AT_ONCE, entries) * self.scratch_tensors(run)

    def scratch_tensors(self, run: GradualRun) -> int:
        """Returns how many tensors the probabilities of some weights take."""
        return SCRATCH_TENSORS

    def kept(self, run: GradualRun, name: str) -> Tensor:
        """Returns how far each width of a layer is kept, [bits]: here all are."""
        return torch.ones(self.bits, device=run.client.device)

    def quantised(self, run: GradualRun, name: str, weight: Tensor) -> Tensor:
        """Returns a masked weight on the grid."""
        return categorical(weight, *self.grid(run, name, weight), self.kept(run, name).to(weight))

    def integers(self, run: GradualRun, name: str, weight: Tensor) -> tuple[Tensor, Tensor, int]:
        """Returns a masked weight as integers, the layer's step [1], and the bits of each."""
        step, bits = self.grid(run, name, weight)[0], int((self.kept(run, name) > 0).sum())
        return nearest(weight, step, *levels(bits)[-1]), step, bits


def inverse_softplus(x: Tensor) -> Tensor:
    """Returns what softplus makes x of, also where x is tiny."""
    return x + torch.log(-torch.expm1(-x))


def scaled(x: Tensor, share: float) -> Tensor:
    """Returns x with its gradient multiplied by a share."""
    return share * x + (x - share * x).detach()
