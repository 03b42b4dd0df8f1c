"""A neural complexity measure: how far a network's loss on held-out inputs will be above that on its training data.

It looks at what the network says: test inputs attend to training examples, and what they find there tells the gap. The
labels of test inputs are never given.

    q_j = [x'_j, h(x'_j)],  k_i = [x_i, h(x_i)],  v_i = [x_i, y_i, h(x_i)]
    NC(h) = MLP(mean_j MHA(q, k, v)_j),  to be L_test(h) - L_train(h)

Source: Lee et al., "Neural Complexity Measures", NeurIPS 2020, section 3. Differs: outputs of a network are looked at
one by one (of a classifier, each class against all others), by the same weights, and the mean is over test inputs and
outputs, so that neither the number of classes nor their order is part of the measure; states have 56 numbers and the
attention 4 heads (512 and 8 there), in MetaD2A's block; the loss, (NC - gap)^2, has errors relative to a data set's
mean beside it, as that of MetaD2A's predictor has, since networks on one data set are what is ranked.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from devices.nas.metad2a.predictor import predictor_loss
from devices.nas.metad2a.set_encoder import WIDTH, Attention


class Behaviour(NamedTuple):
    """What networks say on one data set, or each on its own.

    Attributes:
        x, x_test: training and test inputs, [networks or 1, n, features] and [networks or 1, m, features].
        y: targets of the former, one-hot of classes, [networks or 1, n, outputs].
        h, h_test: what the networks say there, in numbers around 0, [networks, n, outputs] and [networks, m, outputs].
    """

    x: Tensor
    y: Tensor
    h: Tensor
    x_test: Tensor
    h_test: Tensor


class Examples(nn.Module):
    """The state of each example, once for each output: a linear layer on [input, what is told of it], ReLU, another.

    Args:
        features: numbers that an input is given as.
        told: numbers that are told of each output of an example.
        width: of the state.
    """

    def __init__(self, features: int, told: int, width: int):
        super().__init__()
        self.input, self.told = nn.Linear(features, width), nn.Linear(told, width, bias=False)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, *told: Tensor) -> Tensor:
        """Returns [networks * outputs, n, width] from x [networks or 1, n, features] and told, [networks, n, outputs].

        The input's part of the first layer is the same for all outputs, and computed once.
        """
        mixed = self.input(x).unsqueeze(2) + self.told(torch.stack(told, 3))
        states: Tensor = self.out(F.relu(mixed)).transpose(1, 2).flatten(0, 1)
        return states


class NeuralComplexity(nn.Module):
    """Predicts the gap between test and training loss of networks.

    Args:
        features: numbers that an input is given as.
        width: of the states of examples.
    """

    def __init__(self, features: int, width: int = WIDTH):
        super().__init__()
        self.said, self.answered = Examples(features, 1, width), Examples(features, 2, width)
        self.attention = Attention(width, width, width)
        self.head = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1))

    def forward(self, seen: Behaviour) -> Tensor:
        """Returns the predicted gaps, [networks]."""
        x, y, h, x_test, h_test = seen
        values = self.answered(x, y.expand_as(h), h)
        found = self.attention(self.said(x_test, h_test), self.said(x, h), values).mean(1)
        predicted: Tensor = self.head(found.unflatten(0, (len(h), -1)).mean(1)).squeeze(1)
        return predicted


def complexity_loss(model: NeuralComplexity, seen: Behaviour, gaps: Tensor) -> Tensor:
    """Returns the loss of gaps predicted on one data set; the networks that were looked at get no gradient.

    Args:
        model: the measure.
        seen: what networks say there.
        gaps: theirs, [networks].
    """
    return predictor_loss(model(seen._replace(h=seen.h.detach(), h_test=seen.h_test.detach())), gaps)


def regularised_loss(model: NeuralComplexity, losses: Tensor, seen: Behaviour, weight: float) -> Tensor:
    """Returns the loss of networks in training, L_train + weight * NC; the measure itself gets no gradient.

    Args:
        model: the measure.
        losses: training losses, [networks].
        seen: what the networks say, from which gradients flow back to them.
        weight: of the predicted gaps; 0 trains as without them (lambda in the paper).
    """
    if not weight:
        return losses.sum()
    frozen = {name: parameter.detach() for name, parameter in model.named_parameters()}
    total: Tensor = (losses + weight * functional_call(model, frozen, (seen,))).sum()
    return total
