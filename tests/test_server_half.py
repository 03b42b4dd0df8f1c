"""What the server half of a method is told and may see, and which strategies take nothing but a mean."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import DAILY, honest
from flwr.serverapp.strategy import (
    FedAdagrad,
    FedAdam,
    FedAvg,
    FedAvgM,
    FedMedian,
    FedProx,
    FedTrimmedAvg,
    FedYogi,
    Krum,
    QFedAvg,
)

import strategies.edge
from clients.app import serve
from fedsim.engines.local import LocalEngine
from fedsim.grid.edge import EdgeGrid
from fedsim.grid.server_half import averaging, is_plain_mean, server_half
from fedsim.runs.federation import Federation
from fedsim.settings.groups import options
from fedsim.settings.run_settings import RunSettings
from fedsim.workloads.base import Workload
from strategies import fedadam
from strategies.edge import EdgeStrategy
from strategies.mafl import Mafl

OURS = Path(strategies.edge.__file__).parent
DOORS = {f.__code__ for f in [*vars(EdgeGrid).values(), Workload.sample] if callable(f)}
SIDE_CHANNELS = {"accepted", "reports"}  # attributes of the grid that a strategy reads


# --- what a strategy may see -----------------------------------------------------------------------------------------


class TouchedError(Exception):
    """A strategy reached for what no server has."""


def guard(what: str) -> None:
    """Raises if a strategy's code is why this is called, and no door of the grid lies between."""
    frame = sys._getframe(1)
    while frame is not None and frame.f_code not in DOORS:
        code = frame.f_code
        if Path(code.co_filename).parent == OURS or code.co_qualname.startswith(Nosy.__name__ + "."):
            raise TouchedError(f"{what} in {code.co_qualname}")
        frame = frame.f_back


def guarded(what: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*given: Any, **named: Any) -> Any:
        guard(what)
        return function(*given, **named)

    return call


class GuardedSettings:
    """Settings of which a strategy may read none: it has its own by its constructor."""

    def __init__(self, settings: RunSettings):
        self._settings = settings

    def __getattr__(self, name: str) -> Any:
        guard(f"settings.{name}")
        return getattr(self._settings, name)


def guarded_attribute(name: str) -> property:
    def read(owner: Any) -> Any:
        guard(f"{type(owner).__name__}.{name}")
        return vars(owner)[name]

    return property(read, lambda owner, value: vars(owner).__setitem__(name, value))


def fence(monkeypatch: pytest.MonkeyPatch, federation: Federation) -> None:
    """Guards the clients' data, the fleet and its future, the settings and all attributes of the grid."""
    workload, fleet, grid = federation.world.workload, federation.world.fleet, federation.grid
    for name in ("client_data", "client_part", "arrivals", "recall", "part", "phase"):
        monkeypatch.setattr(workload, name, guarded(name, getattr(workload, name)))
    for owner, names in ((fleet, ("online", "online_until", "jitter", "crash_s")), (fleet.availability, ("online",))):
        for name in names:
            monkeypatch.setattr(owner, name, guarded(f"fleet.{name}", getattr(owner, name)))
    monkeypatch.setattr(type(workload), "test", guarded_attribute("test"), raising=False)
    for name in vars(grid).keys() - SIDE_CHANNELS:
        monkeypatch.setattr(EdgeGrid, name, guarded_attribute(name), raising=False)


class Nosy(EdgeStrategy):
    """Reaches for what `look` says, in round 1."""

    look: Callable[[Nosy, EdgeGrid], Any]

    def prepare(self, number, weights, arrays, grid):
        type(self).look(self, grid)


def fenced(settings, monkeypatch: pytest.MonkeyPatch, *overrides: str) -> Federation:
    import json

    from fedsim.settings.build import build_world

    build_world.cache_clear()
    world = build_world(json.dumps(settings(*overrides)))
    made = Federation(replace(world, settings=GuardedSettings(world.settings)), LocalEngine(serve))
    fence(monkeypatch, made)
    return made


STREAM = (
    "stream=split_classes",
    "stream.tasks=2",
    "workload.num_classes=4",
    "rounds=4",
    "workload.examples_per_client=16",
)
CONVOLUTIONS = ("model=convnet", "model.channels=[4,6]", "workload.input_shape=[1,8,8]")
RICH = {
    "ewc": STREAM,
    "ocs": (*STREAM, "trainer.memory_size=8", "trainer.ref_scope=global"),
    "heterofl": (*CONVOLUTIONS, "model.batch_norm=true", "strategy.assign=latency", "strategy.step_ms=1"),
    "fjord": (*CONVOLUTIONS, "trainer.judged_at=[0.25]"),
    "ppp": ("strategy.ratio=null", "strategy.latency_budget_ms=1", "trainer.diversity=1", "strategy.warmup=0"),
    "mafl": ("strategy@strategy.server=heterofl", "trainer=naivemix"),
}


@pytest.mark.parametrize("strategy", options("strategy"))
def test_no_strategy_sees_settings_data_or_the_fleets_future(settings, monkeypatch, strategy: str):
    own = (*RICH.get(strategy, ()), *honest([f"strategy={strategy}"]))
    made = fenced(settings, monkeypatch, f"strategy={strategy}", *own, *DAILY, "evaluate_clients=2")
    phases = {client.phase for _, clients in made.rounds() for client in clients}
    assert phases >= {"train", "evaluate"}
    if strategy in ("ewc", "ocs", "heterofl", "mafl"):
        assert any(phase.startswith("query.") for phase in phases)


@pytest.mark.parametrize(
    ("look", "touched"),
    [
        (lambda self, grid: grid.fleet, "EdgeGrid.fleet"),
        (lambda self, grid: grid.settings, "EdgeGrid.settings"),
        (lambda self, grid: grid.store, "EdgeGrid.store"),
        (lambda self, grid: self.world.workload.client_data(0), "client_data"),
        (lambda self, grid: self.world.workload.test, "test"),
        (lambda self, grid: self.world.fleet.online(0, 0.0), "fleet.online"),
        (lambda self, grid: self.world.fleet.availability.online(0, 0.0), "fleet.online"),
        (lambda self, grid: self.world.settings.groups["trainer"], "settings.groups"),
    ],
)
def test_the_fence_stops_who_reaches_over_it(settings, monkeypatch, look, touched: str):
    made = fenced(settings, monkeypatch, "strategy=edge_mean", f"strategy._target_={__name__}.Nosy")
    made.strategy.world = made.world
    monkeypatch.setattr(Nosy, "look", look, raising=False)
    with pytest.raises(Exception, match="TouchedError") as caught:
        list(made.rounds())
    assert touched in str(caught.value)


def test_a_strategy_is_told_of_its_run_before_the_first_round(federation):
    made = federation("strategy=mafl", "strategy@strategy.server=edge_mean", "seed=7", "rounds=5")
    context = made.strategy.context
    assert (context.num_clients, context.seed, context.rounds) == (6, 7, 5)
    assert context.trained == made.roles.trained
    assert made.strategy.server.context is context


def test_a_wrapping_strategy_hands_on_what_an_exchange_brought(federation, monkeypatch):
    brought: list[tuple[int, ...]] = []
    monkeypatch.setattr(EdgeStrategy, "closed", lambda self, exchange: brought.append(exchange.accepted))
    made = federation("strategy=mafl", "strategy@strategy.server=edge_mean", "cohort=6", "rounds=2")
    list(made.rounds())
    assert brought == [tuple(range(6))] * 2


def test_only_who_is_awake_can_be_reached(federation, monkeypatch):
    made = federation()
    monkeypatch.setattr(made.grid.fleet, "online", lambda client, now_s: client % 2 == 1)
    assert made.grid.reachable(range(6)) == [1, 3, 5]
    assert made.grid.reachable([5, 2, 1]) == [5, 1]


# --- strategies that are none of ours --------------------------------------------------------------------------------


def test_flowers_strategies_have_the_defaults():
    half = server_half(FedAvg())
    assert (half.derived, half.takes_all_tensors, half.sums_in_float64, half.wraps) == (frozenset(), False, False, None)


def test_the_innermost_strategy_averages():
    inner = EdgeStrategy()
    around = Mafl(lambda **_: Mafl(lambda **_: inner))
    assert averaging(around) is inner
    assert averaging(inner) is inner


@pytest.mark.parametrize("strategy", [FedAvg, FedAvgM, FedAdagrad, FedAdam, FedYogi, fedadam.FedAdam])
def test_flowers_means_take_one_summed_reply(strategy: type):
    assert is_plain_mean(strategy())
    assert is_plain_mean(FedProx(proximal_mu=0.1))


class Watching(FedAvg):
    """A subclass may look at every reply."""


class Deeper(fedadam.FedAdam):
    """So may one of a class that takes the mean."""


@pytest.mark.parametrize(
    "strategy",
    [
        Watching(),
        Deeper(),
        EdgeStrategy(),
        FedMedian(),
        FedTrimmedAvg(),
        Krum(num_malicious_nodes=1),
        QFedAvg(client_learning_rate=0.1),
        FedAvg(weighted_by_key="num-batches"),
        FedAvg(train_metrics_aggr_fn=lambda records, key: None),
    ],
    ids=lambda s: type(s).__name__,
)
def test_every_other_strategy_gets_each_reply(strategy):
    assert not is_plain_mean(strategy)
