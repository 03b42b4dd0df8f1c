"""FedAvg whose model each client fine-tunes on its own examples before it judges it: the simplest personal baseline.

The federation learns as with plain SGD; nothing of the fine-tuning is kept or sent.
"""

from __future__ import annotations

from typing import Annotated, Any

from annotated_types import Ge, Le

from clients.trainers.base import ClientContext
from clients.trainers.sgd import SGDTrainer
from fedsim.messages.updates import Broadcast, ClientUpdate


class FineTuneTrainer(SGDTrainer):
    """SGD; `evaluate_clients` judges each client's model after `tune_epochs` more on its own training examples.

    Args:
        tune_epochs: epochs before each evaluation; 0 judges the model as it came.
        sgd: arguments of SGDTrainer.
    """

    def __init__(self, tune_epochs: Annotated[int, Ge(0), Le(10_000)], **sgd: Any):
        super().__init__(**sgd)
        self.tune_epochs = tune_epochs

    def personalise(self, client: ClientContext, broadcast: Broadcast) -> dict[str, float]:
        """Fine-tunes the received model, and pays for it."""
        if self.tune_epochs:
            run = self.start(client, broadcast)
            run.reserve()
            client.model.train()
            run.train(self.shuffled(client, "tune-batches", self.tune_epochs))
        return {}


class TuneOnlyTrainer(FineTuneTrainer):
    """Fine-tunes before an evaluation and trains nothing: clients send the weights back as they came.

    Args:
        lr, batch_size, tune_epochs, momentum, weight_decay, clip_norm: of the fine-tuning, as in FineTuneTrainer.
    """

    def __init__(
        self,
        lr: float,
        batch_size: int,
        tune_epochs: int,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        clip_norm: float | None = None,
    ):
        tuning = {"momentum": momentum, "weight_decay": weight_decay, "clip_norm": clip_norm}
        super().__init__(tune_epochs, lr=lr, batch_size=batch_size, **tuning)

    def fit(self, client: ClientContext, broadcast: Broadcast) -> ClientUpdate:
        """Returns the received weights."""
        self.check_settings(broadcast)
        return ClientUpdate(client.client_id, client.num_examples, client.weights)
