"""The contract of every method, uplink, compression, stream and model on a real GPU; skipped where there is none."""

from __future__ import annotations

import pytest
import torch
from test_card import COMPRESSIONS, EVERY, METHODS, STREAMS, UPLINKS
from test_methods import assert_contract, federate
from torch import nn

from clients.slots.record import GraphRecorder
from clients.worker import worker_for
from fedsim.models.dropout import replace_dropout, seed_dropout
from fedsim.report.rounds import weights_sha256
from fedsim.settings.build import build_world
from fedsim.workloads.base import Examples

pytestmark = pytest.mark.gpu
CUDA = "engine.device=cuda"
CONTRACT = [*METHODS, *UPLINKS, *COMPRESSIONS, *STREAMS]


@pytest.mark.parametrize("case", EVERY)
def test_everything_keeps_the_contract_on_a_gpu(case: str):
    result = federate(CUDA, base=EVERY[case])
    assert_contract(result, rounds=result.federation.settings.rounds)
    completed = [c for c in result.clients if c.phase == "train"]
    assert all(c.outcome == "completed" for c in completed)
    assert weights_sha256(result.federation.arrays) != weights_sha256(result.first), "nothing was learnt"


@pytest.mark.parametrize("case", CONTRACT)
def test_work_on_a_gpu_is_that_on_the_cpu(case: str):
    """What a client computes, holds and sends goes by its network; the first round's is not moved by rounding."""
    there, here = (federate(*device, "rounds=1", base=EVERY[case]) for device in ((CUDA,), ()))
    assert [(c.client_id, c.phase, c.outcome) for c in there.clients] == [
        (c.client_id, c.phase, c.outcome) for c in here.clients
    ]
    for ours, theirs in zip(there.clients, here.clients, strict=True):
        assert ours.work.flops == pytest.approx(theirs.work.flops)
        assert ours.work.peak_memory_bytes == pytest.approx(theirs.work.peak_memory_bytes)


@pytest.mark.parametrize("case", ["method=fedavg", "method=ocs", "vgg fedmix", "vgg ppp"])
def test_a_run_on_a_gpu_repeats(case: str):
    hashes = set()
    for drawn in (0, 5):
        torch.rand(drawn, device="cuda")
        build_world.cache_clear()
        worker_for.cache_clear()
        hashes.add(weights_sha256(federate(CUDA, base=EVERY[case]).federation.arrays))
    assert len(hashes) == 1


def test_work_that_waits_for_the_host_is_done_unrecorded_and_other_work_recorded_after_it():
    x, total = torch.ones(8, device="cuda"), torch.zeros((), device="cuda")

    def waits() -> None:
        total.add_(x.sum().item())

    def does_not() -> None:
        total.add_(x.sum())

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        recorder = GraphRecorder(stream)
        assert recorder.record(waits) is None
        replay = recorder.record(does_not)
        assert replay is not None
        total.zero_()
        replay()
    stream.synchronize()
    assert total.item() == 8


def test_examples_on_their_way_to_a_card_are_not_waited_for():
    rows = torch.arange(24.0).reshape(4, 6)
    there = Examples({"x": rows}, torch.tensor([2, 0]))
    torch.cuda.set_sync_debug_mode("error")
    try:
        placed = there.materialise("cuda").gather(torch.tensor([1, 0]))["x"]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(placed.cpu(), rows[[0, 2]])


def test_after_a_recording_that_failed_memory_comes_back():
    """Only a recording meets the wait. What another stream has used is free again when that is through with it."""
    stream, x = torch.cuda.Stream(), torch.ones(8, device="cuda")

    def fails() -> None:
        x.add_(1)
        if torch.cuda.is_current_stream_capturing():
            stream.synchronize()

    def active_bytes() -> int:
        return int(torch.cuda.memory_stats()["active_bytes.all.current"])

    with torch.cuda.stream(stream):
        assert GraphRecorder(stream).record(fails) is None
        before = active_bytes()
        lent = torch.ones(2**20, device="cuda")
        lent.record_stream(torch.cuda.default_stream())
        del lent
        torch.cuda.synchronize()
        small = torch.ones(1, device="cuda")  # torch looks for what is free when it is asked for memory
        assert active_bytes() <= before + 2**10, small
        assert torch.rand(1, device="cuda").isfinite(), "and its generator draws"


def test_masks_of_dropout_are_those_of_the_cpu_eager_and_captured():
    """Three steps each; the captured one replays, and its counter moves on by itself."""
    x, found = torch.ones(64, 300), []
    for device in ("cpu", "cuda"):
        model = nn.Sequential(nn.Linear(1, 1), nn.Dropout(0.3)).to(device)
        replace_dropout(model)
        seed_dropout(model, 9)
        found.append([model[1](x.to(device)).cpu() for _ in range(3)])
    stream, given = torch.cuda.Stream(), x.to("cuda")
    with torch.cuda.stream(stream):
        model[1](given)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            out = model[1](given)
    seed_dropout(model, 9)
    replayed = []
    for _ in range(3):
        graph.replay()
        torch.cuda.synchronize()
        replayed.append(out.cpu())
    for masks in (found[1], replayed):
        assert all(torch.equal(a, b) for a, b in zip(masks, found[0], strict=True))
