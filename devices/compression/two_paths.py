"""Two networks in one set of weights: a pruned one, and the whole one that teaches it.

The pruned network (the student) has the important weights, those where a mask is 1; the whole one (the teacher) has all
of them. Gradients are routed: important weights learn from the student's loss, the others from the teacher's. Source:
Kim et al., "Dynamic Collective Intelligence Learning", arXiv 2109.04660, and its code (named there `part` and `full`);
the routing of Kim et al., "PQK", Interspeech 2021, is taken to be the same.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from devices.compression.masks import NORMS, PRUNABLE, Masks, masked
from devices.compression.quantise import above_zero, fake_quantise, limits


def norm_tensors(model: nn.Module) -> list[str]:
    """Returns state-dict keys of weights and statistics of norms, of which each network has its own."""
    layers = [name for name, module in model.named_modules() if isinstance(module, NORMS)]
    return [key for key in model.state_dict() if key.rpartition(".")[0] in layers]


def prunable_first(model: nn.Module) -> list[str]:
    """Returns the weights of convolutions; without any, those of linear layers, but the last if there are more."""
    layers = {f"{name}.weight": m for name, m in model.named_modules() if isinstance(m, PRUNABLE)}
    convolutions = [name for name, module in layers.items() if not isinstance(module, nn.Linear)]
    return convolutions or list(layers)[:-1] or list(layers)


def unimportant(weight: Tensor, mask: Tensor) -> Tensor:
    """Returns the weight as it is, with a gradient only where the mask is 0: how the teacher sees it."""
    mask = mask.to(weight)
    return weight * (1 - mask) + (weight * mask).detach()


def step_of(weight: Tensor, mask: Tensor, bits: int) -> Tensor:
    """Returns a step's width for each output channel: 2 mean |w| / sqrt(Q) over weights that stay, [out, 1, ...]."""
    _, high = limits(bits)
    weight, mask = weight.detach().flatten(1), mask.to(weight).flatten(1)
    mean = (weight.abs() * mask).sum(1) / mask.sum(1).clamp(min=1)
    return above_zero(2 * mean / high**0.5)


class TwoPaths:
    """The tensors of both networks, for `torch.func.functional_call`; names of parameters never change.

    Args:
        model: whose weights both have.
        names: of the weights that are pruned.
        bits: of the student's pruned weights; 32 leaves them in floats.

    Attributes:
        norms: names of the tensors of normalisation layers, of which each network has its own.
    """

    def __init__(self, model: nn.Module, names: list[str], bits: int = 32):
        self.model, self.names, self.bits = model, names, bits
        self.norms = norm_tensors(model)

    def weights(self) -> dict[str, Tensor]:
        """Returns the weights that are pruned, as they are now."""
        parameters = dict(self.model.named_parameters())
        return {name: parameters[name] for name in self.names}

    def student(self, masks: Masks, rule: str = "masked") -> dict[str, Tensor]:
        """Returns the tensors in which the pruned network differs from the model itself, whose norms are the student's.

        Args:
            masks: of the weights that are pruned.
            rule: of the gradient, see `masks.masked`.
        """
        pruned = {name: masked(weight, masks[name], rule) for name, weight in self.weights().items()}
        return {name: self.quantised(weight, masks[name]) for name, weight in pruned.items()}

    def teacher(self, masks: Masks, norms: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns the tensors in which the whole network differs: weights with its gradients, and its own norms."""
        return {**{name: unimportant(w, masks[name]) for name, w in self.weights().items()}, **norms}

    def quantised(self, weight: Tensor, mask: Tensor) -> Tensor:
        """Rounds a masked weight by fake integers; zeros stay zeros."""
        if self.bits == 32:
            return weight
        step = step_of(weight, mask, self.bits)
        return fake_quantise(weight, step.view(-1, *[1] * (weight.dim() - 1)), *limits(self.bits))

    @torch.no_grad()
    def exported(self, masks: Masks) -> tuple[dict[str, Tensor], dict[str, int]]:
        """Returns what a device stores of the student: tensors with pruned weights, and the bits of the integer ones.

        With bits below 32 a weight comes as integers int8 and `<layer>.scale` [out].
        """
        tensors, bits = dict(self.model.state_dict()), {}
        for name, weight in self.weights().items():
            kept = masked(weight, masks[name])
            tensors[name] = kept
            if self.bits < 32:
                step = step_of(kept, masks[name], self.bits)
                scaled = kept / step.view(-1, *[1] * (kept.dim() - 1))
                tensors[name] = scaled.round().clamp(*limits(self.bits)).to(torch.int8)
                tensors[f"{name.removesuffix('weight')}scale"] = step
                bits[name] = self.bits
        return tensors, bits
