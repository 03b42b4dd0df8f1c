"""What travels between server and clients, byte by byte."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from devices.cost import ModelCost, Passes, Work
from fedsim.errors import ConfigError
from fedsim.messages.cohort import BlockAnswer, ClientAnswer, ClientTask, Close, CohortAnswer, CohortTask
from fedsim.messages.packing import pack_answer, pack_task, unpack_answer, unpack_task
from fedsim.messages.records import (
    Instructions,
    check_extra_names,
    content_of,
    from_array,
    like,
    payload_bytes,
    record_of,
    tensors_of,
    to_array,
    update_of,
)
from fedsim.messages.updates import Broadcast, ClientUpdate
from fedsim.messages.weights import JOINED, SentWeights, is_channels_last, join_storage, joined, joined_like, named

VALUES = {
    "scalar": np.array(1.5, np.float32),
    "empty": np.zeros((0, 3), np.float32),
    "int64": np.arange(6).reshape(2, 3),
    "float16": np.arange(5, dtype=np.float16),
    "bool": np.array([True, False]),
    "strided": np.arange(20, dtype=np.float32)[::3],
    "sliced": np.arange(20.0).reshape(4, 5)[:, 1:3],
}


def model() -> ArrayRecord:
    return record_of({"w": torch.arange(6.0).reshape(2, 3), "b": torch.tensor([7.0])})


# --- arrays ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("values", VALUES.values(), ids=VALUES)
def test_array_is_flowers_own_byte_for_byte(values: np.ndarray):
    ours, flowers = to_array(values), Array(values)
    assert (ours.dtype, tuple(ours.shape), ours.stype) == (flowers.dtype, tuple(flowers.shape), flowers.stype)
    assert ours.data == flowers.data


@pytest.mark.parametrize("values", [*VALUES.values(), np.arange(6.0).reshape(2, 3).T], ids=[*VALUES, "transposed"])
def test_array_is_read_back(values: np.ndarray):
    for array in (to_array(values), Array(values)):
        back = from_array(array)
        assert (back.dtype, back.shape) == (values.dtype, values.shape)
        assert np.array_equal(back, values)


def test_array_read_without_a_copy_cannot_be_written():
    with pytest.raises(ValueError, match="read-only"):
        from_array(to_array(np.zeros(3)))[0] = 1.0


def test_record_does_not_follow_its_tensors():
    tensor = torch.zeros(2)
    record = record_of({"w": tensor})
    tensor += 1
    tensors_of(record)["w"].add_(5)
    assert tensors_of(record)["w"].tolist() == [0, 0]


# --- one array for a whole model ---------------------------------------------------------------------------------


def test_joined_weights_are_one_tensor_and_come_back_as_many():
    """First w (2 x 3, row by row), then b."""
    tensors = {"w": torch.arange(6.0).reshape(2, 3) + 10, "b": torch.tensor([20.0])}
    sent = joined_like(tensors, tensors_of(model()))
    assert sent.tensors[JOINED].tolist() == [10, 11, 12, 13, 14, 15, 20]
    back = sent.by_name(tensors_of(model()))
    assert {name: t.tolist() for name, t in back.items()} == {name: t.tolist() for name, t in tensors.items()}


def test_channels_last_tensors_travel_as_they_lie_in_memory():
    """[n, c, h, w] lies as [n, h, w, c]; what comes back has the model's names, shapes and order again."""
    weight, bias = torch.arange(2 * 3 * 2 * 2.0).reshape(2, 3, 2, 2), torch.tensor([5.0, 6.0])
    sent = {"weight": weight, "bias": bias}
    live = [weight.contiguous(memory_format=torch.channels_last), bias.clone()]
    assert is_channels_last(live)
    buffer = join_storage(live)
    assert buffer.tolist() == [*weight.permute(0, 2, 3, 1).flatten().tolist(), 5.0, 6.0]
    assert live[0].is_contiguous(memory_format=torch.channels_last)
    for weights in (joined(buffer, True), joined_like(sent, sent, True)):
        assert weights.tensors[JOINED].tolist() == buffer.tolist()
        assert {name: t.tolist() for name, t in weights.by_name(sent).items()} == {
            name: t.tolist() for name, t in sent.items()
        }


def test_copies_do_not_follow_what_they_are_of():
    live = {"w": torch.zeros(2)}
    copies = [named(live), joined(live["w"]), joined_like(live, live)]
    live["w"] += 1
    assert all(not next(iter(copy.tensors.values())).any() for copy in copies)


@pytest.mark.parametrize(
    "tensors",
    [
        {"w": torch.zeros(2, 3), "b": torch.zeros(1, dtype=torch.float64)},
        {"w": torch.zeros(3, 2), "b": torch.zeros(1)},
        {"b": torch.zeros(1), "w": torch.zeros(2, 3)},
        {"w": torch.zeros(2, 3)},
    ],
    ids=["dtype", "shape", "order", "missing"],
)
def test_weights_unlike_the_model_travel_one_by_one(tensors: dict):
    sent = joined_like(tensors, tensors_of(model()))
    assert (sent.form, list(sent.tensors)) == ("named", list(tensors))
    assert sent.by_name(tensors_of(model())) is sent.tensors


def test_laid_out_tensors_and_their_buffer_are_one_memory():
    tensors = [torch.tensor([[1.0, 2.0]]), torch.tensor(3.0)]
    buffer = join_storage(tensors)
    buffer[1] = 9.0
    tensors[1].fill_(5.0)
    assert tensors[0].tolist() == [[1.0, 9.0]]
    assert buffer.tolist() == [1.0, 9.0, 5.0]


@pytest.mark.parametrize(
    "tensors", [[torch.zeros(2), torch.zeros(2, dtype=torch.int64)], [torch.zeros(2), torch.zeros(2, 3).T]]
)
def test_tensors_that_cannot_share_a_buffer_stay_where_they_are(tensors: list):
    places = [t.data_ptr() for t in tensors]
    assert join_storage(tensors) is None
    assert [t.data_ptr() for t in tensors] == places


# --- bytes -------------------------------------------------------------------------------------------------------


def test_payload_is_itemsize_times_elements_without_the_clients_state():
    """6 + 1 float32 are 28 bytes, 4 int64 are 32, 5 float16 are 10; settings, metrics and state travel free."""
    content = RecordDict(
        {
            "arrays": model(),
            "counts": ArrayRecord({"n": to_array(np.arange(4))}),
            "halves": ArrayRecord({"h": to_array(np.zeros(5, np.float16))}),
            "state": ArrayRecord({"coreset": to_array(np.arange(1000))}),
            "config": ConfigRecord({"server-round": 1}),
            "metrics": MetricRecord({"num-examples": 3}),
        }
    )
    assert payload_bytes(content) == 28 + 32 + 10


def test_joining_does_not_change_the_payload():
    tensors = {"w": torch.zeros(2, 3), "b": torch.zeros(1)}
    assert joined_like(tensors, tensors).nbytes == named(tensors).nbytes == 28


# --- many clients in one message ---------------------------------------------------------------------------------


def cohort(*clients: ClientTask, **more: Any) -> CohortTask:
    return CohortTask(4, "train", clients, "{}", **more)


def test_what_clients_share_travels_once_and_is_one_object_again():
    weights = tensors_of(model())
    sent = Broadcast(4, weights, {"mask": {"keep": torch.tensor([True, False])}}, {"lr": 0.5, "name": "a"})
    other = replace(sent, settings={"lr": 0.1})
    content = pack_task(cohort(ClientTask(3, sent), ClientTask(5, sent, block=1), ClientTask(9, other, block=1)))
    assert len(content.array_records) == 2  # the weights and the mask
    came = unpack_task(content).clients
    assert [task.client for task in came] == [3, 5, 9]
    assert came[0].broadcast is came[1].broadcast
    assert came[0].broadcast.weights is came[2].broadcast.weights
    assert came[0].broadcast.extras["mask"] is came[2].broadcast.extras["mask"]
    assert [task.broadcast.settings for task in came[1:]] == [sent.settings, other.settings]
    assert came[0].broadcast.extra("mask")["keep"].tolist() == [True, False]


def test_equal_tensors_of_different_clients_stay_apart():
    one, two = (Broadcast(4, tensors_of(model())) for _ in range(2))
    came = unpack_task(pack_task(cohort(ClientTask(0, one), ClientTask(1, two)))).clients
    assert came[0].broadcast.weights is not came[1].broadcast.weights


def test_task_survives_the_journey():
    task = ClientTask(7, Broadcast(4, {}), {"rows": torch.tensor([3, 1])}, 2, 6, 28, 1e6)
    sent = cohort(task, close=Close(3.5, None))
    came = unpack_task(pack_task(sent))
    (back,) = came.clients
    assert (came.round, came.phase, came.settings, came.close) == (4, "train", "{}", Close(3.5, None))
    assert (back.client, back.block, back.group, back.down_bytes, back.expected_flops) == (7, 2, 6, 28, 1e6)
    assert back.state["rows"].tolist() == [3, 1]


def test_answer_survives_the_journey():
    work = Work((Passes(ModelCost("net", 1.0, 2.0, 4, 0), 8, 2, 1),), 10, 11, 12, 13)
    weights = SentWeights({JOINED: torch.arange(3.0)}, "joined last")
    extras = {"means": {"m": torch.ones(2, dtype=torch.float16)}}
    good = ClientAnswer(3, work=work, num_examples=8, metrics={"loss": 0.5}, weights=weights, extras=extras)
    bad = ClientAnswer(4, "failed", "no luck", "TRACE")
    block = BlockAnswer(1, (3, 5), 12.0, SentWeights({"w": torch.tensor([1.0], dtype=torch.float64)}))
    came = unpack_answer(pack_answer(CohortAnswer((good, bad), (block, BlockAnswer(2)))))
    back, failed = came.clients
    assert (back.work, back.num_examples, back.metrics, back.outcome) == (work, 8, {"loss": 0.5}, "completed")
    assert (back.weights.form, back.weights.tensors[JOINED].tolist()) == ("joined last", [0, 1, 2])
    assert back.extras["means"]["m"].dtype == torch.float16
    assert failed == bad
    assert (came.sums[0].clients, came.sums[0].weight, came.sums[0].total.tensors["w"].tolist()) == (
        (3, 5),
        12.0,
        [1.0],
    )
    assert came.sums[1] == BlockAnswer(2)


def test_cohort_of_nobody_has_no_clients():
    assert unpack_task(pack_task(cohort())).clients == ()
    assert unpack_answer(pack_answer(CohortAnswer(()))) == CohortAnswer(())


def test_message_that_is_no_cohort_is_refused():
    with pytest.raises(ValueError, match=r"^not a cohort message: no 'cohort' record among \['arrays'\]$"):
        unpack_task(RecordDict({"arrays": model()}))


def of_blocks(*blocks: int, groups: Sequence[int | None] = (), close: Close | None = None) -> list[list[int]]:
    """The units of clients 0, 1, ... in these blocks and groups."""
    told = groups or [None] * len(blocks)
    tasks = [
        ClientTask(n, Broadcast(1, {}), block=b, group=g) for n, (b, g) in enumerate(zip(blocks, told, strict=True))
    ]
    return [[task.client for task in unit] for unit in cohort(*tasks, close=close).units()]


def test_units_are_whole_blocks_where_they_are_added_up_and_whole_groups():
    close = Close(0.0, None)
    assert of_blocks(0, 0, 1, 1) == [[0], [1], [2], [3]]
    assert of_blocks(0, 0, 1, 1, close=close) == [[0, 1], [2, 3]]
    assert of_blocks(0, 0, 1, 1, groups=[0, 0, 0, 3]) == [[0, 1, 2], [3]]
    assert of_blocks(0, 0, 1, 1, groups=[0, 0, 0, 3], close=close) == [[0, 1, 2, 3]]


def test_one_task_becomes_one_per_client():
    """Each answers with its own update; the weights they share stay one object."""
    sent = Broadcast(4, tensors_of(model()))
    alone = cohort(
        ClientTask(4, sent, group=4), ClientTask(7, sent, block=1, group=4), close=Close(0.0, 1.0)
    ).one_by_one()
    assert [(t.clients[0].client, t.clients[0].block, t.clients[0].group, t.close) for t in alone] == [
        (4, 0, None, None),
        (7, 1, None, None),
    ]
    assert all(task.clients[0].broadcast is sent for task in alone)


# --- what a strategy returns -------------------------------------------------------------------------------------


def test_float64_of_a_strategy_becomes_the_models_dtypes_in_its_order():
    counted = record_of({"w": torch.zeros(2), "n": torch.tensor(3)})
    returned = ArrayRecord({"n": to_array(np.array(7.0)), "w": to_array(np.array([0.1, 0.2]))})
    cast = like(returned, counted)
    assert [(name, array.dtype) for name, array in cast.items()] == [("w", "float32"), ("n", "int64")]
    assert from_array(cast["w"]).tolist() == np.array([0.1, 0.2], np.float32).tolist()
    assert from_array(cast["n"]) == 7


def test_weights_of_other_names_are_refused():
    with pytest.raises(ValueError, match=r"^the strategy returned weights named \['w'\], the model has \['b', 'w'\]$"):
        like(record_of({"w": torch.zeros(2, 3)}), model())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weights_of_another_shape_are_refused(dtype: torch.dtype):
    returned = record_of({"w": torch.zeros(3, 2, dtype=dtype), "b": torch.zeros(1, dtype=dtype)})
    with pytest.raises(ValueError, match=r"^the strategy returned w as \(3, 2\), the model has \(2, 3\)$"):
        like(returned, model())


# --- broadcast and update ----------------------------------------------------------------------------------------


def test_broadcast_survives_the_journey():
    sent = Broadcast(3, tensors_of(model()), {"mask": {"keep": torch.tensor([1, 0])}}, {"lr": 0.5})
    packed = model()
    content = content_of(sent, packed)
    came = Instructions().broadcast(content, 3)
    assert content["arrays"] is packed
    assert (came.round, came.settings) == (3, {"lr": 0.5, "server-round": 3})
    assert came.extra("mask")["keep"].tolist() == [1, 0]


def test_instructions_unpack_what_clients_share_once():
    packed, read = model(), Instructions()
    one, two = (content_of(Broadcast(3, {}, settings={"client": n}), packed) for n in (1, 2))
    assert read.broadcast(one, 3) is read.broadcast(one, 3)
    assert read.broadcast(one, 3).weights is read.broadcast(two, 3).weights
    assert read.broadcast(two, 3).settings["client"] == 2


def test_update_is_read_from_a_reply():
    metrics = MetricRecord({"num-examples": 8, "train_loss": 0.5})
    means = record_of({"m": torch.ones(2)})
    came = update_of(RecordDict({"arrays": model(), "metrics": metrics, "means": means, "state": model()}), 5)
    assert (came.client_id, came.num_examples, came.metrics) == (5, 8, {"train_loss": 0.5})
    assert came.weights["w"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert list(came.extras) == ["means"]
    assert came.extra("means")["m"].tolist() == [1, 1]


@pytest.mark.parametrize("name", ["arrays", "config", "metrics", "state"])
def test_extra_named_like_a_reserved_record_is_refused(name: str):
    extras, weights = {name: {"x": torch.zeros(1)}}, tensors_of(model())
    sentence = f"^an extra record may not be called '{name}'; that name is taken$"
    with pytest.raises(ValueError, match=sentence):
        check_extra_names(extras)
    with pytest.raises(ValueError, match=sentence):
        content_of(Broadcast(1, weights, extras), model())


def test_missing_extra_names_what_did_come():
    pair = "use a pair of strategy and trainer that sends it"
    with pytest.raises(ConfigError) as caught:
        Broadcast(3, {}, {"mask": {}, "anchor": {}}).extra("means")
    assert caught.value.args == (f"round 3 brought no 'means' (only ['anchor', 'mask']); {pair}",)
    with pytest.raises(ConfigError) as caught:
        ClientUpdate(7, 1, {}).extra("means")
    assert caught.value.args == (f"client 7 brought no 'means' (only []); {pair}",)
