"""Workloads that tell classes apart: labels, cross-entropy and accuracy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from fedsim.errors import ConfigError
from fedsim.workloads.base import Tensors, Workload
from fedsim.workloads.by_class import (
    CALIBRATION,
    CLASSES,
    CONFUSION,
    ECE,
    MACRO_F1,
    ByClass,
    calibration_error,
    confusion_of,
    counts,
    macro_f1,
)
from fedsim.workloads.fingerprint import Fingerprint, content_of
from fedsim.workloads.metrics import ACCURACY


class ClassificationWorkload(Workload):
    """Examples with one label each or, for sequences, one per step; models give a logit for each class.

    Attributes:
        num_classes: size of the output.
        classes: their names; none where they go by their numbers.
        client_test_fraction: share of its own examples that a client holds out; 0 where nobody knows it.
        own_outputs: each task of a stream is told apart among its own classes.
    """

    num_classes: int
    classes: Sequence[str] = ()
    own_outputs = False
    client_test_fraction = 0.0
    primary = ACCURACY

    @property
    def num_outputs(self) -> int:  # type: ignore[override]
        """Returns the number of classes."""
        return self.num_classes

    def class_names(self) -> list[str]:
        """Returns the name of every class."""
        return list(self.classes) or [str(label) for label in range(self.num_classes)]

    def fingerprint(self) -> Fingerprint:
        """Returns what tells these data from others; see `fedsim.workloads.fingerprint`.

        Here of data that the seed decides on: who makes them, and the labels of the test part and of the first client.
        No inputs: numbers that are drawn anew may differ in their last bits from machine to machine.
        """
        labels = {"test y": self.test.labels, "client 0 y": self.client_data(0).train.labels}
        return {**super().fingerprint(), **{key: content_of(y.numpy()) for key, y in labels.items()}}

    def logits(self, model: nn.Module, batch: Tensors) -> Tensor:
        """Returns the model's logits of a batch: [batch, classes] or, for sequences, [batch, steps, classes].

        Raises:
            ConfigError: if the model answers something else.
        """
        logits = model(*self.inputs(batch))
        if not isinstance(logits, Tensor) or logits.dim() < 2 or logits.shape[-1] != self.num_classes:
            got = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            name = type(model).__name__
            raise ConfigError(f"{name} must return logits, [batch, ..., {self.num_classes}], it returned {got}")
        return logits

    def loss(self, model: nn.Module, batch: Tensors) -> Tensor:
        """Returns the mean cross-entropy of `batch["y"]` under the logits; every step of a sequence counts alike."""
        logits = self.logits(model, batch)
        return F.cross_entropy(logits.flatten(0, -2), batch["y"].flatten())

    def masks_before(self, client_id: int, phase: int) -> list[Tensor]:
        """Returns, for each task of a client before a phase, what is added to logits so that its own outputs stay.

        Each is [classes]; there are none where tasks share their outputs, as in ordinary workloads.
        """
        return []

    def losses(self, model: nn.Module, batch: Tensors) -> Tensor:
        """Returns the cross-entropy of each example by itself, [batch]."""
        logits = self.logits(model, batch)
        each = F.cross_entropy(logits.flatten(0, -2), batch["y"].flatten(), reduction="none")
        return each.view(len(logits), -1).mean(1)

    def sums(self, model: nn.Module, batch: Tensors) -> tuple[dict[str, Any], int]:
        """Returns how many labels are right, their summed cross-entropy and `counts`, and how many labels there are."""
        sums, y, _ = self._judged(model, batch)
        return sums, len(y)

    def sums_by_class(self, model: nn.Module, batch: Tensors) -> tuple[dict[str, Any], int]:
        """Returns `sums` with how often each class was taken for each, and how many labels there are."""
        sums, y, predicted = self._judged(model, batch)
        return {**sums, CONFUSION: confusion_of(y, predicted, self.num_classes)}, len(y)

    def _judged(self, model: nn.Module, batch: Tensors) -> tuple[dict[str, Any], Tensor, Tensor]:
        """Returns sums over a batch, its labels and the most likely class of each, on the CPU."""
        logits, y = self.logits(model, batch).flatten(0, -2), batch["y"].flatten()
        log_shares = F.log_softmax(logits, -1)
        loss = float(F.nll_loss(log_shares, y, reduction="sum"))
        y, predicted, confidence = y.cpu(), logits.argmax(-1).cpu(), log_shares.amax(-1).exp().cpu()
        found = counts(y, predicted, confidence, self.num_classes)
        return {"accuracy": int((predicted == y).sum()), "loss": loss, **found}, y, predicted

    def means(self, totals: Mapping[str, Any], count: int) -> dict[str, float]:
        """Returns accuracy, loss, macro F1 and calibration error from the sums of an evaluation."""
        means = super().means(totals, count)
        if CLASSES in totals:  # which a workload's own `sums` may lack
            means |= {MACRO_F1: macro_f1(totals[CLASSES]), ECE: calibration_error(totals[CALIBRATION])}
        return means

    def by_class(self, model: nn.Module, round: int) -> ByClass | None:
        """Returns how the model does for each class of the held-out examples, and its calibration."""
        return ByClass.of(self.class_names(), self.totals(model, self.test, self.sums_by_class)[0])


def classification(workload: Workload) -> ClassificationWorkload:
    """Returns the workload as one that tells classes apart.

    Raises:
        ConfigError: if it is none.
    """
    if not isinstance(workload, ClassificationWorkload):
        raise ConfigError(f"workload {workload.name} has no classes, which this method needs; take another workload")
    return workload
