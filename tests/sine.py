"""A workload without classes, to hold the core to: each client has a sine of its own phase, judged by squared error."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fedsim.seeding import torch_generator
from fedsim.workloads.base import ClientData, Examples, ModelFactory, Tensors, Workload
from fedsim.workloads.metrics import Metric

# As a user takes it by overrides alone: in the place of `blobs`, without that one's settings.
DROPPED = ("num_classes", "input_shape", "examples_per_client", "test_examples", "separation")
DROPPED += ("client_test_fraction", "default_clients")
SINE = ("workload=blobs", "workload._target_=sine.Sine", "workload.name=sine", *(f"~workload.{key}" for key in DROPPED))


class Sine(Workload):
    """y = sin(3 x + phase) on [-1, 1]; clients with odd numbers have no held-out examples.

    Args:
        model, num_clients, seed: as of any workload.
        partition: ignored.
        name: of the workload.
        examples: of each client.
        alpha: ignored; one of `blobs` that Hydra cannot drop, because it is null.
    """

    primary = Metric("mse", "m²", higher_is_better=False)
    input_shape, num_outputs = (1,), 1

    def __init__(
        self,
        model: ModelFactory,
        num_clients: int | None,
        seed: int,
        partition: Any = None,
        name: str = "sine",
        examples: int = 12,
        alpha: None = None,
    ):
        super().__init__(model, seed)
        self.name, self.num_clients, self.examples = name, num_clients or 6, examples
        self.test = self._draw(0.0, 40, "test")

    def client_data(self, client_id: int) -> ClientData:
        self.check_client(client_id)
        drawn = self._draw(0.2 * client_id, self.examples, "client", client_id).tensors
        held = 0 if client_id % 2 else 3
        parts = ({name: t[held:] for name, t in drawn.items()}, {name: t[:held] for name, t in drawn.items()})
        return ClientData(*map(Examples, parts))

    def losses(self, model: nn.Module, batch: Tensors) -> Tensor:
        return (model(*self.inputs(batch)) - batch["height"]).square().mean(1)

    def sums(self, model: nn.Module, batch: Tensors) -> tuple[dict[str, float], int]:
        error = float(self.losses(model, batch).sum())
        return {"mse": error, "loss": error}, self.batch_size_of(batch)

    def _draw(self, phase: float, count: int, *names: str | int) -> Examples:
        x = 2 * torch.rand(count, 1, generator=torch_generator(self.seed, "sine", *names)) - 1
        return Examples({"x": x, "height": torch.sin(3 * x + phase)})
