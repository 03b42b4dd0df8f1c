"""A training in progress that is kept in one file, and goes on from it to the bytes of one that never stopped."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from devices.tensor_files import read_tensors, write_tensors
from fedsim.errors import DataError

LARGEST_GRADIENT = 5.0  # norm; the sets' attention has no norm layers
MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # of Adam


@dataclass(frozen=True)
class Look:
    """One validation: after how many steps, mean loss since the one before, score, and whether it is the best."""

    step: int
    loss: float
    score: float
    best: bool


class Fitting:
    """A network, its optimizer, its draws, and the weights that did best at a look.

    Args:
        model: the network, with its first weights.
        learning_rate: of Adam.
        draw: of all that a step draws.
        facts: what the training is of; a file of another one is refused.
        method: what the errors call the method.
    """

    def __init__(
        self,
        model: nn.Module,
        learning_rate: float,
        draw: np.random.Generator,
        facts: Mapping[str, Any],
        method: str = "MetaD2A",
    ):
        self.model, self.draw, self.facts = model, draw, dict(facts)
        self.header, self.kind = method.lower(), f"a training of {method}"
        self.adam = torch.optim.Adam(model.parameters(), lr=learning_rate)
        self.best = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
        self.step, self.losses, self.history = 0, list[float](), list[Look]()

    @property
    def best_score(self) -> float:
        """Returns the best score so far; minus infinity before the first look."""
        return max((look.score for look in self.history), default=-math.inf)

    def advance(self, loss: Callable[[np.random.Generator], Tensor]) -> None:
        """Takes a step down a loss that is given the draws."""
        self.adam.zero_grad()
        value = loss(self.draw)
        value.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), LARGEST_GRADIENT)
        self.adam.step()
        self.step += 1
        self.losses.append(float(value.detach()))

    def look(self, score: float) -> None:
        """Takes down a score, and keeps the weights if none was better."""
        better = score > self.best_score
        if better:
            self.best = {name: tensor.detach().clone() for name, tensor in self.model.state_dict().items()}
        self.history.append(Look(self.step, float(np.mean(self.losses)), score, better))
        self.losses = []

    def save(self, path: Path) -> None:
        """Writes what it takes to go on exactly from here."""
        tensors = {f"best.{name}": tensor for name, tensor in self.best.items()}
        for name, parameter in self.model.named_parameters():
            tensors[f"now.{name}"] = parameter
            tensors |= {f"{moment}.{name}": self.adam.state[parameter][moment] for moment in MOMENTS}
        progress = {
            "facts": self.facts,
            "step": self.step,
            "history": [asdict(look) for look in self.history],
            "draw": self.draw.bit_generator.state,
        }
        write_tensors(path, tensors, progress, self.header)

    def resume(self, path: Path) -> None:
        """Goes on with what `save` wrote.

        Raises:
            DataError: for a file of another training.
            DeviceError: for a file that is none.
        """
        tensors, progress = read_tensors(path, self.header, self.kind)
        if progress.get("facts") != self.facts:
            raise DataError(f"{path} is a training on other tasks or with other settings; name another --out")
        try:
            with torch.no_grad():
                for name, parameter in self.model.named_parameters():
                    parameter.copy_(tensors[f"now.{name}"])
                    self.adam.state[parameter] = {moment: tensors[f"{moment}.{name}"] for moment in MOMENTS}
            self.best = {name: tensors[f"best.{name}"] for name in self.best}
            self.step, self.history = progress["step"], [Look(**look) for look in progress["history"]]
            self.draw.bit_generator.state = progress["draw"]
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise DataError(f"{path} cannot be read as {self.kind}: {error}") from None


def fit(
    fitting: Fitting,
    loss: Callable[[np.random.Generator], Tensor],
    score: Callable[[], float],
    steps: int,
    look_every: int,
    checkpoint: Path | None = None,
    progress: Callable[[Look], None] | None = None,
) -> None:
    """Trains, looks every so often, and leaves the model with the weights that did best at a look.

    Args:
        fitting: the training, at its beginning.
        loss: of one step, given the draws.
        score: of the model as it is; more is better.
        steps: in all.
        look_every: steps between two looks.
        checkpoint: file that is gone on from where it is there, and written at every look.
        progress: called at every look, and at the last one of a training that is gone on with.

    Raises:
        DataError: for a checkpoint of another training.
    """
    if checkpoint is not None and checkpoint.exists():
        fitting.resume(checkpoint)
        if progress is not None and fitting.history:
            progress(fitting.history[-1])
    while fitting.step < steps:
        fitting.advance(loss)
        if fitting.step % look_every == 0 or fitting.step == steps:
            with torch.no_grad():
                fitting.look(score())
            if checkpoint is not None:
                fitting.save(checkpoint)
            if progress is not None:
                progress(fitting.history[-1])
    fitting.model.load_state_dict(fitting.best)
