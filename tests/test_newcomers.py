"""Clients that are the owners of the test part: people who join when the learning is over."""

import numpy as np
import pytest
import torch
from conftest import array_workload

from fedsim.errors import DataError
from fedsim.models.mlp import MLP
from fedsim.workloads.arrays import Arrays
from fedsim.workloads.partition import Natural

OWNERS = np.array(["ann"] * 7 + ["bob"] * 4 + ["cy"] * 3 + [""] * 6)


def make(newcomers: int, seed: int = 1, owners: np.ndarray | None = OWNERS):
    x = np.arange(20, dtype=np.float32)[:, None]
    test = Arrays(x, np.arange(20) % 2, owners)
    train = Arrays(x[:4] + 100, np.zeros(4, np.int64), None if owners is None else np.array(["di"] * 4))
    return array_workload(
        "w", train, test, ["a", "b"], "tabular", MLP, Natural(1), None, seed=seed, newcomers=newcomers
    )


def seen(examples) -> list[float]:
    return examples.gather(torch.arange(len(examples)))["x"][:, 0].tolist()


def test_each_trains_on_so_many_and_holds_out_the_rest():
    workload = make(2)
    assert workload.num_clients == 2  # cy has less than four, and nobody owns the last six
    for client, rows in ((0, range(7)), (1, range(7, 11))):
        data = workload.client_data(client)
        train, test = seen(data.train), seen(data.test)
        assert len(train) == 2
        assert sorted([*train, *test]) == [float(row) for row in rows]
    held = sorted(value for client in (0, 1) for value in seen(workload.client_data(client).test))
    assert seen(workload.test) == held  # which the global model is judged on, too


def test_who_trains_on_what_is_drawn_by_the_seed():
    draws = {tuple(seen(make(2, seed).client_data(0).train)) for seed in range(8)}
    assert len(draws) > 3
    assert seen(make(2).client_data(0).train) == seen(make(2).client_data(0).train)


@pytest.mark.parametrize(
    "newcomers, owners, words",
    [
        (4, OWNERS, "nobody in the test part of w has 8 examples; the most are 7"),
        (1, None, "workload.newcomers=1 needs owners in the test part of w, which has none"),
    ],
)
def test_where_nobody_joins_it_is_said(newcomers, owners, words):
    with pytest.raises(DataError, match=words):
        make(newcomers, owners=owners)
