"""How accurate nets of a zoo become on a task when they are trained on it for a moment, from their weights or anew.

`tuned/TASK.json` in the zoo's folder keeps it: of each net, the accuracy after so many steps. All begin with a new
head, since the classes are others, see the same batches, and are judged by the same images, which no query holds.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any

from annotated_types import Ge, Gt
from torch import Tensor

from devices.bounds import checked
from devices.errors import one_line
from devices.reading import read_json
from devices.writing import write_atomic
from fedsim.errors import ConfigError, DataError
from fedsim.meta.short_training import LAYOUT, accuracy, batches, normalised, train_steps
from fedsim.meta.tasks import Task
from fedsim.meta.zoo import SHAPE, HeldOut, Net, Zoo
from fedsim.seeding import derive, generator

TUNED = "tuned"
HEAD = "head."  # of all families; what stands before it is taken over


@checked("tuning", ConfigError)
@dataclass(frozen=True)
class Tuning:
    """How nets are fine-tuned, and others trained anew: Adam with a constant learning rate.

    Attributes:
        steps: of fine-tuning.
        batch: examples of a step.
        learning_rate: all the time.
    """

    steps: Annotated[int, Ge(1)] = 20
    batch: Annotated[int, Ge(2)] = 32
    learning_rate: Annotated[float, Gt(0)] = 0.003


def tuned_model(net: Net, weights: dict[str, Tensor], shape: Sequence[int], num_classes: int, seed: int) -> Any:
    """Makes the network of a net for other images and classes: with its weights, and a head of its own seed.

    Args:
        net: of the zoo.
        weights: of it; none, and it begins anew.
        shape: of the images; grey ones have one channel, whose weights are the sums of those of three equal ones.
        num_classes: of the head.
        seed: of what is made anew.
    """
    model = net.architecture.build(shape, num_classes, seed)
    own = model.state_dict()
    for name, tensor in weights.items():
        if not name.startswith(HEAD):
            grey = own[name].shape != tensor.shape and own[name].shape[1:2] == (1,)
            own[name] = tensor.sum(1, keepdim=True) if grey else tensor
    model.load_state_dict(own)
    return model


def tune(
    net: Net, weights: dict[str, Tensor], task: Task, tuning: Tuning, looks: Sequence[int], seed: int
) -> list[float]:
    """Trains a net on a task and returns its accuracies in percent after some steps.

    Args:
        net: of the zoo.
        weights: of it; none, and it begins anew.
        task: to train on.
        tuning: how.
        looks: steps after which it is judged, ascending.
        seed: of head and batches.
    """
    model = tuned_model(net, weights, SHAPE, task.num_classes, derive(seed, "tuning weights", task.name))
    model.to(memory_format=LAYOUT)
    x, held_out = (part.contiguous(memory_format=LAYOUT) for part in normalised(task))
    judged = HeldOut.of(task).judged
    x_judged, y_judged = held_out[judged], task.test_y[judged]
    rows = batches(len(x), tuning.batch, generator(seed, "tuning batches", task.name))
    found = []
    for step in train_steps(model, x, task.train_y, rows, looks[-1], tuning.learning_rate, one_cycle=False):
        if step in looks:
            found.append(accuracy(model.eval(), x_judged, y_judged))
            model.train()
    return found


class Tuned:
    """What nets of a zoo reach on tasks; files grow as more is asked for."""

    def __init__(self, zoo: Zoo, tuning: Tuning):
        self.zoo, self.tuning = zoo, tuning
        self._known: dict[str, dict[str, dict[str, float]]] = {}
        self._task: Task | None = None

    def curve(self, name: str, net: Net, looks: Sequence[int], anew: bool = False) -> list[float]:
        """Returns accuracies in percent after some steps; trains where they are not known.

        Args:
            name: of the task.
            net: of the zoo.
            looks: steps after which it is judged, ascending.
            anew: the net begins with new weights.

        Raises:
            DataError: for a file that is damaged or of other images or settings, or a net without its weights.
        """
        known = self._read(name)
        key = f"{net.name} anew" if anew else net.name
        own = known.setdefault(key, {})
        if any(str(step) not in own for step in looks):
            weights = {} if anew else self.zoo.weights(net)
            found = tune(net, weights, self._made(name), self.tuning, looks, self.zoo.tasks.seed)
            own.update({str(step): value for step, value in zip(looks, found, strict=True)})
            content = {**self._facts(name), "accuracies": {k: known[k] for k in sorted(known)}}
            (self.zoo.folder / TUNED).mkdir(exist_ok=True)
            write_atomic(self._path(name), json.dumps(content, indent=1, allow_nan=False))
        return [own[str(step)] for step in looks]

    def _made(self, name: str) -> Task:
        if self._task is None or self._task.name != name:
            self._task = self.zoo.task(name)
            self.zoo.check(self._task)
        return self._task

    def _facts(self, name: str) -> dict[str, Any]:
        kept = {key: value for key, value in asdict(self.tuning).items() if key != "steps"}
        return {"images": self._made(name).fingerprint, "tuning": kept}

    def _read(self, name: str) -> dict[str, dict[str, float]]:
        path = self._path(name)
        if name not in self._known and path.exists():
            found = read_json(path)
            try:
                own = {
                    str(key): {str(int(step)): float(value) for step, value in curve.items()}
                    for key, curve in found["accuracies"].items()
                }
                facts = {key: found[key] for key in ("images", "tuning")}
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                raise DataError(f"{path} cannot be read as accuracies of nets: {one_line(error)}") from None
            if facts != self._facts(name):
                raise DataError(f"{path}: these nets were tuned on other images, or otherwise; remove it")
            self._known[name] = own
        return self._known.setdefault(name, {})

    def _path(self, name: str) -> Any:
        return self.zoo.folder / TUNED / f"{name}.json"
