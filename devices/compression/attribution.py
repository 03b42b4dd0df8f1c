"""Maps of what a network looks at: matched in training, so that compression keeps them, and compared afterwards.

Source: Park et al., "Attribution Preservation in Network Compression for Reliable Network Interpretation", NeurIPS
2020, and its code (GeondoPark/attribute-preserve). Beyond it: a network whose layers have no positions, such as an MLP,
has a map over the units that its last linear layer reads, each a position of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.modules import pooling

from devices.errors import DeviceError, unknown

MAPS = ("swa", "ewa", "sswa")
IN_POOLING = [kind for kind in vars(pooling).values() if isinstance(kind, type)]
POOLING = tuple(kind for kind in IN_POOLING if issubclass(kind, nn.Module) and kind is not nn.Module)
RESHAPING = (nn.Flatten, nn.Unflatten, nn.Identity, nn.Dropout)
LEAST_NORM = 1e-12


def feature_layer(model: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[str, bool]:
    """Finds the features that a map is of: the last ones with positions, before the last pooling.

    Args:
        model: stays as it is.
        inputs: of two examples or more.

    Returns:
        The module's name, and whether its outputs [batch, channels, positions...] are meant; False: the inputs of the
        last linear layer, where no convolution has positions.

    Raises:
        DeviceError: for a network with neither.
    """
    behind_convolution, found, linear = False, "", ""
    known: list[Tensor] = []  # what has been looked at, or pooled: a block may hand it on as its own

    def look(name: str, module: nn.Module, output: Any) -> None:
        nonlocal behind_convolution, found, linear
        behind_convolution |= isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
        if isinstance(module, nn.Linear):
            linear = name
        elif isinstance(module, (*POOLING, *RESHAPING)):
            known.append(output)
        elif behind_convolution and _has_positions(output) and not any(output is t for t in known):
            found = name
            known.append(output)

    parts = [(name, module) for name, module in model.named_modules() if name]  # a block ends behind its layers
    handles = [m.register_forward_hook(lambda m, _, out, n=name: look(n, m, out)) for name, m in parts]
    was_training = model.training
    try:
        with torch.no_grad():
            model.eval()(*inputs)
    finally:
        model.train(was_training)
        for handle in handles:
            handle.remove()
    if not found and not linear:
        raise DeviceError(f"network {type(model).__name__} has no features to attribute to: no convolution, no linear")
    return found or linear, bool(found)


def _has_positions(output: Any) -> bool:
    return isinstance(output, Tensor) and output.dim() > 2 and output[0, 0].numel() > 1


class Attributed:
    """A network whose calls leave their features and logits behind; weights come with each call.

    Args:
        model: stays as it is.
        layer: see `feature_layer`.
        outputs: see `feature_layer`.
        detached: features are cut off from the layers before them: all that a frozen network needs.

    Attributes:
        features: of the last call, [batch, channels, positions...] or [batch, ..., units].
        logits: of the last call.
    """

    features: Tensor
    logits: Tensor

    def __init__(self, model: nn.Module, layer: str, outputs: bool, detached: bool = False):
        self.model, self.layer, self.outputs, self.detached = model, layer, outputs, detached

    def __call__(self, tensors: Mapping[str, Tensor], *inputs: Tensor) -> Tensor:
        """Returns the logits with these weights in the place of the model's own."""
        with self._watched():
            self.logits = functional_call(self.model, dict(tensors), inputs)
        return self.logits

    def map(self, kind: str, classes: Tensor, left_out: Tensor | None = None) -> Tensor:
        """Returns the attribution map of the last call, [batch, positions], not negative.

        "swa": ReLU(sum_c w_c f_c) with w_c the sum over positions of d logit / d f_c; "ewa": the mean over channels of
        f_c^2; "sswa": as "swa", without some channels.

        Args:
            kind: one of MAPS.
            classes: whose logits are differentiated, [batch] or of sequences [batch, steps].
            left_out: True where "sswa" leaves a channel out, [channels].
        """
        if kind not in MAPS:
            raise DeviceError(unknown("attribution map", kind, MAPS))
        f = self.features
        if kind == "ewa":
            return (f**2).mean(1).flatten(1) if self.outputs else (f**2).flatten(1)
        chosen = self.logits.gather(-1, classes[..., None]).sum()
        (slopes,) = torch.autograd.grad(chosen, f, create_graph=not self.detached)
        if not self.outputs:
            product = slopes * f
            return F.relu(product if left_out is None else product * ~left_out).flatten(1)
        slopes = slopes.flatten(2).sum(2)
        if left_out is not None:
            slopes = slopes * ~left_out
        return F.relu((slopes[:, :, None] * f.flatten(2)).sum(1))

    @property
    def channels(self) -> int:
        """Returns how many channels, or units, the features of the last call have."""
        return self.features.shape[1 if self.outputs else -1]

    @contextmanager
    def _watched(self) -> Iterator[None]:
        module = self.model.get_submodule(self.layer)

        def seen(f: Tensor) -> Tensor:
            # A view, since torch's own FLOP counter cannot follow modules that are fed a leaf.
            self.features = f.detach().requires_grad_().view_as(f) if self.detached else f
            return self.features

        if self.outputs:
            handle = module.register_forward_hook(lambda m, given, out: seen(out))
        else:
            handle = module.register_forward_pre_hook(lambda m, given: (seen(given[0]), *given[1:]))
        try:
            yield
        finally:
            handle.remove()


def unit(maps: Tensor) -> Tensor:
    """Returns maps [batch, positions] divided by their Euclidean norms; a map of zeros stays one."""
    return F.normalize(maps, dim=1, eps=LEAST_NORM)


def distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Returns the mean over examples and positions of the squared difference of unit maps; at most 2 / positions.

    Args:
        student: maps, [batch, positions].
        teacher: maps of the same shape; no gradient reaches them, and their scale does not matter.
    """
    return F.mse_loss(unit(student), unit(teacher.detach()))


# --- how well maps agree ------------------------------------------------------------------------------------------


def cosine(maps: Tensor, others: Tensor) -> Tensor:
    """Returns the cosine between the maps of each example, [batch]; 0 where one is all zeros."""
    return (unit(maps) * unit(others)).sum(1)


def pointing(maps: Tensor, inside: Tensor) -> Tensor:
    """Returns whether each map is largest inside the object, [batch] bool; never where it is all zeros.

    Args:
        maps: [batch, positions].
        inside: where the object is, [batch, positions] bool.
    """
    top = maps.argmax(1, keepdim=True)
    return inside.gather(1, top)[:, 0] & (maps.gather(1, top)[:, 0] > 0)


def overlap(maps: Tensor, inside: Tensor) -> Tensor:
    """Returns intersection over union of the object and as many of the map's largest positions, [batch].

    Args:
        maps: [batch, positions].
        inside: where the object is, [batch, positions] bool.
    """
    place = maps.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    chosen = place < inside.sum(1, keepdim=True)
    return (chosen & inside).sum(1) / (chosen | inside).sum(1).clamp(min=1)


def in_boxes(boxes: Tensor, size: tuple[int, int], shape: tuple[int, int]) -> Tensor:
    """Returns which positions of a feature map have their centre in a box, [batch, positions] bool.

    Args:
        boxes: top, left, bottom, right in pixels, the last two outside, [batch, 4].
        size: height and width of images.
        shape: height and width of feature maps.
    """
    centres = [(torch.arange(n, device=boxes.device) + 0.5) * pixels / n for n, pixels in zip(shape, size, strict=True)]
    top, left, bottom, right = (edge[:, None] for edge in boxes.unbind(1))
    rows = (centres[0] >= top) & (centres[0] < bottom)
    columns = (centres[1] >= left) & (centres[1] < right)
    return (rows[:, :, None] & columns[:, None]).flatten(1)
