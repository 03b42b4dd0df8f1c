"""A run that goes on under other prices says so."""

import pytest

from fedsim.runs.price_models import FROM_THE_START, PRICE_MODEL, price_models, repriced

# Of one round by all six clients of a fleet: change them together with PRICE_MODEL, which resumed runs are told by.
PRICED_BY_2 = {"phones": (0.3398369776, 75.0182777884), "mixed": (0.3398369776, 62.6164855541)}  # seconds, joules


@pytest.mark.parametrize("fleet", PRICED_BY_2)
def test_equal_work_costs_what_this_price_model_says(fleet: str, federation):
    run = federation(f"fleet={fleet}", "latency=structured", "cohort=6", "rounds=1")
    _, (report, _) = run.rounds()
    assert PRICE_MODEL == 2
    assert (report.now_s, report.joules) == pytest.approx(PRICED_BY_2[fleet], rel=1e-6)


def test_a_run_under_one_price_model_has_no_warning():
    assert price_models(FROM_THE_START, 9) == ([{"from_round": 0, "model": PRICE_MODEL}], "")
    assert repriced(FROM_THE_START, 5) == FROM_THE_START


def test_rounds_by_another_price_model_are_named():
    history = repriced(((0, None), (4, 1)), 7)
    models, warning = price_models(history, 9)
    assert [m["from_round"] for m in models] == [0, 4, 7]
    assert "rounds 0 to 3 by fedsim 0.1, rounds 4 to 6 by price model 1, rounds 7 to 9 by price model 2" in warning


def test_a_run_that_had_its_last_round_has_one_price_model():
    assert price_models(repriced(((0, None),), 10), 9) == ([{"from_round": 0, "model": None}], "")
