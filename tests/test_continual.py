"""Figures of continual learning against numbers worked out by hand, and the pictures that show them."""

import numpy as np
import pytest

from fedsim.report.rounds import RoundReport
from fedsim.workloads.streams import figures as continual
from fedsim.workloads.streams.figures import key_of
from fedsim.workloads.streams.picture import heat_map, task_curves

NAN = float("nan")
TWO = np.array([[90, NAN], [60, 80]])
# After task 0: 80; after 1: 70, 90; after 2: 75, 60, 85; the next task was judged before it was learned.
THREE = np.array([[80.0, 30.0, NAN], [70.0, 90.0, 40.0], [75.0, 60.0, 85.0]])
UNTRAINED = np.array([10.0, 20.0, 15.0])


def test_two_tasks_by_hand():
    """A = (60 + 80) / 2; F = 90 - 60; BWT = 60 - 90; LA = (90 + 80) / 2."""
    assert continual.average_accuracy(TWO) == 70
    assert continual.forgetting(TWO) == 30
    assert continual.backward_transfer(TWO) == -30
    assert continual.learning_accuracy(TWO) == 85


def test_three_tasks_by_hand():
    """F = ((80 - 75) + (90 - 60)) / 2; BWT = -F here; FWT = ((30 - 20) + (40 - 15)) / 2; LA = (80 + 90 + 85) / 3."""
    figures = continual.summary(UNTRAINED, THREE)
    assert figures["forgetting"] == 17.5
    assert figures["backward_transfer"] == -17.5
    assert figures["forward_transfer"] == 17.5
    assert figures["learning_accuracy"] == 85
    assert figures["average_accuracy"] == pytest.approx(220 / 3)


def test_forgetting_takes_the_best_earlier_accuracy_and_may_be_negative():
    rising = np.array([[50.0, NAN, NAN], [70.0, 60.0, NAN], [60.0, 65.0, 80.0]])
    assert continual.forgetting(rising) == ((70 - 60) + (60 - 65)) / 2
    assert continual.backward_transfer(rising) == ((60 - 50) + (65 - 60)) / 2


def test_one_task_forgets_nothing_and_transfers_nothing():
    figures = continual.summary(np.array([10.0]), np.array([[90.0]]))
    assert (figures["average_accuracy"], figures["forgetting"], figures["forward_transfer"]) == (90, None, None)


def test_clients_with_their_own_orders_see_their_own_figures():
    """Client 1 met the tasks the other way round: its matrix is [[40, 90], [80, 60]] and F = 40 - 80."""
    full = np.array([[90.0, 40.0], [60.0, 80.0]])
    means = continual.mean_over_orders(np.array([10.0, 10.0]), full, [[0, 1], [1, 0]])
    assert means["forgetting"] == ((90 - 60) + (40 - 80)) / 2
    assert means["average_accuracy"] == 70
    assert means["learning_accuracy"] == ((90 + 80) / 2 + (40 + 60) / 2) / 2


def reports_of(matrix: np.ndarray, rounds_per_task: int) -> list[RoundReport]:
    rows = [(0, UNTRAINED), *(((t + 1) * rounds_per_task, row) for t, row in enumerate(matrix))]
    said = [(number, {key_of(s): v for s, v in enumerate(row) if np.isfinite(v)}) for number, row in rows]
    between = [RoundReport(n, 0.0, 0.0) for n in range(1, len(matrix) * rounds_per_task) if n % rounds_per_task]
    return sorted([*(RoundReport(n, 0.0, 0.0, metrics=m) for n, m in said), *between], key=lambda r: r.round)


def test_the_matrix_is_read_from_the_last_round_of_every_phase():
    first, matrix = continual.accuracy_matrix(reports_of(THREE, 2), tasks=3, rounds_per_task=2)
    assert np.array_equal(first, UNTRAINED)
    assert np.array_equal(matrix, THREE, equal_nan=True)


def test_a_run_that_stopped_early_has_the_figures_of_its_finished_tasks():
    first, matrix = continual.accuracy_matrix(reports_of(THREE, 2)[:6], tasks=3, rounds_per_task=2)  # up to round 5
    assert matrix.shape == (2, 3)
    assert continual.summary(first, matrix)["forgetting"] == 80 - 70


def test_pictures_show_every_task():
    figure = heat_map(THREE / 100, "three")
    assert sorted(t.get_text() for t in figure.axes[0].texts) == sorted(
        ["80", "30", "70", "90", "40", "75", "60", "85"]
    )
    curves = task_curves(reports_of(THREE / 100, 2), 3, 2)
    assert {line.get_label() for line in curves.axes[0].lines} >= {"task 0", "task 1", "task 2"}
