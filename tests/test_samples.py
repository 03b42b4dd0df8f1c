"""Coresets of endless streams: the examples themselves, quantised, in the state of the client and within its budget."""

import json
from pathlib import Path

import pytest
import torch

from clients.app import serve
from clients.trainers.rehearsal import samples
from clients.trainers.rehearsal.memory import CANDIDATES, NAMES, NONE
from fedsim.engines.local import LocalEngine
from fedsim.errors import ConfigError, DataError
from fedsim.messages.records import record_bytes
from fedsim.runs.federation import Federation
from fedsim.runs.writer import run
from fedsim.settings.build import build_world
from fedsim.settings.compose import compose
from fedsim.workloads.streams.base import Stream

BASE = (
    *("workload=digits", "partition=iid", "num_clients=2", "cohort=2", "rounds=6", "fleet=uniform", "latency=flops"),
    *("engine.device=cpu", "trainer.local_epochs=1", "model.hidden=[12]", "stream=rotated", "stream.tasks=3"),
)
ENDLESS = ("stream.fresh_noise=0.3", "trainer.store=samples")


def federation(*overrides: str) -> Federation:
    return Federation(build_world(json.dumps(compose([*BASE, *overrides]))), LocalEngine(serve))


def stream(*overrides: str) -> Stream:
    workload = federation("method=finetune", *overrides).world.workload
    assert isinstance(workload, Stream)
    return workload


def states(run: Federation) -> list[dict[str, torch.Tensor]]:
    return [run.grid.store.get(client) for client in range(2)]  # type: ignore[arg-type]


def test_eight_bits_are_off_by_half_a_level_at_most():
    x = torch.randn(5, 1, 6, 6, generator=torch.Generator().manual_seed(0))
    x[4] = 2.5  # without a span
    levels, low, span = samples.quantised(x)
    assert levels.dtype == torch.uint8
    wrong = (samples.restored(levels, low, span) - x).abs().flatten(1).amax(1)
    assert (wrong <= span / 510 + 1e-6).all()
    assert wrong[4] == 0


def test_an_image_of_bytes_comes_back_as_it_was():
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    assert torch.equal(samples.quantised(levels / 255.0)[0], levels)


def test_fresh_noise_is_anew_in_every_part_and_the_same_at_every_call():
    plain, endless = stream(), stream("stream.fresh_noise=0.3")
    rows = torch.arange(len(plain.client_part(0, 1).train))
    x = [w.client_part(0, 1).train.gather(rows)["x"] for w in (plain, endless, endless)]
    assert torch.equal(x[1], x[2])
    assert float((x[1] - x[0]).std()) == pytest.approx(0.3, rel=0.05)
    assert not torch.equal(x[1] - x[0], endless.client_part(1, 1).train.gather(rows)["x"] - x[0])
    held = torch.arange(20)
    assert torch.equal(plain.held_out(1).gather(held)["x"], endless.held_out(1).gather(held)["x"])


def test_what_is_made_anew_cannot_be_recalled_by_name(tmp_path: Path):
    with pytest.raises(DataError, match=r"stream\.fresh_noise=0\.3 makes examples anew"):
        stream("stream.fresh_noise=0.3").recall(0, torch.tensor([1]))
    with pytest.raises(ConfigError, match=r"cannot be fetched again: set trainer\.store=samples"):
        run(compose([*BASE, "method=ocs", "stream.fresh_noise=0.3"]), LocalEngine(serve), tmp_path)


@pytest.mark.parametrize("method", ["coreset", "ocs", "reservoir", "gss"])
@pytest.mark.parametrize("arrival", ["task", "chunk"])
def test_samples_and_candidates_stay_within_the_budget_in_bytes(method: str, arrival: str):
    """64 + 12 bytes each: 2,000 bytes are 26 examples. Nothing of them is sent."""
    own = [] if method != "ocs" else ["trainer.warm_start=2", "trainer.stream_size=20"]
    budget = ["trainer.memory_size=null", "trainer.budget_bytes=2000", f"stream.arrival={arrival}"]
    federated, most = federation(f"method={method}", *ENDLESS, *budget, *own), 0
    for report, rows in federated.rounds():
        if not report.round:
            continue
        for client, state in enumerate(states(federated)):
            kept = {key: t for key, t in state.items() if key.startswith(samples.GROUP) and key != samples.NAMES}
            stored = sum(t.element_size() * t.numel() for t in kept.values())
            assert stored == 76 * len(state[samples.NAMES]) <= 2000
            held = torch.cat([state[NAMES], state.get(CANDIDATES, NONE)])
            assert torch.equal(state[samples.NAMES], held.unique())
            most = max(most, stored)
            work = next(row.work for row in rows if row.client == client and row.phase == "train")
            assert work.storage_bytes == sum(t.element_size() * t.numel() for t in state.values())
            assert work.up_bytes == record_bytes(federated.arrays)
    assert most == 26 * 76


def test_what_is_stored_is_what_arrived():
    federated = federation("method=coreset", *ENDLESS, "trainer.memory_size=20", "stream.arrival=chunk")
    list(federated.rounds())
    workload, state = federated.world.workload, states(federated)[0]
    seen = 0
    for part in range(6):
        here, arrived = workload.arrivals(0, part), workload.client_part(0, part).train
        for place in torch.nonzero(torch.isin(here, state[NAMES])).flatten():
            own = int(torch.searchsorted(state[samples.NAMES], here[place]))
            x, low, span = (state[f"sample_{key}"][own : own + 1] for key in ("x", "low", "span"))
            example = arrived[int(place)]
            assert (samples.restored(x, low, span)[0] - example["x"]).abs().max() <= float(span) / 510 + 1e-6
            assert int(state["sample_y"][own]) == int(example["y"])
            assert int(state["sample_task"][own]) == part // 2
            seen += 1
    assert seen == len(state[NAMES]) > 10


def test_an_addressable_stream_keeps_the_same_examples_either_way():
    runs = [federation("method=coreset", "stream.arrival=chunk", f"trainer.store={s}") for s in ("names", "samples")]
    for one in runs:
        list(one.rounds())
    for names, stored in zip(*map(states, runs), strict=True):
        assert torch.equal(names[NAMES], stored[NAMES])


@pytest.mark.parametrize(
    "overrides, sentence",
    [
        (["trainer.store=bytes"], "unknown value for trainer.store 'bytes'"),
        (
            ["trainer.store=samples", "trainer.input_bytes=4"],
            "trainer.input_bytes must be 1 with trainer.store=samples",
        ),
        (["stream.fresh_noise=-1"], "stream.fresh_noise must be at least 0"),
    ],
)
def test_a_wrong_setting_gets_one_sentence(overrides: list[str], sentence: str):
    with pytest.raises(ConfigError, match=sentence):
        federation("method=coreset", *overrides)
