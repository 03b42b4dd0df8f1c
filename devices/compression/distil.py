"""The loss by which a small network learns from the outputs of a larger one."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional as F

from devices.errors import DeviceError


def divergence(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """Returns T^2 KL(softmax(teacher / T) || softmax(student / T)), summed over classes, averaged over examples.

    Args:
        student: logits, [..., classes].
        teacher: logits of the same shape; no gradient reaches them.
        temperature: T, above 0; T^2 keeps gradients of one size whatever it is.
    Source: Hinton et al., "Distilling the Knowledge in a Neural Network", 2015, section 2.
    """
    if not temperature > 0:
        raise DeviceError(f"temperature must be above 0, got {temperature!r}")
    own = F.log_softmax(student.flatten(0, -2) / temperature, dim=-1)
    target = F.log_softmax(teacher.detach().flatten(0, -2) / temperature, dim=-1)
    return temperature**2 * F.kl_div(own, target, reduction="batchmean", log_target=True)


class Remembering:
    """A network that keeps the logits of its last call, since a workload's loss returns none.

    Attributes:
        logits: of the last call, [batch, ..., classes].
    """

    logits: Tensor

    def __init__(self, call: Callable[[Tensor], Tensor]):
        self.call = call

    def __call__(self, x: Tensor) -> Tensor:
        self.logits = self.call(x)
        return self.logits
