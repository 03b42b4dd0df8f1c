"""What trainers of pruned networks share: masks by magnitude that follow a schedule, and integers for what layers read.

Zeros stand inside dense tensors, so they save bytes and no time; a client is judged with the network that the masks
leave, and its sizes are reported with it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated, Any

import torch
from annotated_types import Ge, Interval
from torch import Tensor, nn

from clients.trainers.base import ClientContext
from clients.trainers.sgd import SGDRun, SGDTrainer
from devices.compression.masks import FLOOR, PRUNABLE, Masks, SparsitySchedule, global_masks, sparsity_of
from devices.compression.quantise import ActivationRange
from devices.compression.sizes import dense_bytes, nonzero_bytes, wire_bytes
from devices.cost import ModelCost
from devices.profile import DeviceProfile
from fedsim.errors import ConfigError
from fedsim.messages.updates import Broadcast
from fedsim.workloads.base import Tensors, Workload

MASKS = "masks"  # group of a client's state: masks that are final


class SparseRun(SGDRun):
    """The local loop under masks, which are made anew between its batches until sparsity is final.

    Attributes:
        masks: by weight, which entries stay; empty until they are made.
    """

    trainer: SparseTrainer

    def __init__(self, trainer: SparseTrainer, client: ClientContext, broadcast: Broadcast):
        super().__init__(trainer, client, broadcast)
        state = client.state
        final = all(f"{MASKS}.{name}" in state for name in trainer.pruned)
        self.masks: Masks = {name: state[f"{MASKS}.{name}"].cpu() for name in trainer.pruned} if final else {}

    def batches(self) -> Iterator[Tensors]:
        """Yields the batches of plain SGD; masks are made anew between them."""
        trainer, round = self.trainer, self.broadcast.round
        steps = trainer.local_steps or trainer.local_epochs * -(-len(self.client.data.train) // trainer.batch_size)
        for number, batch in enumerate(super().batches()):
            if not self.masks or (round <= trainer.last_pruning and number % trainer.refresh == 0):
                self.masks = trainer.masks_at(round - 1 + number / steps)
            yield batch

    def keep_masks(self) -> None:
        """Keeps final masks with the client."""
        if self.broadcast.round > self.trainer.last_pruning:
            self.client.state.store(MASKS, self.masks)


class SparseTrainer(SGDTrainer):
    """SGD under masks whose sparsity grows by the cubic schedule; subclasses say what is minimised.

    Masks are those of a client's own weights: made anew at the start of each of its rounds and every `refresh` steps,
    until sparsity is final; then the client keeps them. Weight decay and momentum act on all weights, masked or not.

    Args:
        sparsity: final share of zeros.
        prune_rounds: rounds until it is reached; from the next one on masks stay.
        refresh: F, steps from one mask to the next.
        floor: share of its weights that every layer keeps.
        sgd: arguments of SGDTrainer.

    Attributes:
        pruned: names of the weights that masks act on.
    """

    bits, activation_bits = 32, 32
    dense_rounds = 0  # before the first mask
    pruned: list[str]
    model: nn.Module

    def __init__(
        self,
        sparsity: Annotated[float, Interval(ge=0, lt=1)],
        prune_rounds: Annotated[int, Ge(0)],
        refresh: Annotated[int, Ge(1)] = 16,
        floor: Annotated[float, Interval(ge=0, le=1)] = FLOOR,
        **sgd: Any,
    ):
        super().__init__(**sgd)
        self.prune_rounds, self.refresh, self.floor = prune_rounds, refresh, floor
        self.become_sparse(sparsity)

    def become_sparse(self, sparsity: float) -> None:
        """Takes a final share of zeros.

        Raises:
            ConfigError: if it leaves less than the floor.
        """
        if self.floor > 1 - sparsity:
            raise ConfigError(
                "trainer.sparsity must be in [0, 1), and trainer.floor at most what it leaves, got "
                f"{sparsity!r} and {self.floor!r}"
            )
        self.sparsity, self.schedule = sparsity, SparsitySchedule(sparsity, end=1)

    def integer_bits(self, round: int, profile: DeviceProfile) -> int:
        """Returns the larger of the bits of weights and of what layers read: a kernel needs both to be integers."""
        return max(self.bits, self.activation_bits) if round > self.dense_rounds else 32

    @property
    def last_pruning(self) -> int:
        """Returns the last round in which masks move."""
        return self.dense_rounds + self.prune_rounds

    def names(self, model: nn.Module) -> list[str]:
        """Returns weights that are pruned."""
        raise NotImplementedError(f"{type(self).__name__} does not say which weights it prunes")

    def setup(self, workload: Workload, model: nn.Module, network: ModelCost) -> None:
        """Finds the weights to prune.

        Raises:
            ConfigError: for a model without such weights.
        """
        super().setup(workload, model, network)
        self.pruned = self.names(model)
        if not self.pruned:
            raise ConfigError(f"{type(self).__name__} finds no weights to prune in {type(model).__name__}")
        self.model = model

    def smallest(self, weights: Mapping[str, Tensor], sparsity: float, floor: float) -> Masks:
        """Returns masks of the smallest weights."""
        return global_masks(weights, sparsity, floor)

    def weights(self) -> dict[str, Tensor]:
        """Returns the weights that are pruned, as they are now."""
        parameters = dict(self.model.named_parameters())
        return {name: parameters[name] for name in self.pruned}

    def sparsity_at(self, rounds: float) -> float:
        """Returns the share of zeros after so many rounds."""
        pruning = rounds - self.dense_rounds
        return self.schedule.at(pruning / self.prune_rounds if self.prune_rounds else float(pruning >= 0))

    def masks_at(self, rounds: float) -> Masks:
        """Returns masks of the model's weights after so many rounds."""
        sparsity, weights = self.sparsity_at(rounds), self.weights()
        if not sparsity:
            return {name: torch.ones(w.shape, dtype=torch.bool) for name, w in weights.items()}
        return self.smallest(weights, sparsity, self.floor)

    @contextmanager
    def integer_inputs(self, model: nn.Module) -> Iterator[None]:
        """Fakes integers for what the layers read, over the range of the batch at hand; gradients pass unchanged."""

        def fake(_: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
            x, seen = given[0], ActivationRange(self.activation_bits)
            seen.see(x.detach())
            return (x + (seen.fake(x.detach()) - x.detach()), *given[1:])

        layers = [m for m in model.modules() if isinstance(m, PRUNABLE)] if self.activation_bits < 32 else []
        handles = [layer.register_forward_pre_hook(fake) for layer in layers]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def sizes(weights: Tensors, masks: Masks, tensors: Mapping[str, Tensor], bits: Mapping[str, int]) -> dict[str, float]:
    """Returns sparsity and the three sizes of a network, as metrics.

    Args:
        weights: the dense network.
        masks: of its weights.
        tensors: what a device stores of it.
        bits: of integer tensors.
    """
    return {
        "sparsity": sparsity_of(masks),
        "dense_bytes": float(dense_bytes(weights)),
        "nonzero_bytes": nonzero_bytes(tensors, bits),
        "wire_bytes": float(wire_bytes(tensors, bits)),
    }


@torch.no_grad()
def copy(values: Mapping[str, Tensor], into: Mapping[str, Tensor]) -> None:
    """Copies tensors into those of the same name."""
    for name, tensor in values.items():
        into[name].copy_(tensor)
