"""The server's Adam against algorithm 2 of Reddi et al., and its rate beside that of FedYogi."""

import numpy as np
import pytest
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import strategy as flower

from fedsim.messages.records import NUM_EXAMPLES
from fedsim.settings.build import instantiate
from fedsim.settings.compose import compose

SETTINGS = {"eta": 0.01, "eta_l": 0.1, "beta_1": 0.9, "beta_2": 0.99, "tau": 0.001}


def after(strategy: flower.FedAvg, deltas: list[float]) -> list[float]:
    """The weight after each round in which the clients' mean has moved it by so much."""
    x, seen = 1.0, []
    for number, delta in enumerate(deltas, start=1):
        strategy.current_arrays = {"w": np.array([x])}
        reply = RecordDict(
            {
                "arrays": ArrayRecord({"w": _array(x + delta)}),
                "metrics": MetricRecord({NUM_EXAMPLES: 1}),
            }
        )
        arrays, _ = strategy.aggregate_train(number, [Message(reply, dst_node_id=1, message_type="train")])
        assert arrays is not None
        x = float(arrays["w"].numpy()[0])
        seen.append(x)
    return seen


def _array(value: float):
    from flwr.app import Array

    return Array(np.array([value]))


def test_three_rounds_are_algorithm_2_by_hand():
    """M = .9 m + .1 d, v = .99 v + .01 d^2, x + .01 m / (sqrt(v) + .001), for d = .5, -.2, .3."""
    x, m, v, expected = 1.0, 0.0, 0.0, []
    for delta in (0.5, -0.2, 0.3):
        m, v = 0.9 * m + 0.1 * delta, 0.99 * v + 0.01 * delta**2
        x += 0.01 * m / (v**0.5 + 0.001)
        expected.append(x)
    strategy = instantiate(compose(["method=fedadam"]), "strategy")
    assert after(strategy, [0.5, -0.2, 0.3]) == pytest.approx(expected, rel=1e-12)
    assert strategy.eta == 0.01


def test_with_equal_moments_adam_and_yogi_step_alike_and_flowers_does_not():
    """In round 1 v is .01 d^2 for both; Flower's factor is sqrt(1 - .99^2) / (1 - .9^2) = 0.742."""
    steps = {}
    for method in ("fedadam", "fedyogi"):
        (end,) = after(instantiate(compose([f"method={method}"]), "strategy"), [0.5])
        steps[method] = end - 1
    assert steps["fedadam"] == pytest.approx(steps["fedyogi"], rel=1e-9)
    (end,) = after(flower.FedAdam(**SETTINGS), [0.5])
    assert end - 1 == pytest.approx((1 - 0.99**2) ** 0.5 / (1 - 0.9**2) * steps["fedadam"], rel=1e-9)
