"""Compressed updates: exact identities, what travels, and that any strategy sees whole weights again."""

import json
import math

import pytest
import torch
from conftest import task_of

from clients.worker import Worker
from devices.compression.updates import Packed, UpdateCompressor, restore
from fedsim.grid.server_half import is_plain_mean
from fedsim.messages.records import record_of, tensors_of
from fedsim.messages.uplink import BUFFERS, COUNTS, INDEX, RESIDUAL, SCALE, VALUES, WHICH, compressed, decompressed
from fedsim.messages.weights import bytes_of
from fedsim.report.rounds import weights_sha256
from fedsim.settings.build import build_world
from fedsim.settings.groups import options

DRAW = torch.Generator().manual_seed(0)


def a_step(values: list[float], sizes: list[int], **settings) -> tuple[Packed, torch.Tensor]:
    packed = UpdateCompressor(**settings).compress(torch.tensor(values), sizes, DRAW)
    return packed, restore(packed, sizes)


def test_largest_in_magnitude_by_hand():
    packed, back = a_step([0.1, -3.0, 2.0, 0.0, -0.5], [2, 3], select="top", ratio=0.4)
    assert (packed.values.tolist(), packed.index.tolist()) == ([-3.0, 2.0], [1, 2])
    assert (packed.index.dtype, packed.wire_bytes) == (torch.int32, 2 * 4 + 2 * 4)
    assert back.tolist() == [0.0, -3.0, 2.0, 0.0, 0.0]


def test_integers_have_a_scale_for_each_tensor_by_hand():
    """Largest 1.27 and 254: steps 0.01 and 2; a tensor of zeros costs nothing but its scale."""
    packed, back = a_step([1.27, -0.006, 254.0, 3.2, 0.0], [2, 2, 1], bits=8)
    assert packed.values.tolist() == [127, -1, 127, 2, 0]
    torch.testing.assert_close(packed.scale, torch.tensor([0.01, 2.0, 1.0]))
    torch.testing.assert_close(back, torch.tensor([1.27, -0.01, 254.0, 4.0, 0.0]))
    assert packed.wire_bytes == 5 + 3 * 4


def test_both_together_take_five_bytes_an_entry():
    packed, back = a_step([4.0, 1.0, -2.0, 0.5], [4], select="top", ratio=0.5, bits=8)
    assert packed.wire_bytes == 2 * 5 + 4
    torch.testing.assert_close(back, torch.tensor([4.0, 0.0, -64 * 4 / 127, 0.0]))  # -63.5 to even


def test_random_places_cost_one_seed_and_come_back():
    update = torch.arange(1.0, 101.0)
    packed = UpdateCompressor("random", 0.1).compress(update, [60, 40], torch.Generator().manual_seed(5))
    back = restore(packed, [60, 40])
    assert packed.wire_bytes == 10 * 4 + 8
    assert int((back != 0).sum()) == 10
    assert torch.equal(back[back != 0], update[back != 0])


@pytest.mark.parametrize("share, index", [(0.5, torch.uint8), (0.01, torch.int32)])
def test_what_changed_travels_without_loss_with_the_shorter_places(share: float, index: torch.dtype):
    update = torch.randn(1001, generator=torch.Generator().manual_seed(1))
    update[int(share * 1001) :] = 0.0
    update = update[torch.randperm(1001, generator=torch.Generator().manual_seed(2))]
    packed, back = a_step(update.tolist(), [1001], select="nonzero")
    assert packed.index.dtype == index
    assert torch.equal(back, update)
    some = int((update != 0).sum())
    assert packed.wire_bytes == 4 * some + min(math.ceil(1001 / 8), 4 * some)
    assert torch.equal(a_step([0.0, 0.0], [2], select="nonzero")[1], torch.zeros(2))


def test_stochastic_rounding_has_no_bias():
    """The mean of 4000 roundings of each value is within 4 standard errors, at most half a step each."""
    update = torch.tensor([1.27, 0.0123, -0.4567, 0.003])
    one = UpdateCompressor(bits=8, stochastic=True)
    draw = torch.Generator().manual_seed(3)
    back = torch.stack([restore(one.compress(update, [4], draw), [4]) for _ in range(4000)])
    assert float((back - update).abs().max()) <= 0.01 + 1e-6
    assert bool(((back.mean(0) - update).abs() <= 4 * 0.005 / math.sqrt(4000) + 1e-6).all())
    nearest = restore(UpdateCompressor(bits=8).compress(update, [4], draw), [4])
    assert float((nearest - update).abs().max()) <= 0.005 + 1e-6


@pytest.mark.parametrize(
    "settings",
    [
        {"bits": 8},
        {"bits": 8, "stochastic": True},
        {"select": "top", "ratio": 0.05},
        {"select": "random", "ratio": 0.05},
        {"select": "top", "ratio": 0.05, "bits": 8},
    ],
)
def test_nothing_is_lost_over_many_rounds(settings):
    """Sum of what arrived plus the last residual is the sum of all updates, whatever the compressor."""
    one, draw = UpdateCompressor(**settings), torch.Generator().manual_seed(4)
    names, state = ["a", "b"], {}
    shapes = {"a": (30, 10), "b": (50,)}
    total, arrived = torch.zeros(350), torch.zeros(350)
    for number in range(200):
        received = {n: torch.randn(s, generator=draw) for n, s in shapes.items()}
        weights = {n: t + 0.1 * torch.randn(t.shape, generator=draw) for n, t in received.items()}
        sent = compressed(one, weights, received, names, state, torch.Generator().manual_seed(number))
        back = decompressed(sent, received).tensors
        total += torch.cat([(weights[n] - received[n]).flatten() for n in names])
        arrived += torch.cat([(back[n] - received[n]).flatten() for n in names])
    assert float((arrived + state[RESIDUAL] - total).abs().max()) < 1e-4
    assert float(state[RESIDUAL].abs().max()) > 0


@pytest.mark.parametrize("settings, exact", [({"bits": 8}, False), ({"select": "top"}, True)])
@pytest.mark.parametrize("largest", [4.0, 70_000.0])
def test_buffers_and_counts_travel_whole_in_an_array_each(settings: dict, exact: bool, largest: float):
    """Beside 8-bit values in half precision, unless that cannot hold them."""
    received = {
        "w": torch.ones(4),
        "running_mean": torch.zeros(2),
        "running_var": torch.zeros(2, 1),
        "count": torch.tensor(3),
        "half": torch.ones(2).half(),
    }
    weights = {"w": torch.full((4,), 1.5), "running_mean": torch.tensor([0.123, largest]), "count": torch.tensor(7)}
    weights |= {"running_var": torch.tensor([[2.0], [3.0]]), "half": torch.full((2,), 2.0).half()}
    sent = compressed(UpdateCompressor(**settings), weights, received, {"w"}, {}, DRAW)
    assert set(sent.tensors) - {SCALE, INDEX} == {VALUES, BUFFERS, COUNTS, WHICH, "half"}
    assert sent.tensors[BUFFERS].dtype == (torch.float32 if exact or largest > 65_504 else torch.float16)
    back = decompressed(sent, received).tensors
    assert list(back) == list(received)
    assert all((back[name].shape, back[name].dtype) == (t.shape, t.dtype) for name, t in weights.items())
    for name in ("running_mean", "running_var"):
        rtol = 0 if sent.tensors[BUFFERS].dtype == torch.float32 else 5e-4
        torch.testing.assert_close(back[name], weights[name], rtol=rtol, atol=0)
    assert torch.equal(back["half"], weights["half"])
    assert int(back["count"]) == 7
    torch.testing.assert_close(back["w"], weights["w"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_trained_weights_of_other_precision_are_compressed_too(dtype: torch.dtype):
    """A change of 0.5 and one of 0.25 of four: top takes two, as 4 + 4 bytes each, and they come back in the dtype."""
    received, weights = {"w": torch.ones(4, dtype=dtype)}, {"w": torch.tensor([1.5, 1.0, 1.25, 1.0], dtype=dtype)}
    sent = compressed(UpdateCompressor(select="top", ratio=0.5), weights, received, {"w"}, {}, DRAW)
    assert sent.nbytes == 2 * (4 + 4)
    assert torch.equal(decompressed(sent, received).tensors["w"], weights["w"])


def test_an_update_without_a_tensor_to_compress_is_empty():
    """Each tensor was cut to another shape, as a narrowed network's may be: all travel whole."""
    sent = compressed(UpdateCompressor(bits=8), {"w": torch.ones(2)}, {"w": torch.ones(4)}, {"w"}, {}, DRAW)
    assert {name: tuple(t.shape) for name, t in sent.tensors.items() if t.numel()} == {"w": (2,)}


def test_tensors_that_stay_away_or_change_shape_are_no_obstacle():
    """A personal head that is not sent, and a part that the client cut itself: the rest is compressed."""
    received = {"body": torch.zeros(4), "head": torch.ones(3), "cut": torch.ones(6)}
    weights = {"body": torch.ones(4), "cut": torch.tensor([2.0, 5.0])}
    sent = compressed(UpdateCompressor(bits=8), weights, received, set(received), {}, DRAW)
    assert set(sent.tensors) == {VALUES, SCALE, WHICH, "cut"}
    back = decompressed(sent, received).tensors
    assert list(back) == ["body", "cut"]
    assert torch.equal(back["body"], weights["body"])
    assert torch.equal(back["cut"], weights["cut"])


def test_a_residual_of_another_part_of_the_network_is_dropped():
    state = {RESIDUAL: torch.ones(7)}
    received = {"w": torch.zeros(4)}
    compressed(UpdateCompressor(bits=8), {"w": torch.ones(4)}, received, {"w"}, state, DRAW)
    assert state[RESIDUAL].shape == (4,)
    none = {}
    compressed(UpdateCompressor(bits=8, error_feedback=False), {"w": torch.ones(4)}, received, {"w"}, none, DRAW)
    assert none == {}


# --- in runs ----------------------------------------------------------------------------------------------------------


def tensors_after(federation, *overrides: str) -> dict[str, torch.Tensor]:
    made = federation(*overrides)
    list(made.rounds())
    return tensors_of(made.arrays)


@pytest.mark.parametrize("strategy", ["fedavg", "edge_mean", "fedmedian"])
def test_everything_in_floats_is_the_plain_run_up_to_rounding(federation, strategy: str):
    """Top-k of all coordinates: averaged by workers, by the driver, and seen update by update."""
    plain = tensors_after(federation, f"strategy={strategy}")
    same = tensors_after(federation, f"strategy={strategy}", "uplink=topk", "uplink.ratio=1.0")
    assert not all(
        torch.equal(plain[n], t) for n, t in tensors_after(federation, "strategy=edge_mean", "seed=2").items()
    )
    for name, tensor in plain.items():
        torch.testing.assert_close(same[name], tensor, rtol=1e-5, atol=1e-6)


def test_without_compression_the_run_is_the_same_to_the_byte(federation):
    made, other = federation(), federation("uplink=none", "uplink.stochastic=true", "compression=none")
    list(made.rounds())
    list(other.rounds())
    assert weights_sha256(made.arrays) == weights_sha256(other.arrays)
    assert not len(other.grid.store)


@pytest.mark.parametrize("uplink", sorted(set(options("uplink")) - {"none", "secagg"}))
def test_bytes_are_those_of_the_compressed_arrays_and_state_stays_on_the_device(federation, uplink: str):
    """Blobs of 32 numbers, MLP 32-64-10: 2,762 parameters in four tensors."""
    made = federation(f"uplink={uplink}", "workload.input_shape=[32]", "workload.num_classes=10", "rounds=1")
    rows = [client for _, clients in made.rounds() for client in clients if client.phase == "train"]
    total = 32 * 64 + 64 + 64 * 10 + 10
    k = math.ceil(0.01 * total)
    exact = {"int8": total + 16, "topk": 8 * k, "randomk": 4 * k + 8}
    for row in rows:
        assert row.work.down_bytes == 4 * total
        if uplink in exact:
            assert row.work.up_bytes == exact[uplink]
            assert row.work.storage_bytes == 4 * total
        else:
            assert 0 < row.work.up_bytes <= 4 * total + math.ceil(total / 8)
            assert row.work.storage_bytes == 0
    assert len(made.grid.store) == (3 if uplink in exact else 0)
    assert is_plain_mean(made.strategy)


def test_averaging_in_workers_is_averaging_by_the_driver(federation):
    """One worker sums blocks of decompressed updates; over-selection makes the driver do it."""
    by_worker, by_driver = federation("uplink=int8"), federation("uplink=int8")
    by_driver.grid.keep = 3
    list(by_worker.rounds())
    list(by_driver.rounds())
    assert weights_sha256(by_worker.arrays) == weights_sha256(by_driver.arrays)


def test_narrowed_networks_are_compressed_too(federation):
    made = federation("method=heterofl", "+strategy.tiers.reference=0.5", "uplink=int8", "model.hidden=[8]", "rounds=1")
    rows = [client for _, clients in made.rounds() for client in clients if client.phase == "train"]
    plain = federation("method=heterofl", "+strategy.tiers.reference=0.5", "model.hidden=[8]", "rounds=1")
    floats = [client for _, clients in plain.rounds() for client in clients if client.phase == "train"]
    tensors, classes = 4, 2  # bytes: a bit for each of ten classes goes up as it is
    narrow = [4 * (r.work.up_bytes - 4 * tensors - classes) for r in rows]
    assert narrow == [r.work.up_bytes - classes for r in floats]


RESNET = ("model=resnet8", "workload.input_shape=[3,16,16]", "workload.num_classes=10")
BCRESNET = ("model=bcresnet", "workload.input_shape=[1,40,8]", "workload.num_classes=12")


@pytest.mark.parametrize(
    "model, headers, least",
    [
        (RESNET, False, 3.8),
        (RESNET, True, 3.8),
        (BCRESNET, True, 4.6),
        ((*BCRESNET, "model.tau=8"), True, 3.8),
        (BCRESNET, False, 3.1),
    ],
)
def test_int8_with_packing_is_a_quarter_of_a_network_of_many_tensors(settings, model, headers: bool, least: float):
    """resnet8: 32 tensors, all of them weights. BC-ResNet: 195, of which 90 are statistics that stay in 16 bits.

    With Flower's headers of 128 bytes a tensor, as they cross a network; without them, as reports count.
    """
    made = settings(*model, "uplink=int8")
    worker = Worker(build_world(json.dumps(made)))
    whole = dict(worker.model.state_dict())
    weights = {n: t + (0.01 * torch.randn(t.shape)).to(t.dtype) for n, t in whole.items()}
    sent = compressed(worker.uplink, weights, whole, worker.roles.trained, {}, DRAW)
    assert len(sent.tensors) == (2 if model == RESNET else 5)

    def size(tensors: dict[str, torch.Tensor]) -> int:
        return sum(len(a.data) for a in record_of(tensors).values()) if headers else bytes_of(tensors)

    assert size(whole) / size(sent.tensors) > least


def test_a_lost_reply_keeps_the_residual(federation):
    """A client whose reply comes too late has the residual that it had before, and an absent one too."""
    made = federation("uplink=topk", "rounds=1", "cohort=6")
    list(made.rounds())
    before = {i: made.grid.store.get(i)[RESIDUAL] for i in range(6)}
    made.grid.deadline_s = 1e-9
    made.train(2)
    assert {r.outcome for r in made.grid.take_reports()} == {"late"}
    assert all(torch.equal(made.grid.store.get(i)[RESIDUAL], before[i]) for i in range(6))


def test_records_of_a_compressed_reply(federation):
    made = federation("uplink=topk", "uplink.bits=8")
    message = made.instructions(1)[0]
    worker, task = Worker(made.world), task_of(message.content, message.metadata.dst_node_id, 1)
    answer = worker.serve_one("train", task)
    assert (answer.weights.form, set(answer.weights.tensors)) == ("compressed", {VALUES, INDEX, SCALE})
    assert answer.work.up_bytes == answer.weights.nbytes
    assert set(answer.state) == {RESIDUAL}
    assert answer.weights.tensors[VALUES].dtype == torch.int8
