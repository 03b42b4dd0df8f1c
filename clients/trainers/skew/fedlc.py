"""FedLC: logits are calibrated by how often a client has each label.

Source: Zhang et al., "Federated Learning with Label Distribution Skew via Logits Calibration", ICML 2022 (recalled;
compared with the implementation in bytedance/FedDecorr): cross-entropy of f_y - tau n_y^(-1/4), with n_y the client's
count of label y. Differs: the sum of the softmax is over all classes, as in that implementation, where the paper's
leaves the label itself out; so tau=0 is plain SGD. A class that a client does not have takes no part, which is the
limit of n_y = 0.
"""

from __future__ import annotations

from typing import Annotated, Any

import torch
from annotated_types import Ge
from torch import Tensor

from clients.trainers.base import ClientContext
from clients.trainers.sgd import Objective, SGDRun, SGDTrainer
from fedsim.messages.updates import Broadcast
from fedsim.workloads.base import Tensors
from fedsim.workloads.classification import classification


class Calibrated(Objective):
    """The workload's loss of logits less the client's margins."""

    def __call__(self, run: FedLCRun, batch: Tensors) -> Tensor:
        model, margins = run.client.model, run.margins
        if margins is None:
            return run.client.workload.loss(model, batch)
        hook = model.register_forward_hook(lambda _, inputs, logits: logits - margins)
        try:
            return run.client.workload.loss(model, batch)
        finally:
            hook.remove()


class FedLCRun(SGDRun):
    """A round on calibrated logits.

    Attributes:
        margins: tau n^(-1/4), [classes]; None with tau = 0.
    """

    trainer: FedLCTrainer

    def __init__(self, trainer: FedLCTrainer, client: ClientContext, broadcast: Broadcast):
        super().__init__(trainer, client, broadcast)
        self.margins = trainer.margins(client) if trainer.tau else None


class FedLCTrainer(SGDTrainer):
    """SGD on calibrated logits.

    Args:
        tau: size of the margins; 0 is plain SGD, bit for bit.
        sgd: arguments of SGDTrainer.
    """

    needs_classes = True
    run = FedLCRun
    objective = Calibrated()

    def __init__(self, tau: Annotated[float, Ge(0)] = 1.0, **sgd: Any):
        super().__init__(**sgd)
        self.tau = tau

    def margins(self, client: ClientContext) -> Tensor:
        """Returns what is taken from each logit, [classes]; infinite for a class that the client does not have."""
        classes = classification(client.workload).num_classes
        counts = torch.bincount(client.data.train.labels.flatten().cpu(), minlength=classes)
        return (self.tau * counts.double().pow(-0.25)).float().to(client.device)
