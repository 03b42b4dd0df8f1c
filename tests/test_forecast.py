"""The announcement of long runs: what it grows with, and who sees it."""

from __future__ import annotations

import pytest
from conftest import TINY

from fedsim.runs import forecast


def test_twice_the_rounds_or_clients_take_twice_as_long(federation):
    """Without judging, which happens once more than there are rounds."""
    one, rounds, cohort = (
        forecast.host_seconds(federation("workload.test_examples=1", "evaluate_every=2", *more))
        for more in ((), ("rounds=4", "evaluate_every=4"), ("cohort=6",))
    )
    assert rounds == pytest.approx(2 * one, rel=1e-3)
    assert cohort == pytest.approx(2 * one, rel=1e-3)


def test_what_is_behind_a_resumed_run_does_not_count(federation):
    made = federation("rounds=10")
    assert forecast.host_seconds(made, after=9) < forecast.host_seconds(made) / 5


def test_more_passes_and_a_larger_network_take_longer(federation):
    short = forecast.host_seconds(federation())
    assert forecast.host_seconds(federation("trainer.local_epochs=50")) > 10 * short
    assert forecast.host_seconds(federation("trainer.local_steps=1000")) > 100 * short
    assert forecast.host_seconds(federation("model.hidden=[2000,2000]")) > 1.5 * short


def test_a_task_of_a_stream_counts_with_its_own_examples(federation):
    """Five tasks of two classes each are about a fifth of the examples; a permutation of the inputs leaves all."""
    base = ("trainer.local_epochs=20", "workload.examples_per_client=80", "rounds=10", "evaluate_every=1")
    whole, split, permuted = (
        forecast.host_seconds(federation(*base, *more))
        for more in ((), ("stream=split_classes", "stream.tasks=5"), ("stream=permuted", "stream.tasks=10"))
    )
    assert split < whole / 2
    assert permuted == pytest.approx(whole, rel=0.1)


def test_a_run_of_seconds_is_not_announced():
    assert forecast.sentence(59.0, 30) == ""


@pytest.mark.parametrize(
    ("checkpoint_s", "words"),
    [
        (30, "after Ctrl-C, fedsim resume goes on from the last checkpoint (at most one every 30 s)"),
        (0, "after Ctrl-C, fedsim resume goes on from the last checkpoint (at most one a round)"),
        (None, "as checkpoint_s=null, fedsim resume would start it anew"),
    ],
)
def test_a_long_run_is_told_what_an_interruption_costs(checkpoint_s: float | None, words: str):
    ahead = "roughly 2.00 h of training on one core lie ahead; "
    assert forecast.sentence(7200.0, checkpoint_s) == ahead + words


def test_a_long_run_is_announced_before_it_begins(fedsim, tmp_path, monkeypatch):
    monkeypatch.setattr(forecast, "ANNOUNCED_S", 0.0)
    monkeypatch.chdir(tmp_path)
    ended = fedsim("run", *TINY, "out=here")
    assert (ended.code, ended.err) == (0, "")
    assert ended.out.startswith("roughly 0.")
