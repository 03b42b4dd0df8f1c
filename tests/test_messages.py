"""What travels between server and clients, byte by byte."""

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from fedsim.messages.records import (
    PACKED,
    Broadcast,
    ClientUpdate,
    broadcast_of,
    cohort_header,
    content_of,
    content_of_update,
    from_array,
    is_channels_last,
    lay_out,
    like,
    pack_cohort,
    packed_record,
    payload_bytes,
    record_like,
    record_of,
    split_cohort,
    tensors_of,
    to_array,
    unpack_cohort,
    unpacked,
    update_of,
)

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


def test_packed_weights_are_one_array_and_come_back_as_many():
    """First w (2 x 3, row by row), then b."""
    tensors = {"w": torch.arange(6.0).reshape(2, 3) + 10, "b": torch.tensor([20.0])}
    record = record_like(tensors, model())
    assert list(record) == [PACKED]
    assert from_array(record[PACKED]).tolist() == [10, 11, 12, 13, 14, 15, 20]
    back = unpacked(record, model())
    assert {name: array.data for name, array in back.items()} == {n: a.data for n, a in record_of(tensors).items()}


def test_channels_last_tensors_travel_as_they_lie_in_memory():
    """[n, c, h, w] lies as [n, h, w, c]; what comes back has the model's names, shapes and order again."""
    weight, bias = torch.arange(2 * 3 * 2 * 2.0).reshape(2, 3, 2, 2), torch.tensor([5.0, 6.0])
    sent = record_of({"weight": weight, "bias": bias})
    live = [weight.contiguous(memory_format=torch.channels_last), bias.clone()]
    assert is_channels_last(live)
    buffer = lay_out(live)
    assert buffer.tolist() == [*weight.permute(0, 2, 3, 1).flatten().tolist(), 5.0, 6.0]
    assert live[0].is_contiguous(memory_format=torch.channels_last)
    for packed in (packed_record(buffer, True), record_like({"weight": weight, "bias": bias}, sent, True)):
        (array,) = packed.values()
        assert from_array(array).tolist() == buffer.tolist()
        back = unpacked(packed, sent)
        assert {name: a.data for name, a in back.items()} == {name: a.data for name, a in sent.items()}


def test_one_message_becomes_one_per_client():
    """Per-client entries of the header are split; the weights they share stay one object."""
    weights, settings = model(), ConfigRecord({"json": "{}"})
    parts = [RecordDict({"arrays": weights, "config": ConfigRecord({"lr": lr})}) for lr in (0.1, 0.2)]
    header = {"round": 3, "clients": [4, 7], "blocks": [0, 1], "each": ["clients", "blocks"], "sums": {}}
    alone = split_cohort(pack_cohort(header, parts, settings))
    assert [cohort_header(c) for c in alone] == [
        {**header, "clients": [client], "blocks": [block], "separate": True} for client, block in ((4, 0), (7, 1))
    ]
    for content, lr in zip(alone, (0.1, 0.2), strict=True):
        (part,) = unpack_cohort(content)[1]
        assert (part["config"]["lr"], part["arrays"], content["settings"]) == (lr, weights, settings)
        assert part["arrays"] is weights


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
    record = record_like(tensors, model())
    assert list(record) == list(tensors)
    assert unpacked(record, model()) is record


def test_laid_out_tensors_and_their_buffer_are_one_memory():
    tensors = [torch.tensor([[1.0, 2.0]]), torch.tensor(3.0)]
    buffer = lay_out(tensors)
    buffer[1] = 9.0
    tensors[1].fill_(5.0)
    assert tensors[0].tolist() == [[1.0, 9.0]]
    assert buffer.tolist() == [1.0, 9.0, 5.0]


@pytest.mark.parametrize(
    "tensors", [[torch.zeros(2), torch.zeros(2, dtype=torch.int64)], [torch.zeros(2), torch.zeros(2, 3).T]]
)
def test_tensors_that_cannot_share_a_buffer_stay_where_they_are(tensors: list):
    places = [t.data_ptr() for t in tensors]
    assert lay_out(tensors) is None
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


def test_packing_does_not_change_the_payload():
    packed = record_like({"w": torch.zeros(2, 3), "b": torch.zeros(1)}, model())
    assert payload_bytes(RecordDict({"arrays": packed})) == payload_bytes(RecordDict({"arrays": model()})) == 28


# --- many clients in one message ---------------------------------------------------------------------------------


def test_shared_record_travels_once_and_is_one_object_again():
    shared, own = model(), [ConfigRecord({"client": i}) for i in range(3)]
    content = pack_cohort({"round": 4}, [RecordDict({"arrays": shared, "config": own[i]}) for i in range(3)])
    assert len(content.array_records) == 1
    header, parts = unpack_cohort(content)
    assert header == {"round": 4}
    assert [part["config"]["client"] for part in parts] == [0, 1, 2]
    assert parts[0]["arrays"] is parts[1]["arrays"] is parts[2]["arrays"]


def test_equal_records_of_different_clients_stay_apart():
    parts = [RecordDict({"arrays": model()}), RecordDict({"arrays": model()})]
    _, back = unpack_cohort(pack_cohort({}, parts))
    assert back[0]["arrays"] is not back[1]["arrays"]


def test_cohort_without_parts_has_none():
    assert unpack_cohort(pack_cohort({"clients": []}, [])) == ({"clients": []}, [])


def test_message_that_is_no_cohort_is_refused():
    with pytest.raises(ValueError, match=r"^not a cohort message: no 'cohort' record among \['arrays'\]$"):
        unpack_cohort(RecordDict({"arrays": model()}))


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
    came = broadcast_of(content, sent.weights, 3)
    assert content["arrays"] is packed
    assert (came.round, came.settings) == (3, {"lr": 0.5, "server-round": 3})
    assert came.extra("mask")["keep"].tolist() == [1, 0]


def test_update_survives_the_journey():
    sent = ClientUpdate(5, 8, tensors_of(model()), {"train_loss": 0.5}, {"means": {"m": torch.ones(2)}})
    came = update_of(RecordDict({**content_of_update(sent, model()), "state": model()}), 5)
    came_weights = unpacked(record_of(came.weights), model())
    assert (came.client_id, came.num_examples, came.metrics) == (5, 8, {"train_loss": 0.5})
    assert {n: a.data for n, a in came_weights.items()} == {n: a.data for n, a in model().items()}
    assert list(came.extras) == ["means"]
    assert came.extra("means")["m"].tolist() == [1, 1]


@pytest.mark.parametrize("name", ["arrays", "config", "metrics", "state"])
def test_extra_named_like_a_reserved_record_is_refused(name: str):
    extras, weights = {name: {"x": torch.zeros(1)}}, tensors_of(model())
    sentence = f"^an extra record may not be called '{name}'; that name is taken$"
    with pytest.raises(ValueError, match=sentence):
        content_of_update(ClientUpdate(0, 1, weights, extras=extras), model())
    with pytest.raises(ValueError, match=sentence):
        content_of(Broadcast(1, weights, extras), model())


def test_missing_extra_names_what_did_come():
    pair = "use a pair of strategy and trainer that sends it"
    with pytest.raises(KeyError) as caught:
        Broadcast(3, {}, {"mask": {}, "anchor": {}}).extra("means")
    assert caught.value.args == (f"round 3 brought no 'means' (only ['anchor', 'mask']); {pair}",)
    with pytest.raises(KeyError) as caught:
        ClientUpdate(7, 1, {}).extra("means")
    assert caught.value.args == (f"client 7 brought no 'means' (only []); {pair}",)
