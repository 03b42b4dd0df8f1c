"""Own attacks, rules, strategies, loops, uplinks and trainers: what a class overrides works or is refused, whatever
flags it inherits or lacks, and what it keeps on itself is there after a resume.
"""

from __future__ import annotations

import json
from collections import defaultdict, deque
from pathlib import Path

import numpy as np
import pytest
import torch
from cut_short import comparable
from flwr.serverapp.strategy import FedAvg
from torch import nn

from clients.trainers.sgd import SGDRun, SGDTrainer
from devices.compression.updates import UpdateCompressor
from fedsim.attacks.base import Attack, NoAttack, TargetedAttack
from fedsim.attacks.colluding import Alie
from fedsim.attacks.poisoning import Backdoor
from fedsim.attacks.updates import SignFlip
from fedsim.errors import ConfigError
from fedsim.grid.loops import BufferLoop, RoundLoop
from fedsim.grid.participants import Participants, Uniform
from fedsim.messages.secagg import SecureAggregation
from fedsim.runs.federation import Federation
from fedsim.settings.build import build_world
from fedsim.workloads.base import Examples
from strategies.dp import DPFedAvg
from strategies.dp_client import ClientDPFedAvg
from strategies.edge import EdgeStrategy
from strategies.participants import LeastOften
from strategies.stale import FedBuff

BUFFER = ("strategy=fedbuff", "loop=buffer", "loop.buffer_size=2")


def of(group: str, kind: type) -> str:
    return f"{group}._target_={__name__}.{kind.__name__}"


def weights(made: Federation) -> dict[str, list[float]]:
    list(made.rounds())
    return {name: array.numpy().tolist() for name, array in made.arrays.items()}


# --- attacks: flags of an own class neither switch a method on nor off ------------------------------------------------


class Quiet(Attack):
    """Says of itself, as attacks once did, that it does nothing."""

    poisons_data = poisons_updates = colludes = False

    def __init__(self, share: float = 1.0):
        super().__init__(share)


class Relabels(Quiet):
    def poisoned(self, workload, data, draw):
        return Examples({**data.tensors, "y": torch.zeros_like(data.tensors["y"])})


class Leaps(Quiet):
    def changed(self, changes, draw):
        return {name: 3 * change for name, change in changes.items()}


class Agrees(Quiet):
    def conspired(self, sent, num_clients):
        return sent.amax(0)


class OfItsOwn(Quiet):
    def __init__(self):
        super().__init__()
        self.changed = lambda changes, draw: {name: -change for name, change in changes.items()}


class Flat(Backdoor):
    """With a boost of 1, at which its base class changes no update."""

    def changed(self, changes, draw):
        return {name: 0 * change for name, change in changes.items()}


class Softer(SignFlip):
    poisons_updates = False

    def changed(self, changes, draw):
        return {name: change / 2 for name, change in changes.items()}


class Further(Alie):
    colludes = False

    def conspired(self, sent, num_clients):
        return sent.mean(0) - 5


class Misspelt(Quiet):
    def change(self, changes, draw):
        return {}


class Aims(TargetedAttack):
    target = 0


class Nobody(NoAttack):
    def changed(self, changes, draw):
        return {}


@pytest.mark.parametrize("kind", [Relabels, Leaps, Agrees, OfItsOwn, Flat, Softer, Further], ids=lambda k: k.__name__)
def test_an_own_attack_does_what_it_overrides(federation, kind: type[Attack]):
    image = ("workload.input_shape=[1,6,6]", "cohort=6")
    assert weights(federation(*image, of("attack", kind))) != weights(federation(*image))


@pytest.mark.parametrize("kind", [Misspelt, Aims, Nobody], ids=lambda k: k.__name__)
def test_an_attack_that_does_nothing_is_refused(settings, kind: type[Attack]):
    more = ("+attack.share=1",) if kind is Aims else ()
    with pytest.raises(ConfigError, match=rf"^attack {kind.__name__} makes nobody do anything: .* or conspired$"):
        build_world(json.dumps(settings(of("attack", kind), *more)))


# --- strategies, loops, uplinks and trainers --------------------------------------------------------------------------


class Half(FedBuff):
    def combine(self, number, updates):
        raise AssertionError


class Sends(FedAvg):
    def broadcast(self, number, client, weights):
        raise AssertionError


class Makes(EdgeStrategy):
    def made(self, present, replied):
        raise AssertionError


class Alike(EdgeStrategy):
    weighs_alike = True


class Below(ClientDPFedAvg):
    """Inherits `weighs_alike`, and not `takes_the_mean`."""


class Calls(FedAvg):
    """Has a `combine` of its own, and calls it."""

    def combine(self, replies):
        return super().aggregate_train(1, replies)

    def aggregate_train(self, number, replies):
        return self.combine(replies)


class Packs(SecureAggregation):
    def compress(self, update, sizes, draw):
        raise AssertionError


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (("strategy=fedbuff", of("strategy", Half), *BUFFER[1:]), "strategy Half has combine, which nothing calls"),
        (
            (of("strategy", Sends),),
            "strategy Sends has broadcast, which nothing calls: it is a hook of strategies.edge",
        ),
        ((of("strategy", Makes),), "strategy Makes has made, which nothing calls: it is a hook of strategies.stale"),
        ((of("strategy", Alike),), "strategy Alike has weighs_alike, by which nothing goes unless that class itself"),
        (("strategy=dp_client_fedavg", of("strategy", Below)), "strategy Below has weighs_alike"),
        ((of("uplink", Packs),), "a class below it may not compress updates"),
    ],
)
def test_what_nothing_would_call_is_refused(federation, given, words: str):
    with pytest.raises(ConfigError, match=words):
        federation(*given)


class Plain(FedAvg):
    """As Flower's, with each reply for itself."""


def test_a_strategy_may_call_its_own_functions_as_it_likes(federation):
    assert weights(federation(of("strategy", Calls))) == weights(federation(of("strategy", Plain)))


class Passes(FedBuff):
    """Hands its arguments on."""

    def __init__(self, mine: int = 1, **settings):
        super().__init__(**settings)


class Noisy(DPFedAvg):
    """Below a class that another option makes, with another one below it."""


@pytest.mark.parametrize(
    ("kind", "option", "base"),
    [(Half, "fedbuff", "FedBuff"), (Passes, "fedbuff", "FedBuff"), (Noisy, "dp_fedavg", "DPFedAvg")],
)
def test_a_setting_that_an_option_gives_is_told_with_that_option(federation, kind: type, option: str, base: str):
    with pytest.raises(ConfigError) as refused:
        federation(of("strategy", kind))
    begin = f"strategy={option}"
    told = str(refused.value)
    assert told.startswith(f"strategy.server must be given, as {begin} gives it to {base}, from which yours derives: ")
    assert f"{begin} {of('strategy', kind)}, or in a file of options 'defaults: [{option}, _self_]'" in told
    if kind is not Half:
        buffered = BUFFER[1:] if issubclass(kind, FedBuff) else ()
        assert type(federation(begin, of("strategy", kind), *buffered).strategy) is kind


class Edge(EdgeStrategy):
    """One for rounds."""


def test_one_that_is_no_strategy_for_buffers_is_told_what_that_derives_from(federation):
    with pytest.raises(ConfigError, match=r"^Edge takes all .*; one of your own derives from strategies\.stale\.Stale"):
        federation(of("strategy", Edge), *BUFFER[1:])


class Waits(RoundLoop):
    """Brings replies that are stale, as its class does not say."""

    def exchange(self, grid, number, instruct):
        from dataclasses import replace

        from fedsim.grid.exchange import Origin

        found = super().exchange(grid, number, instruct)
        return replace(found, origins=(Origin(found.weights, 1, 0.5),))


def test_stale_replies_of_an_own_loop_are_not_taken_for_fresh_ones(federation):
    with pytest.raises(ConfigError, match="FedAvg takes all replies for fresh ones, and those of this loop are not"):
        list(federation(of("loop", Waits)).rounds())


class Halves(UpdateCompressor):
    """Packs the half of an update, at settings at which its base class packs nothing."""

    def compress(self, update, sizes, draw):
        return super().compress(update / 2, sizes, draw)


def test_an_own_uplink_packs_whatever_it_inherits(federation):
    assert weights(federation(of("uplink", Halves))) != weights(federation())
    assert Halves(error_feedback=False).may_lengthen


class Still(SGDRun):
    """Takes no step."""

    def take_steps(self, batches):
        self.means = {"loss": torch.zeros(())}


class Starts(SGDTrainer):
    """Names its run in `start` alone."""

    def start(self, client, broadcast):
        return Still(self, client, broadcast)


def test_a_run_that_an_own_trainer_starts_is_not_passed_over(federation):
    """Neither where clients train together, nor where their work is told beforehand: both know the plain loop."""
    trainer = Starts(lr=0.1, batch_size=4)
    assert not trainer.is_loop_alone
    with pytest.raises(ConfigError, match="Starts does not train by a pure function"):
        list(federation(of("trainer", Starts), "engine.batch_clients=2").rounds())


# --- rules: whom they take, and what they look at ---------------------------------------------------------------------


class First(Uniform):
    """Takes the first clients; neither its base class nor an old flag lets the strategy draw them."""

    offers = False

    def choose(self, number, count, free, weights, draw):
        return list(free)[:count]


def test_an_own_rule_below_uniform_chooses(federation):
    made = federation(of("participants", First))
    assert [set(report.cohort) for report, _ in made.rounds()][1:] == [{0, 1, 2}] * 2
    assert not federation("participants=uniform").participants.chooses


class Reads(LeastOften):
    """Says nothing of the data that it goes by."""


class ByLoss(Reads):
    def choose(self, number, count, free, weights, draw):
        return sorted(free, key=lambda client: -self.roster.of(client).loss)[:count]


class ByExamplesOfAll(Reads):
    def choose(self, number, count, free, weights, draw):
        most = {client: seen.examples for client, seen in self.roster.seen.items()}
        return sorted(free, key=lambda client: -most.get(client, 0))[:count]


class ByQuestion(Reads):
    def choose(self, number, count, free, weights, draw):
        self.roster.ask(list(free))
        return list(free)[:count]


class ByReports(Reads):
    def learn(self, number, reports):
        super().learn(number, reports)
        self.best = max(reports, key=lambda report: report.metrics["train_loss"]).client


class ByCounts(Reads):
    def learn(self, number, reports):
        self.most = max(report.num_examples for report in reports)


class ByWork(Reads):
    def learn(self, number, reports):
        self.most = max(len(report.whole_work.passes) for report in reports)


class BySpeed(Reads):
    """What a server knows without asking."""

    def choose(self, number, count, free, weights, draw):
        seen = {client: self.roster.of(client) for client in free}
        return sorted(free, key=lambda client: (seen[client].asked, seen[client].seconds, seen[client].round))[:count]

    def learn(self, number, reports):
        super().learn(number, reports)
        self.slow = [report.client for report in reports if report.cost.total_s > 1 and report.outcome == "late"]


READERS = (ByLoss, ByExamplesOfAll, ByQuestion, ByReports, ByCounts, ByWork)
PRIVATE = ("dp_fedavg", "dp_adaptive", "dp_client_fedavg", "dp_client_adaptive")


@pytest.mark.parametrize("kind", READERS, ids=lambda k: k.__name__)
def test_a_look_at_what_noise_hides_is_refused_whatever_the_rule_declares(federation, kind: type[Participants]):
    for private, name in (("strategy=dp_fedavg", "DPFedAvg"), ("uplink=secagg", "uplink=secagg")):
        with pytest.raises(ConfigError, match=rf"^{name} hides what single clients send, and participants=.* shows "):
            list(federation(private, of("participants", kind), "rounds=3").rounds())
    assert len(list(federation(of("participants", kind), "rounds=3").rounds())) == 4


@pytest.mark.parametrize("strategy", PRIVATE)
def test_what_a_server_knows_anyway_is_no_secret(federation, strategy: str):
    private = (f"strategy={strategy}", "strategy.noise_multiplier=0.05")
    assert len(list(federation(*private, of("participants", BySpeed), "rounds=3").rounds())) == 4
    with pytest.raises(ConfigError, match="hides what single clients send"):
        list(federation(*private, of("participants", ByLoss), "rounds=3").rounds())


def test_a_question_for_which_nobody_waits_is_refused_whatever_the_rule_declares(federation):
    with pytest.raises(ConfigError, match="asks clients before a round, and with loop=buffer nobody waits"):
        list(federation(*BUFFER, of("participants", ByQuestion)).rounds())


# --- what they keep ---------------------------------------------------------------------------------------------------


class Counts(LeastOften):
    """Keeps in ten ways how often it chose, and goes by the sum."""

    everywhere: dict[str, int] = {}

    def __init__(self, steps=(1, 2)):
        self.steps, self.number, self.name = steps, 0, ""
        self.told, self.by_client = [], defaultdict(int)
        self.array, self.tensor, self.pair = np.zeros(2), torch.zeros(2), (0, 0.5)
        self.last, self.some = deque(maxlen=3), set()
        self.everywhere = {}
        self.weigh = lambda number: number  # made anew by the constructor

    def choose(self, number, count, free, weights, draw):
        self.number += self.steps[0]
        self.name += "x"
        self.told.append(number)
        self.by_client[int(draw.choice(free))] += 1
        self.array += 1
        self.tensor += 1
        self.pair = (self.pair[0] + 1, 0.5)
        self.last.append(number)
        self.some |= {number, "first"}
        self.everywhere["rounds"] = self.everywhere.get("rounds", 0) + 1
        sums = (self.number, len(self.name), sum(self.told), sum(self.by_client.values()), len(self.some))
        sums += (int(self.array.sum()), int(self.tensor.sum()), self.pair[0], sum(self.last), *self.everywhere.values())
        first = sum(map(self.weigh, sums)) * (1 + len(self.by_client)) % len(free)
        return [free[(first + place) % len(free)] for place in range(count)]


class OfItsClass(LeastOften):
    """Keeps it on its class."""

    rounds: list[int] = []

    def choose(self, number, count, free, weights, draw):
        self.rounds.append(number)
        return [free[(sum(self.rounds) + place) % len(free)] for place in range(count)]


class Remembers(EdgeStrategy):
    """Moves by all that it has kept."""

    def __init__(self, shares=(0.5, 0.25), **sampling):
        super().__init__(**sampling)
        self.shares, self.rounds, self.past = shares, defaultdict(int), {}

    def combine(self, number, updates):
        mean = super().combine(number, updates)
        self.rounds[len(updates)] += 1
        share = self.shares[0] / sum(self.rounds.values())
        self.past = {name: t + share * self.past.get(name, torch.zeros_like(t)) for name, t in mean.items()}
        return self.past


class Ages(FedBuff):
    """Counts less, the more replies it has seen."""

    derived = frozenset({"cache"})  # beside those of its base class

    def __init__(self, *given, **sampling):
        super().__init__(*given, **sampling)
        self.count, self.cache = deque(maxlen=4), object()

    def made(self, present, replied):
        self.count.append(len(replied))
        made = super().made(present, replied)
        return {name: present[name].lerp(t, 1 / sum(self.count)) for name, t in made.items()}


class Slows(RoundLoop):
    """Waits a second more each round."""

    def __init__(self):
        self.seconds = 0

    def exchange(self, grid, number, instruct):
        self.seconds += 1
        grid.clock.advance(float(self.seconds))
        return super().exchange(grid, number, instruct)


class Fills(BufferLoop):
    """Takes a reply more each round."""

    def exchange(self, grid, number, instruct):
        self.buffer_size += 1
        return super().exchange(grid, number, instruct)


KEEPING = {
    "rule": (of("participants", Counts), "+participants.steps=[3,1]"),
    "rule with noise": (of("participants", Counts), "strategy=dp_fedavg"),
    "rule of a class": (of("participants", OfItsClass),),
    "rule and buffer": (*BUFFER, of("participants", Counts), of("loop", Fills)),
    "strategy": (of("strategy", Remembers), "+strategy.shares=[0.5,0.1]"),
    "buffered strategy": (*BUFFER, of("strategy", Ages)),
    "loop": (of("loop", Slows),),
}


@pytest.mark.parametrize("case", KEEPING)
def test_what_an_own_part_keeps_is_there_after_a_resume(go, tmp_path: Path, monkeypatch, case: str):
    """As in a new process: its class is as it was made."""
    given = (*KEEPING[case], "num_clients=9", "rounds=5")
    for name, until in (("whole", None), ("cut", 3)):
        monkeypatch.setattr(OfItsClass, "rounds", [])
        go(name, *given, until=until)
    monkeypatch.setattr(OfItsClass, "rounds", [])
    assert go("cut", resume=True)[-1] == 5
    assert comparable(tmp_path / "cut") == comparable(tmp_path / "whole")


class Holds(LeastOften):
    def __init__(self):
        self.net = nn.Linear(1, 1)


class Draws(LeastOften):
    def __init__(self):
        self.draws = {"own": np.random.default_rng(0)}


class HasNet(EdgeStrategy):
    def __init__(self, **sampling):
        super().__init__(**sampling)
        self.net = nn.Linear(1, 1)


@pytest.mark.parametrize(
    ("given", "place"),
    [
        (of("participants", Holds), r"participants\.own\.net is a torch\.nn\.modules\.linear\.Linear"),
        (of("participants", Draws), r"participants\.own\.draws\.own is a numpy\.random\._generator\.Generator"),
        (of("strategy", HasNet), r"strategy\.net is a torch\.nn\.modules\.linear\.Linear"),
    ],
)
def test_what_no_checkpoint_can_hold_is_named_and_nothing_is_resumed(go, tmp_path: Path, given: str, place: str):
    with pytest.warns(UserWarning, match=rf"^this run keeps no checkpoints: state\.federation\.{place}, which no"):
        go("run", given)
    assert not list((tmp_path / "run").glob("checkpoint/*"))
