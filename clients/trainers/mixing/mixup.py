"""What all mixup trainers share: mixed examples and labels, the pool of other clients' averages, the price of a step.

A mixed example is (1 - mix_ratio) times an own one plus mix_ratio times a partner; its loss is the same mixture of the
losses for both labels. Partners are means that other clients shared (`PoolTrainer`) or single examples. Tokens are
mixed behind the model's embedding. Source: Yoon et al., "FedMix: Approximation of Mixup under Mean Augmented Federated
Learning", ICLR 2021 (equations as third parties transcribed them: the paper itself was not at hand); Zhang et al.,
"mixup: Beyond Empirical Risk Minimization", ICLR 2018.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clients.trainers.base import ClientContext
from clients.trainers.fedprox import FedProxTrainer
from devices.cost import NetworkCost
from devices.meter import measure
from fedsim.errors import ConfigError
from fedsim.exchanges.averages import averages, from_uint8, to_uint8
from fedsim.messages.records import OF_REPLY, Broadcast, ClientUpdate
from fedsim.workloads.base import Tensors, Workload
from fedsim.workloads.classification import classification

QUESTION, AVERAGES, ROOM, POOL = "averages", "averages", "room", "pool"
HELD = f"{OF_REPLY}{POOL}_"  # state: the pool as the server believes it to be with the client
SIZE, KEPT, DROPPED = "pool-size", "pool-kept", "pool-dropped"
VERSION = "data_version"
OWN, PARTNER = "own_loss", "partner_loss"


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """Mean cross-entropy over examples (and steps), linear in the label.

    Args:
        logits: [batch, classes] or [batch, steps, classes].
        y: class numbers [batch] or [batch, steps] int64, or probabilities [batch or 1, ..., classes].
    """
    flat = logits.flatten(0, -2)
    return F.cross_entropy(flat, y.expand_as(logits).flatten(0, -2) if y.is_floating_point() else y.flatten())


class Entrance:
    """Where examples are mixed: at the input, or behind the embedding of a model that takes tokens.

    Args:
        model: the network.
        x: a batch of it, [batch, ...]; integers are tokens.

    Raises:
        ConfigError: for tokens and a model that has not exactly one embedding.
    """

    def __init__(self, model: nn.Module, x: Tensor):
        self.model, self.x, self.embedding = model, x, embedding_of(model) if not x.is_floating_point() else None

    def __call__(self, x: Tensor) -> Tensor:
        """What is mixed: numbers stay; tokens [n, steps] or their means [n, steps, vocabulary] are embedded."""
        if self.embedding is None:
            return x
        return x @ self.embedding.weight if x.is_floating_point() else self.embedding(x)

    def logits(self, mixed: Tensor) -> Tensor:
        """The model's output for mixed examples [batch, ...]."""
        if self.embedding is None:
            return self.model(mixed)
        self.embedding.forward = lambda _: mixed  # type: ignore[method-assign, assignment]
        try:
            return self.model(self.x)
        finally:
            del self.embedding.forward


def embedding_of(model: nn.Module) -> nn.Embedding:
    """The one embedding of a model that takes tokens."""
    found = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    if len(found) != 1:
        what = f"{type(model).__name__} has {len(found)} embeddings"
        raise ConfigError(f"{what}; token inputs are mixed behind the one embedding of a model, such as char_lstm")
    return found[0]


class MixupTrainer(FedProxTrainer):
    """SGD on mixed examples, with the proximal term of FedProx where `proximal_mu` asks for it.

    A class below says in `partner` whom to mix with.

    Args:
        mix_ratio: lambda, share of the partner, a constant in [0, 1); 0 is plain SGD, bit for bit.
        fedprox: arguments of FedProxTrainer.
    """

    pure_loss = False
    partner_terms: tuple[str, ...] = (PARTNER,)  # of the loss, beside its own
    passes = 1  # forward and backward passes of a step, in those of plain SGD

    def __init__(self, mix_ratio: float, **fedprox: Any):
        super().__init__(**fedprox)
        if not 0 <= mix_ratio < 1:
            raise ConfigError(f"trainer.mix_ratio must be in [0, 1), got {mix_ratio!r}")
        self.mix_ratio = mix_ratio
        self.network: NetworkCost | None = None
        self.terms: list[Tensors] = []  # of the steps of the client that trains just now

    def setup(self, workload: Workload, model: nn.Module, network: NetworkCost) -> None:
        """Prices a step on mixed examples, from one that runs on a copy of the model."""
        super().setup(workload, model, network)
        if not self.mix_ratio:
            return
        sample = workload.sample(4)

        def loss(model: nn.Module, batch: Tensors) -> Tensor:
            return self.mixed(model, {**batch, **self.sample_partner(workload, model, batch)})[0]

        cost = measure(model, loss, sample, network.name)
        self.network = replace(
            network,
            name=f"{network.name}, {type(self).__name__}",
            forward_flops=cost.forward_flops / self.passes,
            backward_flops=cost.backward_flops / self.passes,
            activation_bytes=cost.activation_bytes,
            step_bytes=cost.step_bytes,
        )

    def sample_partner(self, workload: Workload, model: nn.Module, sample: Tensors) -> Tensors:
        """A partner of the kind that `partner` gives, for pricing; here single examples."""
        return {"partner_x": sample["x"].flip(0), "partner_y": sample["y"].flip(0)}

    def fit(self, client: ClientContext, task: Broadcast) -> ClientUpdate:
        """The local loop of SGD; reports the mean terms of the loss beside it."""
        self.terms = []
        if self.mixes(client):
            assert self.network is not None
            client = replace(client, network=self.network)
        update = super().fit(client, task)
        means = {name: float(torch.stack([t[name] for t in self.terms]).mean()) for name in self.terms[0]}
        return replace(update, metrics={**update.metrics, **means})

    def mixes(self, client: ClientContext) -> bool:
        """Whether the client's examples are mixed in this round."""
        return self.mix_ratio > 0

    def batches(self, client: ClientContext, task: Broadcast) -> Iterator[Tensors]:
        """The batches of plain SGD, each with its partners, drawn from a stream of their own."""
        draw = client.stream("partners")
        for batch in super().batches(client, task):
            yield {**batch, **self.partner(client, batch, draw)} if self.mixes(client) else batch

    def partner(self, client: ClientContext, batch: Tensors, draw: torch.Generator) -> Tensors:
        """`partner_x` and `partner_y`, with leading size 1 (one for the whole batch) or that of the batch."""
        raise NotImplementedError(f"{type(self).__name__} does not say whom to mix with")

    def loss(self, client: ClientContext, batch: Tensors, task: Broadcast) -> Tensor:
        """The mixed loss of one step and the proximal term."""
        if "partner_x" not in batch:
            loss = super().loss(client, batch, task)
            self.terms.append({OWN: loss.detach(), **dict.fromkeys(self.partner_terms, torch.zeros_like(loss))})
            return loss
        loss, terms = self.mixed(client.model, batch)
        self.terms.append({name: t.detach() for name, t in terms.items()})
        penalty = self.penalty(client, task)
        return loss if penalty is None else loss + penalty

    def mixed(self, model: nn.Module, batch: Tensors) -> tuple[Tensor, Tensors]:
        """The loss at the mixed examples, for both labels (equation 1 of the paper for means as partners).

        Args:
            model: the network.
            batch: "x" [b, ...], "y" [b] or [b, steps], "partner_x" and "partner_y" with leading size b or 1; a
                partner's label is a class number or probabilities.

        Returns:
            (1 - ratio) CE(f(v), y) + ratio CE(f(v), partner_y) at v = (1 - ratio) x + ratio partner_x; and its terms.
        """
        ratio, entrance = self.mix_ratio, Entrance(model, batch["x"])
        logits = entrance.logits((1 - ratio) * entrance(batch["x"]) + ratio * entrance(batch["partner_x"]))
        own, partner = cross_entropy(logits, batch["y"]), cross_entropy(logits, batch["partner_y"])
        return (1 - ratio) * own + ratio * partner, {OWN: own, PARTNER: partner}

    def log_step(self, client: ClientContext, batch: int) -> None:
        """Reports the passes of a step, which cost more when it mixes."""
        passes = self.passes if client.network is self.network else 1
        client.log.add(client.network, batch, forwards=passes, backwards=passes)


class PoolTrainer(MixupTrainer):
    """Mixes with means of all clients' examples: answers the server's question for its own, keeps the pool it is sent.

    Records: averages, up, when asked: x [groups, *input] and y [groups, classes] (uint8 also low, step [groups]); room,
    up with them: bytes [] int64 that the device has left beside training, and version [] int64 of the data. pool, down:
    pairs of all clients, in the form of averages, to be put behind the first `pool-kept` of those that the client has
    and that are not among the rows [pairs] int64 of pool-dropped, down, which makes `pool-size` in all. Updates carry
    the metric data_version.

    Args:
        mix_ratio: see MixupTrainer.
        average_clip: largest Euclidean norm of a mean input that leaves the device; null does not clip.
        average_noise: standard deviation of Gaussian noise on every entry of a mean; labels are then brought back to
            probabilities. There is no accountant: choosing it for a formal guarantee is left to you.
        fedprox: arguments of FedProxTrainer.
    """

    known_settings = FedProxTrainer.known_settings | {SIZE, KEPT}

    def __init__(self, mix_ratio: float, average_clip: float | None = None, average_noise: float = 0.0, **fedprox: Any):
        super().__init__(mix_ratio, **fedprox)
        if average_clip is not None and average_clip <= 0:
            raise ConfigError(f"trainer.average_clip must be null or greater than 0, got {average_clip!r}")
        if average_noise < 0:
            raise ConfigError(f"trainer.average_noise must be at least 0, got {average_noise!r}")
        self.average_clip, self.average_noise = average_clip, average_noise

    # --- sharing averages ---------------------------------------------------------------------------------------

    def answer(self, client: ClientContext, question: str, task: Broadcast) -> dict[str, Tensors]:
        """The client's averages, none if it has too few examples, and the room on its device for a pool."""
        if question != QUESTION:
            return super().answer(client, question, task)
        asked, data = task.settings, client.data.train
        size = int(asked["group-size"]) or len(data)
        network = self.network or client.network
        step_bytes = self.step_bytes(network, min(self.batch_size, len(data)), self.copies(client, task))
        room = max(0, client.profile.memory_bytes - step_bytes)
        facts = {"bytes": torch.tensor(room), "version": torch.tensor(self.data_version(client))}
        records: dict[str, Tensors] = {ROOM: facts}
        if len(data) < size or size < int(asked["min-group-size"]):
            return records
        tokens = not data.gather(torch.arange(1))["x"].is_floating_point()
        vocabulary = embedding_of(client.model).num_embeddings if tokens else None
        shuffle = client.stream("averages")
        pairs = averages(data, size, classification(client.workload).num_classes, shuffle, vocabulary)
        pairs = self.protect(pairs, client.stream("average-noise"))
        if asked["pool-dtype"] == "uint8":
            pairs |= to_uint8(pairs["x"])
        return {**records, AVERAGES: pairs}

    def data_version(self, client: ClientContext) -> int:
        """Changes with the client's examples, so that the server asks for new averages."""
        return client.data.version

    def protect(self, pairs: Tensors, draw: torch.Generator) -> Tensors:
        """Clips and blurs averages before they leave the device."""
        x, y = pairs["x"], pairs["y"]
        if self.average_clip is not None:
            norm = x.flatten(1).norm(dim=1).clamp(min=torch.finfo(x.dtype).tiny)
            x = x * (self.average_clip / norm).clamp(max=1.0).view(-1, *[1] * (x.dim() - 1))
        if self.average_noise:
            x, y = (t + self.average_noise * torch.randn(t.shape, generator=draw).to(t) for t in (x, y))
            y = y.clamp(min=0)
            total = y.sum(-1, keepdim=True)
            y = torch.where(total > 0, y / total.clamp(min=1e-12), 1 / y.shape[-1])
        return {"x": x, "y": y}

    # --- mixing with the pool -----------------------------------------------------------------------------------

    def fit(self, client: ClientContext, task: Broadcast) -> ClientUpdate:
        """The local loop, with the pool as the broadcast has left it.

        Raises:
            ConfigError: if the server sends no pool.
        """
        self.check_settings(task)
        self.keep_pool(client, task)
        update = super().fit(client, task)
        facts = {"pool_pairs": float(self.pairs(client)), VERSION: float(self.data_version(client))}
        return replace(update, metrics={**update.metrics, **facts})

    def keep_pool(self, client: ClientContext, task: Broadcast) -> None:
        """Puts the new pairs behind those that are kept; counted as storage from now on."""
        if SIZE not in task.settings:
            raise ConfigError(f"{type(self).__name__} got no pool of averages; take its server half, strategy=mafl")
        kept, size = int(task.settings[KEPT]), int(task.settings[SIZE])
        dropped = task.extras.get(DROPPED, {}).get("rows", torch.zeros(0, dtype=torch.long))
        new = task.extras.get(POOL, {})
        for key in [f"{HELD}{name}" for name in new] or [name for name in client.state if name.startswith(HELD)]:
            parts = []
            if key in client.state:
                stays = torch.ones(len(client.state[key]), dtype=torch.bool)
                stays[dropped] = False
                parts = [client.state[key][stays][:kept]]
            client.state[key] = torch.cat([*parts, *([new[key.removeprefix(HELD)]] if new else [])])
        if self.pairs(client) != size:
            raise ValueError(f"the pool should have {size} pairs and has {self.pairs(client)}")

    def pairs(self, client: ClientContext) -> int:
        """How many averages the client holds."""
        return len(client.state.get(f"{HELD}y", ()))

    def mixes(self, client: ClientContext) -> bool:
        return super().mixes(client) and self.pairs(client) > 0

    def partner(self, client: ClientContext, batch: Tensors, draw: torch.Generator) -> Tensors:
        """One pair of the pool for the whole batch."""
        row = int(torch.randint(self.pairs(client), (), generator=draw))
        names = ("x", "y", "low", "step")
        pair = {n: client.state[f"{HELD}{n}"][row : row + 1] for n in names if f"{HELD}{n}" in client.state}
        x = from_uint8(pair) if "step" in pair else pair["x"]
        return {"partner_x": x.to(client.device), "partner_y": pair["y"].to(client.device)}

    def sample_partner(self, workload: Workload, model: nn.Module, sample: Tensors) -> Tensors:
        tokens = not sample["x"].is_floating_point()
        x = F.one_hot(sample["x"], embedding_of(model).num_embeddings).float() if tokens else sample["x"]
        classes = classification(workload).num_classes
        return {"partner_x": x[:1], "partner_y": F.one_hot(sample["y"], classes).to(x.dtype)[:1]}

    def reserve(self, client: ClientContext, task: Broadcast) -> None:
        """A step and the pool that stays beside it."""
        client.log.hold("pool", client.state.storage_bytes)
        super().reserve(client, task)
