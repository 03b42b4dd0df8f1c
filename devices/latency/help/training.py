"""Meta-trains HELP: learns the weights that it adapts over the source devices of a table.

Each episode treats eight source devices as new: it adapts with the ten references and ten other networks, judges the
adapted predictor on 200, and takes one Adam step through both. Every 50 episodes the validation devices are predicted
as at test; the best weights are kept.

Source: Lee et al., "HELP: Hardware-Adaptive Efficient Latency Prediction for NAS via Meta-Learning", NeurIPS 2021,
written anew after the authors' code. Differs: support and scale of the labels are those of the test (`predictor`), the
scale from what the episode measured and from the other source devices; the divergence of the gates is the mean over the
episode's devices (theirs counts the last device's once per device: `kl_reference_quirk`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from annotated_types import Ge
from scipy.stats import spearmanr
from torch import Tensor

from devices.bounds import checked
from devices.draws import stream
from devices.errors import DeviceError
from devices.latency.help.encodings import encode
from devices.latency.help.predictor import (
    HelpPredictor,
    adapt,
    gate_divergence,
    gate_posterior,
    hardware_embedding,
    label_range,
    labels,
    modulate,
    predict,
    source_labels,
)
from devices.latency.help.weights import (
    DEVICES,
    GATES,
    HEADER,
    TRAINING,
    HelpWeights,
    flatten_weights,
    map_weights,
    read_training,
    unflatten_weights,
    weight_shapes,
)
from devices.latency.spaces import Space
from devices.tensor_files import write_tensors


@checked("help")
@dataclass(frozen=True)
class HelpSettings:
    """Settings of meta-training; the defaults are the authors' for NAS-Bench-201; for FBNet they take 4000 episodes.

    Attributes:
        episodes: outer steps.
        devices: drawn per episode, without replacement.
        support: networks drawn per device and episode to adapt with, besides the references.
        query: networks drawn per device and episode to judge with.
        kl_weight: weight of the gates' divergence from N(0, 1).
        kl_reference_quirk: whether to weigh as the authors' code does: the last device's divergence, once per device.
        learning_rate: of Adam.
        first_rate: where the step sizes of the inner loop start.
        validate_every: episodes between two looks at the validation devices.
        validation_draws: support sets per validation device, the same at every look.
        patience: looks without a better result after which training ends; 0 never ends early.
        seed: of weights, episodes and validation.
    """

    episodes: Annotated[int, Ge(1)] = 2000
    devices: Annotated[int, Ge(1)] = 8
    support: Annotated[int, Ge(2)] = 10
    query: Annotated[int, Ge(1)] = 200
    kl_weight: float = 0.1
    kl_reference_quirk: bool = False
    learning_rate: float = 1e-4
    first_rate: float = 1e-3
    validate_every: Annotated[int, Ge(1)] = 50
    validation_draws: Annotated[int, Ge(1)] = 3
    patience: int = 0
    seed: int = 3


@dataclass(frozen=True)
class Look:
    """One validation.

    Attributes:
        episode: after which it took place.
        loss: mean training loss since the validation before.
        spearman: mean over the validation devices.
        best: whether it is the best so far.
    """

    episode: int
    loss: float
    spearman: float
    best: bool


@dataclass(frozen=True)
class _Source:
    """A source device.

    Attributes:
        embedding: hardware embedding, [10].
        pool: indices of its trimmed pool but for the references.
        ms: latencies of all networks.
        known: labels of all networks, mean over the other source devices, [networks].
    """

    embedding: Tensor
    pool: np.ndarray
    ms: np.ndarray
    known: np.ndarray


def first_weights(space: str, settings: HelpSettings) -> HelpWeights:
    """Draws weights before training: graph weights within 0.05, others within 1/sqrt(inputs), as in PyTorch."""
    draw = stream(settings.seed, "help", "weights")

    def uniform(name: str, shapes: dict[str, tuple[int, ...]]) -> Tensor:
        weight = shapes[name.rpartition(".")[0] + ".weight"]
        bound = 1 / math.sqrt(weight[1])  # a graph layer's bias too: the authors take the columns of [in, out]
        if name.startswith("gc") and name.endswith("weight"):
            bound = 0.05
        return torch.from_numpy(draw.uniform(-bound, bound, shapes[name])).float()

    shapes = weight_shapes(space)
    model, modulator = ({name: uniform(name, shapes[part]) for name in shapes[part]} for part in ("model", "modulator"))
    rates = {name: torch.full(shape, settings.first_rate) for name, shape in shapes["rates"].items()}
    return HelpWeights(space, model, modulator, rates)


def episode_loss(weights: HelpWeights, batch: tuple[Tensor, ...], z_noise: Tensor, settings: HelpSettings) -> Tensor:
    """Returns the outer loss: error of the adapted predictors on the query networks plus the gates' divergence.

    Args:
        weights: requiring gradients.
        batch: support networks and labels [devices, support, ...], query networks and labels [devices, query, ...],
            embeddings [devices, 10].
        z_noise: standard normal, [devices, 603].
        settings: weight of the divergence and how it is counted.
    """
    x, y, x_query, y_query, h = batch
    mean, deviation = gate_posterior(weights.modulator, h)
    params = modulate(weights.model, mean + deviation * z_noise)
    params = adapt(params, weights.rates, x, y, h, train=True)
    error = (predict(params, x_query, h) - y_query).square().mean()
    divergence = gate_divergence(mean, deviation)
    counted = len(h) * divergence[-1] if settings.kl_reference_quirk else divergence.mean()
    return error + settings.kl_weight * counted


class HelpTraining:
    """A meta-training in progress: weights, optimizer, draws and the best weights so far."""

    def __init__(self, space: Space, settings: HelpSettings):
        """Takes the source devices' tables.

        Raises:
            DeviceError: for a table with fewer source devices, or smaller pools, than an episode draws.
        """
        self.space, self.settings, self.split = space, settings, space.split
        if settings.devices > (have := len(self.split.source)):
            raise DeviceError(f"episodes of {settings.devices} devices need as many sources; {space.name} has {have}")
        if have < 2:
            raise DeviceError(f"HELP learns from two source devices or more, got {have}")
        self.encoded = encode(space.name, space.ops)
        self.sources = [self._source(device) for device in self.split.source]
        need, least = settings.support + settings.query, min(len(s.pool) for s in self.sources)
        if least < need:
            raise DeviceError(f"support and query are {need} networks a device, a pool has only {least}")
        self.weights = replace(first_weights(space.name, settings), devices=(*self.split.source, *self.split.valid))
        self.best, self.best_spearman, self.episode = self.weights, -math.inf, 0
        self.history: list[Look] = []
        self.losses: list[float] = []
        self.draw = stream(settings.seed, "help", "episodes")
        self._take(self.weights)

    def _source(self, device: str) -> _Source:
        ms, pool = self.space.latency(device), np.setdiff1d(self.space.pool(device), self.space.references)
        others = source_labels(self.space, [other for other in self.split.source if other != device])
        return _Source(hardware_embedding(ms[self.space.references]), pool, ms, others)

    def _take(self, weights: HelpWeights) -> None:
        """Makes `weights` the ones that are trained, with a fresh optimizer."""
        self.weights = map_weights(weights, lambda tensor: tensor.clone().requires_grad_())
        self.adam = torch.optim.Adam(flatten_weights(self.weights).values(), lr=self.settings.learning_rate)

    def _batch(self) -> tuple[Tensor, ...]:
        """Draws an episode: devices, and for each its support and query networks."""
        references, chosen = self.space.references, self.draw.choice(len(self.sources), self.settings.devices, False)
        support, query, y, y_query, h = [], [], [], [], []
        for source in (self.sources[i] for i in chosen):
            nets = self.draw.choice(source.pool, self.settings.support + self.settings.query, replace=False)
            drawn, rest = np.split(nets, [self.settings.support])
            first = np.concatenate([references, drawn])
            scale = label_range(source.ms[first], source.ms[references], source.known[first])
            support.append(first)
            query.append(rest)
            y.append(labels(source.ms[first], *scale))
            y_query.append(labels(source.ms[rest], *scale))
            h.append(source.embedding)
        x, x_query = (self.encoded[torch.from_numpy(np.stack(nets))] for nets in (support, query))
        return x, torch.stack(y), x_query, torch.stack(y_query), torch.stack(h)

    def step(self) -> float:
        """Runs one episode and returns its loss."""
        batch = self._batch()
        noise = torch.from_numpy(self.draw.standard_normal((self.settings.devices, GATES))).float()
        self.adam.zero_grad()
        loss = episode_loss(self.weights, batch, noise, self.settings)
        loss.backward()
        self.adam.step()
        self.episode += 1
        self.losses.append(float(loss.detach()))
        return self.losses[-1]

    def validate(self) -> float:
        """Returns the mean Spearman over the validation devices, adapted as at test, on their judged networks.

        A split without validation devices is validated on its source devices: no training sees the networks that they
        are judged with either.
        """
        found, frozen, space = [], _detached(self.weights), self.space
        for device in self.split.valid or self.split.source:
            others = [other for other in self.split.source if other != device]
            ms, judged, known = space.latency(device), space.judged(device), source_labels(space, others)
            pool = np.setdiff1d(space.pool(device), space.references)
            for i in range(self.settings.validation_draws):
                draw = stream(self.settings.seed, "help", "validation", device, i)
                support = np.append(space.references, draw.choice(pool, self.settings.support, replace=False))
                fitted = HelpPredictor.fit(
                    frozen, ms[space.references], space.ops[support], ms[support], i, known_labels=known[support]
                )
                found.append(float(spearmanr(fitted.labels(space.ops[judged]), ms[judged]).statistic))
        return float(np.mean(np.nan_to_num(found, nan=-1.0)))

    def look(self) -> Look:
        """Validates, and keeps the weights if none were better."""
        spearman = self.validate()
        better = spearman > self.best_spearman
        if better:
            self.best, self.best_spearman = _detached(self.weights), spearman
        self.history.append(Look(self.episode, float(np.mean(self.losses)), spearman, better))
        self.losses = []
        return self.history[-1]

    @property
    def done(self) -> bool:
        since = len(self.history) - max((i for i, look in enumerate(self.history) if look.best), default=-1) - 1
        return self.episode >= self.settings.episodes or 0 < self.settings.patience <= since

    def save(self, path: str | Path) -> None:
        """Writes what it takes to go on exactly from here; `load_weights` reads the best weights from the same file."""
        tensors = flatten_weights(self.best)
        for name, tensor in flatten_weights(self.weights).items():
            tensors[f"{TRAINING}weights.{name}"] = tensor
            tensors |= {f"{TRAINING}{moment}.{name}": value for moment, value in self.adam.state[tensor].items()}
        facts = {
            "space": self.space.name,
            DEVICES: list(self.weights.devices),
            "valid": list(self.split.valid),
            "table": _digest(self.space),
            "settings": asdict(self.settings),
            "episode": self.episode,
            "best_spearman": self.best_spearman,
            "history": [asdict(look) for look in self.history],
            "losses": self.losses,
            "draw": self.draw.bit_generator.state,
        }
        write_tensors(path, tensors, facts, HEADER)

    @classmethod
    def resume(cls, space: Space, settings: HelpSettings, path: str | Path) -> HelpTraining:
        """Goes on with a saved training; only `episodes` and `patience` may have changed.

        Raises:
            DeviceError: for a file that is no such training, or one with other settings or another table.
        """
        arrays, facts = read_training(path)
        try:
            saved = HelpSettings(**facts["settings"])
        except (KeyError, TypeError, ValueError) as error:
            raise DeviceError(f"{path}: is no HELP training of this version: {error}") from None
        if replace(saved, episodes=1, patience=0) != replace(settings, episodes=1, patience=0):
            raise DeviceError(f"{path}: is a training with {saved}; ask for the same to go on, or name another file")
        if (facts["space"], facts["table"]) != (space.name, _digest(space)):
            raise DeviceError(f"{path}: is a training on another table of space {facts['space']}; name another file")
        training = cls(space, settings)
        devices = training.weights.devices
        if (tuple(facts[DEVICES]), tuple(facts["valid"])) != (devices, space.split.valid):
            raise DeviceError(f"{path}: is a training on other devices; name another file")
        best = {key: array for key, array in arrays.items() if not key.startswith(TRAINING)}
        training.best = unflatten_weights(best, space.name, str(path), devices)
        mark = f"{TRAINING}weights."
        now = {key.removeprefix(mark): array for key, array in arrays.items() if key.startswith(mark)}
        training._take(unflatten_weights(now, space.name, str(path), devices))
        for name, tensor in flatten_weights(training.weights).items():
            moments = ("step", "exp_avg", "exp_avg_sq")
            training.adam.state[tensor] = {m: arrays[f"{TRAINING}{m}.{name}"] for m in moments}
        training.episode, training.best_spearman = facts["episode"], facts["best_spearman"]
        training.history = [Look(**look) for look in facts["history"]]
        training.losses = facts["losses"]
        training.draw.bit_generator.state = facts["draw"]
        return training


def meta_train(
    space: Space,
    settings: HelpSettings,
    checkpoint: str | Path | None = None,
    progress: Callable[[Look], None] | None = None,
) -> HelpWeights:
    """Meta-trains HELP on a table and returns the weights that were best on the validation devices.

    Args:
        space: table; only the source and validation devices of its split are read.
        settings: see `HelpSettings`; equal settings give equal weights on equal machines with one thread.
        checkpoint: safetensors file that is written at every look and gone on from if it exists.
        progress: called at every look.

    Raises:
        DeviceError: for a table too small for the settings, or a checkpoint of another training.
    """
    if checkpoint is not None and Path(checkpoint).exists():
        training = HelpTraining.resume(space, settings, checkpoint)
    else:
        training = HelpTraining(space, settings)
    while not training.done:
        training.step()
        if training.episode % settings.validate_every == 0 or training.episode >= settings.episodes:
            look = training.look()
            if checkpoint is not None:
                training.save(checkpoint)
            if progress is not None:
                progress(look)
    return training.best


def _digest(space: Space) -> str:
    parts = (space.latency_ms, space.ops, space.references)
    return blake2b(b"".join(np.ascontiguousarray(part).tobytes() for part in parts), digest_size=8).hexdigest()


def _detached(weights: HelpWeights) -> HelpWeights:
    return map_weights(weights, lambda tensor: tensor.detach().clone())
