"""Defaults of every method survive twenty rounds of every stream that it is offered with."""

import json
from typing import Any

import pytest

from clients.app import serve
from fedsim.engines.local import LocalEngine
from fedsim.errors import ConfigError
from fedsim.messages.records import all_finite
from fedsim.runs.federation import Federation
from fedsim.settings.build import build_world
from fedsim.settings.compose import compose
from fedsim.settings.groups import options

# Seven clients, of whom three are asked: what a method does to weights does not hang on how many there are.
ROUNDS = ("rounds=20", "num_clients=7", "cohort=3", "fleet=uniform", "engine.device=cpu", "partition=iid")
STREAMS = [name for name in options("stream") if name != "domains"]  # which needs bundles of somebody's own
MODELS = {"plain": "model.norm=null", "batch": "model.norm=batch"}
SAMPLE = {("ewc", "rotated", "batch")}


def cases() -> list[Any]:
    every = [(m, s, n) for m in options("method") for s in STREAMS for n in MODELS]
    return [
        pytest.param(*case, id="-".join(case), marks=[] if case in SAMPLE else [pytest.mark.slow]) for case in every
    ]


@pytest.mark.parametrize("method, stream, model", cases())
def test_twenty_rounds_of_defaults_end_with_finite_weights(method: str, stream: str, model: str):
    """A run that ends has judged finite outputs; one that is refused before its first round is not offered."""
    rounds = []
    try:
        settings = compose([*ROUNDS, f"method={method}", f"stream={stream}", MODELS[model]])
        federation = Federation(build_world(json.dumps(settings)), LocalEngine(serve))
        for report, _ in federation.rounds():
            rounds.append(report.round)
    except ConfigError as error:
        assert len(rounds) <= 1, f"refused after {rounds}"
        pytest.skip(str(error))
    assert rounds[-1] == 20
    assert all_finite(federation.arrays)
