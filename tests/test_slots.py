"""Slots: steps that are recorded once and done again for every client, to the bytes of one client after the other."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from conftest import TINY
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from clients import worker as workers
from clients.app import serve
from clients.slots import cohort
from clients.slots.slot import MOST_RECORDED, Slot
from clients.trainers.sgd import SGDRun, SGDTrainer, WorkloadLoss
from fedsim.engines.local import LocalEngine
from fedsim.errors import ConfigError
from fedsim.report.files import read_config
from fedsim.report.rounds import weights_sha256
from fedsim.runs import engine_choice
from fedsim.runs.engine_choice import settled
from fedsim.runs.federation import Federation
from fedsim.settings.build import build_world
from fedsim.settings.compose import compose

IMAGES = ("workload.input_shape=[1,12,12]", "model=convnet", "model.channels=[4,6]")
NORMED = (*IMAGES, "model.batch_norm=true")
Outcome = tuple[str, list[Any]]


class Tape:
    """Records as a CUDA graph does: the operators, on the tensors that they were given, and nothing else.

    Whatever Python decided, and every number that it passed, is frozen; a replay writes into the tensors that the
    recording made.
    """

    freezes_numbers = True
    recorded = 0

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        type(self).recorded += 1
        work()  # as a warm-up
        operators: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []

        class Recording(TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                made = func(*args, **(kwargs or {}))
                if not func.is_view:
                    operators.append((func, args, kwargs or {}, made))
                return made

        with Recording():
            work()

        def replay() -> None:
            with torch.no_grad():
                for func, args, kwargs, made in operators:
                    again = func(*args, **kwargs)
                    if func._schema.is_mutable:
                        continue
                    for old, new in zip(_tensors(made), _tensors(again), strict=True):
                        old.detach().copy_(new)

        return replay


def _tensors(made: Any) -> list[torch.Tensor]:
    every = made if isinstance(made, (tuple, list)) else [made]
    return [t for t in every if isinstance(t, torch.Tensor)]


@pytest.fixture
def on_tape(monkeypatch: pytest.MonkeyPatch) -> type[Tape]:
    """Slots record on a tape, and the learning rate is a scalar on the device, as on a card."""
    monkeypatch.setattr(cohort, "Repeater", Tape)
    monkeypatch.setattr(SGDTrainer, "rate_on", lambda self, device, lr: torch.tensor(lr))
    monkeypatch.setattr(Tape, "recorded", 0)
    return Tape


def outcome(*overrides: str) -> Outcome:
    """What a run leaves: the hash of its weights, and all that is reported of its rounds and clients."""
    workers.worker_for.cache_clear()
    run = Federation(build_world(json.dumps(compose([*TINY, *overrides]))), LocalEngine(serve))
    rows = [
        (json.loads(report.to_json()) | {"host_s": 0}, list(map(repr, clients))) for report, clients in run.rounds()
    ]
    return weights_sha256(run.arrays), rows


CASES = {
    "plain": ("model=mlp",),
    "everything of SGD": ("trainer.momentum=0.9", "trainer.weight_decay=0.01", "trainer.clip_norm=0.5"),
    "smaller last batches": (*IMAGES, "trainer.batch_size=5", "trainer.local_epochs=3"),
    "a rate that falls": (*IMAGES, "trainer.lr_decay=0.5", "rounds=3"),
    "dropout": ("model=mlp", "model.dropout=0.3", "trainer.local_epochs=2"),
    "batch norms": (*NORMED, "workload.examples_per_client=9"),
    "fedprox": ("method=fedprox", "trainer.proximal_mu=0.5"),
    "fedmix": ("method=fedmix",),
    "ditto": ("method=ditto",),
    "fedrep": ("method=fedrep",),
    "fedbn": (*NORMED, "method=fedbn"),
    "updates by themselves": ("strategy=krum", "cohort=5"),
    "packed": ("uplink=topk",),
    "some fail": ("trainer.lr=1e25", "trainer.local_epochs=3", "on_client_error=drop", "trainer.momentum=0.9"),
}


@pytest.mark.parametrize("case", CASES)
def test_slots_give_the_bytes_of_one_after_the_other(case: str):
    plain = outcome(*CASES[case])
    for slots in (1, 2, 5):
        assert outcome(*CASES[case], f"engine.slots={slots}") == plain, slots


@pytest.mark.parametrize("case", [case for case in CASES if case not in ("some fail", "fedrep")])
def test_recorded_steps_give_them_too(case: str, on_tape: type[Tape]):
    plain = outcome(*CASES[case])
    assert on_tape.recorded == 0
    for slots in (1, 3):
        assert outcome(*CASES[case], f"engine.slots={slots}") == plain, slots
    assert on_tape.recorded > 0


def test_a_step_is_recorded_once_for_all_clients_and_rounds(on_tape: type[Tape]):
    """A client trains on seven examples: batches of four and of three."""
    outcome("engine.slots=1", "rounds=3", "cohort=6")
    assert on_tape.recorded == 2
    outcome("engine.slots=3", "rounds=3", "cohort=6")
    assert on_tape.recorded == 2 + 6


def test_a_setting_that_the_objective_reads_makes_another_step(on_tape: type[Tape]):
    """Flower's FedProx sends its mu in every round, and the number of the round, which nobody reads."""
    outcome("method=fedprox", "engine.slots=1", "rounds=3")
    assert on_tape.recorded == 2


class Peeks(WorkloadLoss):
    is_pure = True

    def __call__(self, run: Any, batch: Any) -> torch.Tensor:
        return super().__call__(run, batch) * run.client.round


def test_an_objective_that_is_not_as_pure_as_it_says_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(SGDTrainer, "objective", Peeks())
    outcome()
    with pytest.raises(ConfigError, match=r"^Peeks says that it is pure and reads 'round' of a client's round; it may"):
        outcome("engine.slots=1")


class Own(SGDRun):
    """Has something of its client, and no place to say so."""

    def __init__(self, *args: Any):
        super().__init__(*args)
        self.factor = self.client.client_id


class PeeksAtOwn(WorkloadLoss):
    is_pure = True

    def __call__(self, run: Any, batch: Any) -> torch.Tensor:
        return super().__call__(run, batch) * run.factor


def test_what_a_run_has_of_its_own_is_a_clients(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(SGDTrainer, "objective", PeeksAtOwn())
    monkeypatch.setattr(SGDTrainer, "run", Own)
    with pytest.raises(ConfigError, match=r"^PeeksAtOwn says that it is pure and reads 'factor' of a client's round"):
        outcome("engine.slots=1")


# --- what users write ------------------------------------------------------------------------------------------------


@dataclass
class Unhashable(WorkloadLoss):
    weight: float = 2.0
    is_pure = True

    def __call__(self, run: Any, batch: Any) -> torch.Tensor:
        return super().__call__(run, batch) * self.weight


class Scalar(WorkloadLoss):
    """A loss of one number that is no scalar, and two notes, one of them taken twice in larger batches."""

    is_pure = True

    def __call__(self, run: Any, batch: Any) -> torch.Tensor:
        loss = super().__call__(run, batch)
        run.note(first=loss, second=loss.double())
        if len(batch["x"]) == 4:
            run.note(second=3 * loss.double(), third=loss)
        return loss.view(1, 1)


class Through(WorkloadLoss):
    """Goes through the settings, and finds the rate that a strategy has sent for this round."""

    is_pure = True

    def __call__(self, run: Any, batch: Any) -> torch.Tensor:
        return super().__call__(run, batch) * sum(v for n, v in run.broadcast.settings.items() if n == "server-round")


class Weighted(WorkloadLoss):
    is_pure = True

    def __call__(self, run: Any, batch: Any) -> torch.Tensor:
        return super().__call__(run, batch["of"] if "of" in batch else batch[0]) * (0.5 if "of" in batch else batch[1])


class InPairs(SGDRun):
    def batches(self) -> Any:
        yield from ((batch, 0.1 * number) for number, batch in enumerate(super().batches()))

    def size_of(self, batch: Any) -> int:
        return super().size_of(batch[0])


class InNests(InPairs):
    def batches(self) -> Any:
        yield from ({"of": batch} for batch, _ in super().batches())

    def size_of(self, batch: Any) -> int:
        return super().size_of((batch["of"],))


OBJECTIVES: dict[str, tuple[Any, type[SGDRun]]] = {
    "a dataclass": (Unhashable(), SGDRun),
    "figures of all sorts": (Scalar(), SGDRun),
    "through the settings": (Through(), SGDRun),
    "batches that are pairs": (Weighted(), InPairs),
    "batches that hold batches": (Weighted(), InNests),
}


@pytest.mark.parametrize("case", OBJECTIVES)
def test_objectives_of_all_sorts_give_the_bytes_of_one_after_the_other(
    case: str, on_tape: type[Tape], monkeypatch: pytest.MonkeyPatch
):
    for name, value in zip(("objective", "run"), OBJECTIVES[case], strict=True):
        monkeypatch.setattr(SGDTrainer, name, value)
    plain = outcome("rounds=3")
    for slots in (1, 3):
        assert outcome("rounds=3", f"engine.slots={slots}") == plain, slots
    assert (on_tape.recorded > 0) == case.startswith(("a dataclass", "figures", "through"))


class Small(nn.Module):
    """Begins like every network below."""

    def __init__(self, input_shape: Any, num_classes: int):
        super().__init__()
        self.body, self.head = nn.Linear(math.prod(input_shape), 6), nn.Linear(6, num_classes)
        self.register_buffer("mean", torch.zeros(6), persistent=not isinstance(self, Passing))

    def features(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x.flatten(1)).relu()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(x))


class Assigns(Small):
    """Keeps a running mean as most people write it."""

    def features(self, x: torch.Tensor) -> torch.Tensor:
        features = super().features(x)
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * features.detach().mean(0)
        return features - self.mean


class Passing(Assigns):
    """Keeps it where no state dict is."""


class Skips(Small):
    """Decides by a draw of the host what it does."""

    def features(self, x: torch.Tensor) -> torch.Tensor:
        features = super().features(x)
        return 2 * features if self.training and torch.rand(()).item() < 0.5 else features


@pytest.mark.parametrize("kind", [Assigns, Passing, Skips])
def test_networks_of_all_sorts_give_the_bytes_of_one_after_the_other(kind: type[Small], on_tape: type[Tape]):
    own = (f"model._target_={__name__}.{kind.__name__}", "~model.hidden", "~model.norm", "~model.dropout")
    plain = outcome("model=mlp", *own)
    for slots in (1, 3):
        assert outcome("model=mlp", *own, f"engine.slots={slots}") == plain, slots


def test_a_buffer_that_a_network_assigns_is_sent():
    own = (f"model._target_={__name__}.Assigns", "~model.hidden", "~model.norm", "~model.dropout")
    run = Federation(build_world(json.dumps(compose([*TINY, "model=mlp", *own]))), LocalEngine(serve))
    list(run.rounds())
    assert run.arrays["mean"].numpy().max() > 0


def test_steps_that_were_used_longest_ago_make_room(on_tape: type[Tape], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("clients.slots.slot.MOST_RECORDED", 1)
    sizes = ("workload.examples_per_client=10", "trainer.batch_size=5", "trainer.local_epochs=2")
    many = outcome(*sizes, "engine.slots=2")
    assert on_tape.recorded > 4
    monkeypatch.setattr("clients.slots.slot.MOST_RECORDED", MOST_RECORDED)
    assert outcome(*sizes, "engine.slots=2") == many


def test_more_steps_than_figures_have_place(monkeypatch: pytest.MonkeyPatch):
    plain = outcome("trainer.local_steps=11")
    monkeypatch.setattr("clients.slots.slot.KEPT_FIGURES", 4)
    assert outcome("trainer.local_steps=11", "engine.slots=2") == plain


def test_what_is_asked_of_others_does_not_move_a_client(on_tape: type[Tape], monkeypatch: pytest.MonkeyPatch):
    """Recording takes steps; the client that comes first must not feel them, nor draw other numbers."""
    before = []
    inner = Slot._unchanged

    def watched(self: Slot) -> Any:
        before.append([t.detach().clone() for t in self.live.weights.values()] + [torch.get_rng_state()])
        return inner(self)

    taken = Slot._step_like

    def after(self: Slot, *args: Any) -> Any:
        count = len(before)
        step = taken(self, *args)
        if len(before) > count:
            now = [*self.live.weights.values(), torch.get_rng_state()]
            assert all(torch.equal(a, b) for a, b in zip(before[-1], now, strict=True))
        return step

    monkeypatch.setattr(Slot, "_unchanged", watched)
    monkeypatch.setattr(Slot, "_step_like", after)
    outcome("model=mlp", "engine.slots=2")
    assert len(before) == 4  # two slots, batches of four and of three


# --- where a run is trained ------------------------------------------------------------------------------------------


def test_a_run_that_leaves_it_open_is_trained_on_the_cpu_where_there_is_no_card():
    trees, said = settled([compose([]), compose(["engine=local"]), compose(["engine=slots", "engine.slots=3"])])
    assert said == ""
    assert [(t["engine"]["device"], t["engine"]["slots"]) for t in trees] == [("cpu", 0), ("cpu", 0), ("cpu", 3)]
    assert settled(trees) == (trees, "")


def test_with_a_card_the_work_of_a_step_decides_for_all_runs_alike(monkeypatch: pytest.MonkeyPatch):
    """LeNet-5 with ten clients is worth it, the default network is not; one that names a place goes there."""
    monkeypatch.setattr(engine_choice, "has_card", lambda: True)
    small, large = compose(["cohort=10"]), compose(["workload=blobs", "workload.input_shape=[1,28,28]", "model=lenet5"])
    here = compose(["engine.device=cpu"])

    def places(*trees: Any) -> list[Any]:
        return [(tree["engine"]["device"], tree["engine"]["slots"]) for tree in settled(trees)[0]]

    assert places(small) == [("cpu", 0)]
    assert places(large, here) == [("cuda", 32), ("cpu", 0)]
    assert places(small, large) == [("cuda", 32)] * 2
    assert places(compose(["engine=local"])) == [("cuda", 0)]
    assert settled([small])[1].startswith("trained on cpu: a step of the clients that train at once takes ")
    assert settled([compose(["engine=local"])])[1] == "", "it was no choice by work"
    assert places(compose(["cohort=10", "engine.batch_clients=2", "engine.device=cuda"])) == [("cuda", 0)]


def test_clients_are_trained_at_once_in_one_way():
    with pytest.raises(ConfigError, match=r"^engine\.batch_clients=4 and engine\.slots=32 are two ways to train "):
        compose(["engine=slots", "engine.batch_clients=4"])


def test_no_more_slots_are_made_than_clients_are_asked():
    asked = compose([*TINY, "cohort=3", "over_selection=1.3", "engine=slots"])
    assert len(workers.Worker(build_world(json.dumps(asked))).slots) == 4


def test_the_choice_is_in_the_config_of_the_run(fedsim, place):
    assert fedsim("run", *TINY[:-3], "engine.device=auto", "rounds=1", "out=a").code == 0
    engine = read_config(place / "cwd" / "a")["engine"]
    assert (engine["device"], engine["slots"]) == ("cpu", 0)
