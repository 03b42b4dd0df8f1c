"""What the uncompressed network teaches a compressed one: by its outputs, or by what it looks at.

Sources: Hinton et al., "Distilling the Knowledge in a Neural Network", 2015; Park et al., "Attribution Preservation in
Network Compression for Reliable Network Interpretation", NeurIPS 2020 (see `devices.compression.attribution`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from clients.trainers.base import ClientContext
from clients.trainers.sgd import Objective
from devices.compression.attribution import Attributed, cosine, distance, in_boxes, overlap, pointing
from devices.compression.distil import Remembering, divergence
from devices.cost import ModelCost
from devices.meter import measure
from fedsim.workloads.base import JUDGED_AT_ONCE, Tensors, Workload

TEACHER = "teacher"  # what is held, and a group of a client's state: the uncompressed network
BOX = "box"  # of an example, where it has one: top, left, bottom, right of its object in pixels
Layer = tuple[str, bool]  # of the features that maps are of, see `feature_layer`
Sees = Callable[[tuple[Tensor, ...]], Attributed]


class Compressed(Objective):
    """(1 - distil) CE + distil T^2 KL(teacher || student) + attribution_weight R; the first alone without a teacher.

    R is the mean squared distance of the unit maps of both networks, for the class that the teacher answers.

    Args:
        distil: share of the divergence.
        temperature: T.
        attribution: kind of the maps; "none" leaves R out.
        weight: beta of R.
    """

    def __init__(self, distil: float, temperature: float, attribution: str, weight: float):
        self.distil, self.temperature, self.attribution, self.weight = distil, temperature, attribution, weight

    def __call__(self, run: Any, batch: Tensors) -> Tensor:
        student: Remembering = run.student()
        loss: Tensor = run.client.workload.loss(student, batch)
        if not run.teacher:
            return loss
        taught = run.taught(batch)
        if self.distil:
            loss = (1 - self.distil) * loss + self.distil * divergence(student.logits, taught.logits, self.temperature)
        if isinstance(student, Seeing) and isinstance(taught, Attributed) and self.weight:
            classes = taught.logits.argmax(-1)
            theirs = taught.map(self.attribution, classes, run.left_out(taught))
            loss = loss + self.weight * distance(student.network.map(self.attribution, classes), theirs)
        return loss

    def held(self, run: Any) -> dict[str, int]:
        return {TEACHER: run.client.step_cost.parameter_bytes} if run.teacher else {}


class Seeing(Remembering):
    """A network that keeps logits and features of its last call."""

    def __init__(self, network: Attributed, tensors: Tensors):
        super().__init__(lambda x: network(tensors, x))
        self.network = network


def see(model: nn.Module, tensors: Mapping[str, Tensor], inputs: tuple[Tensor, ...], layer: Layer) -> Attributed:
    """Returns a frozen network after a pass in evaluation mode, ready for a map.

    Args:
        model: whose tensors these take the place of.
        tensors: the network.
        inputs: of the pass.
        layer: of the features.
    """
    network, was_training = Attributed(model, *layer, detached=True), model.training
    model.eval()
    with torch.enable_grad():
        network({name: t.detach() for name, t in tensors.items()}, *inputs)
    model.train(was_training)
    return network


def cost_with_maps(workload: Workload, model: nn.Module, network: ModelCost, layer: Layer, kind: str) -> ModelCost:
    """Returns what a step with maps costs, without the teacher's way to its features and logits.

    Args:
        workload: whose loss is added.
        model: stays as it is.
        network: its cost without maps.
        layer: of the features.
        kind: of the maps.
    """

    def loss(model: nn.Module, batch: Tensors) -> Tensor:
        frozen = {name: t.detach() for name, t in model.state_dict().items()}
        taught = see(model, frozen, workload.inputs(batch), layer)
        classes = taught.logits.argmax(-1)
        own = Attributed(model, *layer)
        loss = workload.loss(lambda x: own({}, x), batch)  # type: ignore[arg-type]
        return loss + distance(own.map(kind, classes), taught.map(kind, classes))

    cost = measure(model, loss, workload.sample(4), network.name)
    return replace(
        network,
        name=f"{network.name}, with maps",
        forward_flops=cost.forward_flops - network.forward_flops,
        backward_flops=cost.backward_flops,
        activation_bytes=cost.activation_bytes,
        step_bytes=cost.step_bytes,
    )


def agreement(client: ClientContext, student: Sees, teacher: Sees, kind: str) -> dict[str, float]:
    """Returns how maps of student and teacher agree on held-out examples, for the class that the teacher says.

    Their mean cosine and, where examples come with boxes, how often each map is largest inside (pointing game) and
    the overlap of its largest positions with the box.

    Args:
        client: whose examples they are.
        student: makes a pass of inputs through a frozen network.
        teacher: likewise.
        kind: of the maps.
    """
    found = dict[str, list[Tensor]]()
    for rows in torch.arange(len(client.data.test)).split(JUDGED_AT_ONCE):
        batch = {name: t.to(client.device) for name, t in client.data.test.gather(rows).items()}
        inputs = client.workload.inputs(batch)
        theirs, own = teacher(inputs), student(inputs)
        classes = theirs.logits.argmax(-1)
        maps = {"": _map(own, kind, classes), "_teacher": _map(theirs, kind, classes)}
        found.setdefault("attribution_cosine", []).append(cosine(maps[""], maps["_teacher"]))
        size, shape = inputs[0].shape[2:], theirs.features.shape[2:]
        if BOX in batch and len(size) == len(shape) == 2:
            inside = in_boxes(batch[BOX], (size[0], size[1]), (shape[0], shape[1]))
            for whose, seen in maps.items():
                found.setdefault(f"pointing{whose}", []).append(pointing(seen, inside).float())
                found.setdefault(f"attribution_iou{whose}", []).append(overlap(seen, inside))
    return {name: float(torch.cat(values).mean()) for name, values in found.items()}


def _map(network: Attributed, kind: str, classes: Tensor) -> Tensor:
    with torch.enable_grad():
        return network.map(kind, classes).detach()
