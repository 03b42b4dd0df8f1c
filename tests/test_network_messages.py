"""The edge grid as Flower sees it: nodes, messages, and replies, one by one or as their mean."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from flwr.app import Message, RecordDict
from told_clients import WEIGHTS, computing, edge, exchange, update

from fedsim.errors import ConfigError, RunError
from fedsim.messages.cohort import ClientAnswer, ClientTask
from fedsim.messages.records import from_array
from fedsim.messages.weights import named


def test_nodes_are_the_clients_in_order():
    grid = edge(5)
    assert list(grid.get_node_ids()) == [0, 1, 2, 3, 4]
    assert (grid.client(3).client_id, grid.client(3).profile.name) == (3, "reference")


def test_two_messages_to_one_client_are_refused():
    with pytest.raises(ValueError, match=r"^a strategy sent one client two messages in one exchange; send one"):
        exchange(edge(), [0, 1, 0])


@pytest.mark.parametrize("client", [-1, 4])
def test_message_to_no_client_is_refused(client: int):
    with pytest.raises(ValueError, match=re.escape(f"no client {client}: the fleet has clients 0..3")):
        exchange(edge(), [0, client])


def test_pushed_messages_are_pulled_once():
    grid = edge()
    tickets = grid.push_messages([Message(RecordDict({"arrays": WEIGHTS}), client, "train") for client in (1, 0)])
    assert [m.metadata.src_node_id for m in grid.pull_messages(tickets)] == [0, 1]
    assert list(grid.pull_messages(tickets)) == []


def test_replies_come_in_client_order_whatever_order_they_were_asked_in():
    accepted, reports = exchange(edge(), [2, 0, 3])
    assert (accepted, list(reports)) == ([0, 2, 3], [0, 2, 3])


def test_client_without_held_out_examples_judges_nothing():
    """Client 0 has no examples to judge on: it took part and paid, but its reply is left out."""

    def answer(task: ClientTask) -> ClientAnswer:
        return ClientAnswer(task.client, work=computing(task.client), num_examples=task.client)

    accepted, reports = exchange(edge(answer=answer), phase="evaluate")
    assert accepted == [1, 2, 3]
    assert (reports[0].outcome, reports[0].joules) == ("completed", pytest.approx(0.24 + 3.0 + 0.04))


def test_question_of_a_method_reaches_the_client_under_its_name():

    def answer(task: ClientTask) -> ClientAnswer:
        work = replace(computing(task.client), up_bytes=1_000_000)
        return ClientAnswer(task.client, work=work, extras={"mean": task.broadcast.weights})

    grid = edge(answer=answer)
    accepted, reports = exchange(grid, [0, 1], phase="query.mean")
    assert (accepted, grid.engine.phases) == ([0, 1], ["query.mean"])
    assert (reports[1].phase, reports[1].work.up_bytes) == ("query.mean", 1_000_000)


# --- the mean of a round ---------------------------------------------------------------------------------------------


def test_mean_of_a_round_comes_as_one_reply():
    """Examples 1 + 2 + 3 + 4 = 10; loss (1 * 0 + 2 * 1 + 3 * 2 + 4 * 3) / 10 = 2; weights (0 + 2 + 6 + 12) / 10 = 2."""

    def answer(task: ClientTask) -> ClientAnswer:
        return replace(update(task), weights=named({"w": torch.full([250_000], float(task.client))}))

    replies = edge(answer=answer, averages=True).send_and_receive(
        [Message(RecordDict({"arrays": WEIGHTS}), client, "train") for client in range(4)]
    )
    assert len(replies) == 1
    assert set(from_array(replies[0].content["arrays"]["w"]).tolist()) == {2.0}
    assert dict(replies[0].content["metrics"]) == {"num-examples": 10, "train_loss": 2.0}


def test_stock_mean_refuses_extras_that_it_would_drop():
    def answer(task: ClientTask) -> ClientAnswer:
        return replace(update(task), extras={"prototypes": {"m": torch.zeros(2)}})

    with pytest.raises(ConfigError, match=r"^the clients sent \['prototypes'\] beside their weights"):
        exchange(edge(answer=answer, averages=True))


def test_stock_mean_refuses_metrics_that_only_some_clients_sent():
    def answer(task: ClientTask) -> ClientAnswer:
        told = update(task)
        return replace(told, metrics={**told.metrics, "gap": 1.0}) if task.client == 1 else told

    with pytest.raises(
        RunError, match=r"^client 1 reported metrics \['gap', 'train_loss'\], client 0 \['train_loss'\]"
    ):
        exchange(edge(answer=answer, averages=True))
