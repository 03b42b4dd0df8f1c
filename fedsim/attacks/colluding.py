"""Attacks of malicious clients together: what each sends depends on what all of them have trained in the round.

They come together behind the engine, wherever each was trained, so that neither the number of workers nor the order of
their answers shows; honest updates pass by unseen.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from statistics import NormalDist
from typing import TYPE_CHECKING, Annotated

import torch
from annotated_types import Interval
from torch import Tensor

from devices.compression.updates import UpdateCompressor
from fedsim.attacks.base import Attack, Share
from fedsim.engines.base import Engine
from fedsim.errors import ConfigError
from fedsim.messages.cohort import ClientAnswer, ClientTask, CohortAnswer, CohortTask
from fedsim.messages.uplink import compressed
from fedsim.messages.weights import bytes_of, joined_like, named
from fedsim.seeding import torch_generator
from fedsim.settings.build import instantiate
from fedsim.workloads.base import Tensors, Workload

if TYPE_CHECKING:
    from fedsim.settings.build import World


class Alie(Attack):
    """A little is enough: all colluders send mean - z std of what they have trained, by coordinate.

    They know their own updates only. One that is alone in a round sends its own.

    Args:
        share: of the fleet's clients that are malicious.
        z: how many standard deviations they go; None: as many as the paper says.

    Source: Baruch et al., "A Little Is Enough: Circumventing Defenses For Distributed Learning", NeurIPS 2019,
    algorithm 3 (recalled; the formula compared with public code).
    """

    def __init__(self, share: Share = 0.2, z: Annotated[float, Interval(ge=0, le=1e6)] | None = None):
        super().__init__(share)
        self.z = z

    def deviations(self, num_clients: int, colluders: int) -> float:
        """Returns z: with it, s honest clients are expected to lie further out, who make a majority with the colluders.

        z is the largest with Phi(z) < (n - m - s) / (n - m), s = floor(n / 2 + 1) - m. Few colluders would get a
        negative one, which is taken as 0; where they have the majority by themselves, s is taken as 1.

        Args:
            num_clients: n.
            colluders: m.
        """
        if self.z is not None:
            return self.z
        honest = max(2, num_clients - colluders)
        supporters = max(1, num_clients // 2 + 1 - colluders)
        share = (honest - supporters) / honest
        return max(0.0, NormalDist().inv_cdf(share)) if share > 0 else 0.0

    def futile(self, workload: Workload, clients: frozenset[int], in_round: int, asked: int) -> str:
        """Says so where z is 0, as the paper's formula has it for few colluders."""
        if in_round > 1 and self.deviations(asked, in_round) > 0:
            return ""
        how = "one alone sends its own" if in_round < 2 else "z is 0, and they send the mean of what they trained"
        return f"with {in_round} colluders among {asked} clients {how}; set attack.z=1.5, or a larger attack.share"

    def conspired(self, sent: Tensor, num_clients: int) -> Tensor:
        """Returns mean - z std over the colluders, the deviation of a population."""
        z = self.deviations(num_clients, len(sent))
        return sent.mean(0) - z * sent.std(0, correction=0)


class Colluders(Engine):
    """An engine whose malicious clients agree on what they send once all of a round have trained.

    Args:
        engine: where clients really run.
        attack: on what they agree.
        malicious: clients.
        trained: names of the tensors that they change.
        uplink: compresses what they send, as it does that of others.
        seed: of the run.
    """

    def __init__(
        self,
        engine: Engine,
        attack: Attack,
        malicious: frozenset[int],
        trained: frozenset[str],
        uplink: UpdateCompressor,
        seed: int,
    ):
        self.engine, self.attack, self.malicious = engine, attack, malicious
        self.trained, self.uplink, self.seed = trained, uplink, seed

    def run(self, task: CohortTask) -> Iterator[CohortAnswer]:
        """Answers of honest clients as they come, those of the colluders at the end; no sums of blocks."""
        if task.phase != "train":
            yield from self.engine.run(task)
            return
        met: list[ClientAnswer] = []
        for answer in self.engine.run(replace(task, close=None)):
            met += [one for one in answer.clients if self._is_colluder(one)]
            if others := tuple(one for one in answer.clients if not self._is_colluder(one)):
                yield CohortAnswer(others)
        if met:
            yield CohortAnswer(tuple(self._agreed(task, sorted(met, key=lambda one: one.client))))

    def _is_colluder(self, one: ClientAnswer) -> bool:
        return one.client in self.malicious and one.weights is not None

    def _agreed(self, task: CohortTask, met: Sequence[ClientAnswer]) -> Iterator[ClientAnswer]:
        """What colluders send; those that were sent other parts of the network agree among themselves."""
        tasks = {one.client: one for one in task.clients}
        sent = {one.client: _weights_of(one, tasks[one.client]) for one in met}

        def layout(one: ClientAnswer) -> str:
            return str([(name, tuple(t.shape)) for name, t in sent[one.client].items() if name in self.trained])

        for _, group in groupby(sorted(met, key=layout), key=layout):
            alike = list(group)
            names = [
                name for name, t in sent[alike[0].client].items() if name in self.trained and t.is_floating_point()
            ]
            stacks = {name: torch.stack([sent[one.client][name].double() for one in alike]) for name in names}
            agreed = {name: self.attack.conspired(stack, len(task.clients)) for name, stack in stacks.items()}
            for one in alike:
                own = sent[one.client]
                new = {name: agreed[name].to(t.dtype) if name in agreed else t for name, t in own.items()}
                yield self._as_sent(one, tasks[one.client], new)

    def _as_sent(self, one: ClientAnswer, task: ClientTask, weights: Tensors) -> ClientAnswer:
        """The answer with other weights, as its client would have sent them."""
        received = task.broadcast.weights
        if not self.uplink.active:
            assert one.weights is not None
            form = one.weights.form
            return replace(
                one,
                weights=named(weights) if form == "named" else joined_like(weights, received, form == "joined last"),
            )
        before, state = bytes_of(one.state), dict(one.state)
        again = (task.repeat,) if task.repeat else ()
        draw = torch_generator(self.seed, "uplink", task.broadcast.round, one.client, *again)
        sent = compressed(self.uplink, weights, received, self.trained, state, draw)
        assert one.weights is not None
        work = replace(
            one.work,
            up_bytes=one.work.up_bytes - one.weights.nbytes + sent.nbytes,
            storage_bytes=one.work.storage_bytes + bytes_of(state) - before,
        )
        return replace(one, weights=sent, state=state, work=work)

    def start(self) -> None:
        """Starts the engine."""
        self.engine.start()

    def close(self) -> None:
        """Ends the engine."""
        self.engine.close()


def _weights_of(one: ClientAnswer, task: ClientTask) -> Tensors:
    assert one.weights is not None
    return one.weights.by_name(task.broadcast.weights)


def with_colluders(engine: Engine, world: World, trained: frozenset[str], is_buffered: bool) -> Engine:
    """Returns the engine of a run, behind which its malicious clients meet where they collude.

    Args:
        engine: where clients run.
        world: of the run.
        trained: names of the tensors that are trained and sent.
        is_buffered: clients come each in its own time.

    Raises:
        ConfigError: where there are no rounds in which they could, or an attack on weights that nobody sends.
    """
    attack, seed = world.attack, world.settings.seed
    if not trained and (attack.conspires or attack.changes):
        raise ConfigError(
            f"{type(attack).__name__} changes the weights that clients send, and private={world.settings.private} "
            "keeps all of them at home; take another attack, such as attack=label_flip"
        )
    if not attack.conspires:
        return engine
    if is_buffered:
        raise ConfigError(
            f"{type(attack).__name__} needs rounds whose malicious clients train together, and with loop=buffer each "
            "comes in its own time; take loop=rounds or another attack"
        )
    malicious = attack.clients(world.workload.num_clients, seed)
    return Colluders(engine, attack, malicious, trained, instantiate(world.settings.groups, "uplink"), seed)
