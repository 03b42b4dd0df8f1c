"""What a trainer of a user's may answer: everything else is a sentence that names the client."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from clients.trainers.sgd import SGDRun, SGDTrainer
from fedsim.errors import ClientError, ConfigError

NAN = float("nan")
FAULTS: dict[str, tuple[Any, str]] = {
    "nothing": (lambda update: None, "TypeError: fit of Odd must return a ClientUpdate, got NoneType"),
    "no examples": (lambda u: replace(u, num_examples=0), "num_examples of fit of Odd must be from 1 to .*, got 0"),
    "half an example": (lambda u: replace(u, num_examples=2.5), "num_examples of fit of Odd must be .*, got 2.5"),
    "debts": (lambda u: replace(u, num_examples=-3), "num_examples of fit of Odd must be .*, got -3"),
    "a galaxy": (lambda u: replace(u, num_examples=10**30), "num_examples of fit of Odd must be from 1 to"),
    "a numbered metric": (lambda u: replace(u, metrics={3: 1.0}), "metrics of fit of Odd must be numbers by name"),
    "no metrics": (lambda u: replace(u, metrics=None), "metrics of fit of Odd must be numbers by name, got None"),
    "a list of weights": (lambda u: replace(u, weights=[1]), "weights of fit of Odd must be tensors by name, got list"),
    "complex weights": (
        lambda u: replace(u, weights={n: t.to(torch.complex64) for n, t in u.weights.items()}),
        "weights of fit of Odd must be dense tensors of real numbers .*: complex64 strided on cpu",
    ),
    "sparse weights": (
        lambda u: replace(u, weights={n: t.to_sparse() for n, t in u.weights.items()}),
        "weights of fit of Odd must be dense tensors",
    ),
    "a flat record": (
        lambda u: replace(u, extras={"e": torch.ones(1)}),
        "the record 'e' of fit of Odd must be tensors by name, got Tensor",
    ),
    "a numbered record": (lambda u: replace(u, extras={1: {}}), "records of fit of Odd must be tensors by name"),
}
KEPT: dict[str, tuple[Any, Any]] = {
    "a number": ("s", 3),
    "a text": ("s", "x"),
    "a numbered tensor": (3, torch.ones(1)),
    "what numpy lacks": ("s", torch.ones(2, dtype=torch.bfloat16)),
}


class OddRun(SGDRun):
    def fit(self):
        return self.trainer.fault(super().fit())


class Odd(SGDTrainer):
    run = OddRun
    fault: Any = staticmethod(lambda update: update)


@pytest.fixture
def odd(federation):
    return lambda *more: federation("workload=blobs", f"trainer._target_={__name__}.Odd", *more)


@pytest.mark.parametrize("more", [(), ("strategy=edge_mean", "uplink=int8")], ids=["plain", "edge"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_update_names_its_client(odd, monkeypatch, fault: str, more: tuple[str, ...]):
    change, sentence = FAULTS[fault]
    monkeypatch.setattr(Odd, "fault", staticmethod(change))
    with pytest.raises(ClientError, match=rf"^client \d .* failed in round 1 .*{sentence}"):
        list(odd(*more).rounds())


@pytest.mark.parametrize("kept", KEPT)
def test_what_a_client_cannot_keep_is_named(odd, monkeypatch, kept: str):
    class Keeping(OddRun):
        def fit(self):
            update = super().fit()
            self.client.state.__setitem__(*KEPT[kept])
            return update

    monkeypatch.setattr(Odd, "run", Keeping)
    with pytest.raises(ClientError, match=r"what a client of Odd keeps must be .*tensors"):
        list(odd().rounds())


def test_a_wrong_judgement_names_its_client(odd, monkeypatch):
    monkeypatch.setattr(Odd, "evaluate", lambda self, client, broadcast: {1: 2.0}, raising=False)
    with pytest.raises(ClientError, match="metrics of evaluate of Odd must be numbers by name"):
        list(odd("evaluate_clients=2").rounds())


def test_a_run_that_shall_go_on_counts_the_client_as_failed(odd, monkeypatch):
    monkeypatch.setattr(Odd, "fault", staticmethod(lambda u: replace(u, num_examples=0) if u.client_id < 3 else u))
    rounds = odd("on_client_error=drop", "cohort=6", "rounds=1").rounds()
    assert [len(report.outcomes.get("failed", ())) for report, _ in rounds] == [0, 3]


SHORTAGES = {
    "of Python": MemoryError(),
    "of a card": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "of the CPU": None,  # torch's own
}


@pytest.mark.parametrize("more", [(), ("engine.slots=2",)], ids=["one", "slots"])
@pytest.mark.parametrize("shortage", SHORTAGES)
def test_a_host_without_memory_is_no_fault_of_a_client(odd, monkeypatch, shortage: str, more: tuple[str, ...]):
    """What one host counts as failed, another would train: other results from the same config."""

    def lacks(update):
        if error := SHORTAGES[shortage]:
            raise error
        torch.empty(2**60)

    monkeypatch.setattr(Odd, "fault", staticmethod(lacks))
    with pytest.raises(ConfigError, match=r"^this host has too little memory for client \d; lower"):
        list(odd("on_client_error=drop", "trainer.local_epochs=1", *more).rounds())
