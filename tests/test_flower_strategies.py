"""Any Flower strategy by `strategy._target_=`: it trains and goes on after a cut to the same bytes, or says why not."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
from cut_short import comparable
from flwr.serverapp import strategy as strategies
from flwr.serverapp.strategy import Strategy

from fedsim.errors import ConfigError, RunError

FLOWER = "flwr.serverapp.strategy"
NAMES = sorted(n for n in strategies.__all__ if issubclass(getattr(strategies, n), Strategy))
INSIDE = f"+strategy.strategy={{_target_: {FLOWER}.FedAvg}}"
NOISE = (INSIDE, "+strategy.noise_multiplier=0.1", "+strategy.num_sampled_clients=5")
NEEDS = {  # arguments without a default
    "DifferentialPrivacyClientSideAdaptiveClipping": NOISE,
    "DifferentialPrivacyClientSideFixedClipping": (*NOISE, "+strategy.clipping_norm=1"),
    "DifferentialPrivacyServerSideAdaptiveClipping": NOISE,
    "DifferentialPrivacyServerSideFixedClipping": (*NOISE, "+strategy.clipping_norm=1"),
    "FedProx": ("+strategy.proximal_mu=0.1", "trainer=fedprox"),  # which it sends to the clients
    "QFedAvg": ("+strategy.client_learning_rate=0.1",),
}
REFUSED = {
    "DifferentialPrivacyClientSideAdaptiveClipping": "leaves the clipping to a mod of Flower's client app",
    "DifferentialPrivacyClientSideFixedClipping": "leaves the clipping to a mod of Flower's client app",
    "FedXgbBagging": "collects trees of XGBoost",
    "FedXgbCyclic": "collects trees of XGBoost",
    "Strategy": "is abstract: name a class below it that has aggregate_evaluate, ",
}


def overrides(name: str) -> list[str]:
    clients = ["num_clients=6", "cohort=5", "rounds=4", "evaluate_clients=2"]
    return [f"strategy._target_={FLOWER}.{name}", *NEEDS.get(name, ()), *clients]


@pytest.mark.parametrize("name", [name for name in NAMES if name not in REFUSED])
def test_it_trains_and_a_resumed_run_ends_alike(go, tmp_path: Path, name: str):
    go("whole", *overrides(name))
    go("cut", *overrides(name), until=2)
    go("cut", resume=True)
    assert comparable(tmp_path / "cut") == comparable(tmp_path / "whole")


@pytest.mark.parametrize("name", REFUSED)
def test_or_it_says_why_it_cannot(go, name: str):
    with pytest.raises((ConfigError, RunError)) as refused:
        go("whole", *overrides(name))
    assert REFUSED[name] in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in REFUSED])
def test_the_arguments_that_it_needs_are_named(go, name: str):
    """All that its constructor requires is in NEEDS, and one left out is in the sentence."""
    required = [
        key for key, p in inspect.signature(getattr(strategies, name)).parameters.items() if p.default is p.empty
    ]
    if not required or required == ["args", "kwargs"]:
        return
    assert {f"+strategy.{key}" for key in required} == {
        text.partition("=")[0] for text in NEEDS[name] if text.startswith("+")
    }
    for key in required:
        left = [text for text in overrides(name) if not text.startswith(f"+strategy.{key}=")]
        with pytest.raises(ConfigError, match=rf"strategy\.{key} must be given"):
            go("whole", *left)
