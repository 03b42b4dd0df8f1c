"""What a network last made of every kept example: the coreset's gradient without a pass of its own.

A replay step sends a part of the memory through the network anyway. Its outputs are kept, so that the mean over all
examples is known at every step, each as it was when it was last replayed: the idea of Le Roux et al., "A Stochastic
Gradient Method with an Exponential Convergence Rate for Finite Training Sets" (SAG), NeurIPS 2012.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from clients.trainers.rehearsal.gradients import error_of, head_of, last_layer, scoring
from clients.trainers.rehearsal.memory import Memory
from clients.trainers.rehearsal.spaces import Features
from fedsim.workloads.base import Workload
from fedsim.workloads.classification import classification

OUTPUTS = nn.Identity()  # a network that has been passed already


class Recalled:
    """Softmax - label [m, classes] and the head's inputs [m, features] of every kept example.

    Args:
        space: in which they are compared.
        workload: its logits.
        model: sees all examples once, in evaluation mode; those of later steps as the step saw them, dropout included.
        memory: with at least one example, all of one label.
    """

    def __init__(self, space: Features, workload: Workload, model: nn.Module, memory: Memory):
        self.space, self.workload, self.model, self.memory = space, workload, model, memory
        with scoring(model):
            self.error, self.features = last_layer(workload, model, memory.examples())

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watches one step whose last examples are those that were drawn from the memory last."""
        places = self.memory.drawn
        seen: list[tuple[Tensor, Tensor]] = []
        hook = head_of(self.model).register_forward_hook(lambda _, inputs, outputs: seen.append((inputs[0], outputs)))
        try:
            yield
        finally:
            hook.remove()
        features, outputs = (t[-len(places) :].detach() for t in seen[-1])
        batch = {**self.memory.batch(places), "x": outputs}
        self.error[places] = error_of(classification(self.workload).logits(OUTPUTS, batch), batch["y"])
        self.features[places] = features

    def mean_gradient(self) -> Tensor:
        """Returns the mean gradient of all, as `Space.mean_gradient` would find it."""
        return self.space.mean_of_outputs(self.model, self.error, self.features)
